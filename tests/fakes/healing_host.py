"""What gives up and fills, on a `JournalWorld`: the real quota and filler, working in the task that calls them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import trio

from asrfs.daemon.agent_healing import with_gaps
from asrfs.errors import TemporaryError
from asrfs.format.record import Kind
from asrfs.journal.reader import JournalReader
from asrfs.model import dirty_map
from asrfs.model.dirty_map import TO_COMPARE, DirtyMap, GivenUp
from asrfs.model.machine import NO_SLOT, DiskConfig, DiskRecord, MachineConfig, encode_disk
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Cursor
from asrfs.replication.alarms import Alarms
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.filler import Filler
from asrfs.replication.lost_map import open_dirty_map
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.quota import Quota
from asrfs.storage.interface import File, read_whole, write_atomically
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, ModelRecord, put_record

T = TypeVar("T")
LAG_BYTES_MAX = 1 << 30
BLOCK = 4096


class InlineQuota(Quota):
    """Virtual time would run on while a thread works."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class InlineFiller(Filler):
    """As `InlineQuota`."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class MachineFile:
    """`machine.json` of a world, whose disks are those of its model unless the file says otherwise."""

    def __init__(self, world: JournalWorld) -> None:
        self._world = world

    def load(self) -> MachineConfig:
        storage = self._world.storage
        if storage.exists("machine.json"):
            return msgspec.json.decode(read_whole(storage, "machine.json"), type=MachineConfig)
        disks = tuple(
            DiskConfig(slot=slot, id=f"{slot:032x}", name=f"d{slot}", size_bytes=len(content))
            for slot, content in enumerate(self._world.model.initial)
        )
        return MachineConfig(id=MACHINE_ID.hex(), name="web1", disks=disks)

    def save(self, machine: MachineConfig) -> None:
        write_atomically(self._world.storage, "machine.json", msgspec.json.encode(machine))

    def set_gaps(self, slots: Collection[int], gap: bool) -> MachineConfig:
        machine = with_gaps(self.load(), slots, gap)
        self.save(machine)
        return machine


class WorldServer:
    """The disk server of a world. `calls_left`: after so many fills it is gone. Whatever is synced is noted in
    `progress`, as a ticker would; `syncs_fills`: that is what is filled, too."""

    def __init__(self, world: JournalWorld, machine: MachineFile, progress: Progress) -> None:
        self.world = world
        self.machine = machine
        self.progress = progress
        self.calls_left = 1 << 30
        self.syncs_fills = False
        self.is_fenced = False
        self.announced: dict[int, DiskRecord] = {}

    def announce(self) -> None:
        """As each start of a disk server does, and verb `disks`: what the disks are."""
        for disk in self.machine.load().disks:
            record = DiskRecord.of(disk)
            if self.announced.get(disk.slot) != record:
                self.world.journal.append(Kind.DISK, disk.slot, 0, 0, encode_disk(record))
                self.announced[disk.slot] = record

    def host_positions(self) -> HostPositions:
        journal = self.world.journal
        durable = Cursor(
            lsn=journal.durable_lsn, segment=journal.segment, offset=journal.offset, time_ns=journal.last_time_ns
        )
        return HostPositions(journal.appended_lsn, durable, journal.epoch, journal.failed)

    def note(self) -> None:
        host = self.host_positions()
        self.progress.note_host(appended_lsn=host.appended_lsn, durable=host.durable, epoch=host.epoch)

    async def positions(self) -> HostPositions:
        return self.host_positions()

    async def sync(self) -> HostPositions:
        await trio.lowlevel.checkpoint()
        self.world.sync()
        self.note()
        return self.host_positions()

    async def marker(self, payload: bytes) -> tuple[int, int]:
        self.world.journal.append(Kind.MARKER, NO_SLOT, 0, 0, payload)
        place = self.world.journal.appended_lsn, self.world.journal.last_time_ns
        await self.sync()
        return place

    async def applied(self, lsn: int, segment: int) -> None:
        self.world.journal.drop_through(segment, [disk.map for disk in self.world.disks])

    async def fill(self, slot: int, offset: int, length: int) -> int:
        await trio.lowlevel.checkpoint()
        self.calls_left -= 1
        if self.calls_left < 0:
            raise TemporaryError("the disk server is gone")
        lsn = self.world.disks[slot].fill(offset, length)
        if self.syncs_fills:
            await self.sync()
        return lsn

    async def reread_disks(self) -> None:
        self.announce()

    async def new_epoch(self, epoch: int, after_lsn: int) -> HostPositions:
        await trio.lowlevel.checkpoint()
        if self.world.journal.epoch < epoch:
            self.world.begin_epoch(epoch, after_lsn)
            self.announced.clear()
        self.announce()
        return await self.sync()

    async def reread_fence(self) -> None:
        self.is_fenced = self.world.storage.exists("fenced.json")


def check_marked(
    records: Sequence[ModelRecord], after_lsn: int, last_lsn: int, dirty: DirtyMap, given_up: GivenUp
) -> None:
    """I4: what records behind `after_lsn` up to `last_lsn` wrote is in the map, or in records that will be sent, or all
    of its disk will be compared."""
    later = {
        (record.slot, at)
        for record in records[given_up.through.lsn :]
        for at in range(record.offset, record.offset + record.length, BLOCK)
    }
    marked = {
        (slot, at)
        for slot in dirty.slots()
        for offset, length in dirty.runs(slot, 1 << 20)
        for at in range(offset, offset + length, BLOCK)
    }
    compared = {slot for slot in dirty.slots() if dirty.reasons(slot) & TO_COMPARE}
    for lsn, record in enumerate(records[after_lsn:last_lsn], after_lsn + 1):
        if record.slot in compared:
            continue
        for at in range(record.offset, record.offset + record.length, BLOCK):
            assert (record.slot, at) in marked | later, (
                f"I4: LSN {lsn} was freed, and byte {at} of disk {record.slot} is neither at the store nor in the map"
            )


class HealingHost:
    """One life of an agent's share in giving up and healing."""

    def __init__(self, world: JournalWorld, positions: PositionsFile, progress: Progress | None = None) -> None:
        self.world = world
        self.progress = progress or Progress(positions.current)
        self.machine = MachineFile(world)
        self.server = WorldServer(world, self.machine, self.progress)
        self.dirty = open_dirty_map(
            world.storage, "dirty.map", world.journal_storage, self.machine.load(), positions.current
        )
        self.alarms = Alarms()
        self.points: list[int] = []
        self.hurries = 0
        threads = trio.CapacityLimiter(1)
        self.quota = InlineQuota(
            self.server,
            self.progress,
            positions,
            self.dirty,
            JournalReader(world.journal_storage, MACHINE_ID, check_payloads=False),
            self.alarms,
            threads,
            self.machine.load,
            self.machine.set_gaps,
            1 << 62,
            world.segment_bytes,
        )
        self.filler = InlineFiller(
            self.server,
            self.progress,
            self.dirty,
            threads,
            self.machine.load,
            self.machine.set_gaps,
            self._open_image,
            self.make_point,
            lambda: LAG_BYTES_MAX,
            self.find,
            self.hurry_durable,
        )

    async def find(self, disks: Sequence[DiskConfig]) -> Mapping[int, Sequence[int]]:
        """What is compared differs."""
        await trio.lowlevel.checkpoint()
        return {disk.slot: range(-(-disk.size_bytes >> dirty_map.CHUNK_SHIFT)) for disk in disks}

    def hurry_durable(self) -> None:
        self.hurries += 1

    async def make_point(self, note: str) -> int:
        point = MarkerRecord(id=f"{len(self.world.model.records):032x}", note=note)
        lsn, _ = await self.server.marker(encode_marker(point))
        self.points.append(lsn)
        return lsn

    def _open_image(self, disk: DiskConfig) -> File:
        return self.world.image_storage.open(str(disk.slot))

    def close(self) -> None:
        self.quota.reader.close()


def content_of(world: JournalWorld, records: Sequence[int] | None = None) -> list[bytes]:
    """The disks as a store has them that began with zeros and got these records, all of them if not said which."""
    disks = [bytearray(len(content)) for content in world.model.initial]
    for lsn, record in enumerate(world.model.records, 1):
        if records is None or lsn in records:
            put_record(disks, record)
    return [bytes(disk) for disk in disks]
