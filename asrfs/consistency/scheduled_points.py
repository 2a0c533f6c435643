"""Makes the points that are due, one of a kind at a time, and raises an alarm for one that could not be had.

A point that fails is logged, raises an alarm and is tried again when the next is due; nothing that happens to one ends
the schedule. The intervals are asked for at each step, so a change holds at once (`intervals_changed`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog
import trio

from asrfs.consistency.schedule import Schedule, phase_of
from asrfs.errors import AsrfsError
from asrfs.model.marker import CONSISTENCIES, Consistency
from asrfs.replication.alarms import Alarms


class MadePoint(Protocol):
    """What came of one: less than was wanted, if `failed` says why."""

    @property
    def consistency(self) -> Consistency: ...

    @property
    def failed(self) -> str | None: ...


MakePoint = Callable[[Consistency], Awaitable[MadePoint]]
"""Makes one point; one that could be made only as another kind says why. Raises AsrfsError, OSError."""


class ScheduledPoints:
    """`group`: of which one the points are, empty for a machine's own. `owner_id` decides the place on the grid."""

    def __init__(
        self,
        owner_id: str,
        intervals_s: Callable[[], Mapping[Consistency, float]],
        make: MakePoint,
        alarms: Alarms,
        group: str = "",
    ) -> None:
        self._owner_id = owner_id
        self._intervals_s = intervals_s
        self._make = make
        self._alarms = alarms
        self._group = group
        self._changed = trio.Event()
        self._making: set[Consistency] = set()
        self._log = structlog.get_logger("asrfs.schedule")

    def intervals_changed(self) -> None:
        """Look at them now."""
        self._changed.set()

    async def run(self, ages_s: Mapping[Consistency, float]) -> None:
        """For ever. `ages_s`: how old the newest point of a kind is, where there is one. Leaves no alarm behind."""
        schedule = Schedule[Consistency](phase_of(self._owner_id), self._intervals_s(), trio.current_time(), ages_s)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    with trio.move_on_at(schedule.next_at()):
                        await self._changed.wait()
                    self._changed = trio.Event()
                    self._follow(schedule)
                    for kind in schedule.take_due(trio.current_time()):
                        if kind not in self._making:  # else the last one still takes its time: no queue grows behind it
                            self._making.add(kind)
                            nursery.start_soon(self._make_one, kind)
        finally:
            self._alarms.clear(*map(self._alarm, CONSISTENCIES))

    def _follow(self, schedule: Schedule[Consistency]) -> None:
        intervals_s = self._intervals_s()
        schedule.change(intervals_s, trio.current_time())
        self._alarms.clear(*(self._alarm(kind) for kind in CONSISTENCIES if kind not in intervals_s))

    async def _make_one(self, kind: Consistency) -> None:
        try:
            await self._try_one(kind)
        finally:
            self._making.discard(kind)

    async def _try_one(self, kind: Consistency) -> None:
        last = f"the last scheduled {kind}-consistent point" + (f" of group {self._group}" if self._group else "")
        try:
            point = await self._make(kind)
        except (AsrfsError, OSError) as error:
            self._log.warning("scheduled point not made", consistency=kind, group=self._group, reason=str(error))
            self._raise(kind, f"{last} was not made: {error}")
            return
        if point.failed is None:
            self._alarms.clear(self._alarm(kind))
        else:
            self._raise(kind, f"{last} is {point.consistency}-consistent: {point.failed}")

    def _raise(self, kind: Consistency, text: str) -> None:
        if kind in self._intervals_s():  # else it has been taken off the schedule meanwhile
            self._alarms.set(self._alarm(kind), "warning", text)

    def _alarm(self, kind: Consistency) -> str:
        return f"group-{self._group}-{kind}-point-failed" if self._group else f"{kind}-point-failed"
