"""The store's ingest against a scripted host: real vault, catalog, protocol and sessions; wire and time in memory.

The oracle is the host's history: what is acknowledged can be read back from the vault, record for record.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

from asrfs.errors import NoSpaceError, TemporaryError
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.protocol.frames import FrameType, encode_frame_header
from asrfs.protocol.messages import Acknowledge, Heartbeat, Hello, ObjectBegin, Refused, Welcome
from replica_store.ingest.budget import Budget
from replica_store.ingest.session import HEARTBEAT_S, OBJECTS_WAITING, SILENCE_S_MAX
from replica_store.vault.enrolment import revoke
from replica_store.vault.rebuild import rebuild
from replica_store.vault.rows import Entry, PointRow
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.scrub import scrub
from replica_store.vault.vault import Vault
from tests.fakes.listening_store import StoreWorld, make_world, objects_of
from tests.fakes.memory_objects import MemoryObjects
from tests.fakes.scripted_host import BLOCK, BuiltObject, HostHistory

T = TypeVar("T")


def fill(history: HostHistory, writes: int, *, disk: bool = True) -> None:
    if disk:
        history.disk(0)
    for _ in range(writes):
        history.write()


def check_history(vault: Vault, history: HostHistory) -> None:
    """I3: everything received reads back as the host's records."""
    received = vault.received_lsn(history.machine_id)
    lsn = 0
    for row in vault.objects_of(history.machine_id, received):
        header, index, table = vault.object_head(row)
        raw = b"".join(vault.read_frame(row, header, table, i) for i in range(header.frame_count))
        for i in range(len(index)):
            record = history.records[lsn]
            lsn += 1
            assert (index.kind[i], index.slot[i], index.offset[i]) == (record.kind, record.slot, record.offset)
            at = int(index.payload_position[i])
            carried = raw[at : at + record.length] if record.kind in CARRIES_EXTENT_BYTES else index.note(i)
            assert carried == record.payload, f"LSN {lsn}"
    assert lsn == received


async def test_i3_what_is_acknowledged_is_in_the_vault(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 20)
        history.marker("noon")
        await world.ship_all(history)
        assert world.received(history) == history.last_lsn
        check_history(world.vault, history)
        (point,) = world.vault.points(history.machine_id)
        assert (point.name, point.lsn) == ("noon", history.last_lsn)
        history.write()
        await world.ship_all(history)
        check_history(world.vault, history)
        assert scrub(world.vault, world.vault.machines()).damages == []


async def test_points_that_were_completed_later_are_no_damage_and_completions_that_got_lost_are(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 5)
        early = history.unfinished("early")
        early_lsn = history.last_lsn
        await world.ship_all(history)
        assert scrub(world.vault, world.vault.machines()).damages == [], "a point whose last word has not come"
        fill(history, 3, disk=False)
        history.last_word(early, early_lsn, hold_ms=57.5, freeze_ms=50.25)
        await world.ship_all(history)
        assert [point.marker.hold_ms for point in world.vault.points(history.machine_id)] == [57.5]
        assert scrub(world.vault, world.vault.machines()).damages == []
        with world.vault.catalog.transaction():
            world.vault.catalog.change("UPDATE points SET hold_ms = 1.0 WHERE lsn = ?", (early_lsn,))
        (damage,) = scrub(world.vault, world.vault.machines()).damages
        assert (damage.first_lsn, damage.last_lsn) == (early_lsn, early_lsn)


async def test_a_last_word_that_comes_while_all_is_read_back_is_no_damage(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 5)
        point = history.unfinished("noon")
        point_lsn = history.last_lsn
        await world.ship_all(history)
        last = world.vault.catalog.last_object(history.machine_id)
        assert last is not None
        lsn = last.last_lsn + 1
        word = msgspec.structs.replace(point, unfinished=False, completes=point_lsn, hold_ms=2.5)
        row = replace(last, first_lsn=lsn, last_lsn=lsn, digest=bytes(32))
        coming = [Entry(row, completions=(PointRow(history.machine_id, lsn, 1, last.last_time_ns, word),))]

        def step(done: int, total: int) -> None:
            if coming:
                with Vault.open(world.path, writable=True) as served, served.catalog.transaction():
                    served.catalog.append([coming.pop()])

        assert scrub(world.vault, world.vault.machines(), step).damages == []
        (listed,) = world.vault.points(history.machine_id)
        assert listed.marker.hold_ms == 2.5, "it came"


async def test_objects_that_wait_are_stored_together_and_no_more_than_a_few_wait(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 29)
        host, welcome = await world.begin(history)
        world.listener.pause = trio.Event()
        for each in objects_of(history, welcome, 3):
            await host.ship(each)
        await trio.testing.wait_all_tasks_blocked()
        assert world.listener.batches == [1]
        world.listener.pause.set()
        assert await host.hear_except(Heartbeat) is not None
        await trio.testing.wait_all_tasks_blocked()
        assert world.received(history) == history.last_lsn
        assert max(world.listener.batches) in range(2, OBJECTS_WAITING + 2), "pipelined, and bounded"
        check_history(world.vault, history)


@pytest.mark.parametrize("cut", [0.03, 0.2, 0.5, 0.8, 0.99])
async def test_i3_a_connection_that_breaks_anywhere_loses_nothing_and_repeats_nothing(
    scratch: Path, autojump_clock: trio.testing.MockClock, cut: float
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 30)
        host = world.connect(history, send_bytes_max=int(cut * 30 * BLOCK))
        acknowledged = 0
        try:
            welcome = await host.greet(history.hello())
            assert isinstance(welcome, Welcome)
            for each in objects_of(history, welcome, 2):
                await host.ship(each)
                event = await host.hear_except(Heartbeat)
                assert isinstance(event, Acknowledge)
                acknowledged = event.lsn
        except TemporaryError:
            pass
        assert world.received(history) >= acknowledged
        await world.ship_all(history)
        assert world.received(history) == history.last_lsn
        check_history(world.vault, history)


Lie = Callable[[HostHistory, Welcome], BuiltObject]


def another_announcement(history: HostHistory, welcome: Welcome) -> BuiltObject:
    built = history.build(1, 3, welcome.session_salt)
    return BuiltObject(ObjectBegin(first_lsn=1, last_lsn=2, length=built.begin.length), built.pieces, built.digest)


def flipped(at: int) -> Lie:
    def lie(history: HostHistory, welcome: Welcome) -> BuiltObject:
        built = history.build(1, 3, welcome.session_salt)
        content = bytearray(built.content)
        content[at] ^= 1
        return BuiltObject(built.begin, [bytes(content)], built.digest)

    return lie


def outside_the_disk(history: HostHistory, welcome: Welcome) -> BuiltObject:
    history.write(offset=1 << 20)
    return history.build(1, history.last_lsn, welcome.session_salt)


LIES: dict[str, tuple[Lie, str]] = {
    "another machine's object": (lambda h, w: h.build(1, 3, w.session_salt, machine_id="f" * 32), "corrupt"),
    "I6: an older epoch": (lambda h, w: h.build(1, 3, w.session_salt, epoch=0), "fenced"),
    "an epoch nobody gave out": (lambda h, w: h.build(1, 3, w.session_salt, epoch=2), "state"),
    "sealed for another session": (lambda h, w: h.build(1, 3, bytes(32)), "corrupt"),
    "a gap": (lambda h, w: h.build(2, 3, w.session_salt), "corrupt"),
    "another history": (lambda h, w: h.build(1, 3, w.session_salt, b"x" * 32), "corrupt"),
    "announced as something else": (another_announcement, "corrupt"),
    "a flipped bit in the header": (flipped(60), "corrupt"),
    "a flipped bit in the index": (flipped(300), "corrupt"),
    "a flipped bit in a frame": (flipped(5000), "corrupt"),
    "a flipped bit in the digest": (flipped(-1), "corrupt"),
    "a write outside the disk": (outside_the_disk, "corrupt"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_cannot_be_is_refused_and_changes_nothing(
    scratch: Path, autojump_clock: trio.testing.MockClock, lie: str
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 5)
        host, welcome = await world.begin(history)
        make, code = LIES[lie]
        await host.ship(make(history, welcome))
        refused = await host.hear_except(Heartbeat)
        assert isinstance(refused, Refused)
        assert refused.code == code, refused.text
        assert world.received(history) == 0
        assert [name for name in world.vault.objects.list("") if "/log/" in name] == []
        del history.records[6:]
        await world.ship_all(history)
        check_history(world.vault, history)


async def test_a_duplicate_is_acknowledged_again_only_if_it_is_the_same(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 8)
        host, welcome = await world.begin(history)
        first, second = objects_of(history, welcome, 3)[:2]
        for built in (first, second, first, second):
            await host.ship(built)
        lsns = []
        for _ in range(4):
            event = await host.hear_except(Heartbeat)
            assert isinstance(event, Acknowledge)
            lsns.append(event.lsn)
        assert lsns == [3, 6, 3, 6]
        assert len(world.vault.objects_of(history.machine_id, 6)) == 2
        await host.ship(history.build(2, 3, welcome.session_salt, first.digest))
        refused = await host.hear_except(Heartbeat)
        assert isinstance(refused, Refused)
        assert refused.code == "corrupt"


@pytest.mark.parametrize("error", [NoSpaceError("vault: full"), TemporaryError("vault: input/output error")])
async def test_a_full_or_failing_vault_acknowledges_nothing_and_goes_on_when_it_can(
    scratch: Path, autojump_clock: trio.testing.MockClock, error: TemporaryError
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        world.vault.objects = objects = MemoryObjects()
        fill(history, 8)
        await world.ship_all(history)
        before = history.last_lsn
        fill(history, 8, disk=False)
        objects.fail_puts = [error]
        host, welcome = await world.begin(history)
        await host.ship(objects_of(history, welcome, 3)[0])
        refused = await host.hear_except(Heartbeat)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.text) == ("space", str(error))
        assert objects.fail_puts == [], "the fault struck"
        assert world.received(history) == before
        check_history(world.vault, history)
        await world.ship_all(history)
        check_history(world.vault, history)
        assert world.received(history) == history.last_lsn


async def test_i3_an_object_without_a_catalog_row_is_adopted_after_a_crash(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store dies between object and row: the next one takes it in, and a rebuild finds the same history."""
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 11)
        await world.ship_all(history, 4)
        fill(history, 5, disk=False)
        history.marker("after")
        host, welcome = await world.begin(history)
        built = objects_of(history, welcome, 2)
        monkeypatch.setattr(
            world.vault.catalog, "append", lambda entries: (_ for _ in ()).throw(TemporaryError("dead"))
        )
        await host.ship(built[0])
        assert isinstance(await host.hear_except(Heartbeat), Refused)
        assert world.received(history) == 12
        world.restart()
        _, welcome = await world.begin(history)
        assert welcome.acknowledged_lsn == 14
        await world.ship_all(history)
        check_history(world.vault, history)
        tables = {name: world.vault.catalog.table(name) for name in REBUILDABLE}
        world.vault.close()
        report = rebuild(world.path)
        assert (report.damages, report.left_out) == ([], 0)
        world.restart()
        assert {name: world.vault.catalog.table(name) for name in REBUILDABLE} == tables


async def test_i6_a_second_session_of_a_machine_ends_the_first_one(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 8)
        first, welcome = await world.begin(history)
        world.listener.pause = trio.Event()
        await first.ship(objects_of(history, welcome, 3)[0])
        await trio.testing.wait_all_tasks_blocked()
        second = world.connect(history)
        answers: list[object] = []

        async def greet() -> None:
            answers.append(await second.greet(history.hello()))

        world.nursery.start_soon(greet)
        await trio.testing.wait_all_tasks_blocked()
        assert answers == [], "not before the first one writes no more"
        world.listener.pause.set()
        await trio.testing.wait_all_tasks_blocked()
        (answer,) = answers
        assert isinstance(answer, Welcome)
        assert answer.acknowledged_lsn == 3, "what was being stored was stored to its end"
        assert answer.session_salt != welcome.session_salt
        assert await first.hear_except(Heartbeat, Acknowledge) is None
        for each in objects_of(history, answer, 3):
            await second.ship(each)
            assert isinstance(await second.hear_except(Heartbeat), Acknowledge)
        check_history(world.vault, history)


async def test_i6_an_epoch_raised_while_an_object_is_being_stored_fences_it(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 8)
        await world.ship_all(history)
        fill(history, 3, disk=False)
        host, welcome = await world.begin(history)
        with world.vault.catalog.transaction():
            world.vault.catalog.put_machine(replace(world.vault.machine("web1"), epoch=2))
        await host.ship(objects_of(history, welcome, 9)[0])
        refused = await host.hear_except(Heartbeat)
        assert isinstance(refused, Refused)
        assert refused.code == "fenced"
        assert world.received(history) == 9
        assert len([name for name in world.vault.objects.list("") if "/log/" in name]) == 3, "nothing stays of it"
        refused = await world.connect(history).greet(history.hello())
        assert isinstance(refused, Refused)
        assert refused.code == "fenced"


async def test_received_bytes_that_wait_are_bounded_over_all_sessions(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        histories = [world.enrol(f"m{n}", n) for n in range(1, 4)]
        world.listener.budget = Budget(40 * BLOCK)
        world.listener.pause = trio.Event()
        hosts = []
        for history in histories:
            fill(history, 60)
            host, welcome = await world.begin(history)
            hosts.append(host)
            for each in objects_of(history, welcome, 10)[:4]:
                await host.ship(each)
        await trio.testing.wait_all_tasks_blocked()
        assert 20 * BLOCK < world.listener.budget.used <= 40 * BLOCK
        world.listener.pause.set()
        await trio.testing.wait_all_tasks_blocked()
        assert world.listener.budget.used == 0
        assert [world.received(history) for history in histories] == [40, 40, 40]
        await hosts[0].ship(histories[0].build(1, 3, bytes(32)))
        assert isinstance(await hosts[0].hear_except(Heartbeat, Acknowledge), Refused)
        assert world.listener.budget.used == 0, "also after an object that was refused"


async def test_who_may_not_write_is_told_why(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(scratch) as world:
        history, other = world.enrol(), world.enrol("db1", 2)
        fill(history, 8)
        await world.ship_all(history)
        last_digest = world.vault.objects_of(history.machine_id, 9)[-1].digest.hex()

        async def code(hello: Hello) -> str:
            answer = await world.connect(history).greet(hello)
            return answer.code if isinstance(answer, Refused) else "welcome"

        def hello(**changes: Any) -> Hello:
            return msgspec.structs.replace(history.hello(9, last_digest), **changes)

        assert await code(hello()) == "welcome"
        assert await code(other.hello()) == "authentication", "the certificate is of another machine"
        assert await code(hello(protocol=2)) == "state"
        assert await code(hello(epoch=0)) == "fenced"
        assert await code(hello(epoch=2)) == "welcome", "it is told that this store is older"
        assert await code(hello(epoch=1 << 32)) == "state"
        assert await code(hello(appended_lsn=8)) == "diverged", "set back or cloned"
        assert await code(hello(last_digest="ab" * 32)) == "diverged"
        assert await code(hello(acknowledged_lsn=20, appended_lsn=20)) == "welcome", "it is told that we hold less"
        world.enrol("web1", 1)
        world.certificates[history.machine_id], old = old_certificate(world, history)
        assert await code(hello()) == "authentication", "it has enrolled again since"
        world.certificates[history.machine_id] = old
        assert await code(hello()) == "welcome"
        revoke(world.vault, "web1", world.clock)
        assert await code(hello()) == "authentication", "it is revoked"


def dies(entries: object) -> None:
    raise TemporaryError("dead")


def old_certificate(world: StoreWorld, history: HostHistory) -> tuple[bytes, bytes]:
    """A certificate that was good once, and the one that is good now."""
    once = world.certificates[history.machine_id]
    world.enrol(history.name, int(history.machine_id, 16))
    return once, world.certificates[history.machine_id]


@pytest.mark.parametrize("how", ["superseded", "revoked"])
async def test_a_certificate_that_is_good_no_more_is_cut_within_ten_seconds(
    scratch: Path, autojump_clock: trio.testing.MockClock, how: str
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        host, _ = await world.begin(history)
        if how == "revoked":
            revoke(world.vault, "web1", world.clock)
        else:
            world.enrol("web1", 1)
        began = trio.current_time()
        refused = await host.hear_except(Heartbeat)
        assert isinstance(refused, Refused)
        assert refused.code == "authentication"
        assert trio.current_time() - began <= 10


async def test_silence_ends_a_session_and_heartbeats_keep_it(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        host, welcome = await world.begin(history)
        for _ in range(10):
            await trio.sleep(HEARTBEAT_S)  # sleep: virtual time
            await host.say(Heartbeat(appended_lsn=4, durable_lsn=4, durable_time_ns=1))
            assert isinstance(await host.hear(), Heartbeat)
        await host.ship(objects_of(history, welcome, 9)[0])
        assert isinstance(await host.hear_except(Heartbeat), Acknowledge)
        began = trio.current_time()
        assert await host.hear_except(Heartbeat) is None
        assert SILENCE_S_MAX <= trio.current_time() - began <= SILENCE_S_MAX + HEARTBEAT_S


async def test_silence_before_the_greeting_ends_a_connection(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        assert await world.connect(world.enrol()).hear() is None


async def test_frames_that_are_no_frames_end_the_connection_and_nothing_else(
    scratch: Path, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        wrong_sequence = encode_frame_header(FrameType.HEARTBEAT, 0, 7)
        too_long = bytearray(encode_frame_header(FrameType.HELLO, 10, 0))
        too_long[4:8] = (1 << 30).to_bytes(4, "little")
        for junk in (rng.randbytes(40), wrong_sequence, bytes(too_long), b"GET / HTTP/1.1\r\n\r\n"):
            host = world.connect(history)
            await host.stream.send_all(junk)
            assert await host.hear() is None
        await world.ship_all(history)
        check_history(world.vault, history)


async def test_i5_points_inside_a_gap_are_kept_but_not_listed(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        history.disk(0)
        before = history.marker("before")
        history.disk(1, gap=True)
        inside = history.marker("inside")
        history.append(Kind.FILL, 1, 0, BLOCK, bytes(BLOCK))
        closed = history.disk(1, gap=False)
        after = history.marker("after")
        await world.ship_all(history)
        assert [point.name for point in world.vault.points(history.machine_id)] == ["before", "after"]
        assert [point.lsn for point in world.vault.catalog.points(history.machine_id)] == [before, inside, after]
        assert world.vault.gap_at(history.machine_id, before) is None
        assert world.vault.gap_at(history.machine_id, closed - 1) is not None
        assert world.vault.gap_at(history.machine_id, closed) is None


async def test_the_links_say_how_far_hosts_are(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        world.nursery.start_soon(world.listener.save_links)
        host, _ = await world.begin(history)
        await host.say(Heartbeat(appended_lsn=9, durable_lsn=8, durable_time_ns=77))
        await trio.sleep(6)  # sleep: virtual time
        link = world.vault.catalog.link(history.machine_id)
        assert link is not None
        assert (link.connected, link.appended_lsn, link.durable_lsn, link.durable_time_ns) == (True, 9, 8, 77)
        await host.stream.aclose()
        await trio.sleep(6)  # sleep: virtual time
        link = world.vault.catalog.link(history.machine_id)
        assert link is not None
        assert not link.connected
