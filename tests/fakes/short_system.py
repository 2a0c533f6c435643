"""The system below `DirectoryStorage`, whose calls come short or are interrupted, as any system's may.

`ShortSystem` stands for the module `os`: a read or write at a place does only a part of what is asked; of what is
written that part is really there. With an `error` it goes on as a full disk does: the next write finds no room.
`InterruptedLibrary` stands for the C library: fallocate is interrupted. Of the other calls the interpreter itself makes
those again that were interrupted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import set_errno
from dataclasses import dataclass
from typing import Any
from unittest import mock

from asrfs.storage import directory
from asrfs.storage.interface import Bytes
from tests.fakes.crash_state import SECTOR_BYTES


@dataclass
class Shortage:
    """The `at`-th call (from 0) that could come short, or it and all later ones. `share`: of it that is done.

    `error`: what the caller of the storage is told in the end, if anything."""

    at: int = 0
    for_ever: bool = True
    share: float = 1 / 3
    error: int = 0
    seen: int = 0
    fired: int = 0

    def strikes(self) -> bool:
        number, self.seen = self.seen, self.seen + 1
        strikes = number == self.at or (self.for_ever and number > self.at)
        self.fired += strikes
        return strikes


class ShortSystem:
    """See the module. `cut`: calls that did less than was asked. Without `syncs` they are answered at once: where no
    power is lost they change nothing."""

    def __init__(self, shortage: Shortage | None = None, *, syncs: bool = True) -> None:
        self.shortage = shortage or Shortage()
        self.cut = 0
        self._is_full = False
        if not syncs:
            self.fsync = self.fdatasync = lambda fd: None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _done(self, length: int) -> int:
        """How much of so many bytes is done now."""
        if length < 2 or not self.shortage.strikes():
            return length
        self.cut += 1
        return max(1, int(length * self.shortage.share))

    def _written(self, length: int, offset: int) -> int:
        """As `_done`. Where it ends for want of room it is after whole sectors, if any."""
        error = self.shortage.error
        if not error:
            return self._done(length)
        if not self._is_full:
            done = self._done(length)
            if done == length:
                return length
            self._is_full = True
            done -= (offset + done) % SECTOR_BYTES
            if done > 0:
                return done
        self._is_full = self.shortage.for_ever
        raise OSError(error, os.strerror(error))

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(buffers), offset)

    def pwrite(self, fd: int, content: Bytes, offset: int) -> int:
        return os.pwrite(fd, memoryview(content)[: self._written(len(content), offset)], offset)

    def _read(self, length: int) -> int:
        return length if self.shortage.error else self._done(length)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, self._read(length), offset)

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        (buffer,) = buffers
        return os.preadv(fd, [memoryview(buffer)[: self._read(len(buffer))]], offset)


class InterruptedLibrary:
    """See the module. However long it lasts, each call is interrupted once."""

    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage
        self._fallocate: Callable[..., int] = directory._libc.fallocate
        self._has_interrupted = False

    def fallocate(self, *arguments: int) -> int:
        if self._has_interrupted:
            self._has_interrupted = False
        elif self.shortage.strikes():
            self._has_interrupted = True
            set_errno(errno.EINTR)
            return -1
        return self._fallocate(*arguments)


@contextmanager
def below_storage(system: ShortSystem, library: InterruptedLibrary) -> Iterator[None]:
    """Every `DirectoryStorage` works on these."""
    with mock.patch.object(directory, "os", system), mock.patch.object(directory, "_libc", library):
        yield
