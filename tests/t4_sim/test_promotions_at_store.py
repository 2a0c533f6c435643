"""Promotions at the store: what hosts are told by real sessions, what a person is told before, what is refused, and
what becomes of one whose host, command or time runs out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import BadInputError, NotFoundError, RefusedError, TemporaryError
from asrfs.model.clock import Clock
from asrfs.protocol.messages import Handover, Heartbeat, Hello, Promote, Promoted
from asrfs.storage.system_clock import SystemClock
from replica_store.failover import actions, handing_over, promoting
from replica_store.failover.actions import Failovers
from replica_store.failover.promoting import (
    FAILING_S_MAX,
    Plan,
    begin_promotion,
    cancel_promotion,
    plan,
    wait_promotion,
)
from replica_store.failover.wanted import Wanted
from replica_store.ingest.promoting import AGAIN_S
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.operations import Operation
from replica_store.vault.promoting import TIME_IS_UP, begin_attempt, promotions_wanted
from replica_store.vault.promotions import (
    Promotion,
    check_not_promoting,
    promotion,
    promotions,
    put_promotion,
    write_promotion,
)
from replica_store.vault.rebuild import rebuild
from replica_store.vault.returning import end_by_return
from replica_store.vault.rows import LinkRow
from replica_store.vault.standing import standing_of
from replica_store.vault.vault import Vault, lock_descriptions
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_host import HostEnd, HostHistory
from tests.t4_sim.test_planned_failover import ask as ask_handover

BLOCK = 4096


class SteppedClock:
    """A second later at each look at the monotonic time."""

    def __init__(self) -> None:
        self.at_s = SystemClock().time_ns() / 1e9

    def time_ns(self) -> int:
        return int(self.at_s * 1e9)

    def monotonic(self) -> float:
        self.at_s += 1.0
        return self.at_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(handing_over.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(promoting.time, "sleep", lambda seconds: None)
    return SteppedClock()


@asynccontextmanager
async def connected(
    scratch: Path, takes_promotion: bool = True
) -> AsyncIterator[tuple[StoreWorld, HostHistory, HostEnd]]:
    """A host with two disks, point `good`, and records behind it."""
    async with make_world(scratch) as world:
        world.nursery.start_soon(world.listener.promotions.run)
        history = world.enrol()
        history.disk(0)
        history.disk(1)
        for at in range(5):
            history.write(offset=at * BLOCK)
        history.marker("good")
        history.write(offset=2 * BLOCK)
        history.write(slot=1, offset=7 * BLOCK)
        history.marker("later")
        await world.ship_all(history)
        host = world.connect(history)
        await host.greet(takes(history) if takes_promotion else history.hello())
        yield world, history, host


def takes(history: HostHistory) -> Hello:
    return msgspec.structs.replace(history.hello(), takes_promotion=True, takes_handover=True)


def present(world: StoreWorld, clock: Clock) -> None:
    ids = [machine.id for machine in world.vault.machines()]
    world.vault.catalog.put_links([LinkRow(each, clock.time_ns(), True, 1, 1, 1) for each in ids])


def planned(world: StoreWorld, selector: str = "good", **more: Any) -> Plan:
    with Vault.open(world.path) as vault:
        return plan(vault, "web1", selector, **more)


def begun(world: StoreWorld, clock: Clock, selector: str = "good", **more: Any) -> Promotion:
    present(world, clock)
    return begin_promotion(world.path, planned(world, selector), clock, **more)


def found(world: StoreWorld, promotion_id: str) -> Promotion:
    return promotion(world.vault.catalog, promotion_id)


def put(world: StoreWorld, promotion: Promotion) -> None:
    with lock_descriptions(world.path, 10.0), Vault.open(world.path, writable=True) as vault:
        with vault.catalog.transaction():
            put_promotion(vault, promotion)


async def hear(host: HostEnd) -> Promote:
    event = None
    with trio.fail_after(2 * AGAIN_S):
        while not isinstance(event, Promote):
            await host.say(Heartbeat())
            with trio.move_on_after(5):
                event = await host.hear_except(Heartbeat, Handover)
    assert event is not None
    return event


async def hear_of(host: HostEnd, wanted: str) -> Promote:
    with trio.fail_after(10):
        while (word := await hear(host)).wanted != wanted:
            continue
    return word


async def made_ready(world: StoreWorld, history: HostHistory, host: HostEnd, clock: Clock) -> Promotion:
    """A promotion whose host has prepared and said so."""
    made = begun(world, clock)
    await hear(host)
    await host.say(Promoted(id=made.id, outcome="ready", lsn=history.last_lsn))
    return made


async def test_a_host_is_led_through_it_and_told_again(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, host):
        made = begun(world, clock)
        word = await hear(host)
        assert (word.id, word.wanted, word.lsn) == (made.id, "prepare", 8)
        assert [disk.name for disk in word.disks] == ["disk0", "disk1"] and word.boot == b""
        assert await hear(host) == word, "again, in the same session"
        await host.say(Promoted(id=made.id, outcome="ready", lsn=history.last_lsn))
        assert await hear_of(host, "write") == msgspec.structs.replace(word, wanted="write", attempt=1)
        host = world.connect(history)
        await host.greet(takes(history))
        assert (await hear(host)).wanted == "write", "in each session"
        await host.say(Promoted(id=made.id, outcome="written", lsn=history.last_lsn, bytes_written=9))
        await hear_of(host, "release")
        await host.say(Promoted(id=made.id, outcome="released"))
        await trio.sleep(2)  # sleep: virtual, what writing it down takes
        done = found(world, made.id)
        assert (done.state, done.machines[0].bytes_written, done.is_over) == ("done", 9, True)
        with Vault.open(world.path) as vault:
            assert not promotions_wanted(vault, 0)


async def test_a_host_of_before_says_so(scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(scratch, takes_promotion=False) as (world, _, _):
        made = begun(world, clock)
        await trio.sleep(2)  # sleep: virtual, what writing it down takes
        assert found(world, made.id).state == "cancelled"
        with pytest.raises(RefusedError, match="update asrfs there"):
            wait_promotion(world.path, made.id, clock, lambda found: None)


async def test_what_a_person_is_told_before(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, _):
        said = planned(world)
        assert [(disk.name, disk.bytes_changed) for disk in said.disks] == [("disk0", BLOCK), ("disk1", BLOCK)]
        assert not promotions(world.vault.catalog) and not said.warnings
        assert [disk.bytes_changed for disk in planned(world, "later").disks] == [0, 0]
        history.disk(1, size_bytes=2 << 20)
        history.disk(2)
        history.write(slot=2)
        await world.ship_all(history)
        with pytest.raises(RefusedError, match=r"disk disk2 of machine web1 was added since .*--leave disk2"):
            planned(world)
        with pytest.raises(BadInputError, match="--leave disk0"):
            planned(world, leave=["disk2", "disk0"])
        said = planned(world, leave=["disk2"])
        assert said.machines[0].left == (2,) and "keeps its size" in said.disks[1].note
        assert said.disks[1].bytes_changed == BLOCK, "what it grew by is zeros already"
        history.write(slot=1, offset=300 * BLOCK)
        await world.ship_all(history)
        assert planned(world, leave=["disk2"]).disks[1].bytes_changed == 2 * BLOCK
        history.disk(0, removed=True)
        await world.ship_all(history)
        with pytest.raises(RefusedError, match="disk disk0 of machine web1 was removed since"):
            planned(world, leave=["disk2"])
        assert [disk.name for disk in planned(world, leave=["disk2", "disk0"]).disks] == ["disk1"]
        with pytest.raises(NotFoundError):
            planned(world, "nothing")


async def test_i8_what_is_not_ready_in_time_is_taken_back(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, _, _):
        made = begun(world, clock, prepare_s=5)
        with Vault.open(world.path) as vault:
            assert [word.wanted for word in promotions_wanted(vault, made.until_ns - 1).values()] == ["prepare"]
            assert [word.wanted for word in promotions_wanted(vault, made.until_ns).values()] == ["take-back"]
        assert found(world, made.id).causes[-1].text == TIME_IS_UP
        with pytest.raises(TemporaryError, match="has written nothing"):
            wait_promotion(world.path, made.id, clock, lambda found: None)
        again = cancel_promotion(world.path, "web1", clock)
        assert again.state == "cancelled"


async def test_the_same_again_is_the_same_and_another_takes_its_place_when_that_has_written(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, host):
        made = begun(world, clock)
        assert begun(world, clock).id == made.id
        assert begun(world, clock, "lsn:8").id == made.id, "the same in other words"
        with pytest.raises(RefusedError, match="preparing: wait until that is over"):
            begun(world, clock, "later")
        said = standing_of(world.vault, world.vault.machine("web1"), clock.time_ns())
        assert "LSN 8 is being copied back over its disks" in said.reason
        with pytest.raises(RefusedError, match="a point is being copied back"):
            check_not_promoting(world.vault.catalog, history.machine_id, "web1")
        await hear(host)
        await host.say(Promoted(id=made.id, outcome="ready", lsn=history.last_lsn))
        await hear_of(host, "write")
        with pytest.raises(RefusedError, match="it goes on to its end"):
            cancel_promotion(world.path, "web1", clock)
        other = begun(world, clock, "later")
        assert other.id != made.id and found(world, made.id).is_over
        with pytest.raises(TemporaryError, match="was being written: another point was asked for"):
            wait_promotion(world.path, made.id, clock, lambda found: None)
        assert (await hear_of(host, "prepare")).id == other.id
        assert cancel_promotion(world.path, "web1", clock).id == other.id
        assert (await hear_of(host, "take-back")).id == other.id
        third = begun(world, clock, "later")
        assert third.id != other.id
        assert (await hear_of(host, "prepare")).id == third.id, "disks that are partly written cannot be taken back"
        await host.say(Promoted(id=third.id, outcome="ready", lsn=history.last_lsn))
        assert (await hear_of(host, "write")).id == third.id


async def test_a_machine_that_is_back_is_free_whatever_the_others_do(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, _):
        made = begun(world, clock)
        lost = msgspec.structs.replace(made.machines[0], machine_id="9" * 32, machine="web9")
        both = msgspec.structs.replace(made, machines=(*made.machines, lost)).to("cancelled", 1, "it was cancelled")
        ours = msgspec.structs.replace(both.machines[0], is_back=True)
        for free, state in ((False, both), (True, both.with_member(ours))):
            with Vault.open(world.path, writable=True) as vault, vault.catalog.transaction():
                write_promotion(vault.catalog, state)
            assert not found(world, made.id).is_over, "the other one has heard nothing"
            said = standing_of(world.vault, world.vault.machine("web1"), clock.time_ns())
            assert ("copied back" in said.reason) != free
            with nullcontext() if free else pytest.raises(RefusedError, match="is being copied back"):
                check_not_promoting(world.vault.catalog, history.machine_id, "web1")


async def test_a_machine_that_is_failed_over_or_away_is_refused(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, _):
        present(world, clock)
        clock.at_s += 1000  # type: ignore[attr-defined]
        with pytest.raises(RefusedError, match="is not connected"):
            begin_promotion(world.path, planned(world), clock)
        held: Operation = ask_handover(world, history)
        with pytest.raises(RefusedError, match=f"failed over .failover {held.id[:12]}, preparing"):
            begun(world, clock)
        with pytest.raises(BadInputError):
            begun(world, clock, prepare_s=0)


async def test_what_no_host_could_begin_can_be_taken_back(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    """Each `write` that is said anew may be begun at any time, so it can be taken back between two of them only."""
    async with connected(scratch) as (world, history, host):
        made = await made_ready(world, history, host, clock)
        in_use = Promoted(id=made.id, outcome="failed", exit_code=4, error="the disks are in use")
        for attempt in (1, 2, 3):
            with trio.fail_after(3 * AGAIN_S):
                while (await hear(host)).attempt != attempt:
                    continue
            assert found(world, made.id).machines[0].attempt == attempt, "durable before it is said"
            with pytest.raises(RefusedError, match="it goes on to its end"):
                cancel_promotion(world.path, "web1", clock)
            await host.say(msgspec.structs.replace(in_use, attempt=attempt - (attempt == 2)))
            await trio.sleep(2)  # sleep: virtual, what writing it down takes
            if attempt == 2:  # that was said of the one before
                assert not found(world, made.id).machines[0].is_untouched
                await host.say(msgspec.structs.replace(in_use, attempt=2))
                await trio.sleep(2)  # sleep: virtual, what writing it down takes
            assert found(world, made.id).machines[0].is_untouched
        looks: list[Promotion] = []

        def look(seen: Promotion) -> None:
            looks.append(seen)
            present(world, clock)

        with pytest.raises(RefusedError, match=r"the disks are in use; .*its host tries.*--cancel takes"):
            wait_promotion(world.path, made.id, clock, look)
        assert FAILING_S_MAX - 1 <= len(looks) <= FAILING_S_MAX + 1, "a second a look: it may end by itself"
        assert cancel_promotion(world.path, "web1", clock).state == "cancelled"
        with Vault.open(world.path) as vault:
            assert begin_attempt(vault, history.machine_id, made.id) is None, "decided before, and not said any more"
        with pytest.raises(RefusedError, match=r"the disks are in use; .*has written nothing"):
            wait_promotion(world.path, made.id, clock, lambda found: None)
        assert (await hear_of(host, "take-back")).id == made.id
        await host.say(Promoted(id=made.id, outcome="taken-back"))
        await trio.sleep(2)  # sleep: virtual, what writing it down takes
        assert found(world, made.id).is_over
        check_not_promoting(world.vault.catalog, history.machine_id, "web1")


async def test_what_was_answered_is_not_said_again_to_a_host_that_may_have_forgotten(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    """Its agent died, and what is wanted of it was looked at before it had answered."""
    async with connected(scratch) as (world, history, host):
        made = await made_ready(world, history, host, clock)
        assert (await hear_of(host, "write")).attempt == 1
        world.listener.promotions.look = trio.lowlevel.checkpoint
        again = world.connect(history)
        await again.greet(takes(history))
        assert (await hear(again)).attempt == 1, "it has not answered"
        in_use = Promoted(id=made.id, outcome="failed", exit_code=4, error="the disks are in use", attempt=1)
        await again.say(in_use)
        await trio.sleep(2)  # sleep: virtual, what writing it down takes
        again = world.connect(history)
        await again.greet(takes(history))
        assert (await hear(again)).attempt == 2 == found(world, made.id).machines[0].attempt
        with pytest.raises(RefusedError, match="it goes on to its end"):
            cancel_promotion(world.path, "web1", clock)


async def test_a_member_that_is_left_alone_can_be_taken_to_another_point(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, _, _):
        made = begun(world, clock)
        other = msgspec.structs.replace(
            made.machines[0], machine_id="9" * 32, machine="web9", has_left=True, is_back=True
        )
        both = msgspec.structs.replace(made, target="shop", machines=(*made.machines, other)).to("writing", 1, "ready")
        put(world, both)
        assert begun(world, clock).id == made.id, "to the same: it goes on"
        taken = begun(world, clock, "later")
        assert taken.id != made.id and found(world, made.id).is_over


async def test_a_machine_that_was_failed_over_is_not_taken_back_to_a_point_when_it_comes_home(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "prepare", lambda root, begun, *_, **__: begun)
    async with connected(scratch) as (world, history, host):
        made = await made_ready(world, history, host, clock)
        await hear_of(host, "write")
        failovers = Failovers(world.path, clock)
        operation = failovers.unplanned(Wanted(machine="web1", selector="latest"))
        with Vault.open(world.path) as vault:
            assert promotions_wanted(vault, 0), "it may be cancelled yet"
        with Vault.open(world.path, writable=True) as vault, vault.catalog.transaction():
            vault.catalog.change("INSERT INTO promotions VALUES ('f', 'no state', 1, 1, 'no content')", ())
        failovers.commit(operation.id)
        with Vault.open(world.path, writable=True) as vault, vault.catalog.transaction():
            vault.catalog.change("DELETE FROM promotions WHERE id = 'f'", ())
        after = found(world, made.id)
        assert after.is_over and "was failed over for good" in after.causes[-1].text
        end_by_return(world.path, operation.id, 9, clock.time_ns())
        with Vault.open(world.path) as vault:
            assert promotions_wanted(vault, 0) == {}
        with pytest.raises(RefusedError, match=r"failed over for good.*was being written"):
            wait_promotion(world.path, made.id, clock, lambda found: None)
        gone = msgspec.structs.replace(after.machines[0], machine_id="9" * 32, machine="web9")
        put(world, msgspec.structs.replace(after, machines=(gone, after.machines[0]), state="done"))
        with pytest.raises(RefusedError, match=r"machine web9: it was failed over .*; the others are at"):
            wait_promotion(world.path, made.id, clock, lambda found: None)
        put(world, after)
    rebuild(world.path)
    with Vault.open(world.path) as vault:
        assert [each.is_over for each in promotions(vault.catalog)] == [True]


async def test_the_same_again_is_another_once_its_host_is_in_a_new_epoch(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, history, host):
        made = await made_ready(world, history, host, clock)
        await hear_of(host, "write")
        assert begun(world, clock).id == made.id
        with lock_descriptions(world.path, 10.0), Vault.open(world.path, writable=True) as vault:
            raise_epoch(vault, history.machine_id)
        other = begun(world, clock)
        assert other.id != made.id and found(world, made.id).is_over


async def test_a_row_that_was_never_sealed_writes_to_no_host(
    scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(scratch) as (world, _, _):
        made = begun(world, clock)
        forged = made.with_member(msgspec.structs.replace(made.machines[0], before_lsn=3)).to("writing", 1, "forged")
        with Vault.open(world.path, writable=True) as vault:
            with vault.catalog.transaction():
                write_promotion(vault.catalog, forged)
            assert promotions_wanted(vault, 0) == {}


async def test_a_rebuilt_catalog_has_them(scratch: Path, clock: Clock, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(scratch) as (world, _, _):
        made = begun(world, clock)
    rebuild(world.path)
    with Vault.open(world.path) as vault:
        assert promotions(vault.catalog, live=True) == [made]
