"""Times of the day in policies: windows such as `18:30-06:00`, and limits that depend on them.

Minutes are of the host's local day, 0 to 1439. A window whose end is before its start goes past midnight.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from asrfs.errors import BadInputError
from asrfs.model.quantities import parse_size

DAY_MINUTES = 24 * 60
BANDWIDTH_MIN = 1024
PARTS_MAX = 24
_TIME = r"([01]?\d|2[0-3]):([0-5]\d)|24:00"
_WINDOW = re.compile(rf"\s*(?P<start>{_TIME})\s*-\s*(?P<end>{_TIME})\s*")


class Window(NamedTuple):
    """From minute `start` up to minute `end`; all day if they are equal."""

    start: int
    end: int

    def contains(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


ALWAYS = Window(0, 0)


class BandwidthCalendar(NamedTuple):
    """Bytes per second in each window, the first that contains the minute; `otherwise` outside all. 0: no limit."""

    windows: tuple[tuple[Window, int], ...] = ()
    otherwise: int = 0

    def limit_at(self, minute: int) -> int:
        return next((limit for window, limit in self.windows if window.contains(minute)), self.otherwise)


def parse_window(text: str) -> Window:
    """`18:30-06:00` or `always`. Raises BadInputError."""
    if text.strip().lower() == "always":
        return ALWAYS
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise BadInputError("a window is two times of the day such as 18:30-06:00, or always")
    start, end = _minute(match["start"]), _minute(match["end"])
    if start % DAY_MINUTES == end % DAY_MINUTES and (start, end) != (0, DAY_MINUTES):
        raise BadInputError("a window that ends when it begins is none: write always, or two different times")
    return Window(start % DAY_MINUTES, end % DAY_MINUTES)


def parse_bandwidth(text: str) -> BandwidthCalendar:
    """`20M`, `none`, or parts such as `08:00-18:00 20M; else 200M`, the last of them `else`. Raises BadInputError."""
    parts = [part.strip() for part in text.split(";")]
    if len(parts) > PARTS_MAX:
        raise BadInputError(f"a limit has at most {PARTS_MAX} parts")
    if len(parts) == 1 and not _WINDOW.match(parts[0]) and not parts[0].lower().startswith("else"):
        return BandwidthCalendar((), _limit(parts[0]))
    windows: list[tuple[Window, int]] = []
    otherwise: int | None = None
    for part in parts:
        if otherwise is not None:
            raise BadInputError("else is the last part of a limit")
        word, _, rest = part.partition(" ")
        if word.lower() == "else":
            otherwise = _limit(rest)
            continue
        match = _WINDOW.match(part)
        if match is None:
            raise BadInputError("a part of a limit is a window and a limit such as 08:00-18:00 20M, the last else 200M")
        windows.append((parse_window(match[0]), _limit(part[match.end() :])))
    return BandwidthCalendar(tuple(windows), otherwise or 0)


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _limit(text: str) -> int:
    text = text.strip()
    limit = 0 if text.lower() in ("none", "off") else parse_size(text.removesuffix("/s"))
    if 0 < limit < BANDWIDTH_MIN:
        raise BadInputError("the limit is bytes per second, at least 1K, or none")
    return limit
