"""A file somewhere else with content of a disk of ours: opened when it is first needed, and again after it was away.

It may lie on a mount of another program, which can be slow, fail or go. Whoever reads waits; a failure is OSError and
the next read tries again. Nothing here ever writes to it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

from asrfs.storage.content import content_of
from asrfs.storage.directory import OpenFile, open_path

READ_AHEAD_BYTES = 2 << 20
"""What is read in order is asked for so far ahead."""
_NEAR_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(slots=True)
class _Opened:
    file: OpenFile
    users: int = 0
    is_given_up: bool = False


class BaseFile:
    """The file at `path`, which must have `size_bytes`. Methods may be called from any thread."""

    def __init__(
        self,
        path: str,
        size_bytes: int,
        open_file: Callable[[str], OpenFile] = open_path,
        ask_content: Callable[[OpenFile, int], Iterator[tuple[int, int]]] = content_of,
    ) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._open_file = open_file
        self._ask_content = ask_content
        self._turn = threading.Lock()
        self._opened: _Opened | None = None
        self._read_to = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole of `buffer`. Raises OSError."""
        self._once_more(lambda file: self._read(file, buffer, offset))

    def content(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """`(offset, end)` of what may hold anything but zeros between two bytes, in order. Raises OSError."""
        last = self.size_bytes if end is None else end

        def ask(file: OpenFile) -> list[tuple[int, int]]:
            extents = takewhile(lambda extent: extent[0] < last, self._ask_content(file, start))
            return [(offset, min(offset + length, last)) for offset, length in extents]

        return self._once_more(ask)

    def close(self) -> None:
        """Close it as soon as nobody reads; a later read opens it again."""
        with self._turn:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.is_given_up = True
                if not opened.users:
                    opened.file.close()

    def _read(self, file: OpenFile, buffer: memoryview, offset: int) -> None:
        have = file.read_into(buffer, offset)
        if have != len(buffer):
            raise OSError(errno.EIO, f"ends at {offset + have}")
        end = offset + have
        if 0 <= offset - self._read_to < _NEAR_BYTES:
            file.will_need(end, min(READ_AHEAD_BYTES, self.size_bytes - end))
        self._read_to = end

    def _once_more(self, use: Callable[[OpenFile], T]) -> T:
        """A file that was opened before may be one that is gone, while there is another one under its path by now."""
        try:
            was_open = self._opened is not None
            with self._using() as file:
                return use(file)
        except OSError as error:
            if not was_open:
                raise self._failure(error) from None
        try:
            with self._using() as file:
                return use(file)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> OSError:
        return OSError(errno.EIO, f"{self.path} cannot be read: {error.strerror or error}")

    @contextmanager
    def _using(self) -> Iterator[OpenFile]:
        opened = self._take()
        try:
            yield opened.file
        except OSError:
            opened.is_given_up = True
            raise
        finally:
            self._give_back(opened)

    def _take(self) -> _Opened:
        with self._turn:
            if self._opened is not None:
                self._opened.users += 1
                return self._opened
        fresh = _Opened(self._open(), users=1)  # which may take for ever, so nobody waits for a lock meanwhile
        with self._turn:
            if self._opened is None:
                self._opened = fresh
                return fresh
            self._opened.users += 1
            opened = self._opened
        fresh.file.close()
        return opened

    def _give_back(self, opened: _Opened) -> None:
        with self._turn:
            opened.users -= 1
            if opened.is_given_up:
                if self._opened is opened:
                    self._opened = None
                if not opened.users:
                    opened.file.close()

    def _open(self) -> OpenFile:
        file = self._open_file(self.path)
        try:
            size_bytes = file.size()
            if size_bytes != self.size_bytes:
                raise OSError(errno.EIO, f"it has {size_bytes} bytes instead of {self.size_bytes}")
        except OSError:
            file.close()
            raise
        return file
