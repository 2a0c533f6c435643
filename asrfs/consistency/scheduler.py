"""A machine's own points on schedule, for as long as the agent lives, and the alarm when points do not appear."""

from __future__ import annotations

from collections.abc import Callable

import trio

from asrfs.consistency.point_ages import PointAges
from asrfs.consistency.points import PointLog
from asrfs.consistency.scheduled_points import MakePoint, ScheduledPoints
from asrfs.model.clock import Clock
from asrfs.model.point_alarms import WATCHED, alarm_id
from asrfs.model.policy import Policy
from asrfs.replication.alarms import Alarms

LOOK_EVERY_S = 1.0
"""Between looks at whether points appear."""


class Scheduler:
    """`policy` gives the one in force."""

    def __init__(
        self,
        machine_id: str,
        policy: Callable[[], Policy],
        make: MakePoint,
        points: PointLog,
        alarms: Alarms,
        clock: Clock,
    ) -> None:
        self._policy = policy
        self._points = points
        self._alarms = alarms
        self._clock = clock
        self._scheduled = ScheduledPoints(machine_id, lambda: policy().intervals_s(), make, alarms)

    def policy_changed(self) -> None:
        """Look at it now."""
        self._scheduled.intervals_changed()

    async def run(self) -> None:
        """For ever."""
        ages = PointAges(self._points.newest(), trio.current_time(), self._clock.time_ns())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, ages)
            await self._scheduled.run(ages.ages_s(trio.current_time()))

    async def _watch(self, ages: PointAges) -> None:
        while True:
            now = trio.current_time()
            policy = self._policy()
            ages.look(self._points.newest(), now)
            for kind in WATCHED:
                self._alarms.hold(alarm_id(kind), ages.alarms(kind, policy, now))
            await trio.sleep(LOOK_EVERY_S)
