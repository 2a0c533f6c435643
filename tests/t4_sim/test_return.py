"""A machine that was failed over comes back to the store it came from: which of its sides is let in, and which is not.

Real vault, listener and sessions; hosts are scripts. The failover is committed by the action that people use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio.testing

from asrfs.errors import AuthenticationError
from asrfs.format.log_object import NO_DIGEST
from asrfs.protocol.messages import Acknowledge, Hello, Refused, Welcome
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from replica_store.failover import actions, undoing
from replica_store.failover.actions import Failovers
from replica_store.failover.wanted import Wanted
from replica_store.ingest import session as session_room
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.operations import Operation, operations
from replica_store.vault.protection import protection_of
from replica_store.vault.rebuild import rebuild
from replica_store.vault.vault import Vault
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_host import HostHistory
from tests.t4_sim.test_rejoin_store import digest_of, fill

ORDER = "a" * 32


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(root: str, begun: Operation, *_: Any, **__: Any) -> Operation:
        return msgspec.structs.replace(begun, rto_s=0.1)

    monkeypatch.setattr(actions, "prepare", prepare)
    monkeypatch.setattr(undoing, "discard", lambda found: None)


def commit(world: StoreWorld) -> Operation:
    failovers = Failovers(world.path, SystemClock())
    begun = failovers.unplanned(Wanted(machine="web1", selector="latest"))
    return failovers.commit(begun.id)


async def committed_world(world: StoreWorld) -> tuple[HostHistory, Operation]:
    history = world.enrol()
    fill(history, 6)
    await world.ship_all(history)
    return history, commit(world)


def epoch_of(committed: Operation) -> int:
    assert committed.epoch is not None
    return committed.epoch


def returning_hello(history: HostHistory, epoch: int, **changes: Any) -> Hello:
    hello = msgspec.structs.replace(history.hello(), rejoin=True, order=ORDER, epoch=epoch)
    return msgspec.structs.replace(hello, **changes)


async def greet(world: StoreWorld, history: HostHistory, hello: Hello) -> Welcome | Refused:
    answer = await world.connect(history).greet(hello)
    assert isinstance(answer, Welcome | Refused)
    return answer


def standing(world: StoreWorld) -> tuple[str, str]:
    with Vault.open(world.path) as vault:
        return operations(vault.catalog)[-1].state, str(protection_of(vault, vault.machine("web1")))


async def test_i6_and_i7_the_side_that_went_on_comes_back_and_the_other_never_does(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, committed = await committed_world(world)
        old, old_certificate = history.hello(), world.certificates[history.machine_id]
        tail = world.vault.points(history.machine_id)
        for hello in (old, returning_hello(history, old.epoch), returning_hello(history, 1 << 20)):
            refused = await greet(world, history, hello)
            assert isinstance(refused, Refused) and refused.code == "fenced", "with the certificate of before: never"

        world.enrol()  # by a token of after the commit
        for hello in (old, returning_hello(history, epoch_of(committed) - 1)):
            refused = await greet(world, history, hello)
            assert isinstance(refused, Refused) and refused.code == "fenced", "the token was used at the wrong place"
        own = await greet(world, history, returning_hello(history, epoch_of(committed)))
        assert isinstance(own, Refused) and own.code == "state", (
            "what the failover made itself is not fenced for asking"
        )
        assert standing(world) == ("committed", "committed")

        back = await greet(world, history, returning_hello(history, epoch_of(committed) + 3))
        assert isinstance(back, Welcome) and back.epoch == epoch_of(committed) + 4
        assert standing(world)[0] == "returned"
        assert world.vault.points(history.machine_id) == tail, "I7: what was here is here"

        history.epoch = back.epoch
        history.disk(gap=True)
        host = world.connect(history)
        again = await host.greet(returning_hello(history, back.epoch - 1))
        assert isinstance(again, Welcome) and again.epoch == back.epoch, "the answer was lost, and is given again"
        gap = history.build_gap(again.acknowledged_lsn + 1, history.last_lsn, again.session_salt, digest_of(again))
        await host.ship(gap)
        assert isinstance(await host.hear_except(), Acknowledge)
        assert standing(world) == ("returned", "initial-replication")

        world.certificates[history.machine_id] = old_certificate
        refused = await greet(world, history, old)
        assert isinstance(refused, Refused) and refused.code == "fenced", "also when the other side has enrolled since"
        refused = await greet(world, history, returning_hello(history, old.epoch))
        assert isinstance(refused, Refused) and refused.code == "authentication"
        root, machine_id = world.path, history.machine_id
        before = world.vault.catalog.table("operations")
    rebuild(root)
    with Vault.open(root) as vault:
        assert vault.catalog.table("operations") == before
        assert vault.catalog.last_object(machine_id).epoch == back.epoch  # type: ignore[union-attr]


async def test_i6_nothing_is_received_before_the_failover_has_ended(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A side of a later epoch that does not ask to rejoin is only told where the store is."""
    async with make_world(scratch) as world:
        history, committed = await committed_world(world)
        world.enrol()
        host = world.connect(history)
        welcome = await host.greet(returning_hello(history, epoch_of(committed) + 3, rejoin=False, order=""))
        assert isinstance(welcome, Welcome) and welcome.epoch == epoch_of(committed)
        received = world.received(history)
        history.epoch = welcome.epoch
        history.write()
        digest = bytes.fromhex(welcome.last_digest) or NO_DIGEST
        await host.ship(history.build(received + 1, history.last_lsn, welcome.session_salt, digest))
        refused = await host.hear_except()
        assert isinstance(refused, Refused) and refused.code == "fenced"
        assert world.received(history) == received and standing(world) == ("committed", "committed")


async def test_i6_a_store_that_dies_between_epoch_and_end_has_let_nobody_in(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(AuthenticationError):
        pass

    def die(*_: object) -> None:
        raise Died("it died")

    async with make_world(scratch) as world:
        history, committed = await committed_world(world)
        world.enrol()
        hello = returning_hello(history, epoch_of(committed) + 3)
        with monkeypatch.context() as patched:
            patched.setattr(session_room, "end_by_return", die)
            assert isinstance(await greet(world, history, hello), Refused)
        assert standing(world) == ("committed", "committed")
        world.restart()
        refused = await greet(world, history, returning_hello(history, epoch_of(committed), rejoin=False, order=""))
        assert isinstance(refused, Refused)
        back = await greet(world, history, hello)
        assert isinstance(back, Welcome) and back.epoch == epoch_of(committed) + 5 and standing(world)[0] == "returned"


async def test_a_token_of_before_the_commit_is_no_proof_of_intent(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 6)
        await world.ship_all(history)
        secret = encode_base64url(decode_token(make_token(world.vault, "web1", world.clock)).secret)
        commit(world)
        wanted = EnrolRequest(secret=secret, machine="web1", machine_id=history.machine_id, csr="")
        with pytest.raises(AuthenticationError, match="expired"):
            enrol(world.vault, wanted, world.clock, 9443)


async def test_who_came_back_can_be_failed_over_again_and_come_back_again(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, committed = await committed_world(world)
        for round in range(3):
            world.enrol()
            hello = returning_hello(history, epoch_of(committed) + 3, order=f"{round:032x}")
            assert isinstance(await greet(world, history, hello), Welcome)
            assert standing(world)[0] == "returned"
            committed = commit(world)
            refused = await greet(world, history, hello)
            assert isinstance(refused, Refused) and refused.code == "fenced", "once let in is not let in for ever"
        with Vault.open(world.path) as vault:
            assert [each.state for each in operations(vault.catalog)] == ["returned"] * 3 + ["committed"]
