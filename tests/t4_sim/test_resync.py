"""The store is away for longer than the journal has room: given up, healed when it is back, whatever happens meanwhile.

Real quota, applier's place, trimmer, filler, resyncer, shipper and log objects against a scripted store; virtual time.
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import IntegrityError, TemporaryError
from asrfs.format.record import Kind
from asrfs.format.segment import POSITION_SHIFT
from asrfs.journal.reader import JournalReader
from asrfs.model.calendar import Window
from asrfs.model.dirty_map import Reason
from asrfs.model.machine import DiskConfig, DiskRecord, decode_disk
from asrfs.replication.dirty_map_file import load_dirty_map
from asrfs.replication.link import Link
from asrfs.replication.object_builder import MachineKeys, ObjectBuilder
from asrfs.replication.progress import Progress
from asrfs.replication.reconciliation import StoreLostError
from asrfs.replication.resyncer import ALARM, HealingRules, Resyncer
from asrfs.replication.rewind import check_kept
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.source import ShippingSettings
from asrfs.replication.trimmer import Limit, Trimmer, freeable
from asrfs.transport.backoff import Backoff
from tests.fakes.applied_world import AppliedWorld
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.healing_host import HealingHost, InlineFiller
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, ModelRecord, put_record
from tests.fakes.scripted_store import GIVEN_UP, ScriptedStore
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_shipper import InlineSource

BLOCK = 4096
CHUNK = 64 << 10
SIZES = (12 * CHUNK + 512, 4 * CHUNK)
SEGMENT_BYTES = 8192 + 80 * 1024
KEYS = MachineKeys(MACHINE_ID, b"i" * 32, b"p" * 32)
QUOTA_SEGMENTS = 6
QUOTA_BYTES = QUOTA_SEGMENTS << POSITION_SHIFT
"""As places in a journal count segments, which here are smaller."""
NEVER = Window(1, 2)


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fits in a segment."""
    monkeypatch.setattr("asrfs.replication.filler.RUN_BYTES_MAX", CHUNK)


class Host:
    """A host with a quota. `window` is that of `resync_window`, `minute` that of its day."""

    def __init__(self, store: ScriptedStore, rng: random.Random, world: JournalWorld | None = None) -> None:
        self.rng = rng
        self.store = store
        self.world = world or JournalWorld(CrashStorage(), sizes=SIZES, segment_bytes=SEGMENT_BYTES)
        if world is None:
            _begin_with_zeros(self.world)
        journal = self.world.journal_storage
        self.applied = AppliedWorld(self.world, rng)
        self.positions = self.applied.positions
        self.progress = Progress(self.positions.current)
        self.healing = HealingHost(self.world, self.positions, self.progress)
        self.alarms = self.healing.alarms
        self.tick_s = 0.25
        self.healing.server.syncs_fills = True  # else many segments are filled between two looks at the lag
        self.dirty = self.healing.dirty
        self.healing.quota.quota_bytes = QUOTA_BYTES
        self.healing.quota.segment_bytes = 1 << POSITION_SHIFT
        self.window, self.minute, self.rpo_s = Window(0, 0), 0, 900.0
        self.resyncer = Resyncer(
            self.healing.filler,
            self.progress,
            self.alarms,
            lambda: True,
            lambda: HealingRules(self.window, self.rpo_s, QUOTA_BYTES),
            lambda: self.minute,
        )
        self.trimmer = Trimmer(journal, MACHINE_ID)
        self.segments_max = 0
        source = InlineSource(
            machine_id=MACHINE_ID,
            machine_name="web1",
            journal=journal,
            reader=JournalReader(journal, MACHINE_ID),
            builder=ObjectBuilder(JournalReader(journal, MACHINE_ID)),
            positions=self.positions,
            progress=self.progress,
            settings=ShippingSettings(object_size=8 * BLOCK),
            threads=trio.CapacityLimiter(1),
            journal_turn=trio.Lock(),
            given_up=lambda: self.dirty.given_up,
        )
        self.shipper = Shipper(
            source, StoreAccess(store.connect, KEYS), self.alarms, Link(), Backoff(random.Random(rng.getrandbits(30)))
        )

    async def run(self) -> None:
        """One life of its agent."""
        async with trio.open_nursery() as nursery:
            for task in (self._tick, self.healing.quota.run, self.resyncer.run, self.shipper.run):
                nursery.start_soon(task)

    async def _tick(self) -> None:
        """What ticker, applier and trimmer do."""
        self.healing.server.announce()
        while True:
            await self.healing.server.sync()
            self.applied.apply_all()
            applied = self.positions.saved.applied
            self.progress.note_applied(applied)
            await self.healing.server.applied(applied.lsn, applied.segment - 1)
            dropped = Limit(applied.lsn, applied.segment - 1)
            self.trimmer.trim(freeable(self.positions, self.dirty.given_up, dropped), 0.0)
            await pass_time(self.tick_s)

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            disk = self.rng.choice(self.world.disks)
            disk.write(self.rng.randrange(disk.size_bytes // BLOCK) * BLOCK, self.rng.randbytes(BLOCK))

    async def write_for(self, seconds: float) -> None:
        """A guest that never waits, and a journal that keeps to its quota."""
        for _ in range(int(seconds * 4)):
            self.write(self.rng.randrange(6))
            self.segments_max = max(self.segments_max, len(self.segments()))
            await pass_time(0.25)

    def segments(self) -> list[str]:
        return [name for name in self.world.journal_storage.names("") if name.endswith(".segment")]

    async def until(self, seconds: float, **state: Any) -> None:
        """Until the resyncer is in this state."""
        with trio.fail_after(seconds):
            while any(getattr(self.resyncer, name) != value for name, value in state.items()):
                await pass_time(1)

    async def until_whole(self, seconds: float = 600) -> None:
        with trio.fail_after(seconds):
            while self.dirty.map.slots() or self.progress.acknowledged.lsn < self.world.journal.appended_lsn:
                await pass_time(1)

    def replica(self) -> list[bytes]:
        """The disks as the store has them now."""
        disks = [bytearray(size) for size in SIZES]
        for each in self.store.records:
            put_record(disks, ModelRecord(each.kind, each.slot, each.offset, each.length, each.content))
        return [bytes(disk) for disk in disks]

    def check_replica(self) -> None:
        assert self.replica() == [self.world.content(slot) for slot in range(2)], "I9"
        last = {each.slot: decode_disk(each.content).gap for each in self.store.records if each.kind == Kind.DISK}
        assert last == {0: False, 1: False}, "the gap is closed"
        assert self.store.records[-1].kind == Kind.MARKER or self.store.records[-1].kind != Kind.FILL

    def close(self) -> None:
        self.healing.close()
        self.world.close()


def _begin_with_zeros(world: JournalWorld) -> None:
    """As disks do that are not adopted: the store takes what it never heard of for zeros."""
    for slot, image in enumerate(world.images):
        image.punch(0, SIZES[slot])
        image.datasync()
    world.model.initial = tuple(bytes(size) for size in SIZES)


@asynccontextmanager
async def protected(rng: random.Random) -> AsyncIterator[tuple[Host, trio.Nursery]]:
    """A host whose store has everything, and the nursery it runs in."""
    async with trio.open_nursery() as nursery:
        host = Host(ScriptedStore(nursery, KEYS), rng)
        host.write(5)
        nursery.start_soon(host.run)
        await host.until_whole()
        yield host, nursery
        nursery.cancel_scope.cancel()
    host.close()


async def go_away(host: Host) -> None:
    host.store.is_down = True
    await host.store.hang_up()


def come_back(host: Host) -> None:
    host.store.is_down = False
    host.shipper.retry_now()


async def test_given_up_while_the_store_is_away_and_healed_when_it_is_back(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        point = await host.healing.make_point("before")
        await host.until_whole()
        before = host.replica()
        await go_away(host)
        await host.write_for(60)
        given_up = host.dirty.given_up
        assert given_up.since_lsn == point, "the store had all of that"
        assert host.segments_max <= QUOTA_SEGMENTS + 2, "within its quota, and what is open or being applied"
        assert host.resyncer.phase == "store"
        assert given_up.is_lost(given_up.through.lsn) and not given_up.is_lost(point)
        assert host.replica() == before, "the replica stays where it is"
        come_back(host)
        await host.until_whole()
        host.check_replica()
        assert len(host.store.gaps) == 1
        assert all(disk.gap for disk in host.store.gaps[0])
        closed = host.dirty.given_up
        assert not closed.is_open and not closed.is_lost(host.world.journal.appended_lsn)
        assert closed.is_lost(given_up.through.lsn), "no state of that time is ever at the store"
        host.write(3)
        await host.until_whole()
        host.check_replica()


async def test_writes_go_on_while_it_heals(autojump_clock: trio.testing.MockClock, rng: random.Random) -> None:
    async with protected(rng) as (host, _):
        await go_away(host)
        await host.write_for(30)
        come_back(host)
        for _ in range(40):
            host.write(2)
            await pass_time(0.25)
        await host.until_whole()
        host.check_replica()


@pytest.mark.parametrize("number", range(8))
async def test_a_link_that_comes_and_goes(
    number: int, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        for _ in range(8):
            await go_away(host)
            await host.write_for(rng.choice((1, 5, 20)))
            come_back(host)
            host.store.send_bytes_max = rng.choice((float("inf"), rng.randrange(1, 100_000)))
            await host.write_for(rng.choice((0, 1, 3)))
        host.store.send_bytes_max = float("inf")
        await host.until_whole()
        host.check_replica()


@pytest.mark.parametrize("number", range(8))
async def test_the_host_is_killed_and_started_again_in_any_state(
    number: int, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with trio.open_nursery() as nursery:
        store = ScriptedStore(nursery, KEYS)
        host = Host(store, rng)
        for _ in range(8):
            store.is_down = rng.random() < 0.6
            with trio.move_on_after(rng.choice((1, 5, 20))):
                async with trio.open_nursery() as life:
                    life.start_soon(host.run)
                    await host.write_for(30)
            await store.hang_up()
            world = host.world.restart()
            host.healing.close()
            host = Host(store, rng, world)
        store.is_down = False
        nursery.start_soon(host.run)
        await host.until_whole()
        host.check_replica()
        nursery.cancel_scope.cancel()
    host.close()


async def test_a_live_session_is_told_of_what_was_given_up(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    """The link is there but too slow: objects in flight are followed by a gap object in the same session."""
    async with protected(rng) as (host, _):
        host.store.withholds = True
        sessions = host.store.sessions
        for _ in range(40):
            host.write(4)
            host.store.nursery.start_soon(trio.lowlevel.checkpoint)
            await pass_time(0.25)
        assert host.dirty.given_up.through.lsn
        await host.store.acknowledge_withheld()
        await host.until_whole()
        assert host.store.sessions == sessions
        assert GIVEN_UP in host.store.records
        host.check_replica()


async def test_a_fill_that_is_given_up_is_marked_again(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment a chunk's record is durable and the moment it leaves the map."""
    async with protected(rng) as (host, _):
        await go_away(host)
        await host.write_for(30)
        monkeypatch.setattr("asrfs.replication.filler.RUNS_PER_SAVE", 1)
        given_up = list[bool]()
        fill, real = host.healing.server.fill, InlineFiller._take_from_map

        async def fill_unheard(slot: int, offset: int, length: int) -> int:
            if not given_up:
                await go_away(host)
            return await fill(slot, offset, length)

        async def give_up_first(*arguments: Any) -> None:
            if not given_up:
                given_up.append(await host.healing.quota.give_up())
            await real(*arguments)
            come_back(host)

        host.healing.server.fill = fill_unheard  # type: ignore[method-assign]
        monkeypatch.setattr(InlineFiller, "_take_from_map", give_up_first)
        come_back(host)
        await host.until_whole()
        assert given_up == [True]
        host.check_replica()


async def test_what_is_large_waits_for_the_window_and_goes_at_once_when_ordered(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asrfs.model.healing.SMALL_BYTES", CHUNK)
    async with protected(rng) as (host, _):
        host.window, host.minute = NEVER, 12 * 60
        await go_away(host)
        await host.write_for(30)
        come_back(host)
        await host.until(60, phase="window")
        host.tick_s = 15.0
        await pass_time(3600)
        host.tick_s = 0.25
        assert host.dirty.map.dirty_chunks(0) > 1
        assert not any(each.kind == Kind.FILL for each in host.store.records)
        await host.resyncer.order(now=True)
        again, _ = _reload(host)
        assert all(Reason.NOW in again.reasons(slot) for slot in again.slots()), "also by the next agent"
        await host.until_whole()
        host.check_replica()


async def test_the_window_begins(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asrfs.model.healing.SMALL_BYTES", 0)
    async with protected(rng) as (host, _):
        host.window, host.minute = Window(18 * 60 + 30, 6 * 60), 18 * 60 + 29
        await go_away(host)
        await host.write_for(30)
        come_back(host)
        await host.until(60, phase="window")
        host.minute += 1
        await host.until_whole()
        host.check_replica()


def _reload(host: Host) -> Any:

    return load_dirty_map(host.world.storage, "dirty.map")


async def test_a_failed_resync_is_tried_again_at_the_minutes_that_are_promised(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        await go_away(host)
        await host.write_for(30)
        sound, tries = host.healing.server.fill, list[float]()

        async def fail(slot: int, offset: int, length: int) -> int:
            tries.append(trio.current_time())
            raise IntegrityError("the image cannot be read")

        host.healing.server.fill = fail  # type: ignore[method-assign]
        come_back(host)
        host.tick_s = 15.0
        await pass_time(3 * 3600)
        minutes = [round((later - earlier) / 60) for earlier, later in pairwise(tries)]
        assert minutes == [1, 2, 4, 8, 10, 30, 30, 30, 30, 30]
        (alarm,) = [alarm for alarm in host.alarms.now() if alarm.id == ALARM]
        assert alarm.severity == "critical" and "the image cannot be read" in alarm.text
        host.healing.server.fill = sound  # type: ignore[method-assign]
        host.tick_s = 0.25
        await host.resyncer.order(now=False)
        await host.until_whole(60)
        assert ALARM not in host.alarms
        host.check_replica()


async def test_a_disk_server_that_is_replaced_is_no_failure(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        await go_away(host)
        await host.write_for(30)
        sound = host.healing.server.fill

        async def away(slot: int, offset: int, length: int) -> int:
            raise TemporaryError("the disk server is away")

        host.healing.server.fill = away  # type: ignore[method-assign]
        come_back(host)
        await pass_time(30)
        assert not host.resyncer.failures
        host.healing.server.fill = sound  # type: ignore[method-assign]
        await host.until_whole(60)
        host.healing.server.fill = away  # type: ignore[method-assign]


async def test_i4_nothing_is_freed_nor_said_to_be_given_up_before_the_map_is_saved(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        save = host.dirty.save

        def refuse(*_arguments: object) -> None:
            raise OSError(errno.ENOSPC, "dirty.map")

        host.dirty.save = refuse  # type: ignore[method-assign]
        await go_away(host)
        await host.write_for(30)
        assert not host.dirty.given_up.through.lsn
        assert len(host.segments()) > QUOTA_SEGMENTS + 2, "all of it is kept"
        assert "giving-up" in host.alarms
        host.dirty.save = save  # type: ignore[method-assign]
        await pass_time(5)
        assert "giving-up" not in host.alarms
        assert len(host.segments()) <= 2
        come_back(host)
        await host.until_whole()
        host.check_replica()


@pytest.mark.parametrize("by", ["giving up more", "comparing"])
async def test_i4_what_was_saved_last_leads_over_what_was_freed(
    by: str, autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that dies before it has saved an acknowledgement starts where it was, and the map must know of that."""

    async def never(_: Shipper) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Shipper, "_save_acknowledged", never)
    async with protected(rng) as (host, _):
        await go_away(host)
        await host.write_for(30)
        host.tick_s = math.inf
        await pass_time(1)
        given_up, before = host.dirty.given_up, host.positions.saved.acknowledged
        assert given_up.covers(before.lsn)

        def acknowledge() -> None:
            host.positions.change(acknowledged=given_up.through)
            host.progress.note_acknowledged(given_up.through)

        if by == "comparing":
            find = host.healing.filler.compare

            async def find_late(disks: Sequence[DiskConfig]) -> Mapping[int, Sequence[int]]:
                host.positions.save()
                acknowledge()
                return await find(disks)

            host.healing.filler.compare = find_late
            await host.healing.filler.find_out(host.healing.machine.load().live_disks())
        else:
            acknowledge()
            host.write(60)
            assert await host.healing.quota.give_up()
        _, found = load_dirty_map(host.world.storage, "dirty.map")
        saved = host.positions.saved.acknowledged
        check_kept(host.world.journal_storage, MACHINE_ID, found.needed_behind(saved).lsn, saved.lsn)
        with pytest.raises(StoreLostError):
            check_kept(host.world.journal_storage, MACHINE_ID, before.lsn, before.lsn)


async def test_a_store_that_went_back_behind_what_was_freed_is_lost_and_within_it_is_not(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        first = host.store.acknowledged_lsn
        await go_away(host)
        await host.write_for(30)
        since = host.dirty.given_up.since_lsn
        assert since == first
        store = host.store
        kept, digest, times = list(store.records), store.last_digest, list(store.times_ns)
        store.acknowledged_lsn, store.last_digest = since - 2, "11" * 32
        del store.records[since - 2 :]
        come_back(host)
        await pass_time(600)
        assert "store-lost" in host.alarms
        store.records, store.acknowledged_lsn, store.last_digest, store.times_ns = kept, since, digest, times
        host.shipper.retry_now()
        await host.until_whole()
        host.check_replica()


async def test_a_disk_that_is_added_while_it_is_given_up_is_in_the_gap(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    """`machine.json` names it between the first look at it and the sync."""
    async with protected(rng) as (host, _):
        await go_away(host)
        file = host.healing.machine
        whole = file.load()
        file.save(msgspec.structs.replace(whole, disks=whole.disks[:1]))
        sync, added = host.healing.server.sync, []

        async def sync_and_add() -> Any:
            answer = await sync()
            if not added and host.dirty.map.slots():
                added.append(True)
                now = file.load()
                second = msgspec.structs.replace(whole.disks[1], gap=False)
                file.save(msgspec.structs.replace(now, disks=(*now.disks, second)))
                host.healing.server.announce()
                host.write(4)
            return answer

        host.healing.server.sync = sync_and_add  # type: ignore[method-assign]
        await host.write_for(30)
        assert added
        assert [disk.gap for disk in host.dirty.given_up.disks] == [True, True]
        assert host.dirty.map.slots() == [0, 1]
        come_back(host)
        await host.until_whole()
        host.check_replica()


async def test_a_disk_that_was_removed_is_said_to_be_removed(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        file = host.healing.machine
        whole = file.load()
        gone = msgspec.structs.replace(whole.disks[1], removed=True)
        file.save(msgspec.structs.replace(whole, disks=(whole.disks[0], gone)))
        await go_away(host)
        await host.write_for(30)
        come_back(host)
        await host.until_whole()
        (disks,) = host.store.gaps
        assert disks == [DiskRecord.of(disk) for disk in (msgspec.structs.replace(whole.disks[0], gap=True), gone)]


async def test_a_store_of_before_stretches_is_not_sent_one(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with protected(rng) as (host, _):
        host.store.takes_stretches = False
        await go_away(host)
        await host.write_for(30)
        come_back(host)
        await pass_time(60)
        assert not host.store.gaps
        (alarm,) = [alarm for alarm in host.alarms.now() if alarm.id == "protocol"]
        assert "upgrade" in alarm.text
        host.store.takes_stretches = True
        await host.until_whole()
        host.check_replica()
