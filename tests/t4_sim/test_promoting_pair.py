"""Host and store of a promotion together: guests write until they may not, the connection breaks at any moment, and
what comes back is, byte for byte, what was there at the point.

Real promoter, rewriter, shipper, applier, journal, sessions and vault; wire, time and disks in memory.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from asrfs.errors import RefusedError
from asrfs.format.record import Kind
from asrfs.model.machine import NO_SLOT, DiskConfig, DiskRecord, MachineConfig, encode_disk
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.protocol.messages import Fetch
from asrfs.replication import rewriter
from asrfs.replication.rewriter import Rewriter
from replica_store.points import changed_since
from replica_store.points.builder import build_states
from replica_store.points.point_disk import FrameCache, PointDisk
from replica_store.vault.operations import ChosenPoint
from replica_store.vault.promotions import PromotedMachine, Promotion, promotion, save
from tests.fakes.comparing import InlineFetching
from tests.fakes.journal_world import MACHINE_ID
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_comparing import BLOCK, SIZES, Host
from tests.t4_sim.test_promoting import InlinePromoter, nothing_lags

__all__ = ["nothing_lags"]
ID = MACHINE_ID.hex()


class PairHost(Host):
    """A host whose disks may be brought back."""

    def __init__(self, store: StoreWorld, rng: random.Random) -> None:
        super().__init__(store, rng)
        self.is_fenced = False
        self.refused = 0
        self.machine = MachineConfig(id=ID, name="web1", disks=tuple(self.disks))
        self.announced = {disk.slot: DiskRecord.of(disk) for disk in self.disks}
        self.promoter = InlinePromoter(
            storage=self.world.storage,
            outlet=self.source.outlet,
            server=self,  # type: ignore[arg-type]
            progress=self.progress,
            alarms=self.alarms,
            rewriter=Rewriter(self.source.outlet, self, self.progress),  # type: ignore[arg-type]
            threads=trio.CapacityLimiter(1),
            machine=lambda: self.machine,
            edit_machine=self._edit,
            check=lambda: None,
            users=list,
            drain=self._drain,
            mark=self._mark,
            settle=self._settle,
            lacking=frozenset,
            now_ns=lambda: 7,
        )
        self.source.promotion = self.promoter.heard

    async def reread_fence(self) -> None:
        await trio.lowlevel.checkpoint()
        self.is_fenced = self.world.storage.exists("promoting.json")

    async def reread_disks(self) -> None:
        for disk in self.machine.disks:
            record = DiskRecord.of(disk)
            if self.announced[disk.slot] != record:
                self.world.journal.append(Kind.DISK, disk.slot, 0, 0, encode_disk(record))
                self.announced[disk.slot] = record

    async def rewrite(
        self, slot: int, extents: Sequence[tuple[int, int]], content: bytes, zeros: Sequence[tuple[int, int]]
    ) -> int:
        await trio.lowlevel.checkpoint()
        assert self.is_fenced
        at = 0
        for offset, length in extents:
            self.world.disks[slot].write(offset, content[at : at + length])
            at += length
        for offset, length in zeros:
            self.world.disks[slot].discard(offset, length)
        return self.world.journal.appended_lsn

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
            await trio.sleep(self.rng.random())  # sleep: virtual, between two breaks
            with suppress(trio.BusyResourceError):
                await self.cut()

    async def point(self) -> int:
        lsn = await self._mark("point", "")
        await self._settle(lsn)
        return lsn

    async def _drain(self) -> None:
        await self._settle((await self.sync()).durable.lsn)

    async def _settle(self, lsn: int) -> None:
        self.shipper.hurry(lsn)
        self.applier.hurry(lsn)
        self.ticker.poke()
        await self.progress.wait_until(lambda: min(self.progress.applied.lsn, self.progress.acknowledged.lsn) >= lsn)

    async def _mark(self, name: str, note: str) -> int:
        marker = MarkerRecord(id=f"{self.rng.getrandbits(128):032x}", name=name)
        self.world.journal.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(marker))
        lsn = self.world.journal.appended_lsn
        await self.sync()
        return lsn

    def _edit(self, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        self.machine = change(self.machine)
        return self.machine


@asynccontextmanager
async def pair(scratch: Path, rng: random.Random) -> AsyncIterator[PairHost]:
    async with make_world(scratch) as store, trio.open_nursery() as nursery:
        store.listener.fetching = InlineFetching(store.vault, 0.05)
        store.nursery.start_soon(store.listener.promotions.run)
        host = PairHost(store, rng)
        host.write(200)
        tasks = (host.ticker.run, host.applier.run, host.applier.run_trimming, host.shipper.run)
        for task in (*tasks, host.promoter.run, host.write_for_ever):
            nursery.start_soon(task)
        yield host
        nursery.cancel_scope.cancel()
    host.world.close()


def ask(store: StoreWorld, number: int, lsn: int, disks: Sequence[DiskConfig]) -> str:
    point = ChosenPoint(selector=f"lsn:{lsn}", lsn=lsn, epoch=1, time_ns=1)
    member = PromotedMachine(
        machine_id=ID, machine="web1", point=point, records=tuple(map(DiskRecord.of, disks)), boot=b""
    )
    made = Promotion(
        id=f"{number:032x}",
        target="web1",
        selector=point.selector,
        group=None,
        state="preparing",
        machines=(member,),
        begun_ns=number,
        until_ns=(1 << 63) - 1,
    )
    return save(store.path, lambda vault: (made,)).id


async def ended(store: StoreWorld, promotion_id: str) -> Promotion:
    with trio.fail_after(5000):
        while not (found := promotion(store.vault.catalog, promotion_id)).is_over:
            await pass_time(0.5)
    return found


def at_store(store: StoreWorld, lsn: int) -> list[bytes]:
    states = build_states(store.vault, ID, lsn, store.vault.disks_at(ID, lsn))
    return [PointDisk(states[slot], FrameCache(store.vault)).read(0, size) for slot, size in enumerate(SIZES)]


def check(host: PairHost, done: Promotion, lsn: int) -> None:
    (member,) = done.machines
    assert done.state == "done", done.causes
    assert member.before_lsn is not None and member.end_lsn is not None
    model, vault = host.world.model, host.store.vault
    then = [bytes(each) for each in model.disks_at(lsn)]
    assert at_store(host.store, member.end_lsn) == then == at_store(host.store, lsn), "I9"
    assert [bytes(each) for each in model.disks_at(member.end_lsn)] == then, "at the host"
    was = [bytes(each) for each in model.disks_at(member.before_lsn)]
    assert at_store(host.store, member.before_lsn) == was, "I7: what was there"
    listed = {point.lsn for point in vault.points(ID)}
    assert {member.before_lsn, member.end_lsn} <= listed, "both are points"
    assert not [at for at in listed if member.before_lsn < at < member.end_lsn], "I5: between them there is none"


async def test_i5_i7_and_i9_back_and_forth_while_the_connection_breaks(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rewriter, "NOTED_EVERY_BYTES", 20_000)
    monkeypatch.setattr(changed_since, "FETCHED_BYTES_MAX", 2 * BLOCK)  # segments are short
    async with pair(scratch, rng) as host, trio.open_nursery() as nursery:
        store, points = host.store, []
        for number in range(1, 11):
            if number == 3:
                nursery.start_soon(host.break_links)
            points.append(await host.point())
            await pass_time(rng.random() * 3)
            lsn = rng.choice(points)
            done = await ended(store, ask(store, number, lsn, host.disks))
            check(host, done, lsn)
            with trio.fail_after(100):
                while host.is_fenced:
                    await pass_time(0.5)
        assert host.refused and len(host.wires) > 4, "connections broke"
        nursery.cancel_scope.cancel()


async def test_who_asks_for_what_no_promotion_gives_back_is_refused(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        await host.point()
        wanted = Fetch(number=0, slot=0, disk_id=f"{0:032x}", size_bytes=SIZES[0], lsn=2, offset=0)
        with pytest.raises(RefusedError, match="no promotion"):
            await host.source.outlet.fetch(wanted)
