"""When records are applied, maps dropped and segments freed, while the disk server comes and goes. Virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from asrfs.errors import TemporaryError
from asrfs.format.segment import SegmentHeader
from asrfs.journal.reader import JournalReader
from asrfs.journal.segments import list_journal, read_header, segment_name
from asrfs.model.dirty_map import GivenUp
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier import Applier, Image
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.ticker import AWAY_ALARM_S, Ticker
from asrfs.replication.trimmer import Limit, Trimmer, freeable
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, RECORDS_A_SEGMENT, JournalWorld
from tests.fakes.virtual_time import pass_time

BLOCK = 4096
AGE_S = 0.25
T = TypeVar("T")


class InlineTask(ApplierTask):
    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class Agent:
    """A world's journal, applied by the real tasks. It is also the disk server they talk to."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.world = JournalWorld(CrashStorage(), seed=rng.randrange(1000))
        self.is_away = False
        self.dropped: list[tuple[int, int]] = []
        self.syncs = 0
        self.positions_file = PositionsFile(Positions(), lambda positions: None)
        self.progress = Progress(Positions())
        self.alarms = Alarms()
        journal = self.world.journal_storage
        self.task = InlineTask(
            Applier(JournalReader(journal, MACHINE_ID), self.positions_file, self),
            Trimmer(journal, MACHINE_ID),
            self,
            self.positions_file,
            self.progress,
            self.alarms,
            trio.CapacityLimiter(1),
            trio.Lock(),
        )
        self.ticker = Ticker(self, self.progress, self.alarms, lambda: AGE_S)

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.world.disks[0].write(self.rng.randrange(8) * BLOCK, self.rng.randbytes(BLOCK))

    # ---- images ----

    def image(self, slot: int) -> Image | None:
        file = self.world.images[slot]
        return Image(file, file.size())

    def settle(self) -> None:
        """Nothing is hydrated."""

    def drop(self, slot: int) -> None:
        """The world's images stay open."""

    # ---- disk server ----

    async def positions(self) -> HostPositions:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise TemporaryError("the disk server is not running")
        journal = self.world.journal
        durable = Cursor(lsn=journal.durable_lsn, segment=journal.segment, offset=journal.offset)
        return HostPositions(journal.appended_lsn, durable, 1, None)

    async def sync(self) -> HostPositions:
        self.syncs += 1
        self.world.sync()
        return await self.positions()

    async def applied(self, lsn: int, segment: int) -> None:
        await self.positions()
        self.dropped.append((lsn, segment))
        self.world.journal.drop_through(segment, [disk.map for disk in self.world.disks])

    async def marker(self, payload: bytes) -> tuple[int, int]:
        raise TemporaryError("not in this test")

    async def fill(self, slot: int, offset: int, length: int) -> int:
        raise TemporaryError("not in this test")

    async def reread_disks(self) -> None: ...


@asynccontextmanager
async def working(rng: random.Random) -> AsyncIterator[Agent]:
    agent = Agent(rng)
    async with trio.open_nursery() as nursery:
        for task in (agent.ticker.run, agent.task.run, agent.task.run_trimming):
            nursery.start_soon(task)
        yield agent
        nursery.cancel_scope.cancel()
    agent.world.check()
    agent.world.close()


async def test_what_nobody_syncs_is_durable_within_its_age(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        await pass_time(1)
        assert agent.syncs == 0, "nothing to sync"
        agent.write(3)
        await pass_time(AGE_S + 0.01)
        assert agent.world.journal.durable_lsn == 3
        assert agent.progress.durable.lsn == 3
        assert agent.syncs == 1


async def test_i1_nothing_that_is_only_appended_is_applied(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    """The disk server has told of twelve records, of which five are durable; nobody syncs the rest."""
    agent = Agent(rng)
    agent.write(5)
    agent.world.sync()
    durable = (await agent.positions()).durable
    agent.write(7)
    async with trio.open_nursery() as nursery:
        agent.task.hurry(1 << 40)
        nursery.start_soon(agent.task.run)
        agent.progress.note_host(appended_lsn=12, durable=durable, epoch=1)
        await pass_time(30)
        nursery.cancel_scope.cancel()
    assert agent.positions_file.saved.applied.lsn == 5
    images = [image.read_at(image.size(), 0) for image in agent.world.images]
    agent.world.model.assert_image_never_ahead(images, 5)
    agent.world.close()


async def test_i4_segments_are_freed_in_order_and_only_behind_both_positions(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        agent.write(20)
        await pass_time(5)
        assert agent.progress.applied.lsn == 20
        assert agent.dropped[-1] == (20, agent.progress.applied.segment - 1)
        kept = list_journal(agent.world.journal_storage).segments
        assert kept[0] == 1, "the store has nothing yet"
        acknowledged = Cursor(lsn=3 * RECORDS_A_SEGMENT, segment=4, offset=0)
        agent.positions_file.change(acknowledged=acknowledged)
        agent.progress.note_acknowledged(acknowledged)
        await pass_time(5)
        assert list_journal(agent.world.journal_storage).segments[0] == 1, "in memory only"
        agent.positions_file.save()
        agent.progress.wake()
        await pass_time(5)
        assert list_journal(agent.world.journal_storage).segments[0] == 4


async def test_i4_a_machine_without_a_store_keeps_every_segment(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        for _ in range(5):
            agent.write(12)
            await pass_time(5)
        agent.positions_file.save()
        agent.progress.wake()
        await pass_time(5)
        assert agent.positions_file.saved.applied.lsn == 60
        segments = list_journal(agent.world.journal_storage).segments
        assert segments == list(range(1, agent.world.journal.segment + 1)), "nothing of it is at a store"


def test_i4_what_the_disk_server_has_not_dropped_stays_although_more_is_applied(rng: random.Random) -> None:
    """The applied position moves on between the disk server's answer and the trim."""
    agent = Agent(rng)
    agent.write(20)
    agent.world.sync()
    first = [s.first_lsn for s in headers(agent)]
    told = Cursor(lsn=first[2] - 1, segment=2, offset=1 << 20)  # all of segment 2, which the cursor still points into
    end = Cursor(lsn=20, segment=agent.world.journal.segment, offset=1 << 20)
    agent.positions_file.change(applied=end, acknowledged=end)
    agent.positions_file.save()
    limit = freeable(agent.positions_file, GivenUp(), Limit(told.lsn, told.segment - 1))
    assert Trimmer(agent.world.journal_storage, MACHINE_ID).trim(limit, 0.0) == [1]
    agent.world.close()


def test_i4_a_store_that_went_back_keeps_segments_before_that_is_saved(rng: random.Random) -> None:
    """The handshake lowered the acknowledged position, and the disk is too full to write that down."""
    agent = Agent(rng)
    end = Cursor(lsn=20, segment=5, offset=1 << 20)
    agent.positions_file.change(applied=end, acknowledged=end)
    agent.positions_file.save()
    assert freeable(agent.positions_file, GivenUp(), Limit(20, 4)) == Limit(20, 4)
    agent.positions_file.change(acknowledged=Cursor(lsn=5, segment=2, offset=1 << 20))
    assert freeable(agent.positions_file, GivenUp(), Limit(20, 4)) == Limit(5, 1)
    agent.world.close()


def headers(agent: Agent) -> list[SegmentHeader]:
    """Of all segments, in order."""
    storage = agent.world.journal_storage
    found = []
    for number in list_journal(storage).segments:
        file = storage.open(segment_name(number))
        header = read_header(file, number, MACHINE_ID)
        assert header is not None
        found.append(header)
    return found


async def test_no_segment_is_freed_while_the_disk_server_may_read_it(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        agent.write(20)
        await pass_time(0.5)
        agent.is_away = True
        await pass_time(AWAY_ALARM_S + 5)
        assert agent.progress.applied.lsn == 20, "what is durable is applied all the same"
        end = agent.progress.applied
        agent.positions_file.change(acknowledged=end)
        agent.positions_file.save()
        agent.progress.note_acknowledged(end)
        await pass_time(5)
        assert "disk-server" in agent.alarms
        assert list_journal(agent.world.journal_storage).segments[0] == 1
        agent.is_away = False
        await pass_time(5)
        assert "disk-server" not in agent.alarms
        assert list_journal(agent.world.journal_storage).segments[0] == end.segment


async def test_images_that_cannot_be_written_are_tried_again(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        agent.write(2)
        agent.world.sync()
        fault = agent.world.storage.inject(Fault(at=0, kinds=frozenset(("write",))))
        await pass_time(1.6)
        assert fault.fired == 1
        assert "apply" in agent.alarms
        assert agent.progress.applied.lsn == 0
        await pass_time(5)
        assert "apply" not in agent.alarms
        assert agent.progress.applied.lsn == 2


async def test_a_journal_that_lost_records_raises_an_alarm(
    autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        agent.write(2)
        await pass_time(5)
        agent.progress.note_applied(Cursor(lsn=9, segment=1, offset=0))
        agent.write(1)
        await pass_time(1)
        alarm = next(alarm for alarm in agent.alarms.now() if alarm.id == "journal")
        assert "LSN 9" in alarm.text
        agent.progress.note_applied(Cursor(lsn=2, segment=1, offset=0))


@pytest.mark.parametrize("hurried", [False, True])
async def test_applying_waits_for_company_unless_hurried(
    hurried: bool, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with working(rng) as agent:
        if hurried:
            agent.task.hurry(1 << 40)
        agent.write(2)
        await pass_time(AGE_S + 0.05)
        assert agent.progress.applied.lsn == (2 if hurried else 0)
        await pass_time(2)
        assert agent.progress.applied.lsn == 2
