"""The dirty map cannot be read any more, or is gone: writes go on, and comparing finds what the map would have said."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from asrfs.errors import IntegrityError
from asrfs.format.record import Kind
from asrfs.model.dirty_map import Reason
from asrfs.model.machine import DiskConfig
from asrfs.model.positions import Positions
from asrfs.replication.dirty_map_file import load_dirty_map
from asrfs.replication.lost_map import find_dirty_map, lost_text, open_dirty_map, unknown_of, unknown_slots
from asrfs.storage.interface import read_whole, write_atomically
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_long_outage import check_points
from tests.t4_sim.test_resync import (
    CHUNK,
    KEYS,
    SIZES,
    Host,
    ScriptedStore,
    come_back,
    go_away,
    small_runs,
)

__all__ = ["small_runs"]
NAME = "dirty.map"
Damage = Callable[[CrashStorage], None]


class ComparingHost(Host):
    """Compares what the store has with its images, by bytes. `compared`: how often each disk was."""

    compared: int

    def begin(self) -> ComparingHost:
        self.compared = 0
        self.healing.filler.compare = self._compare
        return self

    async def _compare(self, disks: Sequence[DiskConfig]) -> dict[int, list[int]]:
        await trio.lowlevel.checkpoint()
        assert not self.dirty.given_up.covers(self.progress.acknowledged.lsn), "the store lacks what was given up"
        self.compared += len(disks)
        self.positions.save()
        theirs = self.replica()
        return {
            disk.slot: [
                at // CHUNK
                for at in range(0, disk.size_bytes, CHUNK)
                if self.applied.image(disk.slot)[at : at + CHUNK] != theirs[disk.slot][at : at + CHUNK]
            ]
            for disk in disks
        }


def flipped(storage: CrashStorage) -> None:
    content = bytearray(read_whole(storage, NAME))
    content[len(content) // 2] ^= 1
    write_atomically(storage, NAME, content)


def cut_short(storage: CrashStorage) -> None:
    write_atomically(storage, NAME, read_whole(storage, NAME)[:-1])


def gone(storage: CrashStorage) -> None:
    storage.unlink(NAME)


DAMAGES = (flipped, cut_short, gone)


async def away_and_over(host: Host) -> None:
    """The journal begins behind what the store has."""
    await go_away(host)
    await host.write_for(60)
    assert host.dirty.given_up.covers(host.progress.acknowledged.lsn)


async def half_filled(host: Host) -> None:
    """The store knows what was given up, and has some of it."""
    await away_and_over(host)
    left = host.dirty.map.dirty_chunks(0)
    sound, calls = host.healing.server.fill, [3]

    async def fill(slot: int, offset: int, length: int) -> int:
        calls[0] -= 1
        if calls[0] < 0:
            raise IntegrityError("enough")
        return await sound(slot, offset, length)

    host.healing.server.fill = fill  # type: ignore[method-assign]
    come_back(host)
    await host.until(60, phase="failed")
    assert left > 0 and host.dirty.map.slots() and not host.dirty.given_up.covers(host.progress.acknowledged.lsn)


async def whole(host: Host) -> None:
    """There was a gap once."""
    await away_and_over(host)
    come_back(host)
    await host.until_whole()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("before", [away_and_over, half_filled, whole])
async def test_what_the_map_would_have_said_is_found_by_comparing(
    before: Callable[[Host], object], damage: Damage, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with trio.open_nursery() as nursery:
        store = ScriptedStore(nursery, KEYS)
        host: Host = ComparingHost(store, rng).begin()
        async with trio.open_nursery() as life:
            life.start_soon(host.run)
            host.write(5)
            await host.until_whole()
            await host.healing.make_point("before")
            await host.until_whole()
            await before(host)  # type: ignore[misc]
            life.cancel_scope.cancel()
        await store.hang_up()
        world = host.world.restart()
        host.healing.close()
        damage(world.storage)
        is_lost = damage is not gone or before is not whole
        host = ComparingHost(store, rng, world).begin()
        assert bool(unknown_slots(host.dirty.map)) == is_lost
        assert ("unreadable-1" in lost_text(world.storage, NAME)) == (damage is not gone)
        fills = sum(each.kind == Kind.FILL for each in store.records)
        writes = len(world.model.records)
        nursery.start_soon(host.run)
        await host.write_for(5)
        assert len(world.model.records) > writes, "I8"
        store.is_down = False
        host.shipper.retry_now()
        await host.until_whole()
        host.check_replica()
        assert host.compared == (2 if is_lost else 0)
        _check_sent_once(store, fills)
        assert load_dirty_map(world.storage, NAME)[0].slots() == []
        last = {"before", "the resync is complete"}
        check_points(host, last)
        nursery.cancel_scope.cancel()
    host.close()


def _check_sent_once(store: ScriptedStore, fills: int) -> None:
    """And nothing that the store has already."""
    sent = [(each.slot, each.offset) for each in store.records if each.kind == Kind.FILL][fills:]
    assert len(sent) == len(set(sent)) <= sum(-(-size // CHUNK) for size in SIZES)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_killed_again_before_it_has_compared_it_compares(
    damage: Damage, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with trio.open_nursery() as nursery:
        store = ScriptedStore(nursery, KEYS)
        host: Host = ComparingHost(store, rng).begin()
        for number in range(3):
            async with trio.open_nursery() as life:
                life.start_soon(host.run)
                if number:
                    await host.write_for(10)
                else:
                    await host.until_whole()
                    await away_and_over(host)
                life.cancel_scope.cancel()
            world = host.world.restart()
            host.healing.close()
            if number == 0:
                damage(world.storage)
            host = ComparingHost(store, rng, world).begin()
            assert unknown_slots(host.dirty.map) == [0, 1], "also by the next agent"
        nursery.start_soon(host.run)
        store.is_down = False
        await host.until_whole()
        host.check_replica()
        nursery.cancel_scope.cancel()
    host.close()


async def test_a_full_filesystem_keeps_no_agent_from_starting(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    """I8: it is what makes room."""
    async with trio.open_nursery() as nursery:
        store = ScriptedStore(nursery, KEYS)
        host: Host = ComparingHost(store, rng).begin()
        async with trio.open_nursery() as life:
            life.start_soon(host.run)
            await host.until_whole()
            await away_and_over(host)
            life.cancel_scope.cancel()
        world = host.world.restart()
        host.healing.close()
        flipped(world.storage)
        fault = world.storage.inject(Fault(at=0, kinds=frozenset(("create", "link"))))
        host = ComparingHost(store, rng, world).begin()
        assert fault.fired and unknown_slots(host.dirty.map) == [0, 1]
        nursery.start_soon(host.run)
        await host.write_for(5)
        store.is_down = False
        await host.until_whole()
        host.check_replica()
        nursery.cancel_scope.cancel()
    host.close()


def test_one_that_was_never_written_is_not_missed(rng: random.Random) -> None:
    """An adopted disk whose agent has never run."""
    host = Host(ScriptedStore(None, KEYS), rng)  # type: ignore[arg-type]
    machine = host.healing.machine.set_gaps([1], True)
    storage, journal = CrashStorage(), host.world.journal_storage
    assert open_dirty_map(storage, NAME, journal, machine, Positions()).map.slots() == []
    assert storage.exists(NAME), "from now on it would be missed"
    host.close()


def test_who_only_looks_changes_nothing(rng: random.Random) -> None:
    host = Host(ScriptedStore(None, KEYS), rng)  # type: ignore[arg-type]
    storage, machine = CrashStorage(), host.healing.machine.load()
    write_atomically(storage, NAME, b"no map")
    found = find_dirty_map(storage, NAME, host.world.journal_storage, machine, Positions())
    assert [found.map.reasons(slot) for slot in found.map.slots()] == [Reason.UNKNOWN] * 2
    assert (storage.names(""), read_whole(storage, NAME)) == ([NAME], b"no map")
    host.close()


async def test_a_job_that_cannot_compare_is_tried_again(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with trio.open_nursery() as nursery:
        store = ScriptedStore(nursery, KEYS)
        host = ComparingHost(store, rng).begin()
        host.dirty.map = unknown_of(host.healing.machine.load())
        sound, tries = host.healing.filler.compare, list[float]()

        async def fail(disks: Sequence[DiskConfig]) -> dict[int, list[int]]:
            await trio.lowlevel.checkpoint()
            tries.append(trio.current_time())
            raise IntegrityError("the store cannot compare")

        host.healing.filler.compare = fail
        nursery.start_soon(host.run)
        await pass_time(8 * 60)
        assert len(tries) == 4 and "resync" in host.alarms
        host.healing.filler.compare = sound
        await host.resyncer.order(now=False)
        await host.until_whole()
        host.check_replica()
        nursery.cancel_scope.cancel()
    host.close()
