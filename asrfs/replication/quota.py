"""Gives records up when they would take more room than the journal may have: production goes on, the replica stays
where it is, and what it lacks is in the dirty map (I4, I8).

    disks entered in the map, saved ─▶ gap True in machine.json ─▶ DISK records of that ─▶ sync: all of this is given up
        ─▶ extents of what lies behind the last acknowledged record marked ─▶ map saved ─▶ (trimmer) segments freed

All that is durable is given up at once, the open segment too: else a record that closes an older gap, and lies behind
what is given up, would close this one. A kill between any two steps leaves a disk in the map, or with a gap, of which
nothing was freed: filling finds nothing to do there and closes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
import structlog
import trio

from asrfs.errors import AsrfsError, NoSpaceError, TemporaryError
from asrfs.format.record import Kind
from asrfs.format.segment import SEGMENT_BYTES
from asrfs.journal.columns import Columns
from asrfs.journal.index_reader import stretches
from asrfs.journal.reader import JournalReader, Slabs
from asrfs.model.dirty_map import DirtyMap, Reason
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import NO_SLOT, DiskConfig, DiskRecord, MachineConfig, decode_disk
from asrfs.model.positions import Cursor
from asrfs.replication.alarms import Alarms
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress, bytes_between

ALARM = "giving-up"
RETRY_S = 1.0
_PIECE_BYTES = 32 << 20
_PIECE_RECORDS_MAX = 64 * 1024

SetGaps = Callable[[Collection[int], bool], MachineConfig]
T = TypeVar("T")


@dataclass(slots=True)
class Quota:
    """`quota_bytes` may be changed at any time. `cut_bytes`: by how much segments from one on are shorter than places
    in the journal count them. `look`, which blocks, brings both up to date. `reader` is this one's own and need not
    check payloads.

    `machine` reads `machine.json`, `set_gaps` sets `gap` of some disks in it; both block.
    """

    server: DiskServer
    progress: Progress
    positions: PositionsFile
    dirty: DirtyMapFile
    reader: JournalReader
    alarms: Alarms
    threads: trio.CapacityLimiter
    machine: Callable[[], MachineConfig]
    set_gaps: SetGaps
    quota_bytes: int
    segment_bytes: int = SEGMENT_BYTES
    cut_bytes: Callable[[int], int] = lambda first_segment: 0
    look: Callable[[], object] = lambda: None

    async def run(self) -> None:
        """Give up whenever the store is too far behind, for ever."""
        while True:
            if not self.is_over():
                self.alarms.clear(ALARM)
            await self.progress.wait_until(lambda: self.progress.is_known and self.is_over())
            try:
                await self._in_thread(self.look)
                if not self.is_over():
                    continue
                if await self.give_up():
                    self.alarms.clear(ALARM)
                    continue
            except (AsrfsError, OSError) as error:
                if type(error) is not TemporaryError:  # else the disk server is away, and its successor will answer
                    text = "the journal is over its quota, and what waits for the store cannot be given up"
                    self.alarms.set(ALARM, "critical", f"{text}: {error}")
            await trio.sleep(RETRY_S)

    def is_over(self) -> bool:
        """Whether what only the store still needs would take more than the quota. Of a segment that is needed in part
        all is kept."""
        needed = self.dirty.given_up.needed_behind(self.positions.current.acknowledged)
        waiting = bytes_between(needed, self.progress.durable) - self.cut_bytes(needed.segment)
        return waiting > 0 and waiting + self.segment_bytes > self.quota_bytes

    async def give_up(self) -> bool:
        """Everything that is durable and that the store does not have; whether there was any.

        Raises AsrfsError, OSError: nothing is given up. What is marked by then stays so, which costs traffic, no more.
        """
        dirty = self.dirty
        async with dirty.turn:
            machine, following = None, await self._in_thread(self.machine)
            while machine is None or not all(self._is_open(disk) for disk in following.live_disks()):
                machine = following
                await self._open_gaps(machine)
                host = await self.server.sync()
                following = await self._in_thread(self.machine)  # a disk added later has its records behind `durable`
            given_up = dirty.given_up
            acknowledged = await self._acknowledged()
            start = given_up.needed_behind(acknowledged)
            if start.lsn >= host.durable.lsn or not machine.disks:
                return False
            if not given_up.covers(acknowledged.lsn):
                given_up = given_up._replace(since_lsn=acknowledged.lsn).opened(acknowledged.lsn)
            through, disks = await self._in_thread(self._mark, start, host.durable.lsn, following)
            given_up = given_up._replace(through=through, disks=disks)
            await self._in_thread(self.dirty.save, given_up)
        structlog.get_logger("asrfs.quota").warning(
            "records given up", since_lsn=given_up.since_lsn, through_lsn=through.lsn, quota_bytes=self.quota_bytes
        )
        self.progress.wake()
        return True

    async def _acknowledged(self) -> Cursor:
        """What the store has acknowledged, saved where the map goes on from there: what is given up by now, and freed,
        leads only a start to `through` that finds itself within it. Raises OSError."""
        acknowledged = self.positions.current.acknowledged
        if self.dirty.given_up.covers(acknowledged.lsn):
            return acknowledged
        return (await self._in_thread(self.positions.save)).acknowledged

    def _mark(self, start: Cursor, until_lsn: int, machine: MachineConfig) -> tuple[Cursor, tuple[DiskRecord, ...]]:
        """Mark records: the place behind the last, and the disks as they are there. `machine`: as it was later.

        What a machine says of its disks it says before the history does, which is harmless except for a disk that is
        being removed: then the history itself is asked, which takes reading all of it.
        """
        boot = machine.boot_document()
        records = {disk.slot: DiskRecord.of(disk, boot) for disk in machine.disks}
        if any(disk.removed and not disk.released for disk in machine.disks):
            through, last = mark_records(self.reader, start, until_lsn, self.dirty.map)
            records |= last
        else:
            through = mark_segments(self.reader, start, until_lsn, self.dirty.map)
        return through, tuple(with_gap(records[slot]) for slot in sorted(records))

    def _is_open(self, disk: DiskConfig) -> bool:
        return disk.gap and Reason.GIVEN_UP in self.dirty.map.reasons(disk.slot)

    async def _open_gaps(self, machine: MachineConfig) -> None:
        """From now on no disk server says of any disk that it has no gap."""
        live = machine.live_disks()
        missing = [disk for disk in live if Reason.GIVEN_UP not in self.dirty.map.reasons(disk.slot)]
        for disk in missing:
            is_unread = disk.gap and disk.slot not in self.dirty.map
            self.dirty.map.enter(disk.slot, Reason.GIVEN_UP | (Reason.UNREAD if is_unread else Reason(0)))
        if missing:
            await self._in_thread(self.dirty.save)
        if closed := [disk.slot for disk in live if not disk.gap]:
            await self._in_thread(self.set_gaps, closed, True)
        try:
            await self.server.reread_disks()
        except NoSpaceError:
            pass  # it was asked, and says so before it says anything else of these disks

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)


def with_gap(record: DiskRecord) -> DiskRecord:
    """What a gap object says of a disk."""
    return msgspec.structs.replace(record, gap=not record.removed)


def mark_records(
    reader: JournalReader, cursor: Cursor, until_lsn: int, dirty: DirtyMap
) -> tuple[Cursor, dict[int, DiskRecord]]:
    """Mark every extent of the records behind `cursor` up to `until_lsn`, of disks that are in the map.

    Returns the place behind the last record, and the last DISK record of each disk. Raises IntegrityError, OSError.
    """
    disks: dict[int, DiskRecord] = {}
    slabs = Slabs()
    while cursor.lsn < until_lsn:
        batch = reader.read(cursor, min(until_lsn, cursor.lsn + _PIECE_RECORDS_MAX), _PIECE_BYTES, slabs)
        for part in batch.parts:
            _mark_part(part, dirty)
            for i in np.flatnonzero(part.headers["kind"] == Kind.DISK).tolist():
                record = decode_disk(bytes(part.payload(i)))
                disks[record.slot] = record
        cursor = batch.cursor
    return cursor, disks


def mark_segments(reader: JournalReader, cursor: Cursor, until_lsn: int, dirty: DirtyMap) -> Cursor:
    """Mark the same extents as `mark_records`, by the indexes of sealed segments as far as there are any.

    Returns the place behind the last record. Raises IntegrityError, OSError.
    """
    for stretch in stretches(reader.storage, reader.machine_id, cursor, until_lsn):
        if stretch.known is None:
            cursor, _ = mark_records(reader, cursor, stretch.last_lsn, dirty)
            continue
        disks, cursor = stretch.known
        for disk in disks:
            if disk.slot in dirty:
                starts, ends = (np.array(column, np.int64) for column in (disk.zero_starts, disk.zero_ends))
                blocks = np.array(disk.blocks, np.int64)
                dirty.mark_all(disk.slot, blocks * BLOCK_BYTES, np.full(len(blocks), BLOCK_BYTES))
                dirty.mark_all(disk.slot, starts * BLOCK_BYTES, (ends - starts) * BLOCK_BYTES)
    return cursor


def _mark_part(part: Columns, dirty: DirtyMap) -> None:
    slots = part.headers["slot"]
    has_extent = ~part.has_note() & (slots != NO_SLOT)
    for slot in np.unique(slots[has_extent]).tolist():
        if slot in dirty:
            chosen = part.headers[has_extent & (slots == slot)]
            dirty.mark_all(slot, chosen["offset"].astype(np.int64), chosen["length"].astype(np.int64))
