"""Which of many points somebody wants to see: by time, kind, group, name and number. The same on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Protocol, TypeVar

import msgspec

from asrfs.errors import BadInputError
from asrfs.model.marker import Consistency
from asrfs.model.quantities import NS_PER_SECOND, parse_duration, parse_time

_TIME_NS_MAX = (1 << 63) - 1


class Listed(Protocol):
    """What a point is chosen by."""

    @property
    def lsn(self) -> int: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def consistency(self) -> Consistency: ...
    @property
    def group(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...


T = TypeVar("T", bound=Listed)


class PointFilter(msgspec.Struct, frozen=True, kw_only=True):
    """None: whatever it is. Times are those of the points' markers, both inclusive; `limit`: the newest so many."""

    since_ns: int | None = None
    until_ns: int | None = None
    consistency: Consistency | None = None
    group: str | None = None
    name: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=0)] | None = None

    def choose(self, points: Iterable[T]) -> list[T]:
        """In the order of the history, which no clock changes: by LSN."""
        chosen = sorted(filter(self.wants, points), key=lambda point: point.lsn)
        return chosen if self.limit is None else chosen[max(0, len(chosen) - self.limit) :]

    def wants(self, point: Listed) -> bool:
        return (
            (self.since_ns is None or point.time_ns >= self.since_ns)
            and (self.until_ns is None or point.time_ns <= self.until_ns)
            and (self.consistency is None or point.consistency == self.consistency)
            and (self.group is None or point.group == self.group)
            and (self.name is None or point.name == self.name)
        )


def parse_moment(text: str, now_ns: int) -> int:
    """A time, or how long ago that was, such as `4h`. Raises BadInputError.

    A time that no point can have, such as of the year 1, is the nearest that one can: the same points are meant.
    """
    return min(max(_moment(text, now_ns), 0), _TIME_NS_MAX)


def _moment(text: str, now_ns: int) -> int:
    try:
        return parse_time(text)
    except BadInputError:
        pass
    try:
        return now_ns - int(parse_duration(text) * NS_PER_SECOND)
    except BadInputError:
        raise BadInputError(
            f"{text[:60]!r} is neither a time such as 2026-11-21T10:03:07Z nor how long ago, such as 4h"
        ) from None
