"""What a disk is: a row of bytes of fixed size that can be read, written, zeroed, discarded and flushed.

Calls block. Offsets and lengths are bytes and lie inside the disk; whoever takes requests from outside checks that
first (`check_extent`).
"""

from __future__ import annotations

from typing import Protocol

from asrfs.errors import BadInputError

Bytes = bytes | bytearray | memoryview


class HeldError(Exception):
    """Changes of this disk are being held, and nothing was done: whoever asked for one keeps it until the release."""


class ReadableDisk(Protocol):
    """A disk that can be read: also a recovery point's."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> Bytes:
        """Exactly `length` bytes."""


def check_extent(offset: int, length: int, size_bytes: int) -> None:
    """Raise BadInputError unless `[offset, offset + length)` lies inside a disk of `size_bytes`."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise BadInputError(f"extent {offset}+{length} lies outside a disk of {size_bytes} bytes")
