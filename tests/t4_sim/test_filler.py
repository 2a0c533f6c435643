"""Initial replication of an adopted image, killed anywhere and resumed: the history ends up holding all content."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.format.record import Kind
from asrfs.model.calendar import ALWAYS
from asrfs.model.machine import decode_disk
from asrfs.model.positions import Positions
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.resyncer import HealingRules, Resyncer
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.healing_host import HealingHost, MachineFile, content_of
from tests.fakes.journal_world import JournalWorld
from tests.fakes.virtual_time import pass_time

BLOCK = 4096
CHUNK = 64 << 10
SIZES = (10 * CHUNK + 512, 4 * CHUNK)


class Machine:
    """What outlives the agent: a journal, images, `machine.json`, `dirty.map`. The first disk was adopted."""

    def __init__(self, rng: random.Random) -> None:
        self.world = JournalWorld(CrashStorage(), sizes=SIZES, seed=rng.randrange(1000), segment_bytes=1 << 20)
        self.file = MachineFile(self.world)
        self.file.save(self.file.set_gaps((0,), True))

    @property
    def has_gap(self) -> bool:
        return self.file.load().disks[0].gap

    @property
    def is_known_to_be_whole(self) -> bool:
        return not HealingHost(self.world, PositionsFile(Positions(), lambda _: None)).dirty.map.slots()

    def announced(self) -> list[bool]:
        """`gap` of each DISK record of the adopted disk."""
        records = (record for record in self.world.model.records if record.kind == Kind.DISK and record.slot == 0)
        return [decode_disk(record.content).gap for record in records]


@asynccontextmanager
async def filling(machine: Machine, *, calls: int = 1 << 30, enrolled: bool = True) -> AsyncIterator[HealingHost]:
    """One life of an agent that fills, and of a store that acknowledges what is durable."""
    host = HealingHost(machine.world, PositionsFile(Positions(), lambda _: None))
    host.server.calls_left = calls
    rules = HealingRules(ALWAYS, 900.0, 1 << 40)
    resyncer = Resyncer(host.filler, host.progress, host.alarms, lambda: enrolled, lambda: rules, lambda: 0)

    async def tick() -> None:
        """What ticker and shipper would do all the time."""
        while True:
            await host.server.sync()
            host.progress.note_acknowledged(host.progress.durable)
            await pass_time(0.25)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        nursery.start_soon(resyncer.run)
        yield host
        nursery.cancel_scope.cancel()
    host.close()


async def test_all_content_is_in_the_history_when_the_gap_closes(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    machine = Machine(rng)
    async with filling(machine) as host:
        await pass_time(30)
        assert not host.dirty.map.slots()
    assert not machine.has_gap
    assert machine.is_known_to_be_whole
    assert machine.announced() == [False]
    assert content_of(machine.world)[0] == machine.world.content(0)
    kinds = [record.kind for record in machine.world.model.records]
    assert kinds[-1] == Kind.MARKER, "a point exists as soon as all is there"
    assert set(kinds[kinds.index(Kind.DISK) :]) == {Kind.DISK, Kind.MARKER}, (
        "the closing record comes after all content"
    )
    machine.world.close()


async def test_what_was_filled_is_hurried_to_be_durable(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each batch, and the end, waits until somebody looks whether anything is appended."""
    monkeypatch.setattr("asrfs.replication.filler.RUN_BYTES_MAX", CHUNK)
    monkeypatch.setattr("asrfs.replication.filler.RUNS_PER_SAVE", 3)
    machine = Machine(rng)
    batches = 0
    async with filling(machine) as host:
        fill_batch = host.filler._fill_batch

        async def count(*arguments: Any) -> bool:
            nonlocal batches
            batches += 1
            return await fill_batch(*arguments)

        monkeypatch.setattr(type(host.filler), "_fill_batch", staticmethod(count))
        await pass_time(30)
        assert not host.dirty.map.slots()
    assert batches > 1
    assert host.hurries == batches + 1
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
    monkeypatch.setattr("asrfs.replication.filler.RUN_BYTES_MAX", CHUNK)
    monkeypatch.setattr("asrfs.replication.filler.RUNS_PER_SAVE", rng.randint(1, 4))
    machine = Machine(rng)
    lives = 0
    while machine.has_gap or not machine.is_known_to_be_whole:
        lives += 1
        async with filling(machine, calls=rng.randint(0, 5)):
            for _ in range(rng.randint(1, 6)):
                machine.world.disks[0].write(rng.randrange(SIZES[0] // BLOCK) * BLOCK, rng.randbytes(BLOCK))
                await pass_time(rng.random() * 3)
    assert lives > 1
    assert content_of(machine.world)[0] == machine.world.content(0)
    assert machine.announced()[-1] is False
    machine.world.close()


async def test_a_chunk_leaves_the_saved_map_only_when_its_record_is_durable(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    machine = Machine(rng)
    saves = 0

    async with filling(machine) as host:
        save = host.dirty.save

        def check(*arguments: object) -> None:
            nonlocal saves
            saves += 1
            journal = machine.world.journal
            cleared = host.dirty.map.dirty_chunks(0) < 10
            assert not cleared or journal.durable_lsn == journal.appended_lsn, "I4: the map outlives the records"
            save(*arguments)  # type: ignore[arg-type]

        host.dirty.save = check  # type: ignore[method-assign]
        await pass_time(30)
    assert saves > 1
    machine.world.close()


@pytest.mark.parametrize("is_applied", [True, False])
async def test_holes_are_not_read_and_zeros_travel_as_such(
    is_applied: bool, autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asrfs.replication.filler.RUN_BYTES_MAX", 2 * CHUNK)
    machine = Machine(rng)
    machine.world.disks[0].discard(0, 2 * CHUNK)
    machine.world.sync()
    if is_applied:
        machine.world.apply()
    before = len(machine.world.model.records)
    async with filling(machine):
        await pass_time(30)
    filled = machine.world.model.records[before:]
    assert sum(record.length for record in filled if record.kind == Kind.FILL) == SIZES[0] - (2 * CHUNK)
    assert sum(record.length for record in filled if record.kind == Kind.ZERO) == (0 if is_applied else 2 * CHUNK)
    assert content_of(machine.world)[0] == machine.world.content(0)
    machine.world.close()


async def test_an_adopted_disk_that_is_removed_is_forgotten(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    machine = Machine(rng)
    async with filling(machine, calls=0):
        await pass_time(5)
    config = machine.file.load()
    gone = tuple(msgspec.structs.replace(disk, removed=disk.slot == 0) for disk in config.disks)
    machine.file.save(msgspec.structs.replace(config, disks=gone))
    async with filling(machine) as host:
        await pass_time(5)
        assert not host.dirty.map.slots()
    machine.world.close()
