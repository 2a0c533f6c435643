"""Reads the content an adopted image had before its history into the history (initial replication).

    for each disk with a gap:  chunk ─▶ FILL record ─▶ … ─▶ all durable ─▶ progress saved ─▶ …
                               gap closed in machine.json ─▶ closing DISK record ─▶ acknowledged ─▶ progress forgotten

The disk server reads and appends each chunk as one step, so a write meanwhile is ordered before or after it and the
newest bytes win. Progress is saved only up to chunks whose records are durable; a kill anywhere repeats some chunks,
which changes nothing. The fill's entry in positions stays until the closing record is at the store, so it also says
that initial replication is not over. Holes are not read: the store takes what it never heard of for zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.model.extents import widen_to_blocks
from asrfs.model.machine import DiskConfig
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.storage.interface import File

CHUNK_BYTES_MAX = 1 << 20
LAG_BYTES_MAX = 256 << 20
"""Filling waits while so much is durable and not acknowledged."""
CHUNKS_PER_SAVE = 64
RETRY_S = 1.0
LOOK_INTERVAL_S = 2.0

OpenImage = Callable[[DiskConfig], File]
Chunk = tuple[int, int]
T = TypeVar("T")


@dataclass(slots=True)
class Filler:
    """`disks` reads the machine's live disks, `close_gap` makes gap False for a slot in machine.json; both block."""

    server: DiskServer
    progress: Progress
    positions: PositionsFile
    threads: trio.CapacityLimiter
    disks: Callable[[], tuple[DiskConfig, ...]]
    close_gap: Callable[[int], None]
    open_image: OpenImage
    is_enrolled: Callable[[], bool]

    async def run(self) -> None:
        """Fill whatever has a gap, for ever; tries again after errors. Waits while not enrolled."""
        log = structlog.get_logger("asrfs.filler")
        while True:
            await self.progress.wait_until(lambda: self.progress.is_known and self.is_enrolled())
            try:
                idle = await self.fill_once()
            except (AsrfsError, OSError) as error:
                log.warning("filling waits", reason=str(error))
                await trio.sleep(RETRY_S)
                continue
            if idle:
                await trio.sleep(LOOK_INTERVAL_S)

    async def fill_once(self) -> bool:
        """Fill and close every gap there is; whether there was none."""
        started = {fill.slot for fill in self.positions.current.fills}
        disks = await self._in_thread(self.disks)
        waiting = [disk for disk in disks if disk.gap or disk.slot in started]
        for disk in waiting:
            if disk.gap:
                await self._fill(disk)
            await self._close(disk)
        for slot in started - {disk.slot for disk in disks}:
            self.positions.change_fill(slot, None)
        return not waiting

    async def _fill(self, disk: DiskConfig) -> None:
        offset = next((fill.offset for fill in self.positions.current.fills if fill.slot == disk.slot), 0)
        self.positions.change_fill(disk.slot, offset)
        image = await self._in_thread(self.open_image, disk)
        try:
            chunks = chunks_of(image.data_extents(), offset, disk.size_bytes)
            while batch := await self._in_thread(_take, chunks):
                await self._fill_batch(disk, batch)
        finally:
            image.close()

    async def _fill_batch(self, disk: DiskConfig, batch: list[Chunk]) -> None:
        lsn = 0
        for offset, length in batch:
            await self.progress.wait_until(lambda: self.progress.lag_bytes <= LAG_BYTES_MAX)
            lsn = await self.server.fill(disk.slot, offset, length)
        await self._wait_durable(lsn)
        self.positions.change_fill(disk.slot, batch[-1][0] + batch[-1][1])
        await self._in_thread(self.positions.save)

    async def _close(self, disk: DiskConfig) -> None:
        """End the gap: DISK record with gap False, and wait until the store has it."""
        self.positions.change_fill(disk.slot, disk.size_bytes)
        await self._in_thread(self.positions.save)
        await self._in_thread(self.close_gap, disk.slot)
        await self.server.reread_disks()
        closing_lsn = (await self.server.positions()).appended_lsn
        await self.progress.wait_until(lambda: self.progress.acknowledged.lsn >= closing_lsn)
        self.positions.change_fill(disk.slot, None)
        await self._in_thread(self.positions.save)

    async def _wait_durable(self, lsn: int) -> None:
        await self.progress.wait_until(lambda: self.progress.durable.lsn >= lsn)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)


def chunks_of(extents: Iterator[tuple[int, int]], start: int, size_bytes: int) -> Iterator[Chunk]:
    """`extents` from byte `start` on, widened to whole blocks, cut at multiples of CHUNK_BYTES_MAX, none twice."""
    done = start
    for offset, length in extents:
        first, covered = widen_to_blocks(offset, length, size_bytes)
        end = first + covered
        at = max(first, done)
        while at < end:
            stop = min(end, at - at % CHUNK_BYTES_MAX + CHUNK_BYTES_MAX)
            yield at, stop - at
            at = stop
        done = max(done, end)


def _take(chunks: Iterator[Chunk]) -> list[Chunk]:
    """The next few chunks."""
    batch = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == CHUNKS_PER_SAVE:
            break
    return batch
