"""Kinds of failures, and what a caller may be told of one."""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from asrfs.errors import AsrfsError
from tests.fakes.crash_storage import CHANGING, READING, Fate, Fault
from tests.fakes.failing_catalog import CatalogFault
from tests.fakes.replicated_world import is_refusal
from tests.fakes.short_system import Shortage
from tests.proof.level import Notes

ANY = CHANGING | READING
NEVER = 1 << 60


@dataclass(frozen=True)
class Failure:
    """A kind of failure. `error`: the system's number, or SQLite's."""

    name: str
    error: int

    def at(self, number: int, for_ever: bool, rng: random.Random) -> Fault:
        return Fault(number, self.error, for_ever=for_ever, kinds=ANY, partial=rng.random() * 0.99)


DISK = (Failure("EIO", errno.EIO), Failure("ENOSPC", errno.ENOSPC))
CATALOG = (Failure("SQLITE_IOERR", sqlite3.SQLITE_IOERR), Failure("SQLITE_FULL", sqlite3.SQLITE_FULL))
SHORT, INTERRUPTED = Failure("short call", 0), Failure("interrupted call", errno.EINTR)
NO_ROOM = Failure("short call, then ENOSPC", errno.ENOSPC)
SYSTEM = (SHORT, INTERRUPTED, NO_ROOM)
FOR_EVER = "for ever"
MODES = ("once", FOR_EVER)
FATES = list(Fate)
HOST_STEP = 2
PAIR_STEP = 10
SMALL_STEP = 4
INGEST_STEP = 4
"""Of so many operations in a row one fails, which one differs from round to round."""
SYSTEM_CALLS = 6
"""Of all calls of the system in a scenario so many fail."""
IN_START = "in the next start"
FAULTS = (*(f"{failure.name} {mode}" for failure in (*DISK, *CATALOG, *SYSTEM) for mode in MODES), IN_START)
AnyFault = Fault | CatalogFault | Shortage


@contextmanager
def failing(number: int, failure: Failure, mode: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{failure.name} {mode} at operation {number}: {type(error).__name__}: {error}") from error


def note(notes: Notes, failure: Failure, mode: str) -> None:
    notes.count()
    notes.fired(f"{failure.name} {mode}")


def check_refusal(fault: AnyFault, error: OSError | AsrfsError) -> None:
    """What the caller was told is what it may be told."""
    assert fault.error, f"not for the caller: {error}"
    assert is_refusal(error), f"{type(error).__name__} is not what a failing disk may raise"
    assert not isinstance(error, OSError) or error.errno in (fault.error, errno.EIO), f"another error: {error}"


@contextmanager
def refusing(fault: AnyFault) -> Iterator[None]:
    try:
        yield
    except (OSError, AsrfsError) as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"
