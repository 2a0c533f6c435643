"""Brings disks back to what they were at a record of the history: asks the store for what was written since, and has
the disk server write that as records of their own.

    FETCH from (slot, offset) on ─▶ content, zeros ─▶ disk server ─▶ … ─▶ durable ─▶ noted how far ─▶ …

The store knows from the history alone what was written behind the record, so nothing is scanned and nothing else
travels. Any part may be written twice: the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from asrfs.errors import TemporaryError
from asrfs.model.machine import DiskConfig
from asrfs.protocol.messages import Fetch, Fetched
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.outlet import Outlet
from asrfs.replication.progress import Progress

LAG_BYTES_MAX = 64 << 20
"""So much may wait to go back to the store: the journal's quota is not for this."""
NOTED_EVERY_BYTES = 64 << 20
RETRY_S = 1.0

NoteDone = Callable[[int, int, int], Awaitable[None]]
"""Told slot and offset before which all is written, durably, and how many bytes that were since it was last told."""


@dataclass(slots=True)
class Rewriter:
    outlet: Outlet
    server: DiskServer
    progress: Progress

    async def rewrite(self, disks: Sequence[DiskConfig], lsn: int, begin: tuple[int, int], note: NoteDone) -> None:
        """Bring the disks to record `lsn`, from `begin` (slot, offset) on. Waits for a store that is away.

        Raises what the store answered, RefusedError, OSError.
        """
        for disk in sorted(disks, key=lambda disk: disk.slot):
            if disk.slot >= begin[0]:
                await self._rewrite(disk, lsn, begin[1] if disk.slot == begin[0] else 0, note)

    async def _rewrite(self, disk: DiskConfig, lsn: int, offset: int, note: NoteDone) -> None:
        count = 0
        while offset < disk.size_bytes:
            fetched = await self._fetch(disk, lsn, offset)
            if fetched.extents or fetched.zeros:
                await self._write(disk, fetched)
                await self.progress.wait_until(lambda: self.progress.lag_bytes <= LAG_BYTES_MAX)
            offset = fetched.next
            count += len(fetched.content) + sum(length for _, length in fetched.zeros)
            if len(fetched.content) and count >= NOTED_EVERY_BYTES and offset < disk.size_bytes:
                await self._note(note, disk.slot, offset, count)
                count = 0
        await self._note(note, disk.slot + 1, 0, count)

    async def _note(self, note: NoteDone, slot: int, offset: int, count: int) -> None:
        await self._until_answered(self.server.sync)
        await note(slot, offset, count)

    async def _write(self, disk: DiskConfig, fetched: Fetched) -> None:
        async def write() -> int:
            return await self.server.rewrite(disk.slot, fetched.extents, fetched.content, fetched.zeros)

        await self._until_answered(write)

    async def _fetch(self, disk: DiskConfig, lsn: int, offset: int) -> Fetched:
        """Asked again while the connection comes and goes."""
        wanted = Fetch(number=0, slot=disk.slot, disk_id=disk.id, size_bytes=disk.size_bytes, lsn=lsn, offset=offset)
        while True:
            try:
                return await self.outlet.fetch(wanted)
            except TemporaryError:
                await trio.sleep(RETRY_S)
            await self.outlet.wait_open()

    async def _until_answered(self, call: Callable[[], Awaitable[object]]) -> None:
        """A disk server that died is there again in a moment; what it was asked may be done twice."""
        while True:
            try:
                await call()
                return
            except TemporaryError:
                await trio.sleep(RETRY_S)
