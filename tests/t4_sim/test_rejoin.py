"""A host goes on in a new epoch: killed or without power at each of its steps, and what the end of a session means.

Real rejoiner, journal, positions and dirty map on a `CrashStorage`; the store is a script that gives epochs.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import FencedError, IntegrityError, RefusedError
from asrfs.format.record import Kind
from asrfs.format.segment import SECOND_COPY_OFFSET, SEGMENT_HEADER_BYTES, decode_segment_header
from asrfs.journal.reader import JournalReader
from asrfs.journal.segments import segment_name
from asrfs.model.dirty_map import Gap, GivenUp, Reason
from asrfs.model.machine import DiskRecord, decode_disk
from asrfs.model.positions import Cursor, Positions
from asrfs.model.rejoining import REJOIN_FILE, RejoinOrder
from asrfs.protocol.messages import PROTOCOL_VERSION, Welcome
from asrfs.replication.alarms import Alarms
from asrfs.replication.dirty_map_file import load_dirty_map
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.rewind import cursor_at
from asrfs.replication.shipper import HOPELESS_RETRY_S
from asrfs.replication.trimmer import Trimmer, freeable
from asrfs.storage.interface import read_whole, write_atomically
from tests.fakes.applied_world import AppliedWorld
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.healing_host import HealingHost
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, Look, Model
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_shipper import BLOCK, Host, applied_to, shipping

T = TypeVar("T")
SEGMENT_BYTES = 8192 + 6 * (64 + BLOCK)


class InlineRejoiner(Rejoiner):
    """Virtual time would run on while a thread works."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class Life:
    """One life of a host's processes."""

    def __init__(self, world: JournalWorld, rng: random.Random) -> None:
        self.world = world
        self.applied = AppliedWorld(world, rng)
        self.healing = HealingHost(world, self.applied.positions)
        self.rejoiner = make_rejoiner(world, self.applied.positions, self.healing)
        self.healing.server.note()

    async def rejoin(self, epoch: int, store_lsn: int, at_store: tuple[DiskRecord, ...] = ()) -> None:
        """As `Shipper` and `ShippingSession` do."""
        positions = self.applied.positions
        await self.rejoiner.prepare()
        cursor = await self.rejoiner.go_on(welcome(epoch, store_lsn, at_store))
        positions.change(epoch=epoch, acknowledged=cursor, last_digest="ab" * 32)
        positions.save()
        await self.rejoiner.finish()

    def close(self) -> None:
        self.healing.close()
        self.world.close()


def make_rejoiner(world: JournalWorld, positions: Any, healing: HealingHost) -> InlineRejoiner:
    def edit(change: Callable[[Any], Any]) -> Any:
        machine = change(healing.machine.load())
        healing.machine.save(machine)
        return machine

    return InlineRejoiner(
        world.storage,
        world.journal_storage,
        MACHINE_ID,
        JournalReader(world.journal_storage, MACHINE_ID),
        healing.server,
        healing.progress,
        positions,
        healing.dirty,
        healing.alarms,
        trio.CapacityLimiter(1),
        healing.machine.load,
        edit,
        lambda: 7,
    )


def welcome(epoch: int, lsn: int, disks: tuple[DiskRecord, ...] = ()) -> Welcome:
    return Welcome(
        protocol=PROTOCOL_VERSION,
        store_id="5" * 32,
        session_salt=bytes(32),
        epoch=epoch,
        acknowledged_lsn=lsn,
        acknowledged_time_ns=99,
        last_digest="ab" * 32,
        takes_stretches=True,
        disks=disks,
    )


def written(rng: random.Random) -> JournalWorld:
    """A host with records that are applied, durable, and only appended."""
    world = JournalWorld(CrashStorage(), seed=rng.getrandbits(30), segment_bytes=SEGMENT_BYTES)
    applied = AppliedWorld(world, rng)
    for count in (9, 5, 3):
        for _ in range(count):
            disk = rng.choice(world.disks)
            disk.write(rng.randrange(8) * BLOCK, rng.randbytes(BLOCK))
        if count != 3:
            world.sync()
        if count == 9:
            applied.apply_all()
    return world


def check_gone_on(life: Life, epoch: int, store_lsn: int) -> None:
    """The journal goes on in the epoch, above both; everything is given up, nothing ordered any more."""
    world = life.world
    assert world.journal.epoch >= epoch
    assert world.journal.appended_lsn > store_lsn
    saved = life.applied.positions.saved
    assert (saved.acknowledged.lsn, saved.epoch) == (store_lsn, world.journal.epoch)
    dirty, given_up = load_dirty_map(world.storage, "dirty.map")
    assert given_up.covers(store_lsn) and given_up.since_lsn == store_lsn
    assert all(disk.gap or disk.removed for disk in given_up.disks), "I5"
    assert all(Reason.REJOINED in dirty.reasons(slot) for slot in range(2))
    disks = [each for each in world.model.records if each.kind == Kind.DISK]
    assert {each.slot: decode_disk(each.content).gap for each in disks}[0], "I5: its last record opens the gap"
    assert not world.storage.exists("rejoin.json") and not world.storage.exists("fenced.json")
    world.check()
    life.applied.apply_all()
    life.applied.check_images()
    with closing(JournalReader(world.journal_storage, MACHINE_ID)) as reader:
        assert reader.read(given_up.through, world.journal.durable_lsn, 1 << 20).cursor.lsn == world.journal.durable_lsn


STORES = {"it is behind": 4, "it is ahead": 500, "it is as far": 14, "it is empty": 0}


@pytest.mark.parametrize("store_lsn", STORES.values(), ids=STORES)
def test_i5_and_i9_a_host_goes_on_in_a_new_epoch(store_lsn: int, rng: random.Random) -> None:
    world = written(rng)
    last_lsn = world.journal.appended_lsn

    async def go_on() -> None:
        life = Life(world, rng)
        await life.rejoiner.ask("person", "because")
        await life.rejoin(5, store_lsn)
        check_gone_on(life, 5, store_lsn)
        begun = life.world.journal.appended_lsn
        assert begun == max(last_lsn, store_lsn) + 2, "one record for each disk"
        dirty = life.healing.dirty
        assert (Reason.INITIAL in dirty.map.reasons(0)) is (store_lsn == 0)
        assert dirty.given_up.is_lost(begun) and (store_lsn == 0 or not dirty.given_up.is_lost(0))
        life.close()

    trio.run(go_on)


def test_i5_a_disk_that_only_the_store_knows_is_none_of_this_host(rng: random.Random) -> None:
    """A host set back to before it was added: its slot stays unused, and the history says that it is gone."""
    world = written(rng)
    strange = DiskRecord(slot=7, id="7" * 32, name="later", size_bytes=4096)

    async def go_on() -> None:
        life = Life(world, rng)
        await life.rejoiner.ask("person", "because")
        await life.rejoin(2, 500, (strange,))
        removed = [disk for disk in life.healing.machine.load().disks if disk.slot == 7]
        assert [(disk.removed, disk.released) for disk in removed] == [(True, True)]
        assert [disk.removed for disk in life.healing.dirty.given_up.disks] == [False, False, True]
        check_gone_on(life, 2, 500)
        life.close()

    trio.run(go_on)


def states_after(look: Look, rng: random.Random) -> Iterator[tuple[str, CrashStorage]]:
    yield "killed", look.storage.killed()
    for fate in Fate:  # each: what one of them alone shows is not left to chance
        yield f"without power ({fate.name})", look.storage.crash(fate, rng)


@pytest.mark.parametrize("store_lsn", [4, 500])
def test_i2_and_i9_a_host_killed_or_without_power_at_any_step_of_rejoining(store_lsn: int, rng: random.Random) -> None:
    """The next life finds the order and carries it out, or there was none yet; nothing written is lost on the way."""
    world = written(rng)
    looks: list[Look] = []

    async def first() -> None:
        life = Life(world, rng)
        life.world.looks = looks
        life.world.storage.after_operation = life.world._look
        await life.rejoiner.ask("person", "because")
        await life.rejoin(2, store_lsn)
        life.world.storage.after_operation = None
        check_gone_on(life, 2, store_lsn)
        life.close()

    async def again(storage: CrashStorage, model: Model, what: str) -> bool:
        life = Life(JournalWorld(storage, model, segment_bytes=SEGMENT_BYTES), rng)
        is_ordered = life.rejoiner.order is not None
        life.healing.server.announce()
        disk = rng.choice(life.world.disks)
        disk.write(0, rng.randbytes(BLOCK))
        if is_ordered:
            await life.rejoin(3, store_lsn)
            check_gone_on(life, 3, store_lsn)
        elif life.world.journal.epoch > 1:
            life.world.sync()
            check_gone_on(life, 2, store_lsn)
        life.close()
        return is_ordered

    trio.run(first)
    ordered = states = 0
    for look in looks:
        for way, storage in states_after(look, rng):
            states += 1
            what = f"{way} after {look.kind} {look.name}"
            try:
                ordered += trio.run(again, storage, look.model.copy(), what)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
    assert len(looks) > 20 and 0 < ordered < states


# ---- what the end of a session means ----


@asynccontextmanager
async def may_rejoin(records: int = 12) -> AsyncIterator[Host]:
    """A shipping host that may rejoin, and whose store has everything so far."""
    async with shipping(records=records) as host:
        await host.until_acknowledged()
        await pass_time(1)
        healing = HealingHost(host.world, host.positions, host.progress)
        healing.alarms = host.alarms
        host.source.rejoiner = make_rejoiner(host.world, host.positions, healing)
        host.source.given_up = lambda: healing.dirty.given_up
        yield host
        healing.close()


def rejoiner_of(host: Host) -> Rejoiner:
    assert host.source.rejoiner is not None
    return host.source.rejoiner


async def free_everything(host: Host) -> None:
    host.positions.change(applied=host.progress.durable)
    host.positions.save()
    trimmer = Trimmer(host.world.journal_storage, MACHINE_ID)
    assert trimmer.trim(freeable(host.positions, GivenUp(), applied_to(host.progress.durable)), 0.0)


async def test_a_store_that_was_set_back_is_rejoined_without_a_person(autojump_clock: trio.testing.MockClock) -> None:
    async with may_rejoin(30) as host:
        await free_everything(host)
        store = host.store
        await store.hang_up()
        store.acknowledged_lsn, store.last_digest = 2, "22" * 32
        del store.records[2:]
        with trio.fail_after(60):
            while not store.gaps:
                await pass_time(1)
        assert [hello.rejoin for hello in store.hellos] == [False, False, True]
        assert store.epoch == 2 == host.world.journal.epoch
        assert all(disk.gap for disk in store.gaps[0]), "I5"
        assert rejoiner_of(host).order is None and "store-lost" not in host.alarms
        assert host.positions.saved.epoch == 2
        store.records[:] = host.appended()  # what the test beneath compares: resyncing is another's


async def test_i6_an_older_epoch_at_the_store_is_a_store_that_was_set_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with may_rejoin() as host:
        host.world.begin_epoch(3, 0)
        host.note()
        await host.store.hang_up()
        with trio.fail_after(60):
            while not host.store.gaps:
                await pass_time(1)
        assert host.store.epoch == 4
        host.store.records[:] = host.appended()


async def test_an_order_from_outside_says_what_the_epoch_must_be_above(autojump_clock: trio.testing.MockClock) -> None:
    """As `asrfs enroll --above-epoch` leaves it: its first word to the store is that it rejoins, and above what."""
    async with may_rejoin() as host:
        order = RejoinOrder(id="e" * 32, by="person", why="reprotect", time_ns=1, above=7)
        await rejoiner_of(host).reread()
        assert rejoiner_of(host).order is None, "there is none yet"
        write_atomically(host.world.storage, REJOIN_FILE, msgspec.json.encode(order))
        await rejoiner_of(host).reread()
        assert rejoiner_of(host).order == order
        await host.store.hang_up()
        with trio.fail_after(60):
            while not host.store.gaps:
                await pass_time(1)
        assert [(hello.rejoin, hello.epoch) for hello in host.store.hellos] == [(False, 1), (True, 7)]
        assert host.store.epoch == 8 == host.world.journal.epoch and rejoiner_of(host).order is None
        await rejoiner_of(host).reread()
        assert rejoiner_of(host).order is None, "once"
        host.store.records[:] = host.appended()


async def test_i6_who_is_superseded_writes_that_down_and_asks_no_more(autojump_clock: trio.testing.MockClock) -> None:
    async with may_rejoin() as host:
        host.store.epoch = 2
        await host.store.hang_up()
        await pass_time(10)
        assert "fenced" in host.alarms and host.world.storage.exists("fenced.json")
        (alarm,) = [alarm for alarm in host.alarms.now() if alarm.id == "fenced"]
        assert alarm.severity == "critical" and "asrfs resync --full-scan" in alarm.text
        assert rejoiner_of(host).server.is_fenced  # type: ignore[attr-defined]
        tries = len(host.store.tries)
        await pass_time(3 * HOPELESS_RETRY_S)
        assert len(host.store.tries) == tries, "it has nothing to say to the store any more"
        after = Alarms()
        again = HealingHost(host.world, host.positions, host.progress)
        again.alarms = after
        assert make_rejoiner(host.world, host.positions, again).fence is not None
        assert "fenced" in after, "also after any death"
        again.close()
        await rejoiner_of(host).ask("person", "because")
        host.shipper.retry_now()
        with trio.fail_after(60):
            while not host.store.gaps:
                await pass_time(1)
        assert host.world.journal.epoch == 3 and not host.world.storage.exists("fenced.json")
        assert "fenced" not in host.alarms and not rejoiner_of(host).server.is_fenced  # type: ignore[attr-defined]
        host.store.records[:] = host.appended()


async def test_i7_a_diverged_host_waits_for_a_person(autojump_clock: trio.testing.MockClock) -> None:
    async with may_rejoin() as host:
        store = host.store
        store.acknowledged_lsn, store.last_digest = 40, "44" * 32
        await store.hang_up()
        await pass_time(3 * HOPELESS_RETRY_S)
        assert "diverged" in host.alarms and rejoiner_of(host).order is None
        assert not any(hello.rejoin for hello in store.hellos)
        await rejoiner_of(host).ask("person", "because")
        host.shipper.retry_now()
        with trio.fail_after(60):
            while not store.gaps:
                await pass_time(1)
        assert store.objects[-1][0] == 41, "I9: behind what the store has"
        assert "diverged" not in host.alarms
        store.records[:] = host.appended()


async def test_a_store_that_does_not_let_it_rejoin_ends_the_order(autojump_clock: trio.testing.MockClock) -> None:
    async with may_rejoin() as host:
        host.store.refusal = ("fenced", "the machine was failed over, and that is committed")
        await rejoiner_of(host).ask("person", "because")
        await host.store.hang_up()
        await pass_time(10)
        rejoiner = rejoiner_of(host)
        assert rejoiner.order is None and isinstance(rejoiner.refusal, FencedError)
        assert rejoiner.fence is not None and not host.world.storage.exists("rejoin.json")


def test_a_machine_without_disks_cannot_rejoin(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage(), sizes=())

    async def prepare() -> None:
        life = Life(world, rng)
        with pytest.raises(RefusedError, match="without disks"):
            await life.rejoiner.prepare()
        life.close()

    trio.run(prepare)


def test_an_lsn_of_an_older_epoch_is_never_sent_again(rng: random.Random) -> None:
    """Nor one that was jumped over: a store that stands there is one to rejoin."""
    world = written(rng)
    world.begin_epoch(2, 100)
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    with closing(JournalReader(world.journal_storage, MACHINE_ID)) as reader:
        for lsn in (3, 14, 17, 60):
            with pytest.raises(IntegrityError, match=r"lost to the replica|jump"):
                cursor_at(world.journal_storage, MACHINE_ID, reader, Positions().acknowledged, lsn)
        assert cursor_at(world.journal_storage, MACHINE_ID, reader, Positions().acknowledged, 100).lsn == 100
    world.close()


@pytest.mark.parametrize("survived_bytes", [100, SECOND_COPY_OFFSET, SEGMENT_HEADER_BYTES - 1])
def test_i2_an_epoch_whose_header_came_through_a_power_loss_in_one_copy_has_begun(
    survived_bytes: int, rng: random.Random
) -> None:
    world = written(rng)
    world.begin_epoch(2, 100)
    name = segment_name(world.journal.segment)
    world.close()
    storage = world.storage.killed()
    file = storage.open(f"journal/{name}", write=True)
    file.truncate(survived_bytes)
    file.close()
    for _ in range(2):
        world = JournalWorld(storage, world.model.copy(), segment_bytes=SEGMENT_BYTES)
        assert (world.journal.epoch, world.journal.appended_lsn) == (2, 100)
        world.check()
        world.close()
        storage = world.storage.crash(rng.choice(list(Fate)), rng)
    header = read_whole(world.journal_storage, name)[:SEGMENT_HEADER_BYTES]
    assert decode_segment_header(header[SECOND_COPY_OFFSET:], name) == decode_segment_header(header, name)


def test_messages_of_before_rejoining_are_understood() -> None:
    said = msgspec.structs.asdict(welcome(1, 0))
    del said["disks"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Welcome).disks == ()


def test_i5_the_gap_stays_open_until_disks_were_compared_in_the_epoch_that_goes_on(rng: random.Random) -> None:
    world = written(rng)

    async def go_on() -> None:
        life = Life(world, rng)
        await life.rejoiner.ask("person", "because")
        await life.rejoin(2, 4)
        filler, map, progress = life.healing.filler, life.healing.dirty.map, life.healing.progress
        disks = life.healing.machine.load().live_disks()
        with trio.fail_after(5):
            assert not await filler.close([0, 1], "too early"), "I5: nothing is known of them"
        looked: list[int] = []

        async def find(_disks: object) -> dict[int, list[int]]:
            looked.append(progress.applied.lsn)
            return {1: [0]}

        async with trio.open_nursery() as nursery:
            filler.compare = find
            nursery.start_soon(filler.find_out, disks)
            await trio.testing.wait_all_tasks_blocked()
            assert not looked, "what was given up is not in the images yet"
            life.applied.apply_all()
            progress.note_applied(life.applied.positions.saved.applied)
        assert looked[0] >= life.healing.dirty.given_up.through.lsn
        assert (map.dirty_chunks(0), map.dirty_chunks(1)) == (0, 1)
        assert not any(Reason.REJOINED in map.reasons(slot) for slot in (0, 1))
        assert load_dirty_map(world.storage, "dirty.map")[0].dirty_chunks(1) == 1

        async def find_while_another_epoch_begins(_disks: object) -> dict[int, list[int]]:
            await life.rejoiner.ask("person", "because")
            await life.rejoin(3, 4)
            return {}

        await life.rejoiner.prepare()
        filler.compare = find_while_another_epoch_begins
        await filler.find_out(disks)
        assert all(Reason.REJOINED in map.reasons(slot) for slot in (0, 1)), "I5: it was compared with another history"
        life.close()

    trio.run(go_on)


def test_states_that_never_came_to_the_store_are_lost() -> None:
    through = Cursor(lsn=30, segment=4)
    kept = GivenUp(5, Cursor(lsn=9), (), (Gap(1, 3), Gap(5, 12), Gap(21, 25))).rejoined(18, 20, through, ())
    assert kept.gaps == (Gap(1, 3), Gap(5, 12), Gap(20))
    assert kept.covers(18) and not kept.covers(30)
    assert [kept.is_lost(lsn) for lsn in (2, 4, 13, 20, 21, 99)] == [True, False, False, False, True, True]
    again = GivenUp(gaps=(Gap(7),)).rejoined(18, 20, through, ())
    assert again.gaps == (Gap(7),), "a gap that is open stays so from where it began"
