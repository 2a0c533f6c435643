"""A machine's shares of points that need quiet: what they claim, and the last word, whatever let go too early."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from asrfs.consistency.group_share import Held as HeldAt
from asrfs.consistency.maker import PointMaker
from asrfs.consistency.points import Point, PointLog
from asrfs.consistency.procedure import Held, Outcome, PointOrder
from asrfs.daemon.agent_groups import AgentGroups
from asrfs.daemon.group_instants import GroupInstants
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.marker import Consistency, HookResult, MarkerRecord, completed, encode_marker
from asrfs.replication.alarms import Alarms
from asrfs.storage.directory import DirectoryStorage
from tests.fakes.group_world import MemoryServer

POINT = "e" * 32
PRE, POST = HookResult(name="pre", phase="pre", exit_code=0), HookResult(name="post", phase="post", exit_code=0)


class FakeQuiet:
    """`consistency.maker.Quiescing`: says it is quiet, and at the end what became of it."""

    def __init__(self, world: World) -> None:
        marker = MarkerRecord(id="1" * 32, consistency=world.had, hooks=(PRE,), freeze_ms=2.0)
        self.held = Held(marker=marker, deadline=9.0) if world.is_quiet else None
        self.outcome: Outcome | None = None
        self.end = Outcome(marker=msgspec.structs.replace(marker, hold_ms=40.0, hooks=(PRE, POST), **world.taken_back))
        if self.held is None:
            self.outcome = self.end
        self.was_marked = False

    def marked(self) -> None:
        self.was_marked = True


class World:
    def __init__(self, had: Consistency = "application") -> None:
        self.had = had
        self.is_quiet = True
        self.taken_back: dict[str, object] = {}
        self.dies = False
        self.server = MemoryServer(lambda: 0.0)
        self.finished: list[MarkerRecord] = []
        self.maker = PointMaker(
            machine_name="m0",
            quiescer=self,  # type: ignore[arg-type]
            mark=self.server.marker,
            note=self.note,
            epoch=lambda: 1,
            deadline_s=lambda: 7.0,
        )
        self.instants = GroupInstants(self.maker, self.server, lambda: "crash", self.finish)

    @asynccontextmanager
    async def quiesce(self, order: PointOrder) -> AsyncIterator[FakeQuiet]:
        assert order.is_external
        quiet = FakeQuiet(self)
        yield quiet
        if self.dies:
            raise TemporaryError("the process that made the point ended with -9 before it had")
        quiet.outcome = quiet.end

    async def finish(self, word: MarkerRecord) -> None:
        self.finished.append(word)

    async def note(self, _point: Point) -> None:
        raise AssertionError("a share is no point yet")

    async def take(self, consistency: Consistency = "application") -> None:
        """As a share does: the marker, and let go."""

        async def do(marker: MarkerRecord, not_after: float | None) -> None:
            assert not_after == (9.0 if self.is_quiet else None)
            await self.instants.arm(POINT, encode_marker(marker), 1.0, not_after)
            assert isinstance(await self.instants.hold(POINT), HeldAt)
            await self.instants.release(POINT, 0.0)

        await self.instants.at_instant(MarkerRecord(id=POINT, consistency=consistency, group="g"), do)

    def markers(self) -> list[tuple[int, MarkerRecord]]:
        return self.server.markers

    def whole(self) -> MarkerRecord:
        """What the store and the host's list make of both records."""
        (lsn, marker), (_, word) = self.markers()
        assert marker.unfinished and word.completes == lsn and not word.unfinished
        return completed(marker, word)


async def test_a_share_that_was_quiet_says_so_with_all_its_hooks_and_how_long() -> None:
    world = World()
    await world.take()
    whole = world.whole()
    assert (whole.consistency, whole.failed, whole.hold_ms, whole.hooks) == ("application", None, 40.0, (PRE, POST))
    assert [word.id for word in world.finished] == [POINT]
    held_ms = world.instants.hold_ms(POINT)
    assert held_ms is not None and held_ms == round(held_ms, 3), "people read it"


async def test_a_share_whose_quiet_did_not_last_claims_nothing() -> None:
    """A hook let go too early, or somebody thawed: found out after the marker."""
    world = World()
    world.taken_back = {"consistency": "crash", "wanted": "application", "failed": "hook keep: it let go too early"}
    await world.take()
    whole = world.whole()
    assert (whole.consistency, whole.wanted, whole.failed) == (
        "crash",
        "application",
        "hook keep: it let go too early",
    )


async def test_a_share_whose_point_process_was_killed_claims_nothing() -> None:
    """The watchdog thaws when it dies: perhaps before the marker."""
    world = World("filesystem")
    world.dies = True
    with pytest.raises(TemporaryError, match="-9"):
        await world.take("filesystem")
    whole = world.whole()
    assert (whole.consistency, whole.wanted) == ("crash", "filesystem") and "-9" in str(whole.failed)


async def test_a_share_without_a_marker_has_no_last_word() -> None:
    world = World()

    async def do(_marker: MarkerRecord, _not_after: float | None) -> None:
        await trio.lowlevel.checkpoint()

    await world.instants.at_instant(MarkerRecord(id=POINT, consistency="application", group="g"), do)
    assert world.markers() == [] and world.finished == []


async def test_a_share_that_was_never_quiet_says_so_at_once() -> None:
    world = World()
    world.is_quiet = False
    world.taken_back = {"consistency": "crash", "wanted": "application", "failed": "hook pre: exit code 1"}
    await world.take()
    ((_, marker),) = world.markers()
    assert (marker.consistency, marker.failed, marker.unfinished) == ("crash", "hook pre: exit code 1", False)
    assert world.finished == []


@pytest.mark.parametrize("comes_first", ["confirmation", "last word"])
async def test_the_hosts_list_has_the_last_word_whenever_it_comes(scratch: Path, comes_first: str) -> None:
    state = StateDirectory.create(str(scratch / "state"), "m0")
    points = PointLog(DirectoryStorage(str(scratch)), "points.jsonl")

    async def note(point: Point) -> None:
        points.add(point)

    async def settled(_lsn: int) -> None:
        raise AssertionError

    world = World()
    world.maker.note = note
    groups = AgentGroups(
        state,
        machine_id="a" * 32,
        server=world.server,
        maker=world.maker,
        alarms=Alarms(),
        settings=Settings,
        settled=settled,
        threads=trio.CapacityLimiter(2),
        points=points,
    )
    machine = groups.groups._machine
    point = Point(id=POINT, consistency="application", group="g", unfinished=True, ready=1, lsn=1, epoch=1, time_ns=1)

    async def do(marker: MarkerRecord, not_after: float | None) -> None:
        await machine.server.arm(POINT, encode_marker(marker), 1.0, not_after)
        await machine.server.hold(POINT)
        await machine.server.release(POINT, 0.0)
        if comes_first == "confirmation":
            await machine.confirmed(point)
            assert points.points()[0].unfinished

    await machine.instants.at_instant(MarkerRecord(id=POINT, consistency="application", group="g"), do)
    if comes_first == "last word":
        await machine.confirmed(point)
    (listed,) = points.points()
    assert (listed.unfinished, listed.consistency, listed.ready, listed.hooks) == (False, "application", 1, (PRE, POST))
    assert listed.hold_ms == 40.0
    assert await groups.share_of(POINT, 1.0) == listed
