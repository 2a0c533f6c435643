"""Initial replication of an adopted image, killed anywhere and resumed: the history ends up holding all content."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import TemporaryError
from asrfs.format.record import Kind
from asrfs.model.machine import DiskConfig, DiskRecord, encode_disk
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.filler import CHUNK_BYTES_MAX, Filler, chunks_of
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.storage.interface import File
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import JournalWorld, put_record
from tests.fakes.virtual_time import pass_time

BLOCK = 4096
SIZES = (40 * BLOCK + 512, 16 * BLOCK)
T = TypeVar("T")


class Machine:
    """What outlives the agent: a journal, images, machine.json, positions.json."""

    def __init__(self, rng: random.Random) -> None:
        storage = CrashStorage()
        self.world = JournalWorld(storage, sizes=SIZES, seed=rng.randrange(1000), segment_bytes=1 << 20)
        self.adopted = [DiskConfig(slot=0, id="0" * 32, name="root", size_bytes=SIZES[0], adopted="root.img", gap=True)]
        self.saved = Positions()
        self.announced: list[DiskRecord] = []

    def disks(self) -> tuple[DiskConfig, ...]:
        return tuple(self.adopted)

    def close_gap(self, slot: int) -> None:
        self.adopted[slot] = msgspec.structs.replace(self.adopted[slot], gap=False)

    def open_image(self, disk: DiskConfig) -> File:
        return self.world.image_storage.open(str(disk.slot))

    def save(self, positions: Positions) -> None:
        self.saved = positions


class Server:
    """The disk server of a machine. `calls_left`: after so many fills it is gone. Acknowledges what is durable."""

    def __init__(self, machine: Machine, progress: Progress, calls_left: int) -> None:
        self.machine = machine
        self.progress = progress
        self.calls_left = calls_left

    async def positions(self) -> HostPositions:
        journal = self.machine.world.journal
        durable = Cursor(lsn=journal.durable_lsn, segment=journal.segment, offset=journal.offset)
        return HostPositions(journal.appended_lsn, durable, 1, None)

    async def sync(self) -> HostPositions:
        self.machine.world.sync()
        return await self.positions()

    async def marker(self, payload: bytes) -> tuple[int, int]:
        raise TemporaryError("not in this test")

    async def applied(self, lsn: int, segment: int) -> None: ...

    async def fill(self, slot: int, offset: int, length: int) -> int:
        await trio.lowlevel.checkpoint()
        self.calls_left -= 1
        if self.calls_left < 0:
            raise TemporaryError("the disk server is gone")
        return self.machine.world.disks[slot].fill(offset, length)

    async def reread_disks(self) -> None:
        record = DiskRecord.of(self.machine.adopted[0])
        if self.machine.announced[-1:] != [record]:
            self.machine.announced.append(record)
            self.machine.world.journal.append(Kind.DISK, 0, 0, 0, encode_disk(record))

    async def tick(self) -> None:
        """What ticker and shipper would do all the time."""
        while True:
            positions = await self.sync()
            self.progress.note_host(appended_lsn=positions.appended_lsn, durable=positions.durable, epoch=1)
            self.progress.note_acknowledged(positions.durable)
            await pass_time(0.25)


class InlineFiller(Filler):
    """Works in the task: virtual time would run on while a thread works."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


@asynccontextmanager
async def filling(machine: Machine, *, calls: int = 1 << 30, enrolled: bool = True) -> AsyncIterator[Filler]:
    """One life of the agent's filler."""
    positions = PositionsFile(machine.saved, machine.save)
    progress = Progress(machine.saved)
    server = Server(machine, progress, calls)
    filler = InlineFiller(
        server,
        progress,
        positions,
        trio.CapacityLimiter(1),
        machine.disks,
        machine.close_gap,
        machine.open_image,
        lambda: enrolled,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.tick)
        nursery.start_soon(filler.run)
        yield filler
        nursery.cancel_scope.cancel()


def content_of_history(machine: Machine) -> bytes:
    """The disk as a store has it: it began with zeros."""
    disks = [bytearray(size) for size in SIZES]
    for record in machine.world.model.records:
        put_record(disks, record)
    return bytes(disks[0])


async def test_all_content_is_in_the_history_when_the_gap_closes(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    machine = Machine(rng)
    async with filling(machine):
        await pass_time(30)
    assert not machine.adopted[0].gap
    assert machine.saved.fills == ()
    assert [record.gap for record in machine.announced] == [False]
    assert content_of_history(machine) == machine.world.content(0)
    assert machine.world.model.records[-1].kind == Kind.DISK, "the closing record comes after all content"
    machine.world.close()


async def test_nothing_is_filled_before_enrolment(autojump_clock: trio.testing.MockClock, rng: random.Random) -> None:
    machine = Machine(rng)
    async with filling(machine, enrolled=False):
        await pass_time(60)
    assert not machine.world.model.records
    machine.world.close()


@pytest.mark.parametrize("number", range(30))
async def test_killed_anywhere_it_resumes_and_newer_writes_win(
    number: int, autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asrfs.replication.filler.CHUNK_BYTES_MAX", 2 * BLOCK)
    monkeypatch.setattr("asrfs.replication.filler.CHUNKS_PER_SAVE", rng.randint(1, 6))
    machine = Machine(rng)
    lives = 0
    while machine.adopted[0].gap or machine.saved.fills:
        lives += 1
        async with filling(machine, calls=rng.randint(0, 12)):
            for _ in range(rng.randint(1, 6)):
                machine.world.disks[0].write(rng.randrange(40) * BLOCK, rng.randbytes(BLOCK))
                await pass_time(rng.random() * 3)
    assert lives > 1
    assert content_of_history(machine) == machine.world.content(0)
    assert machine.announced[-1].gap is False
    machine.world.close()


async def test_progress_is_saved_only_for_durable_content(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    machine = Machine(rng)
    saved: list[tuple[int, int]] = []

    def save(positions: Positions) -> None:
        journal = machine.world.journal
        saved.extend((fill.offset, journal.durable_lsn) for fill in positions.fills)
        assert journal.durable_lsn == journal.appended_lsn, "I2: progress would outlive the records it speaks of"
        machine.saved = positions

    machine.save = save  # type: ignore[method-assign]
    async with filling(machine):
        await pass_time(30)
    assert saved
    machine.world.close()


def test_chunks_are_whole_blocks_and_none_comes_twice() -> None:
    size = 3 * CHUNK_BYTES_MAX + 1536
    extents = iter([(512, 1024), (1536, 100), (BLOCK, 2 * CHUNK_BYTES_MAX), (size - 512, 512)])
    chunks = list(chunks_of(extents, 0, size))
    assert chunks[0] == (0, BLOCK)
    ends = [offset + length for offset, length in chunks]
    assert all(offset % BLOCK == 0 for offset, _ in chunks)
    assert all(start >= end for (start, _), end in zip(chunks[1:], ends, strict=False))
    assert all(length <= CHUNK_BYTES_MAX for _, length in chunks)
    assert ends[-1] == size
    later = list(chunks_of(iter([(0, size)]), CHUNK_BYTES_MAX, size))
    assert later[0][0] == CHUNK_BYTES_MAX
