"""What a disk is: a row of bytes of fixed size that can be read, written, zeroed, discarded and flushed.

Calls block. Offsets and lengths are bytes and lie inside the disk; whoever takes requests from outside checks that
first (`check_extent`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from asrfs.errors import BadInputError

Bytes = bytes | bytearray | memoryview
T = TypeVar("T")


class HeldError(Exception):
    """Changes of this disk are being held, and nothing was done: whoever asked for one keeps it until the release."""


class Fetching(Protocol):
    """Gets bytes from where they are far away, for the thread that calls."""

    def fetch(self, extents: Sequence[tuple[int, int]]) -> None:
        """Have the bytes of `(offset, end)` ready for this thread, or what is wrong with them. May take long."""

    def forget(self) -> None:
        """Give up what was fetched for this thread."""


class AbsentError(Exception):
    """Some bytes are not on this host yet, and nothing was done: who can wait has them fetched and asks again."""

    def __init__(self, source: Fetching, extents: Sequence[tuple[int, int]]) -> None:
        super().__init__(f"{len(extents)} extents are not here yet")
        self.source = source
        self.extents = extents


def waiting(ask: Callable[[], T]) -> T:
    """What `ask` returns, whatever has to be fetched for it. Blocks for as long as that takes."""
    sources: list[Fetching] = []
    try:
        while True:
            try:
                return ask()
            except AbsentError as absent:
                sources.append(absent.source)
                absent.source.fetch(absent.extents)
    finally:
        for source in sources:
            source.forget()


class ReadableDisk(Protocol):
    """A disk that can be read: also a recovery point's."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> Bytes:
        """Exactly `length` bytes."""


@runtime_checkable
class MappedDisk(ReadableDisk, Protocol):
    """One that knows where it has content."""

    def content(self, offset: int, extents_max: int) -> list[tuple[int, int]]:
        """The first extents, as `(offset, length)` in order, from `offset` on that may hold anything but zeros; none if
        all of the rest is zeros."""


def check_extent(offset: int, length: int, size_bytes: int) -> None:
    """Raise BadInputError unless `[offset, offset + length)` lies inside a disk of `size_bytes`."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise BadInputError(f"extent {offset}+{length} lies outside a disk of {size_bytes} bytes")
