"""A tail as the store sees it: whose may be offered, and what a host that lies can do, which is nothing to the history.

Real vault, listener and sessions; hosts are scripts that say over the real protocol what they like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.protocol.messages import Acknowledge, Compare, Heartbeat, Hello, KeptTail, Refused, Welcome
from replica_store.failover import actions, undoing
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.tails import tails
from tests.fakes.listening_store import StoreWorld, make_world, objects_of
from tests.fakes.scripted_host import BuiltObject, HostEnd, HostHistory
from tests.t4_sim.test_rejoin_store import fill
from tests.t4_sim.test_return import commit

SECOND = 7
"""Records of the host that the store has."""


async def superseded_world(world: StoreWorld) -> tuple[HostHistory, Hello]:
    """A host with records that the store does not have, superseded, and what it greets with."""
    history = world.enrol()
    fill(history, 5)
    await world.ship_all(history)
    row = world.vault.catalog.last_object(history.machine_id)
    assert row is not None and row.last_lsn == SECOND
    for _ in range(6):
        history.write()
    raise_epoch(world.vault, history.machine_id)
    return history, offering(history, row.digest)


def offering(history: HostHistory, digest: bytes) -> Hello:
    return msgspec.structs.replace(history.hello(SECOND, digest.hex()), tail_lsn=history.last_lsn)


async def greet(world: StoreWorld, history: HostHistory, hello: Hello) -> tuple[HostEnd, Welcome | Refused]:
    host = world.connect(history)
    answer = await host.greet(hello)
    assert isinstance(answer, Welcome | Refused)
    return host, answer


async def heard(host: HostEnd) -> Any:
    return await host.hear_except(Heartbeat)


async def send(host: HostEnd, built: list[BuiltObject]) -> Refused:
    """What ends it."""
    for each in built:
        await host.ship(each)
        answer = await heard(host)
        if isinstance(answer, Refused):
            return answer
        assert answer == Acknowledge(lsn=each.begin.last_lsn, digest=each.digest.hex())
    answer = await heard(host)
    assert isinstance(answer, Refused)
    return answer


def history_of(world: StoreWorld) -> dict[str, list[tuple[object, ...]]]:
    """All that the catalog has of histories, and nothing of tails."""
    return {name: world.vault.catalog.table(name) for name in REBUILDABLE if "tail" not in name}


async def test_i7_a_tail_is_kept_and_the_host_is_told(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        before = history_of(world)
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome) and answer.is_tail
        assert (answer.epoch, answer.acknowledged_lsn) == (1, SECOND)
        last_ns = history.records[-1].time_ns
        refused = await send(host, objects_of(history, answer, 2))
        assert refused.code == "fenced"
        assert refused.tail == KeptTail(lsn=history.last_lsn, time_ns=last_ns, is_point=True)
        _, again = await greet(world, history, hello)
        assert again == refused, "the answer was lost, and is given again"
        assert history_of(world) == before
        _, plain = await greet(world, history, msgspec.structs.replace(hello, tail_lsn=0))
        assert isinstance(plain, Refused) and plain.code == "fenced" and plain.tail is None


async def test_i7_who_is_cut_off_goes_on_behind_what_was_acknowledged(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome)
        first = objects_of(history, answer, 2)[0]
        await host.ship(first)
        assert isinstance(await heard(host), Acknowledge)
        await host.stream.aclose()
        world.restart()
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome) and answer.acknowledged_lsn == first.begin.last_lsn
        assert answer.acknowledged_time_ns == history.records[first.begin.last_lsn - 1].time_ns
        refused = await send(host, objects_of(history, answer, 2))
        assert refused.tail is not None and refused.tail.is_point


async def test_i6_a_tail_touches_no_session_of_the_side_that_goes_on(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        other = world.connect(history)
        welcomed = await other.greet(msgspec.structs.replace(history.hello(), epoch=1, rejoin=True, order="a" * 32))
        assert isinstance(welcomed, Welcome) and welcomed.epoch == 3
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome)
        busy = world.connect(history)
        second = await busy.greet(hello)
        assert isinstance(second, Refused) and (second.code, second.tail) == ("state", None), "one at a time"
        await send(host, objects_of(history, answer, 3))
        assert history.machine_id in world.listener.connected, "it is as it was"


Lie = Callable[[HostHistory, Welcome], BuiltObject]


def _of_another_epoch(history: HostHistory, answer: Welcome) -> BuiltObject:
    digest = bytes.fromhex(answer.last_digest)
    history.epoch = 2
    return history.build(SECOND + 1, SECOND + 2, answer.session_salt, digest)


def _with_a_hole(history: HostHistory, answer: Welcome) -> BuiltObject:
    return history.build(SECOND + 2, SECOND + 3, answer.session_salt, bytes.fromhex(answer.last_digest))


def _over_what_is_there(history: HostHistory, answer: Welcome) -> BuiltObject:
    return history.build(SECOND - 1, SECOND + 1, answer.session_salt, bytes.fromhex(answer.last_digest))


def _of_another_chain(history: HostHistory, answer: Welcome) -> BuiltObject:
    return history.build(SECOND + 1, SECOND + 2, answer.session_salt, bytes(32))


def _of_another_session(history: HostHistory, answer: Welcome) -> BuiltObject:
    return history.build(SECOND + 1, SECOND + 2, bytes(32), bytes.fromhex(answer.last_digest))


def _of_another_machine(history: HostHistory, answer: Welcome) -> BuiltObject:
    digest = bytes.fromhex(answer.last_digest)
    return history.build(SECOND + 1, SECOND + 2, answer.session_salt, digest, machine_id="f" * 32)


def _outside_its_disks(history: HostHistory, answer: Welcome) -> BuiltObject:
    history.write(slot=9, offset=0)
    lsn = history.last_lsn
    history.records[SECOND] = history.records[lsn - 1]
    return history.build(SECOND + 1, SECOND + 1, answer.session_salt, bytes.fromhex(answer.last_digest))


def _damaged(history: HostHistory, answer: Welcome) -> BuiltObject:
    built = history.build(SECOND + 1, SECOND + 2, answer.session_salt, bytes.fromhex(answer.last_digest))
    content = bytearray(built.content)
    content[-40] ^= 1
    return BuiltObject(built.begin, [bytes(content)], built.digest)


def _omitting(history: HostHistory, answer: Welcome) -> BuiltObject:
    built = history.build(SECOND + 1, SECOND + 2, answer.session_salt, bytes.fromhex(answer.last_digest))
    return BuiltObject(msgspec.structs.replace(built.begin, omitted=b"\x01"), built.pieces, built.digest)


LIES: tuple[Lie, ...] = (
    _of_another_epoch,
    _with_a_hole,
    _over_what_is_there,
    _of_another_chain,
    _of_another_session,
    _of_another_machine,
    _outside_its_disks,
    _damaged,
    _omitting,
)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.strip("_"))
async def test_i6_a_host_that_lies_about_its_tail_changes_nothing(
    lie: Lie, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        before, objects = history_of(world), sorted(world.vault.objects.list("machines/"))
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome)
        await host.ship(lie(history, answer))
        refused = await heard(host)
        assert isinstance(refused, Refused) and refused.tail is None
        assert history_of(world) == before and not tails(world.vault.catalog, history.machine_id)
        assert sorted(world.vault.objects.list("machines/")) == objects
        world.restart()
        assert not world.listener.taking_tails and world.received(history) == SECOND


async def test_i6_a_host_that_says_something_else_is_refused(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome)
        await host.say(Compare(number=1, slot=0, disk_id="0" * 32, size_bytes=1 << 20, first=0, digests=bytes(32)))
        refused = await heard(host)
        assert isinstance(refused, Refused) and refused.code == "state"


CHANGES: dict[str, dict[str, Any]] = {
    "of the epoch that goes on": {"epoch": 2},
    "of no epoch": {"epoch": 0},
    "of another machine": {"machine_id": "f" * 32},
    "of another protocol": {"protocol": 99},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
async def test_i6_whose_tail_may_not_be_offered(
    changes: dict[str, Any], scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        _, answer = await greet(world, history, msgspec.structs.replace(hello, **changes))
        assert not (isinstance(answer, Welcome) and answer.is_tail)


async def test_i6_a_certificate_that_was_revoked_offers_nothing(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history, hello = await superseded_world(world)
        host, answer = await greet(world, history, hello)
        assert isinstance(answer, Welcome)
        with world.vault.catalog.transaction():
            row = world.vault.machine("web1")
            world.vault.catalog.put_machine(replace(row, revoked=True))
        refused = await send(host, objects_of(history, answer, 2))
        assert refused.code == "fenced" and refused.tail is None and not tails(world.vault.catalog, row.id)
        _, answer = await greet(world, history, hello)
        assert isinstance(answer, Refused) and answer.code == "authentication"


async def test_i7_the_side_that_a_failover_left_behind_offers_its_tail_also_after_another_one_enrolled(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate is good no more; but it is the one that was good until the commit."""
    monkeypatch.setattr(actions, "prepare", lambda root, begun, *_, **__: msgspec.structs.replace(begun, rto_s=0.1))
    monkeypatch.setattr(undoing, "discard", lambda found: None)
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 5)
        await world.ship_all(history)
        commit(world)
        history.write()
        row = world.vault.catalog.last_object(history.machine_id)
        assert row is not None
        old = world.certificates[history.machine_id]
        world.enrol()
        world.certificates[history.machine_id], new = old, world.certificates[history.machine_id]
        host, answer = await greet(world, history, offering(history, row.digest))
        assert isinstance(answer, Welcome) and answer.is_tail
        refused = await send(host, objects_of(history, answer, 1))
        assert refused.tail is not None and refused.tail.is_point
        world.enrol()
        world.certificates[history.machine_id] = new
        _, answer = await greet(world, history, offering(history, row.digest))
        assert isinstance(answer, Refused) and answer.tail is None, "of neither side"
