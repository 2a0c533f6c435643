"""A disk server that dies leaves its segment short: what is left of the room is given back, and counts for nothing."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from asrfs.daemon.housekeeping import Housekeeping
from asrfs.daemon.settings import Settings
from asrfs.format.segment import POSITION_SHIFT, SEGMENT_HEADER_BYTES
from asrfs.journal.segments import list_journal, segment_name
from asrfs.model.machine import MachineConfig
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.progress import Progress
from asrfs.replication.trimmer import Trimmer
from tests.fakes.applied_world import AppliedWorld
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.healing_host import HealingHost
from tests.fakes.journal_world import MACHINE_ID, JournalWorld

BLOCK = 4096
ROOM = 40 * (BLOCK + 64)
SEGMENT_BYTES = SEGMENT_HEADER_BYTES + ROOM


def size_of(world: JournalWorld, number: int) -> int:
    file = world.journal_storage.open(segment_name(number))
    try:
        return file.size()
    finally:
        file.close()


def world_with(writes: int, rng: random.Random) -> JournalWorld:
    world = JournalWorld(CrashStorage(), segment_bytes=SEGMENT_BYTES, seed=1)
    for _ in range(writes):
        world.disks[0].write(rng.randrange(10) * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    return world


def test_what_a_death_leaves_of_a_segment_is_given_back(rng: random.Random) -> None:
    world = world_with(3, rng)
    number = world.journal.segment
    assert size_of(world, number) == SEGMENT_BYTES
    for _ in range(3):
        world = world.restart()
        world.check()
        assert size_of(world, number) == SEGMENT_HEADER_BYTES + 3 * (BLOCK + 64)
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.check()
    assert world.journal.segment > number, "nothing is added to it"
    world.close()


def test_a_segment_of_which_everything_is_applied_is_no_other(rng: random.Random) -> None:
    world = world_with(3, rng)
    number = world.journal.segment
    applied = AppliedWorld(world, rng)
    applied.apply_all()
    assert applied.positions.saved.applied.lsn == 3
    world = world.restart()
    assert size_of(world, number) == SEGMENT_HEADER_BYTES + 3 * (BLOCK + 64)
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.check()
    world = world.restart()
    world.check()
    world.close()


def test_a_power_loss_while_it_is_given_back_loses_nothing(rng: random.Random) -> None:
    for fate in Fate:
        world = world_with(5, rng)
        world.close()
        for _ in range(2):
            storage = world.storage.crash(fate, rng)
            world = JournalWorld(storage, world.model.copy(), segment_bytes=SEGMENT_BYTES)
            assert world.journal.appended_lsn == 5
            world.check()
            world.close()


def test_a_segment_that_is_almost_full_stays_as_it_is(rng: random.Random) -> None:
    """It will be a spare, and making one costs as much as filling it."""
    world = world_with(39, rng)
    number = world.journal.segment
    world = world.restart()
    assert size_of(world, number) == SEGMENT_BYTES
    world.close()


def test_a_short_segment_is_no_spare_when_it_is_freed(rng: random.Random) -> None:
    world = world_with(3, rng)
    number = world.journal.segment
    world = world.restart()
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.apply()
    listing = list_journal(world.journal_storage)
    assert number not in listing.segments and not listing.spares
    world.close()


def test_numbers_that_no_segment_has_count_for_nothing() -> None:
    """A disk server makes the next segment's file ahead; the one after it begins with a number of its own."""
    storage = CrashStorage()
    for number, size in ((3, SEGMENT_BYTES), (5, BLOCK), (9, SEGMENT_BYTES), (10, SEGMENT_BYTES)):
        file = storage.create(segment_name(number))
        file.truncate(size)
        file.close()
    trimmer = Trimmer(storage, MACHINE_ID, SEGMENT_BYTES)
    assert trimmer.look() == 3
    short = SEGMENT_BYTES - BLOCK
    assert [trimmer.cut_bytes(first) for first in (3, 5, 9, 10)] == [
        SEGMENT_BYTES + short + 3 * SEGMENT_BYTES,
        short + 3 * SEGMENT_BYTES,
        0,
        0,
    ]


@pytest.mark.parametrize("lives_between_looks", [1, 5])
async def test_the_quota_is_of_bytes_and_not_of_lives(rng: random.Random, lives_between_looks: int) -> None:
    world = world_with(2, rng)
    looking = Trimmer(world.journal_storage, MACHINE_ID, SEGMENT_BYTES)
    for life in range(9):
        if life % lives_between_looks == 0:
            looking.look()
        world = world.restart()
        looking._storage = world.journal_storage
        world.disks[0].write(rng.randrange(10) * BLOCK, rng.randbytes(BLOCK))
        world.sync()
    trimmer = Trimmer(world.journal_storage, MACHINE_ID, SEGMENT_BYTES)
    first = trimmer.look()
    assert trimmer.look() == first, "what is known of all but the newest is not looked at again"
    lives = len(list_journal(world.journal_storage).segments)
    used = sum(size_of(world, number) for number in list_journal(world.journal_storage).segments)
    assert lives == 10
    looking.look()
    assert looking.cut_bytes(first) == trimmer.cut_bytes(first), "also who saw them while they were long"
    assert trimmer.cut_bytes(first) == 10 * SEGMENT_BYTES - used
    assert trimmer.cut_bytes(first + 9) == 0, "the last one is as long as ever"
    assert used < 3 * SEGMENT_BYTES

    positions = AppliedWorld(world, rng).positions
    host = HealingHost(world, positions, Progress(positions.current))
    host.server.note()
    host.quota.segment_bytes = 1 << POSITION_SHIFT
    host.quota.quota_bytes = 4 << POSITION_SHIFT
    assert host.progress.durable.segment - first >= 9 and host.quota.is_over(), "as places in the journal count"
    real = Trimmer(world.journal_storage, MACHINE_ID)  # as if its segments were of the usual length
    real.look()
    host.quota.cut_bytes = real.cut_bytes
    assert not host.quota.is_over()
    seldom = Trimmer(world.journal_storage, MACHINE_ID)
    has_looked = threading.Event()

    def look() -> None:
        seldom.look()
        has_looked.set()

    host.quota.cut_bytes, host.quota.look = seldom.cut_bytes, look
    assert host.quota.is_over(), "as was seen last"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.quota.run)
        assert await trio.to_thread.run_sync(has_looked.wait, 10)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    assert not host.quota.is_over() and not host.dirty.given_up.gaps, "who is not over it in truth gives nothing up"
    host.progress.note_acknowledged(Cursor(lsn=1, segment=first, offset=SEGMENT_HEADER_BYTES + BLOCK + 64))
    assert not host.quota.is_over()
    await trio.lowlevel.checkpoint()
    host.close()
    world.close()


async def test_what_was_allowed_a_moment_ago_counts_before_anything_is_given_up(
    rng: random.Random, scratch: Path
) -> None:
    """`asrfs set journal_quota=…` while a fast writer is at it: nobody looks at the quota before the next tick."""
    world = world_with(2, rng)
    host = HealingHost(world, AppliedWorld(world, rng).positions, Progress(Positions()))
    host.server.note()
    host.quota.segment_bytes = host.quota.quota_bytes = 1
    host.quota.cut_bytes = lambda first_segment: 0
    machine = MachineConfig(id="0" * 32, name="web1")
    state = SimpleNamespace(root=scratch, journal=scratch, load_machine=lambda: machine)
    trimmer, threads = Trimmer(world.journal_storage, MACHINE_ID), trio.CapacityLimiter(2)
    has_looked = threading.Event()

    def settings() -> Settings:
        has_looked.set()
        return Settings(journal_quota_bytes=1 << 40)

    Housekeeping(state, trimmer, host.progress, host.quota.alarms, threads, settings, host.quota)  # type: ignore[arg-type]
    assert host.quota.is_over()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.quota.run)
        assert await trio.to_thread.run_sync(has_looked.wait, 10)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    assert not host.quota.is_over() and not host.dirty.given_up.gaps
    world.close()
