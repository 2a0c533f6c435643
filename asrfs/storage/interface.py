"""What we ask of a filesystem, and what a crash may do to it.

Both the real thing (`directory.py`) and the test double (`tests/fakes/crash_storage.py`) keep these rules, and one
contract suite runs on both:

- A write is visible to every reader at once. Until `datasync` or `sync` of that file returns, a power loss may keep
  it, lose it, or keep any of its 512-byte sectors, in any order among other such writes. A killed process loses
  nothing.
- `create`, `rename`, `link` and `unlink` are visible at once. Until `sync_directory` of the directory returns, a power
  loss may undo each of them. A rename is never half-done: the name means the old file or the new one.
- A file's size and its holes are made durable by `datasync` together with its bytes.
- A failed `datasync` leaves it unknown what is durable of all that was written before it, for good: the kernel may hold
  those bytes for clean, and a second try would say yes. It is never tried again on the same descriptor; whoever goes on
  writes everything since the last good one again, through a fresh descriptor, before that one is synced.

Names are relative to the storage's root, parts joined by `/`. Errors are `OSError`, as from the system; calls that
were interrupted or wrote less than asked go on by themselves until done, except that a full disk raises ENOSPC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

Bytes = bytes | bytearray | memoryview


class File(Protocol):
    """An open file. Not closed by losing it: who opens closes."""

    def write_at(self, buffers: Sequence[Bytes], offset: int) -> None:
        """Write all buffers one after the other from byte `offset` on; all of it or OSError."""

    def read_at(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end of the file."""

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""

    def datasync(self) -> None:
        """Make written bytes, size and holes durable (fdatasync)."""

    def punch(self, offset: int, length: int) -> None:
        """Make the extent read as zeros and give its space back where the filesystem can; never changes the size."""

    def allocate(self, length: int) -> None:
        """Reserve space for the first `length` bytes, growing the file to it, so that no write there is ENOSPC."""

    def truncate(self, size: int) -> None:
        """Set the size; new bytes are a hole and read as zeros."""

    def size(self) -> int:
        """Bytes in the file, or in the block device."""

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """`(offset, length)` of what may hold anything but zeros from `start` on, in order. A block device is one
        extent."""

    def close(self) -> None: ...


class Storage(Protocol):
    """A directory tree under one root."""

    def create(self, name: str) -> File:
        """A new empty file, readable and writable by its owner alone. FileExistsError if the name is taken."""

    def open(self, name: str, *, write: bool = False) -> File: ...

    def exists(self, name: str) -> bool: ...

    def rename(self, old: str, new: str) -> None:
        """Replaces `new` if it is there."""

    def link(self, old: str, new: str) -> None:
        """A second name for a file. FileExistsError if `new` is taken."""

    def unlink(self, name: str) -> None: ...

    def names(self, directory: str) -> list[str]:
        """Sorted names in `directory`, without the directory's own."""

    def make_directory(self, name: str) -> None:
        """With its parents, owner only; nothing happens if it is there."""

    def sync_directory(self, directory: str) -> None:
        """Make the names in `directory` durable."""

    def free_bytes(self) -> int:
        """Space left for us on the filesystem."""


def write_atomically(storage: Storage, name: str, content: bytes) -> None:
    """Replace or make `name` so that a crash leaves the old content or the new, and the new once this returns.

    Raises OSError; then nothing else is left of it.
    """
    directory, _, base = name.rpartition("/")
    temporary = f"{directory}/.{base}.new" if directory else f".{base}.new"
    if storage.exists(temporary):
        storage.unlink(temporary)
    file = storage.create(temporary)
    try:
        try:
            file.write_at([content], 0)
            file.datasync()
        finally:
            file.close()
        storage.rename(temporary, name)
    except OSError:
        with suppress(OSError):
            storage.unlink(temporary)
        raise
    storage.sync_directory(directory)


def read_whole(storage: Storage, name: str) -> bytes:
    """All bytes of a file."""
    file = storage.open(name)
    try:
        return file.read_at(file.size(), 0)
    finally:
        file.close()
