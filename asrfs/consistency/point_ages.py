"""How long ago a point of each kind last appeared, and the alarm when that is too long. PURE.

Measured on monotonic time: a point is new when its LSN is, whatever its own clock says. Only what was there before the
agent began is aged by the clock, and a clock that was set back makes it young, not old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from asrfs.model.marker import Consistency
from asrfs.model.point_alarms import WATCHED, alarm_id, missing_text
from asrfs.model.policy import Policy
from asrfs.model.quantities import NS_PER_SECOND
from asrfs.replication.alarms import Alarm


class Newest(NamedTuple):
    """The newest point that is at least of some kind."""

    lsn: int
    time_ns: int


def ages_s(newest: Mapping[str, Newest], now_ns: int) -> dict[Consistency, float]:
    """By the wall clock, of the kinds there ever was a point of; what the clock says is yet to come is new."""
    return {kind: max(0, now_ns - newest[kind].time_ns) / NS_PER_SECOND for kind in WATCHED if kind in newest}


class PointAges:
    """`newest`: by kind, of the points that are at least that."""

    def __init__(self, newest: Mapping[str, Newest], now: float, now_ns: int) -> None:
        self._began = now
        self._lsn = {kind: point.lsn for kind, point in newest.items()}
        self._seen = {kind: now - max(0, now_ns - point.time_ns) / NS_PER_SECOND for kind, point in newest.items()}

    def look(self, newest: Mapping[str, Newest], now: float) -> None:
        """What is newest now."""
        for kind, point in newest.items():
            if point.lsn > self._lsn.get(kind, 0):
                self._lsn[kind] = point.lsn
                self._seen[kind] = now

    def ages_s(self, now: float) -> dict[Consistency, float]:
        """Of the kinds there ever was a point of."""
        return {kind: now - self._seen[kind] for kind in WATCHED if kind in self._seen}

    def alarms(self, kind: Consistency, policy: Policy, now: float) -> list[Alarm]:
        """The alarm of this kind, if it is to be raised now; none for a kind that is not scheduled."""
        seen = self._seen.get(kind)
        text = missing_text(kind, policy, now - (self._began if seen is None else seen), never=seen is None)
        return [] if text is None else [Alarm(alarm_id(kind), "warning", text)]
