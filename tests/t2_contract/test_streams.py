"""Every `ByteStream` keeps the same rules: TLS on loopback, and the wire in memory that the simulation breaks.

Below them, what the wire is told to do to its bytes, and that it says whether it did.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from asrfs.consistency.group_stream import GroupStream
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.group_messages import Beat, Gather, Gathered, Join, Joined, Prepare, Word
from asrfs.protocol.group_session import GroupSession
from asrfs.storage.system_clock import SystemClock
from asrfs.transport import stream, tls
from asrfs.transport.stream import ByteStream, LinkError
from tests.fakes.virtual_time import pass_time
from tests.fakes.wire import Wire

NAME = "store.test"
POINT, OTHER = "a" * 32, "b" * 32
Pair = tuple[ByteStream, ByteStream]
Kind = Callable[[Path], AbstractAsyncContextManager[Pair]]


@asynccontextmanager
async def in_memory(scratch: Path) -> AsyncIterator[Pair]:
    wire = Wire(chop=random.Random(1))
    yield wire.host, wire.store


def _credentials(scratch: Path) -> dict[str, str]:
    """Files of an authority, a server and a machine."""
    now_ns = SystemClock().time_ns()
    authority = tls.make_authority("one", now_ns)
    server = tls.make_server(authority, NAME, now_ns)
    key, request = tls.make_key_and_request("web1", "1" * 32)
    machine, _ = tls.sign_request(authority, request, "web1", "1" * 32, now_ns)
    paths = {name: str(scratch / name) for name in ("ca", "server", "machine")}
    for name, content in (
        ("ca", authority.certificate),
        ("server", server.key + server.certificate),
        ("machine", key + machine),
    ):
        Path(paths[name]).write_bytes(content)
    return paths


@asynccontextmanager
async def over_tls(scratch: Path) -> AsyncIterator[Pair]:
    paths = _credentials(scratch)
    listening = stream.listen("127.0.0.1", 0)
    accepted, accepting = trio.open_memory_channel[ByteStream](0)
    over = trio.Event()

    async def handle(connection: stream.SecureStream) -> None:
        await accepted.send(connection)
        await over.wait()

    async with trio.open_nursery() as nursery, stream.listener_of(listening) as listener:
        context = tls.server_context(paths["server"], paths["server"], paths["ca"])
        nursery.start_soon(stream.serve, [listener], context, handle)
        client = tls.client_context(paths["machine"], paths["machine"], paths["ca"])
        host = await stream.connect("127.0.0.1", listening.getsockname()[1], client, NAME)
        try:
            yield host, await accepting.receive()
        finally:
            over.set()
            await host.aclose()
        nursery.cancel_scope.cancel()  # else the listener, closed by a task that is cancelled, hides what failed


KINDS = pytest.mark.parametrize("kind", [in_memory, over_tls], ids=["memory", "tls"])


async def _receive(end: ByteStream, count: int, max_bytes: int | None = None) -> bytes:
    received = b""
    while len(received) < count:
        piece = await end.receive_some(max_bytes)
        assert piece, "the peer has not closed"
        assert len(piece) <= (max_bytes or math.inf)
        received += piece
    return received


@KINDS
async def test_bytes_come_in_their_order_both_ways_at_once(kind: Kind, scratch: Path, rng: random.Random) -> None:
    up, down = rng.randbytes(700_000), rng.randbytes(300_000)
    async with kind(scratch) as (host, store):

        async def send(end: ByteStream, content: bytes) -> None:
            for at in range(0, len(content), 90_001):
                await end.send_all(memoryview(content)[at : at + 90_001])

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, host, up)
                nursery.start_soon(send, store, down)
                got = await _receive(store, len(up), 10_000)
                assert got == up
                got = await _receive(host, len(down))
                assert got == down


@KINDS
async def test_after_a_close_the_peer_gets_what_was_sent_and_then_the_end(kind: Kind, scratch: Path) -> None:
    async with kind(scratch) as (host, store):
        with trio.fail_after(30):
            await host.send_all(b"last words")
            await host.aclose()
            assert await _receive(store, 10) == b"last words"
            assert await store.receive_some() == b""
            with pytest.raises(LinkError):
                while True:
                    await store.send_all(bytes(10_000))


@KINDS
async def test_a_closed_end_neither_sends_nor_receives(kind: Kind, scratch: Path) -> None:
    async with kind(scratch) as (host, _):
        await host.aclose()
        await host.aclose()
        with pytest.raises(LinkError):
            await host.send_all(b"more")
        with pytest.raises(LinkError):
            await host.receive_some()


@KINDS
async def test_whoever_sends_waits_while_nobody_receives(kind: Kind, scratch: Path) -> None:
    async with kind(scratch) as (host, _):
        with trio.move_on_after(1) as scope:
            await host.send_all(bytes(64 << 20))
        assert scope.cancelled_caught


@KINDS
async def test_a_receive_that_is_given_up_loses_nothing(kind: Kind, scratch: Path) -> None:
    async with kind(scratch) as (host, store):
        for _ in range(3):
            with trio.move_on_after(0.02) as scope:
                await store.receive_some()
            assert scope.cancelled_caught
        with trio.fail_after(30):
            await host.send_all(b"still here")
            assert await _receive(store, 10) == b"still here"


# ---- what a wire can be told ----


@pytest.mark.parametrize("count", [1, 7, 9_999, 10_000])
async def test_a_wire_is_cut_behind_any_byte(count: int) -> None:
    wire = Wire()
    wire.cut_after(wire.upward, count)
    with pytest.raises(LinkError):
        await wire.host.send_all(bytes(10_000))
    assert await _receive(wire.store, count) == bytes(count)
    with pytest.raises(LinkError):
        await wire.store.receive_some()
    assert wire.cuts == 1


async def test_a_cut_may_lose_what_is_under_way() -> None:
    wire = Wire()
    await wire.host.send_all(b"under way")
    wire.cut()
    with pytest.raises(LinkError):
        await wire.store.receive_some()
    wire.cut()
    assert wire.cuts == 1


async def test_half_open_one_direction_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire()
    wire.silence(wire.upward)
    await wire.host.send_all(b"nobody hears")
    await wire.store.send_all(b"heard")
    assert await _receive(wire.host, 5) == b"heard"
    await wire.host.aclose()
    with trio.move_on_after(60) as scope:
        await wire.store.receive_some()
    assert scope.cancelled_caught, "not even the end is heard"
    assert wire.upward.swallowed == len(b"nobody hears")


async def test_a_stalled_direction_holds_everything_back(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire(capacity=1000)
    wire.stall(wire.upward)
    sent = trio.Event()

    async def send() -> None:
        await wire.host.send_all(bytes(3000))
        sent.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with trio.move_on_after(60) as scope:
            await wire.store.receive_some()
        assert scope.cancelled_caught and not sent.is_set()
        wire.release(wire.upward)
        assert await _receive(wire.store, 3000) == bytes(3000)
    assert wire.upward.held_back


async def test_late_bytes_keep_their_order(autojump_clock: trio.testing.MockClock) -> None:
    delays = iter((5.0, 0.0, 1.0))
    wire = Wire(latency=lambda: next(delays))
    for word in (b"one", b"two", b"six"):
        await wire.host.send_all(word)
    started = trio.current_time()
    assert await _receive(wire.store, 9) == b"onetwosix"
    assert trio.current_time() - started == 5.0
    assert wire.upward.late == 2


async def test_a_doubled_connection_says_the_first_words_twice() -> None:
    wire, ghost = Wire(), Wire()
    wire.echo_to(ghost)
    await wire.host.send_all(b"hello")
    await wire.host.send_all(b", and more")
    assert await _receive(wire.store, 15) == b"hello, and more"
    assert await _receive(ghost.store, 5) == b"hello"
    assert wire.echoed == 1


async def test_a_machine_without_power_leaves_silence(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire()
    await wire.store.send_all(b"never read")
    wire.store.vanish()
    await wire.host.send_all(b"into the void")
    with trio.move_on_after(60) as scope:
        await _receive(wire.host, 11)
    assert scope.cancelled_caught
    await pass_time(1)


async def test_what_has_come_is_taken_at_once_also_while_a_task_waits_for_it(scratch: Path) -> None:
    """Nothing is lost and nothing comes twice, whoever of the two takes it; the end is for the task."""
    async with over_tls(scratch) as (host, store):
        assert isinstance(host, stream.SecureStream)
        by_task, ended = bytearray(), trio.Event()

        async def receive() -> None:
            while piece := await host.receive_some():
                by_task.extend(piece)
            ended.set()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                assert host.receive_now(0.0) == b""
                await store.send_all(b"one")
                taken = host.receive_now(20.0)
                assert bytes(by_task + taken) == b"one"
                await store.send_all(b"two")
                while len(by_task) + len(taken) < 6:
                    await pass_time(0.001)
                assert bytes(by_task + taken) in (b"onetwo", b"twoone")
                await store.aclose()
                assert host.receive_now(20.0) == b""
                await ended.wait()


async def test_a_word_that_is_attended_to_is_handed_on_before_anything_else_is_done(scratch: Path) -> None:
    """Of a group: beats are no word that anybody waits for, and what breaks the protocol ends the conversation."""
    async with over_tls(scratch) as (host, store):
        member, coordinator = GroupStream(host, "member"), GroupSession("coordinator")
        heard: list[Word] = []
        join = Join(protocol=1, group="c" * 32, generation=3)

        async def converse() -> None:
            with pytest.raises(ProtocolError, match="another point"):
                await member.converse(heard.append)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(converse)
                member.say(join)
                while not (words := coordinator.receive(await store.receive_some())):
                    pass
                assert words == [join]
                gather = Gather(point=POINT, generation=3, consistency="crash", seconds=1.0, hold_s=1.0)
                for words in ([Joined()], [Beat()], [Beat(), gather]):
                    await store.send_all(b"".join(coordinator.send(word) for word in words))
                while gather not in heard:
                    member.attend(20.0)
                assert heard == [Joined(), gather]
                member.attend(0.0)
                member.say(Gathered(point=POINT))
                while not coordinator.receive(await store.receive_some()):
                    pass
                coordinator.point = OTHER
                await store.send_all(coordinator.send(Prepare(point=OTHER)))
                member.attend(20.0)
                assert heard == [Joined(), gather]
