"""A host that compares its images with a store: real journal, applier, shipper and sessions; wire and time in memory.

The oracle is bytes: what is different after everything has come is what the test changed behind everybody's back.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from asrfs.errors import RefusedError, TemporaryError
from asrfs.format.record import Kind
from asrfs.journal.reader import JournalReader
from asrfs.model.digest_tree import LEAF_BYTES, Region
from asrfs.model.machine import DiskConfig, DiskRecord, encode_disk
from asrfs.model.positions import Cursor, Positions
from asrfs.protocol.messages import Compare
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier import Applier
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.comparer import PATIENCE_S, Comparer, Comparison
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.image_digests import digest_image
from asrfs.replication.link import Link
from asrfs.replication.object_builder import MachineKeys, ObjectBuilder
from asrfs.replication.outlet import Outlet
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.source import ShippingSettings, Source
from asrfs.replication.ticker import Ticker
from asrfs.replication.trimmer import Trimmer
from asrfs.transport.backoff import Backoff
from replica_store.ingest.session import NoComparing
from tests.fakes.applied_world import StoredImages
from tests.fakes.comparing import InlineComparing
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, Model
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_store import Wire
from tests.fakes.virtual_time import pass_time

BLOCK = 4096
SIZES = (5 * (1 << 20) + 512, 6 * LEAF_BYTES)
T = TypeVar("T")


class InlineTask(ApplierTask):
    slow_s = 0.0

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.sleep(self.slow_s)  # sleep: virtual, what its work takes
        return function(*arguments)


class InlineSource(Source):
    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class Host:
    """A machine with two disks, its agent's parts, and the disk server that they ask. It digests its own images."""

    def __init__(self, store: StoreWorld, rng: random.Random, **journal: Any) -> None:
        self.rng = rng
        self.store = store
        keys = store.enrol(number=int(MACHINE_ID.hex(), 16)).keys
        storage = CrashStorage()
        images = storage.below("images")
        for slot, size in enumerate(SIZES):
            with closing(images.create(str(slot))) as file:
                file.truncate(size)
        model = Model(tuple(bytes(size) for size in SIZES))
        self.world = JournalWorld(storage, model, seed=rng.getrandbits(32), **journal)
        self.disks = [
            DiskConfig(slot=slot, id=f"{slot:032x}", name=f"d{slot}", size_bytes=size)
            for slot, size in enumerate(SIZES)
        ]
        for disk in self.disks:
            self.world.journal.append(Kind.DISK, disk.slot, 0, 0, encode_disk(DiskRecord.of(disk)))
        self.images = StoredImages(images, SIZES)
        self.positions_file = PositionsFile(Positions(), lambda positions: None)
        self.progress = Progress(self.positions_file.current)
        self.alarms = Alarms()
        self.digest_hook: Callable[[], None] = lambda: None
        self.wires: list[Wire] = []
        journal, threads, turn = self.world.journal_storage, trio.CapacityLimiter(1), trio.Lock()
        self.applier = InlineTask(
            Applier(JournalReader(journal, MACHINE_ID), self.positions_file, self.images, round_bytes_max=20_000),
            Trimmer(journal, MACHINE_ID),
            self,
            self.positions_file,
            self.progress,
            self.alarms,
            threads,
            turn,
        )
        self.source = InlineSource(
            machine_id=MACHINE_ID,
            machine_name="web1",
            journal=journal,
            reader=JournalReader(journal, MACHINE_ID),
            builder=ObjectBuilder(JournalReader(journal, MACHINE_ID)),
            positions=self.positions_file,
            progress=self.progress,
            settings=ShippingSettings(object_size=30 * BLOCK),
            threads=threads,
            journal_turn=turn,
        )
        access = StoreAccess(self.connect, MachineKeys(MACHINE_ID, keys.index_key, keys.payload_key))
        self.shipper = Shipper(self.source, access, self.alarms, Link(), Backoff(random.Random(1)))
        self.ticker = Ticker(self, self.progress, self.alarms, lambda: 0.25)
        self.comparer = Comparer(
            self.source.outlet,
            self,
            self,
            self.progress,
            self.applier.exact,
            self.applier.hurry,
            self.shipper.hurry,
        )

    async def connect(self) -> Wire:
        ours, theirs = trio.testing.memory_stream_pair()
        self.store.nursery.start_soon(self.store._serve, Wire(theirs), self.store.certificates[MACHINE_ID.hex()])
        self.wires.append(Wire(ours))
        return self.wires[-1]

    async def cut(self) -> None:
        await self.wires[-1].aclose()

    # ---- the disk server ----

    async def positions(self) -> HostPositions:
        await trio.lowlevel.checkpoint()
        journal = self.world.journal
        durable = Cursor(
            lsn=journal.durable_lsn, segment=journal.segment, offset=journal.offset, time_ns=journal.last_time_ns
        )
        return HostPositions(journal.appended_lsn, durable, 1, None)

    async def sync(self) -> HostPositions:
        self.world.sync()
        return await self.positions()

    async def applied(self, lsn: int, segment: int) -> None:
        self.world.journal.drop_through(segment, [disk.map for disk in self.world.disks])

    async def marker(self, payload: bytes) -> tuple[int, int]:
        raise TemporaryError("not in this test")

    async def fill(self, slot: int, offset: int, length: int) -> int:
        raise TemporaryError("not in this test")

    async def reread_disks(self) -> None: ...

    # ---- digesting ----

    async def pace(self) -> None:
        await trio.lowlevel.checkpoint()

    async def digest(self, disk: DiskConfig, region: Region) -> bytes:
        self.digest_hook()
        await trio.sleep(0.01)  # sleep: virtual, what reading takes
        image = self.images.image(disk.slot)
        assert image is not None
        return digest_image(image.file, region).leaves

    # ---- what happens ----

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            disk = self.rng.choice(self.world.disks)
            at = self.rng.randrange(disk.size_bytes // BLOCK) * BLOCK
            if self.rng.random() < 0.2:
                disk.discard(at, BLOCK)
            else:
                disk.write(at, self.rng.randbytes(BLOCK))

    async def write_on(self) -> None:
        """For ever, in bursts, some of them on the same few blocks."""
        while True:
            self.write(self.rng.randint(1, 6))
            for _ in range(self.rng.randint(0, 4)):
                self.world.disks[0].write(3 * BLOCK, self.rng.randbytes(BLOCK))
            await trio.sleep(self.rng.choice((0.001, 0.01, 0.3)))  # sleep: virtual, between writes

    async def lag(self) -> None:
        """For ever: now the store is slow, now the applier."""
        while True:
            pause = self.store.listener.pause = trio.Event() if self.rng.random() < 0.5 else None
            self.applier.slow_s = 0.0 if pause is not None else self.rng.random() / 4
            try:
                await trio.sleep(self.rng.random())  # sleep: virtual, between two moods
            finally:
                self.store.listener.pause = None
                if pause is not None:
                    pause.set()

    def flip(self, slot: int, at: int) -> None:
        """In the image, behind everybody's back."""
        image = self.images.image(slot)
        assert image is not None
        image.file.write_at([bytes([image.file.read_at(1, at)[0] ^ 1])], at)

    async def verify(self) -> tuple[Comparison, Comparison]:
        found = await self.comparer.compare(self.disks)
        return found, await self.comparer.settle(self.disks, found)


@asynccontextmanager
async def comparing(scratch: Path, rng: random.Random, *, writes: int = 300) -> AsyncIterator[Host]:
    async with make_world(scratch) as store, trio.open_nursery() as nursery:
        store.listener.comparing = InlineComparing(store.vault)
        host = Host(store, rng)
        host.write(writes)
        tasks = (host.ticker.run, host.applier.run, host.applier.run_trimming, host.shipper.run)
        for task in tasks:
            nursery.start_soon(task)
        yield host
        nursery.cancel_scope.cancel()
    assert host.alarms.now() == []
    host.world.close()


def plain(found: Comparison) -> dict[int, list[int]]:
    return {slot: list(chunks) for slot, chunks in found.different.items()}


async def settled(host: Host) -> None:
    """Everything written is applied and at the store."""
    lsn = (await host.sync()).durable.lsn
    await host.ticker.tick()
    await host.progress.wait_until(lambda: min(host.progress.applied.lsn, host.progress.acknowledged.lsn) >= lsn)


async def test_equal_is_equal_and_costs_next_to_nothing(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng) as host:
        await settled(host)
        steps: list[tuple[int, int]] = []
        found = await host.comparer.compare(host.disks, lambda done, total: steps.append((done, total)))
        assert (found.chunks_compared, plain(found), found.chunks_different) == (81 + 6, {}, 0)
        assert 0 < found.bytes_sent < 600
        assert steps[-1] == (sum(SIZES), sum(SIZES))


async def test_a_flipped_byte_is_exactly_its_chunk(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng) as host:
        await settled(host)
        flipped = {0: sorted({rng.randrange(SIZES[0]) for _ in range(5)} | {SIZES[0] - 1}), 1: [0, SIZES[1] - 1]}
        for slot, places in flipped.items():
            for at in places:
                host.flip(slot, at)
        found, really = await host.verify()
        expected = {slot: sorted({at // LEAF_BYTES for at in places}) for slot, places in flipped.items()}
        assert plain(found) == plain(really) == expected


async def test_a_difference_is_found_under_writes_and_nothing_else(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """Every comparison sees records on their way. None of them counts; the byte that was flipped always does."""
    async with comparing(scratch, rng) as host, trio.open_nursery() as nursery:
        await settled(host)
        nursery.start_soon(host.write_on)
        nursery.start_soon(host.lag)
        lagging = 0
        for _ in range(12):
            await pass_time(2 * rng.random())
            found, really = await host.verify()
            lagging += found.chunks_different
            assert plain(really) == {}, "I9: a record on its way is no difference"
        assert lagging > 20, "comparisons ran into records on their way"
        for disk in host.world.disks:  # of the last sectors nothing else is written
            host.flip(disk.slot, 0) if disk.slot else host.flip(0, SIZES[0] - 1)
        host.world.disks[1].write(0, rng.randbytes(BLOCK))  # this heals the one of disk 1
        for _ in range(3):
            _, really = await host.verify()
            assert plain(really) == {0: [80]}, "the flipped byte, which nobody wrote over"
        nursery.cancel_scope.cancel()


async def test_what_is_on_its_way_is_waited_for_and_not_sent_twice(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """A backlog is shipped while disks are compared: without waiting for it, what it writes differs."""
    async with comparing(scratch, rng) as host:
        await settled(host)
        for waits in (False, True):
            await host.cut()
            pause = host.store.listener.pause = trio.Event()
            host.write(60)
            lsn = (await host.sync()).durable.lsn
            await host.ticker.tick()
            await host.progress.wait_until(lambda lsn=lsn: host.progress.applied.lsn >= lsn)  # type: ignore[misc]
            assert host.progress.acknowledged.lsn < lsn
            found: list[Comparison] = []

            async def compare(waits: bool = waits, found: list[Comparison] = found) -> None:
                if waits:
                    await host.comparer.catch_up()
                found.append(await host.comparer.compare(host.disks))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(compare)
                await pass_time(1)
                assert not (waits and found)
                pause.set()
            assert bool(plain(found[0])) == (not waits)


async def test_a_store_that_is_away_is_not_caught_up_with(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng) as host:
        await settled(host)
        host.shipper.pause()
        host.write(3)
        began = trio.current_time()
        with pytest.raises(TemporaryError, match="no connection"):
            await host.comparer.catch_up()
        assert trio.current_time() - began == pytest.approx(PATIENCE_S, abs=10)
        host.shipper.resume()
        await host.comparer.catch_up()
        assert host.progress.acknowledged.lsn == host.world.journal.durable_lsn


async def test_images_that_a_broken_span_has_passed_are_not_taken_for_exact(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """A datasync fails after a span was written: blocks of later records are in the image, the position is not."""
    async with comparing(scratch, rng) as host:
        await settled(host)
        for at in range(0, 40 * BLOCK, BLOCK):
            host.world.disks[0].write(at, rng.randbytes(BLOCK))
        lsn = (await host.sync()).durable.lsn
        fault = host.world.storage.inject(Fault(at=0, kinds=frozenset(("datasync",))))
        await host.ticker.tick()
        host.applier.hurry(lsn)
        await host.progress.wait_until(lambda: host.progress.acknowledged.lsn >= lsn)
        while not host.alarms.now():
            await pass_time(0.1)
        applied = host.progress.applied.lsn
        assert applied < lsn, "the span was broken off"
        async with host.applier.exact.held(applied) as exact:
            assert exact > applied, "the images hold more than the position says"
        found, really = await host.verify()
        assert (plain(found), plain(really)) == ({}, {})
        assert fault.fired


async def test_a_connection_that_comes_and_goes_is_waited_for(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng) as host, trio.open_nursery() as nursery:
        await settled(host)
        host.flip(0, 77)
        nursery.start_soon(host.write_on)
        connections = len(host.wires)

        async def flap() -> None:
            for _ in range(12):
                await pass_time(0.05)
                await host.cut()

        nursery.start_soon(flap)
        for _ in range(5):
            _, really = await host.verify()
            assert set(really.different) <= {0}
        assert len(host.wires) > connections + 3, "it came and went"
        nursery.cancel_scope.cancel()


async def test_a_store_that_cannot_compare_is_not_asked(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng, writes=3) as host:
        host.store.listener.comparing = NoComparing()
        await settled(host)
        with pytest.raises(RefusedError, match="update it"):
            await host.verify()


async def test_more_questions_than_the_store_takes_wait_here(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """Each is answered, whoever asked and went; the session goes on."""
    async with comparing(scratch, rng, writes=3) as host, trio.open_nursery() as nursery:
        await settled(host)
        asked = Compare(number=0, slot=0, disk_id="0" * 32, size_bytes=SIZES[0], first=0, digests=bytes(32))
        answers: list[int] = []

        async def ask(patience_s: float) -> None:
            with trio.move_on_after(patience_s):
                answers.append((await host.source.outlet.ask(asked)).number)

        for number in range(60):
            nursery.start_soon(ask, 0 if number % 3 == 0 else 100)
        await pass_time(5)
        assert len(answers) == len(set(answers)) >= 40
        assert len(host.wires) == 1, "no session was ended by it"


async def test_what_was_asked_of_a_session_that_ended_fails_and_may_be_asked_again() -> None:
    outlet = Outlet()
    asked = Compare(number=0, slot=0, disk_id="0" * 32, size_bytes=1 << 20, first=0, digests=bytes(32))
    with pytest.raises(TemporaryError, match="no connection"):
        await outlet.ask(asked)
    said: list[Compare] = []

    async def send(request: Compare) -> None:
        await trio.lowlevel.checkpoint()
        said.append(request)

    failures: list[str] = []

    async def ask() -> None:
        try:
            await outlet.ask(asked)
        except TemporaryError as error:
            failures.append(str(error))

    async with trio.open_nursery() as nursery:
        with outlet.opened(send, 2):
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert {request.number for request in said} == {1, 2}, "no more than the store takes"
    assert len(failures) == 5
    assert not outlet.is_open


async def test_what_is_on_its_way_is_no_reason_to_send(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with comparing(scratch, rng) as host:
        await settled(host)
        pause = host.store.listener.pause = trio.Event()
        host.write(40)
        await host.sync()
        await host.ticker.tick()
        await host.progress.wait_until(lambda: host.progress.applied.lsn >= host.world.journal.durable_lsn)
        found = await host.comparer.compare(host.disks)
        assert found.chunks_different > 0, "the store lags"
        host.store.listener.pause = None
        pause.set()
        assert not await host.comparer.is_real(host.disks, found)
        host.flip(0, 3 * LEAF_BYTES)
        found = await host.comparer.compare(host.disks)
        assert plain(found) == {0: [3]}
        assert await host.comparer.is_real(host.disks, found)
