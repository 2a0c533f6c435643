"""PURE: what a person may write to choose a state of a machine, and which LSN that is.

    latest              everything the store has received
    latest-processed    the newest listed point
    latest-application  the newest listed application-consistent point
    ID or NAME          a listed point; of several with one name the newest; `tail-of-epoch-N` if there is such a tail
    lsn:N               the state just after record N, where the store has one: see `check_exists`
    time:T              the last state at or before T (RFC 3339, up to nanoseconds)

Deciding needs no disk: the caller hands in the listed points, the received LSN and the times of log objects. `time:`
takes two steps, because only an object's index knows the times of its records: `object_at_time` chooses the object,
`lsn_at_time` the record in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.names import SELECTOR_WORDS, check_name
from asrfs.model.quantities import format_time, parse_time

LATEST, LATEST_PROCESSED, LATEST_APPLICATION = SELECTOR_WORDS

_FORMS = "latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T"


@dataclass(frozen=True, slots=True)
class Newest:
    """`latest`, `latest-processed` or `latest-application`."""

    word: str


@dataclass(frozen=True, slots=True)
class AtLsn:
    lsn: int


@dataclass(frozen=True, slots=True)
class AtTime:
    time_ns: int


@dataclass(frozen=True, slots=True)
class AtPoint:
    """A point by its id or name."""

    label: str


Selector = Newest | AtLsn | AtTime | AtPoint


class ListedPoint(Protocol):
    """What choosing needs to know of a listed point."""

    @property
    def id(self) -> str: ...
    @property
    def lsn(self) -> int: ...
    @property
    def consistency(self) -> str: ...
    @property
    def name(self) -> str | None: ...


class TimedObject(Protocol):
    """What choosing needs to know of a log object."""

    @property
    def first_lsn(self) -> int: ...
    @property
    def last_lsn(self) -> int: ...
    @property
    def first_time_ns(self) -> int: ...
    @property
    def last_time_ns(self) -> int: ...
    @property
    def is_stretch(self) -> bool: ...


P = TypeVar("P", bound=ListedPoint)
O = TypeVar("O", bound=TimedObject)  # noqa: E741 - an object


def parse_selector(text: str) -> Selector:
    """Raises BadInputError for what is not a selector."""
    form, colon, value = text.partition(":")
    if colon and form == "lsn":
        if not re.fullmatch(r"[0-9]{1,20}", value):
            raise BadInputError(f"{text!r} is not a selector: after lsn: comes the number of a record")
        return AtLsn(int(value))
    if colon and form == "time":
        return AtTime(parse_time(value))
    if text in (LATEST, LATEST_PROCESSED, LATEST_APPLICATION):
        return Newest(text)
    try:
        return AtPoint(check_name(text, "point"))
    except BadInputError:
        raise BadInputError(f"{text[:80]!r} is not a selector: use {_FORMS}") from None


def choose_point(label: str, points: Iterable[P]) -> P | None:
    """The listed point with this id, else the newest with this name."""
    named: P | None = None
    for point in points:
        if point.id == label:
            return point
        if point.name == label and (named is None or point.lsn > named.lsn):
            named = point
    return named


def choose_lsn(selector: Newest | AtLsn | AtPoint, points: Sequence[ListedPoint], received_lsn: int) -> int:
    """The LSN chosen. Raises NotFoundError where nothing fits."""
    if isinstance(selector, AtLsn):
        if not 1 <= selector.lsn <= received_lsn:
            raise NotFoundError(f"there is no record {selector.lsn} at the store: it has {_received(received_lsn)}")
        return selector.lsn
    if isinstance(selector, AtPoint):
        label = selector.label
        point = choose_point(label, points)
        if point is None:
            raise NotFoundError(f"no recovery point has the id or name {label!r}: see `replica-store point list`")
        return point.lsn
    if selector.word == LATEST:
        if received_lsn < 1:
            raise NotFoundError("nothing has been received yet, so there is no latest state")
        return received_lsn
    wanted = [p.lsn for p in points if selector.word == LATEST_PROCESSED or p.consistency == "application"]
    if not wanted:
        kind = "application-consistent " if selector.word == LATEST_APPLICATION else ""
        raise NotFoundError(f"no {kind}recovery point is listed yet: choose latest, lsn:N or time:T")
    return max(wanted)


def object_at_time(time_ns: int, objects: Sequence[O]) -> O:
    """The last of the objects, which are in LSN order, with a state at or before the time. Raises NotFoundError.

    Times never go back within an epoch, but a new epoch comes from another host's clock: the later LSN counts.
    """
    for candidate in reversed(objects):
        if _first_state_ns(candidate) <= time_ns:
            return candidate
    if not objects:
        raise NotFoundError(f"nothing has been received yet, so there is no state at {format_time(time_ns)}")
    begin = format_time(_first_state_ns(objects[0]))
    raise NotFoundError(f"the history begins at {begin}, after {format_time(time_ns)}: choose a later time")


def check_exists(lsn: int, found: TimedObject) -> None:
    """Raise NotFoundError when the object, which stands for `lsn`, is a stretch that has no state there."""
    if found.is_stretch and lsn != found.last_lsn:
        before = f"LSN {found.first_lsn - 1} and " if found.first_lsn > 1 else ""
        raise NotFoundError(
            f"the store has no state at LSN {lsn}: records {found.first_lsn} to {found.last_lsn} came as one stretch: "
            f"choose {before}LSN {found.last_lsn}"
        )


def _first_state_ns(found: TimedObject) -> int:
    return found.last_time_ns if found.is_stretch else found.first_time_ns


def lsn_at_time(time_ns: int, first_lsn: int, record_times_ns: npt.NDArray[np.uint64]) -> int:
    """LSN of the last record at or before the time, of an object that begins with `first_lsn` at or before it and has a
    record of each LSN."""
    # As uint64: a Python int would make numpy compare as float64, which has no nanoseconds left.
    count = int(np.searchsorted(record_times_ns, np.uint64(min(time_ns, (1 << 64) - 1)), side="right"))
    assert count > 0
    return first_lsn + count - 1


def _received(received_lsn: int) -> str:
    return f"records 1 to {received_lsn}" if received_lsn else "received nothing yet"
