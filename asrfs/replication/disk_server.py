"""What the agent asks of the disk server of its machine. The composition implements it with the control socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from asrfs.model.positions import Cursor


class HostPositions(NamedTuple):
    """Where the disk server's history stands. `durable` has the segment and offset of the journal's tail; `served_s` is
    the processor time that requests of guests have taken so far."""

    appended_lsn: int
    durable: Cursor
    epoch: int
    failed: str | None
    served_s: float = 0.0


class DiskServer(Protocol):
    """Every call raises TemporaryError while the disk server is away, and what it refused otherwise."""

    async def positions(self) -> HostPositions: ...

    async def sync(self) -> HostPositions:
        """After this, everything appended before the call is durable."""

    async def marker(self, payload: bytes) -> tuple[int, int]:
        """Append a MARKER record and make it durable: `(lsn, time_ns)`."""

    async def applied(self, lsn: int, segment: int) -> None:
        """Records up to `lsn`, and whole segments up to `segment`, are in the images: their maps may go."""

    async def fill(self, slot: int, offset: int, length: int) -> int:
        """Append the extent's present content as a FILL record: its LSN."""

    async def rewrite(
        self, slot: int, extents: Sequence[tuple[int, int]], content: bytes, zeros: Sequence[tuple[int, int]]
    ) -> int:
        """Write extents, their bytes one after the other in `content`, and zeros, behind the fence: the last LSN."""

    async def hydrating(self, slot: int, extents: Sequence[tuple[int, int]], applied_lsn: int) -> None:
        """These `(offset, end)` of a disk, and nothing else, are in doubt: they are read from its base."""

    async def new_epoch(self, epoch: int, after_lsn: int) -> HostPositions:
        """Go on in this epoch behind `after_lsn`, unless it has begun already, and say what the disks are: durable."""

    async def reread_fence(self) -> None:
        """Take up whether this side was superseded, or its disks are being rewritten: then guests can write no more."""

    async def reread_disks(self) -> None:
        """Take up changes of the machine's disks and append their DISK records."""
