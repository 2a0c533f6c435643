"""When scheduled points are due. PURE: it is handed monotonic time, in seconds, and never a wall clock.

Each kind has a grid of its own: `interval` apart, and at a place that the machine's id decides, so that machines that
start together do not all cut at once. What was missed, because the host slept or the last point took long, is not made
up for: the next one is the next on the grid. A new interval holds at once, counted from the last place on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from hashlib import sha256
from typing import Generic, TypeVar

SPREAD_S_MAX = 10.0
"""Over so long machines spread what all of them would do at once."""

Kind = TypeVar("Kind", bound=Hashable)


def phase_of(machine_id: str) -> float:
    """The machine's place among others, from 0 up to 1, the same at every start."""
    return int.from_bytes(sha256(machine_id.encode()).digest()[:8], "big") / 2**64


class Schedule(Generic[Kind]):
    """Kinds of points, each with an interval. `phase`: see `phase_of`.

    `ages_s`: how old the newest point of a kind was when this began, so that the schedule goes on where it was. The
    clock that says so may be wrong: it can bring the first point forward, to right now, never put it off for longer
    than an interval.
    """

    def __init__(
        self, phase: float, intervals_s: Mapping[Kind, float], now: float, ages_s: Mapping[Kind, float] | None = None
    ) -> None:
        assert 0 <= phase < 1
        self._phase = phase
        self._intervals: dict[Kind, float] = {}
        self._due: dict[Kind, float] = {}
        self.change(intervals_s, now)
        for kind, age_s in (ages_s or {}).items():
            if kind in self._due:
                soonest = now + self._spread(kind)
                self._due[kind] = max(soonest, now + self._intervals[kind] - max(0.0, age_s))

    def change(self, intervals_s: Mapping[Kind, float], now: float) -> None:
        """From now on these kinds, each in its interval; a kind whose interval stays goes on as it was."""
        assert all(interval_s > 0 for interval_s in intervals_s.values())
        before, self._intervals = self._intervals, dict(intervals_s)
        due, self._due = self._due, {}
        for kind, interval_s in intervals_s.items():
            if kind not in due:
                self._due[kind] = now + interval_s * (1 - self._phase / 2)
            elif before[kind] == interval_s:
                self._due[kind] = due[kind]
            else:
                last = due[kind] - before[kind]
                self._due[kind] = max(now + self._spread(kind), last + interval_s)

    def next_at(self) -> float:
        """When something is due next; never, if there is nothing."""
        return min(self._due.values(), default=math.inf)

    def take_due(self, now: float) -> list[Kind]:
        """What is due, once each however long that has been so; each is due again at the next place of its grid."""
        taken = [kind for kind, due in self._due.items() if due <= now]
        for kind in taken:
            interval_s, due = self._intervals[kind], self._due[kind]
            following = due + interval_s * (math.floor((now - due) / interval_s) + 1)
            self._due[kind] = following if following > now else following + interval_s  # a sum that was rounded
        return taken

    def _spread(self, kind: Kind) -> float:
        return self._phase * min(self._intervals[kind] / 2, SPREAD_S_MAX)
