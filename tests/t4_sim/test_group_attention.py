"""A coordinator's attention to its members, over TLS on loopback: while its own share waits it hands on what they say,
lets no other task run, and never waits longer than it may.

Real connections, streams and decisions; the coordinator's own share is played by the test.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from asrfs.consistency.cut import Cut, CutOrder, Phase
from asrfs.consistency.group_coordinator import GroupCoordinator
from asrfs.consistency.group_stream import GroupStream
from asrfs.errors import AsrfsError
from asrfs.model.configuration import GroupOrder, Member
from asrfs.protocol.group_messages import Gather, Gathered, Join, Joined, Prepare, Word
from asrfs.protocol.group_session import GroupSession
from asrfs.transport.stream import ByteStream, SecureStream
from asrfs.transport.tls import MachineIdentity
from tests.t2_contract.test_streams import over_tls

GROUP, POINT, OTHER = "e" * 32, "a" * 32, "b" * 32
OWN, A, B = "0" * 32, "1" * 32, "2" * 32
GATHER_S = 30.0
LONG_S = 20.0
WAIT_S_MAX = 10.0


class OwnShare:
    """In the place of `Taking`: what it is told is nobody's concern here."""

    def __init__(self) -> None:
        self.heard: list[Word] = []

    def hear(self, word: Word) -> None:
        self.heard.append(word)

    def lose(self) -> None:
        self.heard.clear()


class Peer:
    """A member's end, played by the test."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.session = GroupSession("member")
        self.heard: list[Word] = []

    async def say(self, word: Word) -> None:
        await self.stream.send_all(self.session.send(word))

    def say_now(self, word: Word) -> None:
        """No task runs meanwhile."""
        assert isinstance(self.stream, SecureStream)
        self.stream.seal(self.session.send(word))
        assert self.stream.send_sealed()

    def vanish(self) -> None:
        """Its end of the connection is gone. No task runs meanwhile."""
        assert isinstance(self.stream, SecureStream)
        with socket.socket(fileno=os.dup(self.stream.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    async def hear(self, kind: type[Word]) -> None:
        with trio.fail_after(WAIT_S_MAX):
            while not any(isinstance(word, kind) for word in self.heard):
                self.heard += self.session.receive(await self.stream.receive_some())


class Coordinating:
    """A coordinator in the middle of gathering: its own share has just said that it is ready."""

    def __init__(self, coordinator: GroupCoordinator, a: Peer, b: Peer) -> None:
        self.coordinator = coordinator
        self.a = a
        self.b = b
        self.cut = Cut(CutOrder(point=POINT, group="shop", generation=1, members=(OWN, A, B), gather_s=GATHER_S))

    async def begin(self) -> None:
        self.coordinator._own = OwnShare()  # type: ignore[assignment]
        self.coordinator._cut = self.cut
        self.coordinator._say_all(self.cut.begin([OWN, A, B], trio.current_time()))
        for peer in (self.a, self.b):
            await peer.hear(Gather)
        self.coordinator._hear_own(Gathered(point=POINT))

    def attend(self, seconds_max: float) -> float:
        """How long it took."""
        began = time.monotonic()
        self.coordinator._attend(seconds_max)
        return time.monotonic() - began


async def _member(
    coordinator: GroupCoordinator, theirs: ByteStream, ours: ByteStream, number: str, name: str, nursery: trio.Nursery
) -> Peer:
    """Join as a member does."""
    peer, stream = Peer(theirs), GroupStream(ours, "coordinator")
    identity = MachineIdentity(number, name, "1")

    def on_word(word: Word) -> None:
        if isinstance(word, Join):
            assert not coordinator.refusal(identity, word)
            coordinator.enter(stream, identity)
        else:
            coordinator.on_word(number, word)

    async def converse() -> None:
        try:
            await stream.converse(on_word)
        except AsrfsError:
            pass
        coordinator.leave(stream, identity)

    nursery.start_soon(converse)
    await peer.say(Join(protocol=1, group=GROUP, generation=1))
    await peer.hear(Joined)
    return peer


@asynccontextmanager
async def coordinating(scratch: Path) -> AsyncIterator[Coordinating]:
    members = tuple(
        Member(machine_id=number, name=name, address="127.0.0.1", port=1, serial="1")
        for number, name in ((OWN, "own"), (A, "a"), (B, "b"))
    )
    order = GroupOrder(id=GROUP, name="shop", coordinator=OWN, members=members, generation=1)
    nobody: Any = None
    machine: Any = type("Machine", (), {"id": OWN, "server": nobody, "instants": nobody})()
    coordinator = GroupCoordinator(machine, order, hold_s=lambda: 1.0, freeze_s=lambda: 1.0)
    async with AsyncExitStack() as stack:
        wires = []
        for name in "ab":
            (scratch / name).mkdir()
            wires.append(await stack.enter_async_context(over_tls(scratch / name)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(coordinator.run)
            peers = [
                await _member(coordinator, theirs, ours, number, name, nursery)
                for (theirs, ours), number, name in zip(wires, (A, B), "ab", strict=True)
            ]
            made = Coordinating(coordinator, *peers)
            await made.begin()
            yield made
            nursery.cancel_scope.cancel()


def is_phase(made: Coordinating, phase: Phase) -> Callable[[], bool]:
    return lambda: made.cut.phase is phase


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(WAIT_S_MAX):
        while True:
            if condition():
                return
            await trio.sleep(0.01)  # sleep: between two looks at what other tasks and sockets do


async def test_what_all_say_is_handed_on_and_answered_before_anything_else_is_done(scratch: Path) -> None:
    async with coordinating(scratch) as made, trio.open_nursery() as nursery:
        ran: list[bool] = []

        async def other_task() -> None:
            ran.append(True)

        nursery.start_soon(other_task)
        for peer in (made.a, made.b):
            peer.say_now(Gathered(point=POINT))
        taken_s = made.attend(LONG_S)
        assert made.cut.phase is Phase.PREPARING, "all have gathered"
        assert not ran, "no other task ran meanwhile"
        assert taken_s < LONG_S / 4
        for peer in (made.a, made.b):
            await peer.hear(Prepare)


async def test_who_says_nothing_is_waited_for_no_longer_than_was_said(scratch: Path) -> None:
    async with coordinating(scratch) as made:
        await made.a.say(Gathered(point=POINT))
        assert 0.2 <= made.attend(0.2) < LONG_S / 4
        assert made.cut.phase is Phase.GATHERING
        await made.b.say(Gathered(point=POINT))
        await until(is_phase(made, Phase.PREPARING))


@pytest.mark.parametrize("left_s", [0.2, -1.0])
async def test_nobody_is_waited_for_beyond_the_moment_at_which_the_late_are_given_up(
    left_s: float, scratch: Path
) -> None:
    """That is done by a task, which does not run while somebody attends."""
    async with coordinating(scratch) as made:
        made.cut.wake_at = trio.current_time() + left_s
        taken_s = made.attend(LONG_S)
        assert taken_s < LONG_S / 4, "it attended to them beyond the moment at which they are given up"
        assert taken_s >= min(left_s, 0.1)
        made.coordinator._say_all(made.cut.tick(max(trio.current_time(), made.cut.wake_at)))
        assert made.cut.outcome is not None and not made.cut.outcome.shares, "void: both were late"


async def test_a_connection_that_ends_is_looked_at_once(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket at its end is always readable."""
    sound, looks = GroupStream.attend_at_hand, list[GroupStream]()

    def attend_at_hand(stream: GroupStream) -> bool:
        looks.append(stream)
        return sound(stream)

    monkeypatch.setattr(GroupStream, "attend_at_hand", attend_at_hand)
    async with coordinating(scratch) as made:
        made.b.vanish()
        assert 0.5 <= made.attend(0.5) < LONG_S / 4
        assert 0 < len(looks) < 5, f"it was looked at {len(looks)} times"
        await until(lambda: made.cut.outcome is not None)
        assert B in made.cut.outcome.reasons  # type: ignore[union-attr]


async def test_when_all_connections_have_ended_nothing_is_waited_for(scratch: Path) -> None:
    async with coordinating(scratch) as made:
        for peer in (made.a, made.b):
            peer.vanish()
        assert made.attend(LONG_S) < LONG_S / 4


async def test_who_breaks_the_protocol_is_cut_off_and_the_others_are_heard(scratch: Path) -> None:
    async with coordinating(scratch) as made:
        made.b.session.point = OTHER
        heard: list[tuple[str, Word | None]] = []
        sound = made.coordinator._hear

        def hear(member: str, word: Word | None) -> None:
            heard.append((member, word))
            sound(member, word)

        made.coordinator._hear = hear  # type: ignore[method-assign]
        made.b.say_now(Gathered(point=OTHER))
        made.a.say_now(Gathered(point=POINT))
        made.attend(0.5)
        assert (A, Gathered(point=POINT)) in heard
        assert not any(member == B and word is not None for member, word in heard)
        await until(lambda: (B, None) in heard)


async def test_where_no_point_is_cut_nobody_is_waited_for(scratch: Path) -> None:
    async with coordinating(scratch) as made:
        made.coordinator._cut = None
        assert made.attend(LONG_S) < LONG_S / 4
