"""The shipper against a scripted store: real protocol, real log objects, a real journal, virtual time.

The store keeps what it acknowledged and checks that nothing is missing or repeated; what it holds at the end is
compared with what was appended. Every fault of a script is seen to have struck.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import structlog.testing
import trio
import trio.testing

from asrfs.format.record import Kind
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from asrfs.journal.reader import JournalReader
from asrfs.model.dirty_map import GivenUp
from asrfs.model.machine import NO_SLOT
from asrfs.model.positions import Cursor, Positions
from asrfs.protocol.messages import Compare, Match, RefusalCode, Refused
from asrfs.replication import shipping_session, stretch_reader
from asrfs.replication.alarms import Alarms
from asrfs.replication.link import Link
from asrfs.replication.object_builder import MachineKeys, ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.seeding import Outgoing
from asrfs.replication.shipper import HOPELESS_RETRY_S, TOLD_EVERY_S, Shipper, StoreAccess
from asrfs.replication.shipping_session import OBJECTS_UNACKNOWLEDGED_MAX, SILENCE_S_MAX, ShippingSession
from asrfs.replication.source import ShippingSettings, Source
from asrfs.replication.trimmer import Limit, Trimmer, freeable
from asrfs.transport.backoff import Backoff
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, ModelRecord, put_record
from tests.fakes.scripted_store import Received, ScriptedStore
from tests.fakes.virtual_time import pass_time

BLOCK = 4096
KEYS = MachineKeys(MACHINE_ID, b"i" * 32, b"p" * 32)
T = TypeVar("T")


class InlineSource(Source):
    """Works in the task: virtual time would run on while a thread works."""

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class Host:
    """A machine's journal and its shipper. `saved`: every positions that was saved."""

    def __init__(
        self,
        store: ScriptedStore,
        seed: int = 1,
        world: JournalWorld | None = None,
        positions: Positions | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.world = world or JournalWorld(CrashStorage(), seed=seed)
        self.store = store
        self.saved: list[Positions] = []
        self.positions = PositionsFile(positions or Positions(), self.saved.append)
        self.progress = Progress(self.positions.current)
        self.alarms = Alarms()
        self.link = Link()
        self.source = InlineSource(
            machine_id=MACHINE_ID,
            machine_name="web1",
            journal=self.world.journal_storage,
            reader=JournalReader(self.world.journal_storage, MACHINE_ID),
            builder=ObjectBuilder(JournalReader(self.world.journal_storage, MACHINE_ID)),
            positions=self.positions,
            progress=self.progress,
            settings=ShippingSettings(object_size=3 * BLOCK),
            threads=trio.CapacityLimiter(1),
            journal_turn=trio.Lock(),
        )
        self.shipper = Shipper(
            self.source, StoreAccess(store.connect, KEYS), self.alarms, self.link, Backoff(random.Random(seed))
        )

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            disk = self.rng.choice(self.world.disks)
            disk.write(self.rng.randrange(8) * BLOCK, self.rng.randbytes(BLOCK))

    def sync(self) -> None:
        """Everything appended is durable, and the agent knows."""
        self.world.sync()
        self.note()

    def note(self) -> None:
        journal = self.world.journal
        self.progress.note_host(
            appended_lsn=journal.appended_lsn,
            durable=Cursor(
                lsn=journal.durable_lsn,
                segment=journal.segment,
                offset=journal.offset,
                time_ns=journal.last_time_ns,
            ),
            epoch=journal.epoch,
        )

    async def until_acknowledged(self, lsn: int | None = None) -> None:
        lsn = self.world.journal.durable_lsn if lsn is None else lsn
        await self.progress.wait_until(lambda: self.progress.acknowledged.lsn >= lsn)

    def appended(self) -> list[Received]:
        return [
            Received(record.kind, record.slot, record.offset, record.length, record.content)
            for record in self.world.model.records
        ]

    def check_store(self) -> None:
        """The store holds exactly a prefix of what was appended, as far as it says; where some of it came folded,
        enough for its disks to be what they are there."""
        if self.store.stretches:
            disks = [bytearray(content) for content in self.world.model.initial]
            for record in self.store.records:
                put_record(disks, ModelRecord(*record))
            assert disks == self.world.model.disks_at(self.store.acknowledged_lsn), "I9: a stretch is not exact"
        else:
            assert self.store.records == self.appended()[: self.store.acknowledged_lsn]
        assert self.store.acknowledged_lsn >= self.progress.acknowledged.lsn, "I3: acknowledged only what the store has"


@asynccontextmanager
async def shipping(*, seed: int = 1, records: int = 0, begun: bool = True) -> AsyncIterator[Host]:
    """A host that ships to a store; with `begun` False the shipper is started by the test."""
    async with trio.open_nursery() as nursery:
        host = Host(ScriptedStore(nursery, KEYS), seed)
        if records:
            host.write(records)
        host.sync()
        if begun:
            nursery.start_soon(host.shipper.run)
        yield host
        nursery.cancel_scope.cancel()
    host.check_store()
    host.world.close()


def applied_to(cursor: Cursor) -> Limit:
    """What a disk server has dropped when it was told that everything up to here is applied."""
    return Limit(cursor.lsn, cursor.segment - 1)


async def test_ships_every_record_in_order(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=20) as host:
        await host.until_acknowledged()
        host.write(10)
        host.world.disks[0].discard(0, 5 * BLOCK)
        host.world.journal.append(Kind.MARKER, NO_SLOT, 0, 0, b"a point")
        host.write(4)
        host.sync()
        await host.until_acknowledged()
        assert host.store.records == host.appended()
        assert host.link.state == "connected"
        assert not host.alarms.now()
        marker = next(i for i, r in enumerate(host.store.records, 1) if r.kind == Kind.MARKER)
        assert marker in [last for _, last in host.store.objects], "an object ends right after a marker"
    assert host.positions.saved.acknowledged.lsn == len(host.appended())
    assert host.positions.saved.last_digest == host.store.last_digest


async def test_only_durable_records_are_shipped(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=4) as host:
        await host.until_acknowledged(4)
        host.write(6)
        host.note()
        await pass_time(60)
        assert host.store.acknowledged_lsn == 4
        host.sync()
        await host.until_acknowledged(10)


async def test_i3_nothing_counts_as_acknowledged_before_the_store_says_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with shipping(begun=False, records=30) as host:
        host.store.withholds = True
        host.store.nursery.start_soon(host.shipper.run)
        await pass_time(60)
        assert len(host.store.withheld) == OBJECTS_UNACKNOWLEDGED_MAX, "bounded while nothing is acknowledged"
        assert host.progress.acknowledged.lsn == 0
        assert host.positions.current.acknowledged.lsn == 0
        assert not host.saved
        await host.store.acknowledge_withheld()
        await host.until_acknowledged()
    assert [positions.acknowledged.lsn for positions in host.saved] == sorted(
        positions.acknowledged.lsn for positions in host.saved
    )


async def test_i4_a_segment_is_freed_only_when_applied_and_acknowledged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with shipping(begun=False, records=30) as host:
        trimmer = Trimmer(host.world.journal_storage, MACHINE_ID)
        end = host.progress.durable
        host.positions.change(applied=end)
        host.positions.save()
        assert not trimmer.trim(freeable(host.positions, GivenUp(), applied_to(end)), 0.0), (
            "applied, but the store has nothing"
        )
        host.store.nursery.start_soon(host.shipper.run)
        await host.until_acknowledged()
        assert freeable(host.positions, GivenUp(), applied_to(end)).lsn < end.lsn, "acknowledged is not saved yet"
        await pass_time(1)
        assert not trimmer.trim(freeable(host.positions, GivenUp(), Limit(0, -1)), 0.0), (
            "the disk server still reads from them"
        )
        freed = trimmer.trim(freeable(host.positions, GivenUp(), applied_to(end)), 0.0)
        assert freed == list(range(1, end.segment)), "all but the segment that is written to"
        host.write(5)
        host.sync()
        await host.until_acknowledged()


@pytest.mark.parametrize("number", range(40))
async def test_a_connection_that_breaks_at_any_byte(
    number: int, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    """However often and wherever it breaks, the store ends with every record, none twice."""
    async with shipping(seed=number, begun=False, records=25) as host:
        store = host.store
        store.nursery.start_soon(host.shipper.run)
        while store.acknowledged_lsn < 25:
            store.send_bytes_max = rng.choice((rng.randrange(1, 400), rng.randrange(400, 40_000)))
            store.receive_bytes_max = rng.choice((rng.randrange(1, 400), 10_000))
            await pass_time(rng.random() * 5)
        store.send_bytes_max = store.receive_bytes_max = float("inf")
        host.write(3)
        host.sync()
        await host.until_acknowledged()
        assert store.records == host.appended()
        assert any(wire.is_broken for wire in store.wires)


async def test_lost_acknowledgements_are_made_good_at_the_handshake(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(begun=False, records=10) as host:
        host.store.loses_acknowledgements = True
        host.store.nursery.start_soon(host.shipper.run)
        await host.until_acknowledged()
        assert host.store.sessions > 2
        assert host.store.records == host.appended()
        assert "diverged" not in host.alarms


async def test_store_set_back_within_the_journal_gets_the_records_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with shipping(records=12) as host:
        store = host.store
        await host.until_acknowledged()
        first_objects = list(store.objects)
        await store.hang_up()
        store.acknowledged_lsn, store.last_digest = 0, ""
        store.records.clear()
        store.objects.clear()
        host.write(2)
        host.sync()
        await host.until_acknowledged()
        assert store.records == host.appended()
        assert len(store.objects) >= len(first_objects)
        assert not host.alarms.now()


async def test_nothing_is_shipped_until_it_is_saved_that_the_store_was_set_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Else a restart holds the old position for acknowledged, with digests of objects that the store has lost."""
    async with shipping(records=12) as host:
        store = host.store
        await host.until_acknowledged()
        await pass_time(1)
        await store.hang_up()
        store.acknowledged_lsn, store.last_digest = 0, ""
        store.records.clear()
        store.objects.clear()
        refused: list[Positions] = []

        def refuse(positions: Positions) -> None:
            refused.append(positions)
            raise OSError(errno.EIO, "positions.json")

        host.positions._save = refuse
        await pass_time(20)
        assert len(refused) > 2
        assert host.positions.saved.acknowledged.lsn == 12
        assert not store.objects
        host.positions._save, saved = host.saved.append, len(host.saved)
        await pass_time(60)
        assert host.saved[saved].acknowledged.lsn == 0
        assert store.records == host.appended()


async def test_store_set_back_behind_the_trimmed_journal_raises_an_alarm(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with shipping(records=30) as host:
        store = host.store
        await host.until_acknowledged()
        await pass_time(1)
        host.positions.change(applied=host.progress.durable)
        host.positions.save()
        freed = Trimmer(host.world.journal_storage, MACHINE_ID).trim(
            freeable(host.positions, GivenUp(), applied_to(host.progress.durable)), 0.0
        )
        assert freed
        await store.hang_up()
        store.acknowledged_lsn, store.last_digest = 2, "22" * 32
        del store.records[2:]
        host.write(2)
        host.sync()
        received = len(store.objects)
        await pass_time(HOPELESS_RETRY_S * 3)
        alarm = next(alarm for alarm in host.alarms.now() if alarm.id == "store-lost")
        assert alarm.severity == "critical"
        assert "LSN 3 to " in alarm.text
        assert len(store.objects) == received, "nothing is sent"
        assert host.link.state == "refused"
        assert host.positions.current.acknowledged.lsn == 30, "what was acknowledged stays known"
        store.acknowledged_lsn = 30
        store.records[:] = host.appended()[:30]


@pytest.mark.parametrize(
    ("store_side", "alarm"),
    [
        ({"acknowledged_lsn": 9, "last_digest": "99" * 32}, "diverged"),
        ({"epoch": 2}, "fenced"),
    ],
)
async def test_a_history_that_is_not_ours_is_not_added_to(
    store_side: dict[str, Any], alarm: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with shipping(begun=False, records=5) as host:
        before = host.store.acknowledged_lsn, host.store.last_digest
        for name, value in store_side.items():
            setattr(host.store, name, value)
        host.store.nursery.start_soon(host.shipper.run)
        await pass_time(HOPELESS_RETRY_S * 2.5)
        assert alarm in host.alarms
        assert not host.store.objects
        assert len(host.store.tries) == 3
        host.store.acknowledged_lsn, host.store.last_digest = before


@pytest.mark.parametrize("written", [1, 4, 5, 6, 30])
@pytest.mark.parametrize("is_saved", [False, True])
async def test_i9_a_host_set_back_or_cloned_adds_nothing(
    written: int, is_saved: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The store went on with another branch: records of ours under the same numbers are others, however many."""
    async with shipping(records=5) as host:
        store = host.store
        await host.until_acknowledged()
        positions = host.positions.current if is_saved else Positions()
        host.write()  # one more that the store has not got when the copy is made
        host.sync()
        copy = Host(store, 2, JournalWorld(host.world.storage.killed(), host.world.model.copy()), positions)
        await host.until_acknowledged()
        host.write(4)
        host.sync()
        await host.until_acknowledged()
        host.shipper.pause()
        await pass_time(1)
        received = list(store.records)
        copy.write(written)
        copy.sync()
        store.nursery.start_soon(copy.shipper.run)
        await pass_time(HOPELESS_RETRY_S * 2.5)
        assert "diverged" in copy.alarms
        assert store.records == received
        copy.world.close()


async def test_another_digest_under_the_same_lsn_is_diverged(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=5) as host:
        await host.until_acknowledged()
        await host.store.hang_up()
        host.store.last_digest = "ab" * 32
        host.write()
        host.sync()
        await pass_time(100)
        assert "diverged" in host.alarms
        assert host.store.acknowledged_lsn == 5


@pytest.mark.parametrize(
    ("code", "alarm", "is_hopeless"),
    [
        ("authentication", "authentication", True),
        ("fenced", "fenced", True),
        ("diverged", "diverged", True),
        ("space", "store-space", False),
        ("busy", "link", False),
    ],
)
async def test_refused(
    code: RefusalCode, alarm: str, is_hopeless: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with shipping(begun=False, records=5) as host:
        store = host.store
        store.refusal = (code, "not you")
        store.nursery.start_soon(host.shipper.run)
        await pass_time(HOPELESS_RETRY_S * 2.5)
        assert alarm in host.alarms
        assert "not you" in host.link.reason
        waits = [after - before for before, after in zip(store.tries, store.tries[1:], strict=False)]
        if is_hopeless:
            assert waits == [HOPELESS_RETRY_S] * 2
        else:
            assert max(waits) <= 30
        store.refusal = None
        host.shipper.retry_now()
        await host.until_acknowledged()
        assert not host.alarms.now()


async def test_nothing_is_said_after_a_refusal_that_comes_with_the_next_object(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Refusal and object may reach their tasks in one round, and the object's task may be the first to run."""
    async with shipping(begun=False, records=3) as host:
        session = ShippingSession(await host.store.connect(), host.source, KEYS, lambda: None)
        await session._reconcile(await session._greet())
        assert host.store._current is not None
        session._session.receive(host.store._current.send(Refused(code="space", text="full")))
        built = session._build_next(session._level(), None)
        assert built is not None
        sending, receiving = trio.open_memory_channel[Outgoing | Compare | Match](1)
        await sending.send(Outgoing(built))
        before = host.store.bytes_received
        with trio.fail_after(60):
            await session._send_objects(receiving)
        await pass_time(1)
        assert host.store.bytes_received == before


async def test_somebody_who_waits_is_not_kept_waiting_by_the_backoff(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(begun=False, records=5) as host:
        store = host.store
        store.refusal = ("authentication", "not you")
        store.nursery.start_soon(host.shipper.run)
        await pass_time(10)
        store.refusal = None
        asked_at = trio.current_time()
        host.shipper.hurry(5)
        await host.until_acknowledged()
        assert trio.current_time() - asked_at < 1


async def test_backoff_and_the_return_of_the_store(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=5) as host:
        store = host.store
        await host.until_acknowledged()
        store.is_down = True
        lost_at = trio.current_time()
        await store.hang_up()
        await pass_time(600)
        waits = [after - before for before, after in zip(store.tries[1:], store.tries[2:], strict=False)]
        assert store.tries[1] - lost_at < 0.5, "a lost connection is tried again at once"
        assert max(waits) <= 5
        assert max(waits) > 3, "the waits grow"
        assert 120 < len(waits) < 600
        assert "link" in host.alarms
        store.is_down = False
        host.write()
        host.sync()
        back_at = trio.current_time()
        await host.until_acknowledged()
        assert trio.current_time() - back_at <= 5 + 1
        assert "link" not in host.alarms


async def test_a_store_that_is_away_for_a_day_does_not_fill_the_log(autojump_clock: trio.testing.MockClock) -> None:
    with structlog.testing.capture_logs() as told:
        async with shipping(records=5) as host:
            await host.until_acknowledged()
            host.store.is_down = True
            await host.store.hang_up()
            await pass_time(24 * 3600)
            assert len(host.store.tries) > 10_000
            lines = [line for line in told if line["event"] == "not connected"]
            assert 24 * 3600 / TOLD_EVERY_S - 5 <= len(lines) <= 24 * 3600 / TOLD_EVERY_S + 5
            host.store.is_down = False
            host.write()
            host.sync()
            await host.until_acknowledged()
            host.store.is_down = True
            await host.store.hang_up()
            await pass_time(10)
            after = [line for line in told if line["event"] == "not connected"][len(lines) :]
            assert after, "a connection in between makes it news"


async def test_a_silent_store_is_left_and_heartbeats_are_sent(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=5) as host:
        store = host.store
        await host.until_acknowledged()
        await pass_time(31)
        assert store.sessions == 1
        assert len(store.heartbeats) >= 5
        assert store.heartbeats[-1].durable_lsn == 5
        store.is_silent = True
        await pass_time(SILENCE_S_MAX * 2)
        store.is_silent = False
        await pass_time(60)
        assert store.sessions >= 2
        host.write()
        host.sync()
        await host.until_acknowledged()


async def test_pause_and_resume(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=5) as host:
        await host.until_acknowledged()
        host.shipper.pause()
        await pass_time(1)
        assert host.link.state == "paused"
        assert host.store.goodbyes == ["paused or stopped"]
        host.write(3)
        host.sync()
        await pass_time(600)
        assert host.store.acknowledged_lsn == 5
        host.shipper.resume()
        await host.until_acknowledged()


async def test_a_corrupt_journal_is_never_shipped(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(begun=False, records=8) as host:
        segment = host.world.journal_storage.open(f"{1:016x}.segment", write=True)
        at = SEGMENT_HEADER_BYTES + 64 + BLOCK + 64 + 100
        segment.write_at([bytes([segment.read_at(1, at)[0] ^ 1])], at)
        segment.close()
        host.store.nursery.start_soon(host.shipper.run)
        await pass_time(100)
        alarm = next(alarm for alarm in host.alarms.now() if alarm.id == "corrupt")
        assert "LSN 2" in alarm.text
        assert host.store.acknowledged_lsn < 2


async def test_hurried_records_do_not_wait_for_their_age(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(records=1) as host:
        host.source.settings = ShippingSettings(object_size=1 << 20, object_age=50.0)
        await host.until_acknowledged()
        await pass_time(1)
        began = trio.current_time()
        host.write()
        host.sync()
        await pass_time(5)
        assert host.progress.acknowledged.lsn == 1
        host.shipper.hurry(2)
        await host.until_acknowledged()
        assert trio.current_time() - began < 6


async def test_another_limit_of_bandwidth_holds_within_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """Also for what is left of an object: at the first limit it would take hours."""
    async with shipping(begun=False, records=20) as host:
        host.source.settings = ShippingSettings(bandwidth_limit=4)
        host.store.nursery.start_soon(host.shipper.run)
        await pass_time(60)
        assert host.progress.acknowledged.lsn == 0
        began = trio.current_time()
        host.source.settings = ShippingSettings()
        await host.until_acknowledged()
        assert trio.current_time() - began <= 1


async def test_bandwidth_limit(autojump_clock: trio.testing.MockClock) -> None:
    async with shipping(begun=False, records=20) as host:
        host.source.settings = ShippingSettings(object_size=3 * BLOCK, bandwidth_limit=10_000)
        began = trio.current_time()
        host.store.nursery.start_soon(host.shipper.run)
        await host.until_acknowledged()
        assert trio.current_time() - began >= 20 * BLOCK / 10_000
        assert host.store.sessions == 1, "a slow link is not a silent one"


@pytest.fixture
def short_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few blocks a backlog is long already."""
    monkeypatch.setattr(shipping_session, "FOLD_BACKLOG_BYTES", 20 * BLOCK)
    monkeypatch.setattr(stretch_reader, "BYTES_LEAST", 0)


@pytest.mark.usefixtures("short_backlog")
@pytest.mark.parametrize("takes_stretches", [True, False])
async def test_i9_a_long_backlog_is_folded_for_a_store_that_takes_it(
    takes_stretches: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Both points are there, and behind each record that the store has as the last one the disks are the host's."""
    async with shipping(begun=False) as host:
        host.store.takes_stretches = takes_stretches
        points = []
        for _ in range(2):
            host.write(150)
            host.world.marker()
            points.append(host.world.journal.appended_lsn)
        host.sync()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.shipper.run)
            await host.until_acknowledged()
            in_backlog = len(host.store.objects)
            host.write(4)
            host.sync()
            await host.until_acknowledged()
            nursery.cancel_scope.cancel()
        assert all(end not in host.store.stretches for end in host.store.objects[in_backlog:]), "only of a backlog"
        assert bool(host.store.stretches) == takes_stretches
        assert set(points) <= {last for _, last in host.store.objects}, "points never vanish"
        host.check_store()
        sent = sum(len(record.content) for record in host.store.records)
        assert sent < 90 * BLOCK if takes_stretches else sent > 300 * BLOCK


@pytest.mark.usefixtures("short_backlog")
async def test_a_folded_backlog_comes_through_a_link_that_breaks(autojump_clock: trio.testing.MockClock) -> None:
    """What is lost with a connection is folded anew in the next, from where the store stands."""
    async with shipping(begun=False) as host:
        host.store.takes_stretches = True
        host.store.send_bytes_max = 14 * BLOCK
        host.write(300)
        host.sync()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.shipper.run)
            with trio.fail_after(3600):
                await host.until_acknowledged()
            nursery.cancel_scope.cancel()
        assert host.store.sessions > 1 and host.store.stretches
        ends = [0, *(last for _, last in host.store.objects)]
        assert [first for first, _ in host.store.objects] == [last + 1 for last in ends[:-1]]
        host.check_store()
