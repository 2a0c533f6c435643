"""Host and store of a planned failover together: guests write until they may not, the connection breaks at any moment,
and what is handed over is, byte for byte, everything that was acknowledged.

Real handing over, rejoiner, comparer, shipper, applier, journal, sessions and vault; wire, time and disks in memory.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import trio
import trio.testing

from asrfs.daemon.handing_over import AWAY_S_MAX, Fencing, HandingOver
from asrfs.format.record import CHANGES, Kind
from asrfs.journal.reader import JournalReader
from asrfs.model.machine import NO_SLOT
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.replication.comparer import Comparison
from replica_store.points.builder import build_states
from replica_store.points.point_disk import FrameCache, PointDisk
from replica_store.vault.operations import (
    ChosenPoint,
    HandoverAsked,
    Operation,
    Places,
    begin,
    change,
    operation,
)
from replica_store.vault.vault import Vault
from tests.fakes.comparing import InlineComparing
from tests.fakes.healing_host import HealingHost
from tests.fakes.journal_world import MACHINE_ID
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_comparing import SIZES, Host
from tests.t4_sim.test_handing_over import Services
from tests.t4_sim.test_rejoin import InlineRejoiner

ID = MACHINE_ID.hex()


class PairHost(Host):
    """A host that may be asked to make way."""

    def __init__(self, store: StoreWorld, rng: random.Random) -> None:
        super().__init__(store, rng)
        self.is_fenced = False
        self.refused = 0
        healing = HealingHost(self.world, self.positions_file, self.progress)
        self.rejoiner = InlineRejoiner(
            self.world.storage,
            self.world.journal_storage,
            MACHINE_ID,
            JournalReader(self.world.journal_storage, MACHINE_ID),
            self,  # type: ignore[arg-type]
            self.progress,
            self.positions_file,
            healing.dirty,
            self.alarms,
            trio.CapacityLimiter(1),
            healing.machine.load,
            lambda change: healing.machine.load(),
            lambda: 7,
        )
        self.source.rejoiner = self.rejoiner
        self.services = Services([])
        self.handing_over = HandingOver(
            rejoiner=self.rejoiner,
            outlet=self.source.outlet,
            check=lambda: None,
            hooks=self.services,
            drain=self._drain,
            fence_and_mark=self._fence_and_mark,
            settle=self._settle,
            compare=self._compare,
        )
        self.source.handover = self.handing_over.heard

    async def reread_fence(self) -> None:
        await trio.lowlevel.checkpoint()
        self.is_fenced = self.world.storage.exists("fenced.json")

    def write(self, count: int = 1) -> None:
        if getattr(self, "is_fenced", False):
            self.refused += 1
        else:
            super().write(count)

    async def write_for_ever(self) -> None:
        while True:
            self.write(self.rng.randint(1, 6))
            await trio.sleep(self.rng.choice((0.001, 0.01, 0.3)))  # sleep: virtual, between writes

    async def break_links(self) -> None:
        while True:
            await trio.sleep(self.rng.random() * 3)  # sleep: virtual, between two breaks
            with suppress(trio.BusyResourceError):
                await self.cut()

    async def _drain(self) -> None:
        await self._settle((await self.sync()).durable.lsn)

    async def _settle(self, lsn: int) -> None:
        self.shipper.hurry(lsn)
        self.applier.hurry(lsn)
        self.ticker.poke()
        await self.progress.wait_until(lambda: min(self.progress.applied.lsn, self.progress.acknowledged.lsn) >= lsn)

    async def _fence_and_mark(self, failover: str, fence: Fencing) -> int:
        await fence()
        self.world.journal.append(
            Kind.MARKER, NO_SLOT, 0, 0, encode_marker(MarkerRecord(id=f"{self.rng.getrandbits(128):032x}"))
        )
        lsn = self.world.journal.appended_lsn
        await self.sync()
        return lsn

    async def _compare(self) -> Comparison:
        return (await self.verify())[1]


@asynccontextmanager
async def pair(scratch: Path, rng: random.Random) -> AsyncIterator[PairHost]:
    async with make_world(scratch) as store, trio.open_nursery() as nursery:
        store.listener.comparing = InlineComparing(store.vault)
        store.nursery.start_soon(store.listener.handovers.run)
        host = PairHost(store, rng)
        host.write(200)
        tasks = (host.ticker.run, host.applier.run, host.applier.run_trimming, host.shipper.run)
        for task in (*tasks, host.rejoiner.run, host.handing_over.run, host.write_for_ever):
            nursery.start_soon(task)
        yield host
        nursery.cancel_scope.cancel()
    host.world.close()


def ask(store: StoreWorld, number: int) -> str:
    made = Operation(
        id=f"{number:032x}",
        machine_id=ID,
        machine="web1",
        kind="planned",
        state="preparing",
        point=ChosenPoint(selector="latest", lsn=1, epoch=1, time_ns=1),
        places=Places(directory="/srv/one", state="/srv/one/state", mount="/srv/one/disks"),
        begun_ns=number,
        handover=HandoverAsked(seconds_max=10_000, until_ns=(1 << 63) - 1),
    )
    return begin(store.path, lambda vault: made).id


def standing(store: StoreWorld, failover: str) -> HandoverAsked:
    found = operation(store.vault.catalog, failover).handover
    assert found is not None
    return found


async def answered(store: StoreWorld, failover: str) -> HandoverAsked:
    with trio.fail_after(2000):
        while not standing(store, failover).is_answered:
            await pass_time(0.5)
    return standing(store, failover)


def end(store: StoreWorld, failover: str) -> None:
    def cancel(vault: Vault, before: Operation) -> Operation:
        return msgspec.structs.replace(before.to("cancelled", 1, "because"), remains=False)

    change(store.path, failover, cancel)


def check_handed(host: PairHost, lsn: int) -> None:
    """Host and store have the same, and that is all that was ever written."""
    world, vault = host.world, host.store.vault
    assert host.is_fenced
    records = world.model.records
    assert not [each for each in records[lsn:] if each.kind in CHANGES], "a guest wrote behind it"
    states = build_states(vault, ID, lsn, vault.disks_at(ID, lsn))
    for slot, (size, content) in enumerate(zip(SIZES, world.model.disks_at(lsn), strict=True)):
        there = PointDisk(states[slot], FrameCache(vault)).read(0, size)
        assert bytes(there) == bytes(content), f"I9: disk {slot} at the store"
        image = host.images.image(slot)
        assert image is not None and bytes(image.file.read_at(size, 0)) == bytes(content), f"disk {slot} at the host"


async def test_i6_and_i9_over_and_back_again_while_the_connection_breaks(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host, trio.open_nursery() as nursery:
        store = host.store
        for number in range(1, 9):
            if number == 3:
                nursery.start_soon(host.break_links)
            await pass_time(rng.random())
            failover = ask(store, number)
            handed = await answered(store, failover)
            assert handed.lsn is not None, handed.error
            check_handed(host, handed.lsn)
            refused = host.refused
            await pass_time(2 * AWAY_S_MAX)
            assert host.is_fenced and host.refused > refused
            check_handed(host, handed.lsn)
            end(store, failover)
            with trio.fail_after(100):
                while not standing(store, failover).is_back:
                    await pass_time(0.5)
            assert not host.is_fenced and not host.world.storage.exists("fenced.json")
        assert len(host.wires) > 20, "connections broke"
        nursery.cancel_scope.cancel()


async def test_what_differs_is_found_and_guests_write_on(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        await host._drain()
        host.flip(0, SIZES[0] - 1)  # the last sectors, which nobody writes
        answer = await answered(host.store, ask(host.store, 1))
        assert answer.lsn is None and answer.is_back and answer.chunks_different == 1
        assert "1 of 87 chunks differ" in str(answer.error) and not host.is_fenced
        refused = host.refused
        await pass_time(10)
        assert host.refused == refused
