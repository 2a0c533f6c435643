"""A host that fills its disks into a store that was brought a copy: real sessions on both sides; wire, time in memory.

The oracle is bytes: what the store has is what the host has, whatever the seed holds and whoever goes away when.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from asrfs.protocol.messages import Welcome
from asrfs.replication import seeding
from asrfs.storage.directory import open_path
from replica_store.ingest import session
from replica_store.points.builder import build_states
from replica_store.points.point_disk import FrameCache, PointDisk
from tests.fakes.journal_world import MACHINE_ID
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_comparing import SIZES, Host

CHUNK = 64 << 10
MIB = 1 << 20
ID = MACHINE_ID.hex()


class SeededHost(Host):
    """A machine of which the first disk has content that is filled in, and of which a copy was brought."""

    def __init__(self, store: StoreWorld, rng: random.Random, nursery: trio.Nursery) -> None:
        super().__init__(store, rng, segment_bytes=4 * MIB)
        self._nursery = nursery
        self.source.seeds.names = lambda: {0: "d0", 1: "d1"}

    def begin(self) -> None:
        for task in (self.ticker.run, self.applier.run, self.shipper.run):
            self._nursery.start_soon(task)

    def fill_all(self) -> None:
        disk = self.world.disks[0]
        for offset in range(0, disk.size_bytes, 1 << 20):
            disk.fill(offset, min(1 << 20, disk.size_bytes - offset))

    def seed(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        image, vault = open_path(str(path)), self.store.vault
        with vault.seeds.lock(ID):
            vault.seeds.put(ID, "d0", image, vault.keys_of(ID), lambda done, total: None)
        image.close()

    def at_store(self, slot: int) -> bytes:
        vault = self.store.vault
        lsn = vault.received_lsn(ID)
        disks = [disk for disk in vault.disks_at(ID, lsn) if disk.slot == slot]
        state = build_states(vault, ID, lsn, disks)[slot]
        return PointDisk(state, FrameCache(vault)).read(0, disks[0].size_bytes)

    def content(self, slot: int) -> bytes:
        return bytes(self.world.model.disks_at(len(self.world.model.records))[slot])


@asynccontextmanager
async def seeded(scratch: Path, rng: random.Random) -> AsyncIterator[SeededHost]:
    """Nothing runs yet: `begin` does."""
    async with make_world(scratch) as store, trio.open_nursery() as nursery:
        host = SeededHost(store, rng, nursery)
        for at in range(0, SIZES[0], CHUNK):
            host.world.disks[0].write(at, rng.randbytes(min(CHUNK, SIZES[0] - at)))
        yield host
        nursery.cancel_scope.cancel()
    host.world.close()


async def settled(host: SeededHost) -> None:
    """Everything is at the store, byte for byte."""
    lsn = (await host.sync()).durable.lsn
    await host.ticker.tick()
    with trio.fail_after(600):
        await host.progress.wait_until(lambda: host.progress.acknowledged.lsn >= lsn)
    for slot in range(len(SIZES)):
        assert host.at_store(slot) == host.content(slot), "I9"


async def test_what_the_seed_has_does_not_travel(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with seeded(scratch, rng) as host:
        content = bytearray(host.content(0))
        for at in (5, 3 * CHUNK, 60 * CHUNK + 7):
            content[at] ^= 1
        host.seed(scratch / "image", bytes(content))
        host.fill_all()
        host.begin()
        await settled(host)
        seeds = host.source.seeds
        least = SIZES[0] - 5 * 2 * CHUNK  # three frames of two chunks that differ, and where writes and the end are
        assert seeds.bytes_left_out >= least
        assert not seeds.is_useless
        host.write(50)
        host.fill_all()
        host.write(50)
        await settled(host)
        assert not seeds.is_useless, "what was written since is no part of the seed, and travels"


async def test_connections_that_come_and_go(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with seeded(scratch, rng) as host:
        host.seed(scratch / "image", host.content(0))
        host.begin()
        for _ in range(6):
            host.fill_all()
            host.write(20)
            await host.sync()
            await host.ticker.tick()
            for _ in range(rng.randrange(60)):
                await trio.lowlevel.checkpoint()
            if host.wires:
                await host.cut()
        await settled(host)
        assert not host.source.seeds.is_useless
        assert host.source.seeds.bytes_left_out > MIB


async def test_a_seed_that_is_swapped_after_it_was_matched(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """The store said that it has something, and has it no more: the object is not taken, then everything is sent."""
    async with seeded(scratch, rng) as host:
        host.seed(scratch / "image", host.content(0))
        host.begin()
        await settled(host)
        pause = host.store.listener.pause = trio.Event()
        host.fill_all()
        await host.sync()
        await host.ticker.tick()
        while not host.source.seeds.bytes_left_out:
            await pass_time(0.1)
        host.seed(scratch / "image", rng.randbytes(SIZES[0]))
        host.store.listener.pause = None
        pause.set()
        await settled(host)
        assert host.source.seeds.is_useless
        assert host.alarms.now() == []


async def test_a_seed_that_comes_later(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with seeded(scratch, rng) as host:
        host.fill_all()
        host.begin()
        await settled(host)
        assert host.source.seeds.bytes_left_out == 0
        host.seed(scratch / "image", host.content(0))
        await pass_time(2 * seeding.ASK_AGAIN_S)
        host.fill_all()
        await settled(host)
        assert host.source.seeds.bytes_left_out > 4 * MIB


async def test_a_store_of_before_seeds_is_not_asked(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    def welcome_of_before(**fields: Any) -> Welcome:
        return Welcome(**fields | {"takes_matches": False})

    monkeypatch.setattr(session, "Welcome", welcome_of_before)
    monkeypatch.setattr(session, "match", None)
    async with seeded(scratch, rng) as host:
        host.seed(scratch / "image", host.content(0))
        host.fill_all()
        host.begin()
        await settled(host)
        assert host.source.seeds.bytes_left_out == 0
