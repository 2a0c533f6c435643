"""A host makes way for a planned failover: what it tells the store, what holds whoever dies, and who may take it back.

Real handing over, rejoiner and journal on a `CrashStorage`; what compares is a script, and the store is a list of what
was said to it.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.points import Point
from asrfs.consistency.procedure import Held, Outcome, PointOrder
from asrfs.daemon.agent_handover import FencedInstant
from asrfs.daemon.handing_over import AWAY_S_MAX, HandingOver
from asrfs.errors import RefusedError, TemporaryError
from asrfs.format.record import CHANGES, Kind
from asrfs.model.marker import MarkerRecord, decode_marker
from asrfs.protocol.messages import HandedOver, Handover
from asrfs.replication.comparer import Comparison
from asrfs.replication.outlet import Outlet
from asrfs.replication.rejoiner import ALARM, HANDOVER_ALARM
from tests.fakes.journal_world import JournalWorld, Look, Model
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_rejoin import BLOCK, SEGMENT_BYTES, Life, may_rejoin, rejoiner_of, states_after, written

FAILOVER = "f" * 32
OTHER = "e" * 32
CHUNKS = 16


def wanted(what: Any = "hand-over", failover: str = FAILOVER, seconds_max: int = 1000) -> Handover:
    return Handover(id=failover, wanted=what, seconds_max=seconds_max)


class Quiet:
    """`consistency.maker.Quiescer`: freezes nothing, and says what it is told to."""

    def __init__(self) -> None:
        self.is_quiet = True
        self.dies = False
        self.order: list[str] = []

    @asynccontextmanager
    async def quiesce(self, order: PointOrder) -> AsyncIterator[Any]:
        quiet = self

        class Machine:
            marker = MarkerRecord(id=order.id, consistency="filesystem", name=order.name)
            held = Held(marker=marker) if quiet.is_quiet else None
            outcome = None if quiet.is_quiet else Outcome(marker=marker)

            def marked(self) -> None:
                quiet.order.append("marked")

        self.order.append("frozen")
        machine = Machine()
        yield machine
        self.order.append("thawed")
        if self.dies:
            raise TemporaryError("the process that made the point was killed")
        machine.outcome = Outcome(marker=machine.marker)


class Services:
    """What uses the disks."""

    def __init__(self, order: list[str]) -> None:
        self.is_stopped = False
        self.fails = False
        self._order = order

    async def stop(self, failover: str) -> None:
        await trio.lowlevel.checkpoint()
        self._order.append("stopped")
        self.is_stopped = True
        if self.fails:
            raise TemporaryError("hook stop: exit code 1")

    async def start_again(self, failover: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_stopped:
            self._order.append("started")
        self.is_stopped = False


class Host:
    """One life of a host that may be asked to make way."""

    def __init__(self, world: JournalWorld, rng: random.Random) -> None:
        self._rng = rng
        self.life = Life(world, rng)
        self.rejoiner = self.life.rejoiner
        self.server = self.life.healing.server
        self.quiet = Quiet()
        self.services = Services(self.quiet.order)
        self.said: list[HandedOver] = []
        self.different = 0
        self.outlet = Outlet()
        self.settling: Callable[[int], Awaitable[None]] = self._pass
        self.refuses: Exception | None = None
        self.compared_at: list[int] = []
        maker = PointMaker(
            machine_name="web1",
            quiescer=self.quiet,  # type: ignore[arg-type]
            mark=self._mark,
            note=self._pass_point,
            epoch=lambda: 1,
            deadline_s=lambda: 7.0,
        )
        self.handing_over = HandingOver(
            rejoiner=self.rejoiner,
            outlet=self.outlet,
            check=self._check,
            hooks=self.services,
            drain=self._drain,
            fence_and_mark=FencedInstant(maker, lambda: self.rejoiner.fence is not None),
            settle=self._settle,
            compare=self._compare,
        )

    @property
    def world(self) -> JournalWorld:
        return self.life.world

    async def say(self, word: object) -> None:
        await trio.lowlevel.checkpoint()
        assert isinstance(word, HandedOver)
        fence = self.rejoiner.fence
        if word.outcome == "handed-over":
            assert fence is not None and fence.handed is not None, "I6: said before it was written down"
        else:
            assert not self.server.is_fenced, "said, and it cannot write yet"
        self.said.append(word)

    def write(self, rng: random.Random) -> bool:
        """As a guest would; whether it could."""
        if not self.server.is_fenced:
            self.world.disks[0].write(0, rng.randbytes(BLOCK))
            self.world.sync()
        return not self.server.is_fenced

    def check_handed(self, lsn: int) -> None:
        """I6, I9: nothing of a guest is behind what was handed over, and all before it is durable."""
        assert self.server.is_fenced and self.world.storage.exists("fenced.json")
        records = self.world.model.records
        assert records[lsn - 1].kind == Kind.MARKER and self.world.journal.durable_lsn >= lsn
        assert not [each for each in records[lsn:] if each.kind in CHANGES], "a guest wrote behind it"

    def _check(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    async def _mark(self, payload: bytes) -> tuple[int, int]:
        """Guests write whenever they can."""
        place = await self.server.marker(payload)
        self.write(self._rng)
        return place

    async def _drain(self) -> None:
        await trio.lowlevel.checkpoint()
        assert not self.server.is_fenced or self.rejoiner.fence is not None

    async def _pass(self, lsn: int) -> None:
        await trio.lowlevel.checkpoint()

    async def stay(self, lsn: int) -> None:
        await trio.sleep_forever()

    async def _pass_point(self, point: Point) -> None:
        await trio.lowlevel.checkpoint()

    async def _settle(self, lsn: int) -> None:
        await self.settling(lsn)

    async def _compare(self) -> Comparison:
        await trio.lowlevel.checkpoint()
        assert self.server.is_fenced, "compared while guests could write"
        self.compared_at.append(self.world.journal.durable_lsn)
        return Comparison(CHUNKS, {0: array("Q", range(self.different))} if self.different else {})


@asynccontextmanager
async def serving(host: Host, *, connected: bool = True) -> AsyncIterator[Host]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.rejoiner.run)
        nursery.start_soon(host.handing_over.run)
        await trio.testing.wait_all_tasks_blocked()
        if connected:
            with host.outlet.opened(host.say, 4):
                yield host
        else:
            yield host
        nursery.cancel_scope.cancel()
    host.life.close()


@pytest.fixture
def host(rng: random.Random) -> Host:
    return Host(written(rng), rng)


async def answer(host: Host, word: Handover, seconds: float = 5) -> HandedOver:
    before = len(host.said)
    host.handing_over.heard(word)
    await pass_time(seconds)
    assert len(host.said) == before + 1, host.said
    return host.said[-1]


async def test_i6_fenced_before_the_marker_and_equal_before_it_is_said(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(host):
        assert host.write(rng)
        said = await answer(host, wanted())
        assert (said.outcome, said.chunks_compared, said.chunks_different) == ("handed-over", CHUNKS, 0)
        host.check_handed(said.lsn)
        assert host.quiet.order == ["stopped", "frozen", "marked", "thawed"] and min(host.compared_at) >= said.lsn
        marker = decode_marker(host.world.model.records[said.lsn - 1].content)
        last = decode_marker(host.world.model.records[said.lsn].content)
        assert (marker.name, marker.consistency, marker.unfinished) == (f"handover-{FAILOVER[:12]}", "filesystem", True)
        assert (last.completes, last.unfinished, last.consistency) == (said.lsn, False, "filesystem")
        (alarm,) = host.rejoiner.alarms.now()
        assert (alarm.id, alarm.severity) == (HANDOVER_ALARM, "critical") and "failover cancel ffff" in alarm.text
        assert not host.write(rng)
        assert await answer(host, wanted()) == said, "asked again it says the same"
        await pass_time(10 * AWAY_S_MAX)
        assert not host.write(rng), "only the store's word counts now"
        assert (await answer(host, wanted("take-back"))).outcome == "taken-back"
        assert host.write(rng) and not host.world.storage.exists("fenced.json")
        assert host.quiet.order[-1] == "started"
        assert HANDOVER_ALARM not in host.rejoiner.alarms
        assert (await answer(host, wanted("take-back"))).outcome == "taken-back", "asked again, too"
        again = await answer(host, wanted(failover=OTHER))
        assert again.outcome == "handed-over" and again.lsn > said.lsn
        host.check_handed(again.lsn)


async def test_where_nothing_is_mounted_it_is_a_crash_point(host: Host, autojump_clock: trio.testing.MockClock) -> None:
    host.quiet.is_quiet = False
    async with serving(host):
        said = await answer(host, wanted())
        host.check_handed(said.lsn)
        marker = decode_marker(host.world.model.records[said.lsn - 1].content)
        assert (marker.consistency, marker.unfinished) == ("crash", False)


async def test_a_freezer_that_dies_takes_the_claim_back_and_not_the_handover(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    host.quiet.dies = True
    async with serving(host):
        said = await answer(host, wanted())
        host.check_handed(said.lsn)
        last = decode_marker(host.world.model.records[said.lsn].content)
        assert (last.completes, last.consistency, last.wanted) == (said.lsn, "crash", "filesystem")


async def test_what_differs_is_not_handed_over_and_the_host_writes_again(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.different = 3
    async with serving(host):
        said = await answer(host, wanted())
        assert (said.outcome, said.chunks_different) == ("failed", 3) and "3 of 16 chunks differ" in said.error
        assert host.write(rng) and not host.world.storage.exists("fenced.json")


async def test_a_machine_that_cannot_be_stopped_is_started_again(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.services.fails = True
    async with serving(host):
        said = await answer(host, wanted())
        assert (said.outcome, said.error) == ("failed", "hook stop: exit code 1")
        assert host.quiet.order == ["stopped", "started"] and host.write(rng)


async def test_i8_a_machine_that_was_stopped_for_nobody_is_started_again(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    """Killed between its hooks and its fence."""
    host.services.is_stopped = True
    async with serving(host):
        await pass_time(AWAY_S_MAX - 5)
        assert host.quiet.order == []
        await pass_time(10)
        assert host.quiet.order == ["started"] and host.said == []


async def test_what_is_not_whole_is_refused_before_anything_is_fenced(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.refuses = RefusedError("the replica is not whole")
    async with serving(host):
        said = await answer(host, wanted())
        assert (said.outcome, said.error) == ("failed", "the replica is not whole")
        assert host.quiet.order == [] and host.write(rng)


async def test_i8_a_host_that_cannot_hand_over_in_time_writes_again(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.settling = host.stay
    async with serving(host):
        host.handing_over.heard(wanted(seconds_max=20))
        await pass_time(19)
        assert not host.write(rng)
        await pass_time(2)
        assert "within 20 s" in host.said[-1].error
        assert host.write(rng)


async def test_i8_a_host_whose_store_went_away_writes_again_unless_it_has_said_that_it_will_not(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.settling = host.stay
    async with serving(host, connected=False):
        with host.outlet.opened(host.say, 4):
            host.handing_over.heard(wanted())
            await pass_time(AWAY_S_MAX / 2)
        await pass_time(AWAY_S_MAX / 2)
        with host.outlet.opened(host.say, 4):
            await pass_time(3 * AWAY_S_MAX)
        assert not host.write(rng), "it came back"
        await pass_time(AWAY_S_MAX + 2)
        assert host.write(rng) and host.said == []
        host.settling = host._pass
        with host.outlet.opened(host.say, 4):
            assert (await answer(host, wanted())).outcome == "handed-over"
        await pass_time(10 * AWAY_S_MAX)
        assert not host.write(rng)


async def test_a_new_word_ends_what_is_being_done(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    host.settling = host.stay
    async with serving(host):
        host.handing_over.heard(wanted())
        await pass_time(1)
        host.handing_over.heard(wanted())
        await pass_time(1)
        assert host.quiet.order.count("frozen") == 1, "the same again changes nothing"
        assert (await answer(host, wanted("take-back"))).outcome == "taken-back"
        assert host.write(rng)


async def test_i6_a_superseded_host_takes_nothing_back(
    host: Host, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    """Commit: whoever handed over is of an older epoch now."""
    async with serving(host):
        await answer(host, wanted())
        await host.rejoiner.superseded("another side goes on")
        assert ALARM in host.rejoiner.alarms and HANDOVER_ALARM not in host.rejoiner.alarms
        host.handing_over.heard(wanted("take-back"))
        await pass_time(5)
        assert not host.write(rng) and host.rejoiner.fence is not None and not host.rejoiner.fence.handover
        host.handing_over.heard(wanted(failover=OTHER))
        await pass_time(5)
        assert not host.write(rng)


def test_i2_i6_and_i8_killed_or_without_power_at_any_step(rng: random.Random) -> None:
    """Asked again, the next life hands over, and nothing is behind that; asked no more, it writes again, unless the
    store had been told that it may go on."""
    looks: list[Look] = []
    told_from: list[int] = []

    async def first() -> None:
        host = Host(written(rng), rng)

        async def say(word: object) -> None:
            await host.say(word)
            told_from.append(len(looks))
            host.world._look("answer", "said")

        host.world.looks = looks
        host.world.storage.after_operation = host.world._look
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.handing_over.run)
            with host.outlet.opened(say, 4):
                host.handing_over.heard(wanted())
                await pass_time(5)
                host.world.storage.after_operation = None
                assert host.said[-1].outcome == "handed-over"
            nursery.cancel_scope.cancel()
        host.life.close()

    async def again(storage: Any, model: Model, *, asked: bool, was_told: bool) -> str:
        host = Host(JournalWorld(storage, model, segment_bytes=SEGMENT_BYTES), rng)
        host.server.announce()
        fence = host.rejoiner.fence
        host.server.is_fenced = host.world.storage.exists("fenced.json")
        assert not was_told or (fence is not None and fence.handed is not None), "I6: the store may have gone on"
        async with serving(host, connected=asked):
            if asked:
                host.write(rng)
                said = await answer(host, wanted())
                assert said.outcome == "handed-over"
                host.check_handed(said.lsn)
            else:
                await pass_time(AWAY_S_MAX + 5)
                is_bound = fence is not None and fence.handed is not None
                assert host.write(rng) is not is_bound
            return "none" if fence is None else "handed" if fence.handed else "fenced"

    clock = lambda: trio.testing.MockClock(autojump_threshold=0)  # noqa: E731
    trio.run(first, clock=clock())
    found: set[tuple[str, bool]] = set()
    for number, look in enumerate(looks, 1):
        for way, storage in states_after(look, rng):
            for asked in (True, False):
                was_told = number > told_from[0]

                async def life(storage: Any = storage, asked: bool = asked, was_told: bool = was_told) -> str:
                    return await again(storage.killed(), look.model.copy(), asked=asked, was_told=was_told)  # noqa: B023

                try:
                    found.add((trio.run(life, clock=clock()), asked))
                except AssertionError as error:
                    raise AssertionError(f"{way} after {look.kind} {look.name}, asked {asked}: {error}") from error
    assert {state for state, _ in found} == {"none", "fenced", "handed"}


# ---- with a shipper ----


async def test_i6_a_host_that_made_way_stays_connected_until_it_is_superseded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with may_rejoin() as host:
        rejoiner = rejoiner_of(host)
        heard: list[Handover] = []
        host.source.handover = heard.append
        await rejoiner.hand_over(FAILOVER, "because")
        await host.store.hang_up()
        await pass_time(30)
        assert host.link.state == "connected" and "fenced" not in host.alarms
        assert host.store.hellos[-1].takes_handover and not host.store.hellos[0].takes_handover
        host.store.epoch = 2
        await host.store.hang_up()
        await pass_time(30)
        assert "fenced" in host.alarms and HANDOVER_ALARM not in host.alarms
        assert rejoiner.fence is not None and not rejoiner.fence.handover
        await rejoiner.take_back(FAILOVER)
        assert rejoiner.fence is not None, "it is too late"
