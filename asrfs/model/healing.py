"""When a replica that lacks something is brought up to date, and how hard. Pure."""

from __future__ import annotations

from typing import NamedTuple

from asrfs.model.calendar import Window
from asrfs.model.dirty_map import Reason

SMALL_BYTES = 1 << 30
"""So little is sent at any time of the day."""
FAILURES_MAX = 3
"""After so many in a row people are told. It is tried all the same."""
_RETRY_MINUTES = (1, 2, 4, 8, 10)
_RETRY_MINUTES_LATER = 30
LAG_BYTES_MAX = 256 << 20
LAG_BYTES_MIN = 4 << 20
_SHARE_OF_RPO = 4
_SHARE_OF_QUOTA = 4


class Sick(NamedTuple):
    """What is to be decided on: why disks of a machine are dirty, all of it together, and how many bytes."""

    reasons: Reason
    dirty_bytes: int


def is_due(sick: Sick, window: Window, minute: int) -> bool:
    """Whether it is sent now, at this minute of the host's day. A first copy is, and what is small, and what was
    ordered; the rest waits for the window."""
    if sick.reasons & (Reason.INITIAL | Reason.UNREAD | Reason.NOW):
        return True
    return sick.dirty_bytes <= SMALL_BYTES or window.contains(minute)


def retry_delay_s(failures: int) -> float:
    """Seconds until a job that has failed so many times in a row is tried again."""
    assert failures > 0
    minutes = _RETRY_MINUTES[failures - 1] if failures <= len(_RETRY_MINUTES) else _RETRY_MINUTES_LATER
    return minutes * 60.0


def lag_bytes_max(acknowledged_bytes_per_s: float, rpo_s: float, quota_bytes: int) -> int:
    """Above this lag nothing is filled, so that new writes come first: what waits before them reaches the store in a
    share of the RPO they are to have, and filling alone never brings the journal over its quota."""
    of_link = int(acknowledged_bytes_per_s * rpo_s / _SHARE_OF_RPO)
    return min(LAG_BYTES_MAX, quota_bytes // _SHARE_OF_QUOTA, max(LAG_BYTES_MIN, of_link))
