"""Planned failover at the store: what hosts are told by real sessions, what of their answers is believed, and what
becomes of a failover whose host, command or time runs out. No machine is started."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import BadInputError, IntegrityError, RefusedError, TemporaryError
from asrfs.protocol.messages import HandedOver, Handover, Heartbeat, Hello, Refused
from replica_store.failover import handing_over
from replica_store.failover.actions import Failovers
from replica_store.failover.report import document
from replica_store.failover.wanted import HANDOVER_S
from replica_store.ingest.handovers import LOOK_EVERY_S
from replica_store.vault.enrolment import put_description
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.handovers import handovers_wanted, note_answer, wanted_of
from replica_store.vault.operations import (
    ChosenPoint,
    HandoverAsked,
    Operation,
    Places,
    begin,
    change,
    operation,
    operations,
)
from replica_store.vault.rebuild import rebuild
from replica_store.vault.rows import LinkRow
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.memory_history import random_history
from tests.fakes.scripted_host import HostEnd, HostHistory
from tests.t4_sim.test_failover_actions import MACHINE, Recovery, ShiftedClock, standing, wanted

FAILOVER = "f" * 32
FAR_NS = (1 << 63) - 1

# ---- sessions -----------------------------------------------------------------------------------------------------


def takes(history: HostHistory) -> Hello:
    return msgspec.structs.replace(history.hello(), takes_handover=True)


def ask(world: StoreWorld, history: HostHistory, failover: str = FAILOVER) -> Operation:
    """A planned failover begins, as by a command of another process."""
    made = Operation(
        id=failover,
        machine_id=history.machine_id,
        machine=history.name,
        kind="planned",
        state="preparing",
        point=ChosenPoint(selector="latest", lsn=1, epoch=1, time_ns=1),
        places=Places(directory="/srv/one", state="/srv/one/state", mount="/srv/one/disks"),
        begun_ns=int(failover[:2], 16),
        handover=HandoverAsked(seconds_max=60, until_ns=FAR_NS),
    )
    return begin(world.path, lambda vault: made)


def standing_of(world: StoreWorld, failover: str = FAILOVER) -> HandoverAsked:
    found = operation(world.vault.catalog, failover).handover
    assert found is not None
    return found


def end(world: StoreWorld, *, remains: bool) -> None:
    def cancel(vault: Vault, before: Operation) -> Operation:
        return msgspec.structs.replace(before.to("cancelled", 1, "because"), remains=remains)

    change(world.path, FAILOVER, cancel)


async def hear(host: HostEnd) -> Handover:
    with trio.fail_after(60):
        event = await host.hear_except(Heartbeat)
    assert isinstance(event, Handover), event
    return event


async def silence(host: HostEnd) -> None:
    """Nothing but heartbeats for a while."""
    await host.say(Heartbeat())
    with trio.move_on_after(8):
        raise AssertionError(f"the store said {await host.hear_except(Heartbeat)}")


@asynccontextmanager
async def connected(
    scratch: Path, takes_handover: bool = True
) -> AsyncIterator[tuple[StoreWorld, HostHistory, HostEnd]]:
    async with make_world(scratch) as world:
        world.nursery.start_soon(world.listener.handovers.run)
        history = world.enrol()
        history.disk()
        for _ in range(5):
            history.write()
        await world.ship_all(history)
        host = world.connect(history)
        await host.greet(takes(history) if takes_handover else history.hello())
        yield world, history, host


async def test_a_host_is_asked_until_it_has_answered(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(scratch) as (world, history, host):
        ask(world, history)
        with trio.fail_after(3 * LOOK_EVERY_S):
            assert await hear(host) == Handover(id=FAILOVER, wanted="hand-over", seconds_max=60)
        await silence(host)
        host = world.connect(history)
        await host.greet(takes(history))
        assert (await hear(host)).wanted == "hand-over", "in each session"
        await host.say(HandedOver(id=FAILOVER, outcome="handed-over", lsn=history.last_lsn, chunks_compared=16))
        await silence(host)
        handed = standing_of(world)
        assert (handed.lsn, handed.chunks_compared, handed.error) == (history.last_lsn, 16, None)
        await host.say(HandedOver(id=FAILOVER, outcome="handed-over", lsn=1, chunks_compared=1))
        await silence(host)
        assert standing_of(world) == handed, "what was answered stays"


async def test_i6_a_host_gets_its_machine_back_when_nobody_else_runs_it(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, host):
        ask(world, history)
        await hear(host)
        await host.say(HandedOver(id=FAILOVER, outcome="handed-over", lsn=history.last_lsn, chunks_compared=16))
        await silence(host)
        end(world, remains=True)
        await silence(host)
        end(world, remains=False)
        assert (await hear(host)).wanted == "take-back"
        await silence(host)
        host = world.connect(history)
        await host.greet(takes(history))
        assert (await hear(host)).wanted == "take-back", "until it says that it has"
        await host.say(HandedOver(id=FAILOVER, outcome="taken-back"))
        await silence(host)
        assert standing_of(world).is_back
        host = world.connect(history)
        await host.greet(takes(history))
        await silence(host)


async def test_of_several_failovers_the_oldest_is_settled_first(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, host):
        ask(world, history, "1" * 32)
        change(
            world.path,
            "1" * 32,
            lambda vault, before: msgspec.structs.replace(before.to("cancelled", 1, "because"), remains=False),
        )
        ask(world, history)
        word = await hear(host)
        assert (word.id, word.wanted) == ("1" * 32, "take-back")
        await host.say(HandedOver(id=word.id, outcome="taken-back"))
        word = await hear(host)
        assert (word.id, word.wanted) == (FAILOVER, "hand-over")


async def test_a_host_of_before_is_told_nothing_and_that_is_the_answer(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch, takes_handover=False) as (world, history, host):
        ask(world, history)
        await silence(host)
        answer = standing_of(world)
        assert "update asrfs" in str(answer.error) and answer.is_back


@pytest.mark.parametrize(
    "changes", [{"lsn": 7}, {"lsn": 0}, {"chunks_compared": 0}, {"chunks_different": 1}], ids=lambda each: str(each)
)
async def test_i5_a_claim_that_cannot_be_is_not_believed(
    scratch: Path, autojump_clock: trio.testing.MockClock, changes: dict[str, int]
) -> None:
    async with connected(scratch) as (world, history, host):
        ask(world, history)
        await hear(host)
        claim = HandedOver(id=FAILOVER, outcome="handed-over", lsn=history.last_lsn, chunks_compared=16)
        await host.say(msgspec.structs.replace(claim, **changes))
        await silence(host)
        answer = standing_of(world)
        assert answer.lsn is None and answer.error is not None
        end(world, remains=False)
        assert (await hear(host)).wanted == "take-back", "for it may be fenced"


async def test_a_host_cannot_answer_for_another(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(scratch) as (world, history, host):
        other = world.enrol("web2", 2)
        ask(world, other)
        await host.say(HandedOver(id=FAILOVER, outcome="failed", error="no"))
        assert isinstance(await host.hear_except(Heartbeat), Refused)
        assert not standing_of(world).is_answered
        host = world.connect(history)
        await host.greet(takes(history))
        await host.say(HandedOver(id="9" * 32, outcome="taken-back"))
        await silence(host)


async def test_a_row_that_was_never_sealed_stops_no_host(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(scratch) as (world, history, host):
        made = ask(world, history)
        forged = msgspec.structs.replace(made, id="a" * 32, begun_ns=1)
        with world.vault.catalog.transaction():
            world.vault.catalog.change(
                "INSERT INTO operations (id, machine_id, kind, state, generation, content) VALUES (?, ?, ?, ?, ?, ?)",
                (forged.id, forged.machine_id, "planned", "preparing", 1, msgspec.json.encode(forged).decode()),
            )
        assert (await hear(host)).id == made.id, "and does not stand before one that was"
        await silence(host)


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Recovery:
    return Recovery(monkeypatch)


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
def root(scratch: Path) -> str:
    history = random_history(7, records=20, disks={"root": 16 * 4096})
    history.marker(name="end")
    history.seal()
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault")) as vault:
        put_description(vault, vault.machine(MACHINE))
    return str(scratch / "vault")


@pytest.fixture
def failovers(root: str, clock: ShiftedClock, recovery: Recovery) -> Failovers:
    return Failovers(root, clock)


def last(root: str) -> Operation:
    with Vault.open(root) as vault:
        return operations(vault.catalog)[-1]


def told(root: str, clock: ShiftedClock) -> Handover | None:
    """What the host is told now."""
    with Vault.open(root) as vault:
        return handovers_wanted(vault, clock.time_ns()).get(vault.machine(MACHINE).id)


def says(root: str, found: Operation, **answer: Any) -> None:
    with Vault.open(root) as vault:
        note_answer(vault, found.machine_id, HandedOver(id=found.id, **answer), 1)


def died_waiting(failovers: Failovers, root: str) -> Operation:
    """A planned failover whose command was killed while it waited for the host."""
    found = failovers.planned(wanted())
    assert found.handover is not None
    fresh = msgspec.structs.replace(found.handover, lsn=None, chunks_compared=0, is_used=False)

    def back(vault: Vault, before: Operation) -> Operation:
        return msgspec.structs.replace(before.to("preparing", 0, "it died"), handover=fresh)

    return change(root, found.id, back)


def test_what_was_handed_over_is_gone_on_from_and_nothing_is_lost(failovers: Failovers, root: str) -> None:
    found = failovers.planned(wanted())
    with Vault.open(root) as vault:
        received = vault.received_lsn(found.machine_id)
    assert (found.state, found.kind, found.point.lsn, found.data_loss_s) == ("commit-pending", "planned", received, 0.0)
    shown = document(found)
    assert shown["proof"] == {"lsn": received, "chunks_compared": 4, "chunks_different": 0}
    assert shown["data_loss_seconds"] == 0.0 and shown["handover"]["taken_back"] is False
    assert [step["name"] for step in shown["steps"]][:4] == ["start", "resolve", "handover", "point"]
    rebuild(root)
    assert last(root) == found
    moved = failovers.change_point(found.id, f"lsn:{received - 1}")
    assert document(moved)["proof"] is None, "another point is none of what was proven"
    assert failovers.commit(found.id).state == "committed"


@pytest.mark.parametrize(
    ("different", "kind"), [(0, TemporaryError), (2, IntegrityError)], ids=["it could not", "a disk differs"]
)
def test_what_is_not_handed_over_is_cancelled(
    failovers: Failovers, recovery: Recovery, root: str, clock: ShiftedClock, different: int, kind: type[Exception]
) -> None:
    recovery.answer = HandedOver(id="", outcome="failed", error="no such thing", chunks_different=different)
    with pytest.raises(kind, match="was not handed over: its host says: no such thing"):
        failovers.planned(wanted())
    found = last(root)
    assert (found.state, found.remains) == ("cancelled", False) and "no such thing" in found.causes[-1].text
    assert standing(root) == "protected" and told(root, clock) is None and recovery.there == set()
    recovery.answer = HandedOver(id="", outcome="handed-over", chunks_compared=4)
    assert failovers.planned(wanted()).state == "commit-pending"


def test_a_machine_that_cannot_be_made_is_given_back(
    failovers: Failovers, recovery: Recovery, root: str, clock: ShiftedClock
) -> None:
    recovery.fails = True
    with pytest.raises(TemporaryError, match="no program"):
        failovers.planned(wanted())
    found = last(root)
    assert found.state == "cancelled"
    assert told(root, clock) == Handover(id=found.id, wanted="take-back")
    says(root, found, outcome="taken-back")
    assert told(root, clock) is None


def test_who_asks_again_carries_on_with_what_died(failovers: Failovers, root: str, clock: ShiftedClock) -> None:
    died = died_waiting(failovers, root)
    word = told(root, clock)
    assert word is not None and word.wanted == "hand-over"
    again = failovers.planned(wanted())
    assert (again.id, again.state) == (died.id, "commit-pending")
    died = died_waiting_of(root, again)
    assert failovers.resume(died.id).state == "commit-pending"


@pytest.mark.parametrize("has_answered", [False, True])
def test_i7_another_point_is_for_who_has_been_handed_over_to(
    failovers: Failovers, root: str, clock: ShiftedClock, has_answered: bool
) -> None:
    """Else the host would be asked no more, write on, and be committed away."""
    died = died_waiting(failovers, root)
    if has_answered:
        died = died_waiting_of(root, failovers.resume(died.id))
    with pytest.raises(RefusedError, match=r"has not handed over.*allowed: resume, cancel"):
        failovers.change_point(died.id, "latest")
    assert last(root) == died
    assert failovers.resume(died.id).state == "commit-pending"
    with Vault.open(root) as vault:
        assert failovers.change_point(died.id, "lsn:2").point.lsn < vault.received_lsn(died.machine_id)


def died_waiting_of(root: str, found: Operation) -> Operation:
    """Killed after the host had answered, before that was used."""
    assert found.handover is not None
    unused = msgspec.structs.replace(found.handover, is_used=False)

    def back(vault: Vault, before: Operation) -> Operation:
        point = msgspec.structs.replace(before.point, lsn=1)
        return msgspec.structs.replace(before.to("preparing", 0, "it died"), handover=unused, point=point)

    return change(root, found.id, back)


@pytest.mark.parametrize("has_answered", [False, True])
def test_i8_what_nobody_carries_on_with_is_cancelled_in_time(
    failovers: Failovers, root: str, clock: ShiftedClock, has_answered: bool
) -> None:
    died = died_waiting(failovers, root)
    if has_answered:
        with Vault.open(root) as vault:
            lsn = vault.received_lsn(died.machine_id)
        says(root, died, outcome="handed-over", lsn=lsn, chunks_compared=4)
        assert told(root, clock) is None
    assert not failovers.is_anything_due()
    clock.advance(HANDOVER_S + 1)
    assert told(root, clock) is None, "asked no more"
    assert failovers.is_anything_due()
    (ended,) = failovers.sweep()
    assert (ended.state, ended.remains) == ("cancelled", False) and "nobody carried on" in ended.causes[-1].text
    assert told(root, clock) == Handover(id=died.id, wanted="take-back")


def test_what_a_person_has_moved_is_theirs(failovers: Failovers, root: str, clock: ShiftedClock) -> None:
    found = failovers.planned(wanted())
    clock.advance(HANDOVER_S + 1)
    assert not failovers.is_anything_due(), "commit pending has no end"
    failovers.change_point(found.id, f"lsn:{found.point.lsn - 1}")
    change(root, found.id, lambda vault, before: before.to("preparing", 0, "it died"))
    assert not failovers.is_anything_due()


def test_a_point_of_before_the_host_came_home_can_be_committed(
    scratch: Path, clock: ShiftedClock, recovery: Recovery
) -> None:
    """It is of an older epoch, and the host rests all the same."""
    history = random_history(7, records=20, disks={"root": 16 * 4096})
    history.marker(name="old")
    history.seal()
    history.begin_epoch(history.time_ns + 1)
    history.marker(name="end")
    history.seal()
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault")) as vault:
        put_description(vault, vault.machine(MACHINE))
    failovers = Failovers(str(scratch / "vault"), clock)
    found = failovers.planned(wanted())
    moved = failovers.change_point(found.id, "old")
    assert (found.point.epoch, moved.point.epoch) == (2, 1)
    assert failovers.commit(found.id).state == "committed"


@pytest.mark.parametrize("way", ["it says so", "a new epoch"])
def test_i7_a_host_that_goes_on_by_itself_is_not_committed_away(failovers: Failovers, root: str, way: str) -> None:
    found = failovers.planned(wanted())
    if way == "it says so":
        says(root, found, outcome="taken-back")
    else:
        with Vault.open(root, writable=True) as vault:
            raise_epoch(vault, found.machine_id)
    with pytest.raises(RefusedError, match="has taken its machine back since"):
        failovers.commit(found.id)
    assert failovers.cancel(found.id).state == "cancelled"


def test_a_commit_that_died_is_not_taken_for_a_host_that_goes_on(
    root: str, clock: ShiftedClock, recovery: Recovery
) -> None:
    class Died(Exception):
        pass

    def told(step: str) -> None:
        if step == "committed":
            raise Died

    found = Failovers(root, clock).planned(wanted())
    with pytest.raises(Died):
        Failovers(root, clock, told).commit(found.id)
    assert Failovers(root, clock).commit(found.id).state == "committed"


def test_bad_wishes(failovers: Failovers, root: str) -> None:
    with pytest.raises(BadInputError, match="--point latest"):
        failovers.planned(replace(wanted(), selector="latest-processed"))
    with pytest.raises(BadInputError, match="--timeout"):
        failovers.planned(wanted(handover_s=0))
    failovers.unplanned(wanted())
    with pytest.raises(RefusedError, match="failed-over: planned-failover is refused; allowed: change-point, cancel"):
        failovers.planned(wanted())


def heard(root: str, clock: ShiftedClock, *, is_connected: bool = True) -> None:
    with Vault.open(root, writable=True) as vault:
        vault.catalog.put_links([LinkRow(vault.machine(MACHINE).id, clock.time_ns(), is_connected, 1, 1, 1)])


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch, clock: ShiftedClock) -> Callable[[float], None]:
    """Waiting for another process takes no time."""
    advance = clock.advance
    monkeypatch.setattr(handing_over.time, "sleep", lambda seconds: advance(1.0))
    return advance


def test_a_host_that_is_not_there_is_not_asked(
    root: str, clock: ShiftedClock, waiting: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_connected in (False, True):
        with pytest.raises(RefusedError, match="is not connected to this store") as refused:
            Failovers(root, clock).planned(wanted())
        assert refused.value.exit_code == 4
        with Vault.open(root) as vault:
            assert operations(vault.catalog) == []
        heard(root, clock, is_connected=is_connected)
        waiting(0.0 if not is_connected else handing_over.AWAY_S_MAX + 1)
    heard(root, clock)
    handing_over.check_present(root, MACHINE, clock)


def test_a_host_that_goes_away_is_not_waited_for(
    failovers: Failovers, root: str, clock: ShiftedClock, waiting: Callable[[float], None]
) -> None:
    died = died_waiting(failovers, root)
    heard(root, clock)
    begun = clock.monotonic()
    with pytest.raises(TemporaryError, match=f"was away for {handing_over.AWAY_S_MAX:g} s"):
        WAIT_ANSWER(root, died.id, clock)
    assert clock.monotonic() - begun < 3 * handing_over.AWAY_S_MAX


def test_a_host_that_takes_too_long_is_not_waited_for(
    failovers: Failovers,
    root: str,
    clock: ShiftedClock,
    waiting: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = died_waiting(failovers, root)
    monkeypatch.setattr(handing_over, "is_present", lambda root, machine, clock: True)
    waiting(HANDOVER_S - 30.0)
    with pytest.raises(TemporaryError, match="was not handed over within 60m"):
        WAIT_ANSWER(root, died.id, clock)


WAIT_ANSWER = handing_over.wait_answer


def test_what_a_host_is_told_in_each_state(failovers: Failovers, root: str, clock: ShiftedClock) -> None:
    found = failovers.planned(wanted())
    assert found.handover is not None
    open_ = msgspec.structs.replace(found.handover, lsn=None)
    expected = {("preparing", True): "hand-over", ("preparing", False): "hand-over", ("cancelled", False): "take-back"}
    for state in ("preparing", "commit-pending", "committed", "cancelled"):
        for remains in (True, False):
            each = msgspec.structs.replace(found, state=state, remains=remains, handover=open_)
            word = wanted_of(each, clock.time_ns())
            assert (word.wanted if word else None) == expected.get((state, remains)), (state, remains)
