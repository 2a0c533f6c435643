"""A place that takes input, and what every input there must keep: typed errors only, little memory, little time."""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from asrfs.errors import AsrfsError
from tests.proof.fuzzing.mutations import Strike

GROWTH_BYTES_MAX = 64 << 20
INPUT_S_MAX = 1.0
_HANGS_AFTER_S = 5.0
_ADDRESS_SPACE_BYTES = 512 << 20
"""Room above what is mapped when an input begins: who allocates what a length says meets MemoryError, touched or not.

Of each input, not of the run: threads come and go, and malloc keeps 64 MiB of addresses, not of memory, for each that
it ever had beside others. What memory a run keeps is measured by what is resident.
"""

Trial = Callable[[random.Random, Strike], None]
"""Feeds one input. Raises when something else than a typed error left, or when an oracle of the place disagrees."""

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """`open` builds in a directory of its own what the trials of this place need. No trial depends on another.

    `weight`: its share of the inputs; the dear ones have less.
    """

    name: str
    weight: int
    open: Callable[[Path], AbstractContextManager[Trial]]


def refused(call: Callable[[], T]) -> T | None:
    """What the call gives, or None when it refused its input as it should. Anything else that leaves is a violation."""
    try:
        return call()
    except AsrfsError:
        return None


class _HangsError(BaseException):
    """Not an Exception, so that nothing on the way takes it for a bad input."""


class Gauge:
    """Memory and time of inputs. One for a run, in the main thread."""

    def __init__(self) -> None:
        self._start = 0
        self._limits = resource.getrlimit(resource.RLIMIT_AS)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sets the limits, and takes them back."""
        previous = signal.signal(signal.SIGVTALRM, _on_alarm)
        self.begin()
        try:
            yield
        finally:
            signal.signal(signal.SIGVTALRM, previous)

    @contextmanager
    def input(self) -> Iterator[None]:
        """One input. Raises AssertionError when it took too much of either."""
        _begin_peak()
        before = _status("VmRSS:")
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize:") + _ADDRESS_SPACE_BYTES, self._limits[1]))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, _HANGS_AFTER_S)
        try:
            yield
        except _HangsError:
            raise AssertionError(f"an input was still being worked on after {_HANGS_AFTER_S:g} s") from None
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, self._limits)
        taken = time.process_time() - started
        assert taken <= INPUT_S_MAX, f"an input took {taken:.2f} s"
        growth = _status("VmHWM:") - before
        assert growth <= GROWTH_BYTES_MAX, f"memory grew by {growth >> 20} MiB with one input"
        if _status("VmRSS:") - self._start > GROWTH_BYTES_MAX and (kept := self._kept_bytes()) > GROWTH_BYTES_MAX:
            self.begin()
            raise AssertionError(f"memory grew by {kept >> 20} MiB")

    def begin(self) -> None:
        """What is in use now is what growth is measured from."""
        _give_back()
        self._start = _status("VmRSS:")

    def _kept_bytes(self) -> int:
        """What inputs left behind. Cycles that wait for the collector, and pages that malloc keeps between what it
        gave back in another order than it was taken, are no input's."""
        _give_back()
        return _status("VmRSS:") - self._start


def _begin_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise _HangsError


def _status(field: str) -> int:
    """Bytes that /proc/self/status says."""
    with open("/proc/self/status", "rb") as status:
        text = status.read()
    at = text.index(field.encode())
    return int(text[at + len(field) : text.index(b"kB", at)]) << 10
