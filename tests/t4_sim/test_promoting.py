"""A host whose disks are brought back to a point: what is served whoever dies, what is kept, and who may take it back.

Real promoter, rewriter and journal on a `CrashStorage`; the store is a script that gives back what the model says.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

from asrfs.daemon.promoting import ALARM, AWAY_S_MAX, Promoter, load_promoting
from asrfs.errors import RefusedError, TemporaryError
from asrfs.format.record import CHANGES, Kind
from asrfs.model.machine import DiskRecord, MachineConfig, decode_disk
from asrfs.model.marker import MarkerRecord, decode_marker, encode_marker
from asrfs.model.promoting import Promoting
from asrfs.protocol.messages import Fetch, Fetched, Promote, Promoted, check_fetched
from asrfs.replication import rewriter
from asrfs.replication.outlet import Outlet
from asrfs.replication.rewriter import Rewriter
from asrfs.storage.interface import write_atomically
from tests.fakes.healing_host import WorldServer
from tests.fakes.journal_world import JournalWorld, Look, Model
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_rejoin import BLOCK, SEGMENT_BYTES, Life, states_after, written

ID, OTHER = "f" * 32, "e" * 32
BOOT = b'{"kind":"none"}'
T = TypeVar("T")


@pytest.fixture(autouse=True)
def nothing_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody acknowledges here, and segments are short."""
    monkeypatch.setattr(rewriter, "LAG_BYTES_MAX", 1 << 60)


class InlinePromoter(Promoter):
    """Virtual time would run on while a thread works."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class PromotingServer(WorldServer):
    """A disk server whose disks may be rewritten; it tells no guest of those that are partly written."""

    is_partial = False

    async def reread_fence(self) -> None:
        await trio.lowlevel.checkpoint()
        self.reread()

    def reread(self) -> None:
        self.is_fenced = any(map(self.world.storage.exists, ("fenced.json", "promoting.json")))
        found = load_promoting(self.world.storage)
        self.is_partial = found is not None and found.is_partial

    def announce(self) -> None:
        """With the boot settings."""
        machine = self.machine.load()
        for disk in machine.disks:
            record = DiskRecord.of(disk, machine.boot_document())
            if self.announced.get(disk.slot) != record:
                self.world.journal.append(Kind.DISK, disk.slot, 0, 0, msgspec.msgpack.encode(record))
                self.announced[disk.slot] = record

    async def rewrite(
        self, slot: int, extents: Sequence[tuple[int, int]], content: bytes, zeros: Sequence[tuple[int, int]]
    ) -> int:
        await trio.lowlevel.checkpoint()
        assert self.is_fenced and self.is_partial, "rewritten while guests may use it"
        at = 0
        for offset, length in extents:
            self.world.disks[slot].write(offset, content[at : at + length])
            at += length
        for offset, length in zeros:
            self.world.disks[slot].discard(offset, length)
        self.note()
        return self.world.journal.appended_lsn


class PromotedHost:
    """One life of a host. `point_lsn`: what it is brought back to; the store's answers are of one block each."""

    def __init__(self, world: JournalWorld, rng: random.Random, point_lsn: int) -> None:
        self.rng = rng
        self.point_lsn = point_lsn
        self.life = Life(world, rng)
        self.machine = self.life.healing.machine
        self.server = PromotingServer(world, self.machine, self.life.healing.progress)
        self.life.healing.server = self.server
        self.said: list[Promoted] = []
        self.fetched: list[Fetch] = []
        self.users: list[str] = []
        self.refuses: Exception | None = None
        self.fails: Exception | None = None
        self.lacking: frozenset[int] = frozenset()
        self.is_stuck = False
        self.outlet = Outlet()
        self.outlet.fetch = self._fetch  # type: ignore[method-assign]
        self.promoter = InlinePromoter(
            storage=world.storage,
            outlet=self.outlet,
            server=self.server,
            progress=self.life.healing.progress,
            alarms=self.life.healing.alarms,
            rewriter=Rewriter(self.outlet, self.server, self.life.healing.progress),
            threads=trio.CapacityLimiter(1),
            machine=self.machine.load,
            edit_machine=self._edit,
            check=self._check,
            users=lambda: self.users,
            drain=self._drain,
            mark=self._mark,
            settle=self._settle,
            lacking=lambda: self.lacking,
            now_ns=lambda: 7,
        )
        self.server.reread()

    @property
    def world(self) -> JournalWorld:
        return self.life.world

    def wanted(self, what: Any, promotion: str = ID, attempt: int = 0) -> Promote:
        disks = tuple(DiskRecord.of(disk) for disk in self.machine.load().live_disks())
        return Promote(id=promotion, wanted=what, lsn=self.point_lsn, disks=disks, boot=BOOT, attempt=attempt)

    def write(self) -> bool:
        """As a guest would; whether it could."""
        if not self.server.is_fenced:
            self.world.disks[0].write(self.rng.randrange(8) * BLOCK, self.rng.randbytes(BLOCK))
            self.world.sync()
        return not self.server.is_fenced

    def disks(self) -> list[bytes]:
        return [bytes(disk.read(0, disk.size_bytes)) for disk in self.world.disks]

    def at_point(self) -> list[bytes]:
        return [bytes(each) for each in self.world.model.disks_at(self.point_lsn)]

    def check_written(self, said: Promoted) -> None:
        """I5, I7, I9: equal to the point, what was there is a point, and between them there is none."""
        records = self.world.model.records
        assert [bytes(each) for each in self.world.model.disks_at(said.lsn)] == self.at_point(), "I9"
        assert decode_marker(records[said.lsn - 1].content).name == f"promoted-{ID[:12]}"
        promoting = load_promoting(self.world.storage)
        assert promoting is not None and promoting.end_lsn == said.lsn <= self.world.journal.durable_lsn
        before = promoting.before_lsn
        assert decode_marker(records[before - 1].content).name == f"before-promote-{ID[:12]}"
        assert _gaps(self.world.model, before) == {False}, "I7: it is a point"
        is_changed = [lsn for lsn, each in enumerate(records[: said.lsn], 1) if lsn > before and each.kind in CHANGES]
        assert is_changed, "nothing was brought back"
        for lsn in is_changed:
            assert True in _gaps(self.world.model, lsn), "I5: a point between"
        assert _gaps(self.world.model, said.lsn) == {False}
        assert self.machine.load().boot is not None, "settings come back, too"

    async def _fetch(self, wanted: Fetch) -> Fetched:
        await trio.sleep(0.01)  # sleep: virtual, what asking takes
        self.fetched.append(wanted)
        if self.fails is not None:
            raise self.fails
        if self.is_stuck:
            await trio.sleep_forever()
        changed = sorted(
            {
                at
                for record in self.world.model.records[self.point_lsn :]
                if record.slot == wanted.slot
                for at in range(record.offset, record.offset + record.length, BLOCK)
            }
        )
        content = self.at_point()[wanted.slot]
        at = next((at for at in changed if at >= wanted.offset), None)
        if at is None:
            return Fetched(number=0, next=wanted.size_bytes)
        end = min(at + BLOCK, wanted.size_bytes)
        extent = ((at, end - at),)
        piece = content[at:end]
        answer = Fetched(number=0, next=end, extents=extent, content=piece)
        if not any(piece):
            answer = Fetched(number=0, next=end, zeros=extent)
        check_fetched(answer, wanted)
        return answer

    async def _drain(self) -> None:
        await self.server.sync()

    async def _settle(self, lsn: int) -> None:
        await trio.lowlevel.checkpoint()

    async def _mark(self, name: str, note: str) -> int:
        marker = MarkerRecord(id=f"{self.rng.getrandbits(128):032x}", name=name, note=note, hold_ms=0.0)
        return (await self.server.marker(encode_marker(marker)))[0]

    def _check(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    def _edit(self, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        machine = change(self.machine.load())
        self.machine.save(machine)
        return machine

    async def say(self, word: object) -> None:
        await trio.lowlevel.checkpoint()
        assert isinstance(word, Promoted)
        self.said.append(word)


def _gaps(model: Model, lsn: int) -> set[bool]:
    newest = {each.slot: decode_disk(each.content).gap for each in model.records[:lsn] if each.kind == Kind.DISK}
    return set(newest.values()) or {False}


@asynccontextmanager
async def serving(host: PromotedHost) -> AsyncIterator[PromotedHost]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.promoter.run)
        await trio.testing.wait_all_tasks_blocked()
        with host.outlet.opened(host.say, 4, takes_fetches=True):
            yield host
        nursery.cancel_scope.cancel()
    host.life.close()


def made(rng: random.Random) -> tuple[JournalWorld, int]:
    """A host with records, a point, and records behind it."""
    world = written(rng)
    world.sync()
    point = world.journal.appended_lsn
    for _ in range(6):
        disk = rng.choice(world.disks)
        disk.write(rng.randrange(8) * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    return world, point


@pytest.fixture
def host(rng: random.Random) -> PromotedHost:
    host = PromotedHost(*_with_rng(made(rng), rng))
    host.server.announce()
    return host


def _with_rng(found: tuple[JournalWorld, int], rng: random.Random) -> tuple[JournalWorld, random.Random, int]:
    return found[0], rng, found[1]


async def answer(host: PromotedHost, word: Promote, seconds: float = 20) -> Promoted:
    before = len(host.said)
    host.promoter.heard(word)
    with trio.fail_after(seconds):
        while len(host.said) == before:
            await pass_time(0.1)
    return host.said[-1]


async def test_i5_i7_and_i9_step_by_step(host: PromotedHost, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(host):
        assert host.write()
        was = host.disks()
        ready = await answer(host, host.wanted("prepare"))
        assert ready.outcome == "ready" and not host.write() and not host.server.is_partial
        assert [bytes(each) for each in host.world.model.disks_at(ready.lsn)] == was == host.disks()
        assert await answer(host, host.wanted("prepare")) == ready, "asked again it says the same"
        assert ALARM in host.promoter.alarms
        said = await answer(host, host.wanted("write"))
        assert said.outcome == "written" and said.bytes_written
        host.check_written(said)
        assert host.disks() == host.at_point() and not host.server.is_partial and not host.write()
        assert await answer(host, host.wanted("write")) == said
        assert (await answer(host, host.wanted("release"))).outcome == "released"
        assert host.write() and not host.world.storage.exists("promoting.json") and ALARM not in host.promoter.alarms
        assert (await answer(host, host.wanted("release"))).outcome == "released"


async def test_nothing_is_held_where_it_cannot_be(host: PromotedHost, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(host):
        appended = host.world.journal.appended_lsn
        host.users = ["disk d0 is attached as /dev/loop7 (`asrfs detach d0`)"]
        said = await answer(host, host.wanted("prepare"))
        assert (said.outcome, said.exit_code) == ("failed", 4) and "/dev/loop7" in said.error
        host.users, host.refuses = [], RefusedError("the replica is not whole")
        said = await answer(host, host.wanted("prepare", OTHER))
        assert (said.exit_code, said.error) == (4, "the replica is not whole")
        host.refuses = None
        strange = DiskRecord(slot=9, id="9" * 32, name="gone", size_bytes=4096)
        word = host.wanted("prepare")
        said = await answer(host, msgspec.structs.replace(word, disks=(*word.disks, strange)))
        assert said.exit_code == 4 and "no disk gone any more" in said.error
        said = await answer(host, msgspec.structs.replace(word, disks=word.disks[:1], id=OTHER))
        assert said.exit_code == 4 and "nobody said that it stays" in said.error
        said = await answer(host, msgspec.structs.replace(word, disks=word.disks[:1], left=(1,), id=OTHER))
        assert said.outcome == "ready"
        assert (await answer(host, host.wanted("take-back", OTHER))).outcome == "taken-back"
        assert host.write() and host.world.journal.appended_lsn <= appended + 2, "but a marker, and that write"


async def test_i7_a_kill_before_the_point_of_what_is_there_leaves_it_to_be_made(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world, point = made(rng)
    held = Promoting(id=ID, phase="held", epoch=1, time_ns=7, lsn=point)
    write_atomically(world.storage, "promoting.json", msgspec.json.encode(held))
    host = PromotedHost(world, rng, point)
    host.server.announce()
    async with serving(host):
        said = await answer(host, host.wanted("write"))
        assert said.outcome == "written"
        host.check_written(said)


async def test_who_begins_to_use_the_disks_between_is_found(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.users = ["process 7 has d0.img open"]
        was = host.disks()
        said = await answer(host, host.wanted("write"))
        assert (said.outcome, said.exit_code) == ("failed", 4) and host.disks() == was
        for _ in range(4):
            await pass_time(20)
            host.promoter.heard(host.wanted("write"))
        assert len(host.said) == 2, "the same again is not said again"
        host.users = []
        await pass_time(10)
        assert host.said[-1].outcome == "written"
        host.check_written(host.said[-1])


async def test_who_could_not_begin_begins_only_when_he_is_told_again(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    """The store may have cancelled it meanwhile."""
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.users = ["process 7 has d0.img open"]
        said = await answer(host, host.wanted("write", attempt=1))
        assert (said.outcome, said.attempt) == ("failed", 1)
        host.users = []
        was = host.disks()
        await pass_time(30)
        assert host.said[-1] == said and host.disks() == was, "not by itself"
        assert await answer(host, host.wanted("write", attempt=1)) == said, "what is said twice is begun once"
        await pass_time(30)
        assert host.disks() == was and len(host.said) == 3
        host.users = ["process 7 has d0.img open"]
        again = await answer(host, host.wanted("write", attempt=2))
        assert again == msgspec.structs.replace(said, attempt=2), "each attempt has its answer"
        assert await answer(host, host.wanted("write", attempt=1)) == said, (
            "a vault that was set back counts on from there"
        )
        host.promoter.heard(host.wanted("take-back"))
        await pass_time(5)
        assert host.said[-1].outcome == "taken-back" and host.write()


async def test_what_is_written_is_said_whatever_was_said_of_attempts_before(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.users = ["process 7 has d0.img open"]
        await answer(host, host.wanted("write", attempt=1))
        host.users = []
        await answer(host, host.wanted("write", attempt=2))
        await pass_time(10)
        assert [(each.outcome, each.error) for each in host.said[2:]] == [("failed", ""), ("written", "")]
        for attempt in (1, 2):  # of a vault that was set back, too
            assert (await answer(host, host.wanted("write", attempt=attempt))).outcome == "written"


async def test_what_goes_on_after_a_failure_is_said_to(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.fails = RefusedError("a frame is damaged")
        said = await answer(host, host.wanted("write", attempt=1))
        assert (said.error, said.attempt) == ("a frame is damaged", 0), "it may have begun"
        host.fails = None
        await pass_time(30)
        words = [(each.outcome, each.error) for each in host.said[1:]]
        assert words == [("failed", "a frame is damaged"), ("failed", ""), ("written", "")]
        host.check_written(host.said[-1])


async def test_i8_what_nobody_asks_for_any_more_is_taken_back_unless_something_was_written(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        for _ in range(8):
            await pass_time(AWAY_S_MAX / 2)
            host.promoter.heard(host.wanted("prepare"))
        assert not host.write(), "somebody asks"
        await pass_time(AWAY_S_MAX + 5)
        assert host.said[-1].outcome == "taken-back" and host.write()
        host.is_stuck = True
        host.promoter.heard(host.wanted("write"))
        await pass_time(10 * AWAY_S_MAX)
        assert host.server.is_partial and not host.write()
        host.promoter.heard(host.wanted("take-back"))
        await pass_time(10)
        host.promoter.heard(host.wanted("release"))
        await pass_time(10)
        assert host.server.is_partial and not host.write(), "not to anybody's word"
        host.is_stuck = False
        said = await answer(host, host.wanted("write"))
        assert said.outcome == "written"
        host.check_written(said)


async def test_another_promotion_takes_the_place_of_one_that_cannot_go_on(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        was = host.disks()
        ready = await answer(host, host.wanted("prepare"))
        host.fails = RefusedError("a frame is damaged")
        said = await answer(host, host.wanted("write"))
        assert (said.outcome, said.error) == ("failed", "a frame is damaged") and host.server.is_partial
        host.fails, host.point_lsn = None, ready.lsn
        host.users = ["process 7 has d0.img open"]  # it gets nothing but errors
        again = await answer(host, host.wanted("prepare", OTHER))
        assert (again.outcome, again.lsn) == ("ready", ready.lsn), "what was there is what was there"
        assert host.server.is_partial
        host.promoter.heard(host.wanted("take-back", OTHER))
        await pass_time(5)
        assert host.server.is_partial, "partly written"
        said = await answer(host, host.wanted("write", OTHER))
        assert said.outcome == "written" and host.disks() == was
        await answer(host, host.wanted("release", OTHER))
        assert host.write()


async def test_a_new_epoch_meanwhile_is_not_written_over(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    """It is not known any more what differs from the history."""
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        promoter = host.promoter
        assert promoter.now is not None and promoter.holds_healing_back()
        await promoter._save(msgspec.structs.replace(promoter.now, epoch=99))
        assert not promoter.holds_healing_back()
        said = await answer(host, host.wanted("write"))
        assert said.exit_code == 4 and "new epoch" in said.error and not host.fetched


async def test_what_the_store_lacks_stays_open(host: PromotedHost, autojump_clock: trio.testing.MockClock) -> None:
    """Given up meanwhile: healing closes that."""
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.lacking = frozenset({1})
        await answer(host, host.wanted("write"))
        assert [disk.gap for disk in host.machine.load().disks] == [False, True]
        assert host.disks() == host.at_point()


async def test_a_file_that_cannot_be_read_holds_until_another_promotion(
    host: PromotedHost, autojump_clock: trio.testing.MockClock
) -> None:
    write_atomically(host.world.storage, "promoting.json", b"{")
    host.promoter.now = load_promoting(host.world.storage)
    host.server.reread()
    assert host.server.is_partial and not host.write()
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        assert (await answer(host, host.wanted("write"))).outcome == "written"
        assert host.disks() == host.at_point()


def test_i2_i5_and_i9_killed_or_without_power_at_any_step(rng: random.Random) -> None:
    """What guests get at any time is what was there or what is to be, never a part of both; asked again, the next life
    comes to the end, and what was there is a point."""
    looks: list[Look] = []
    world, point = made(rng)

    async def first() -> None:
        host = PromotedHost(world, rng, point)
        host.server.announce()
        host.world.looks = looks
        host.world.storage.after_operation = host.world._look
        async with serving(host):
            for word in ("prepare", "write", "release"):
                await answer(host, host.wanted(word))
            host.world.storage.after_operation = None
            assert host.disks() == host.at_point()

    async def again(storage: Any, model: Model, *, asked: bool) -> str:
        host = PromotedHost(JournalWorld(storage, model, segment_bytes=SEGMENT_BYTES), rng, point)
        host.server.announce()
        found: Promoting | None = host.promoter.now
        was = [bytes(each) for each in model.disks_at(_before(model))]
        if not host.server.is_partial:
            assert host.disks() in (was, host.at_point()), "a part of both is served"
        async with serving(host):
            if asked and (found is None or found.phase != "written"):
                host.write()
                said = await answer(host, host.wanted("prepare"))
                assert said.outcome == "ready", said
            if asked:
                said = await answer(host, host.wanted("write"))
                assert said.outcome == "written", said
                host.check_written(said)
                await answer(host, host.wanted("release"))
                assert host.write()
            else:
                await pass_time(AWAY_S_MAX + 5)
                is_bound = found is not None and found.phase != "held"
                assert host.write() is not is_bound, "I8"
            return "none" if found is None else found.phase

    clock = lambda: trio.testing.MockClock(autojump_threshold=0)  # noqa: E731
    trio.run(first, clock=clock())
    found: set[tuple[str, bool]] = set()
    for look in looks:
        for way, storage in states_after(look, rng):
            for asked in (True, False):

                async def life(storage: Any = storage, asked: bool = asked, look: Look = look) -> str:
                    return await again(storage.killed(), look.model.copy(), asked=asked)

                try:
                    found.add((trio.run(life, clock=clock()), asked))
                except AssertionError as error:
                    raise AssertionError(f"{way} after {look.kind} {look.name}, asked {asked}: {error}") from error
    assert {state for state, _ in found} == {"none", "held", "writing", "written"}


def _before(model: Model) -> int:
    """LSN of the state before anything was brought back."""
    for lsn, record in enumerate(model.records, 1):
        if record.kind == Kind.DISK and decode_disk(record.content).gap:
            return lsn - 1
    return len(model.records)


async def test_a_store_that_is_away_is_waited_for(host: PromotedHost, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(host):
        await answer(host, host.wanted("prepare"))
        host.fails = TemporaryError("there is no connection to the store")
        host.promoter.heard(host.wanted("write"))
        await pass_time(100)
        assert host.server.is_partial and len(host.said) == 1
        host.fails = None
        await pass_time(20)
        host.check_written(host.said[-1])
