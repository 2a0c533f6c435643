"""What a direct session serves: disks by name and by node, and who does what it does not do itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from asrfs.fuse import abi

FILE_SUFFIX = b".img"
FIRST_DISK_NODE = abi.ROOT_NODE + 1

Bytes = bytes | bytearray | memoryview
SyncCallback = Callable[[OSError | None], None]
RequestSync = Callable[[SyncCallback], None]
Keep = Callable[[Callable[[], None], int], bool]
"""Keeps a request of so many bytes that met HeldError, to call it when changes go on. False: they do already."""
Wait = Callable[[Callable[[], None]], None]
"""Has a request that met AbsentError done in a thread that may wait; it raises that as often as something is absent."""


class ServedDisk(Protocol):
    """What a session needs of a disk. Failures are OSError and reach the kernel as they are."""

    @property
    def size_bytes(self) -> int: ...

    def write(self, offset: int, payload: Bytes) -> None: ...

    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...


TogetherWrite = tuple[ServedDisk, int, Any]
"""Disk, offset, and what `frame` made of the payload."""


class WriteTogether(Protocol):
    """Does writes at once and returns True, or nothing and returns False.

    `frame` makes what it wants to have of a payload with `room` bytes before it that may be written over; the memory
    stays the same for many writes.
    """

    @property
    def room(self) -> int: ...

    def frame(self, whole: memoryview, /) -> object: ...

    def __call__(self, writes: Sequence[TogetherWrite]) -> bool: ...


class _NotTogether:
    room = 0

    def frame(self, whole: memoryview) -> object:
        return None

    def __call__(self, writes: Sequence[TogetherWrite]) -> bool:
        return False


class Volume:
    """The disks of a mount, by name and by node. May be changed by another thread while the session runs."""

    def __init__(
        self,
        request_sync: RequestSync,
        write_together: WriteTogether | None = None,
        keep: Keep | None = None,
        wait: Wait | None = None,
    ) -> None:
        self.request_sync = request_sync
        self.keep = keep
        self.wait = wait
        self.write_together = write_together or _NotTogether()
        self.disks: dict[int, ServedDisk] = {}
        self.nodes: dict[bytes, int] = {}

    def add(self, name: str, slot: int, disk: ServedDisk) -> None:
        """Make the disk appear as `NAME.img`."""
        node = slot + FIRST_DISK_NODE
        self.disks[node] = disk
        self.nodes[name.encode() + FILE_SUFFIX] = node

    def remove(self, name: str) -> None:
        """Let the file vanish; whoever still has it open gets EIO."""
        node = self.nodes.pop(name.encode() + FILE_SUFFIX, abi.ROOT_NODE)
        self.disks.pop(node, None)
