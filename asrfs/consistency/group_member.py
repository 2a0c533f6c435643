"""A machine as member of one group: keeps a connection to the coordinator and takes part in the points it cuts.

Nothing here decides about a point: the coordinator does, and the disk server says what it held.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import structlog
import trio

from asrfs.consistency.group_share import LATER_WORDS, GroupNames, GroupShare, HoldingServer, Instants
from asrfs.consistency.group_stream import GroupStream
from asrfs.consistency.points import Point
from asrfs.errors import AsrfsError, TemporaryError, foreign_line
from asrfs.model.configuration import GroupOrder
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.group_messages import (
    GROUP_PROTOCOL_VERSION,
    Answer,
    Ask,
    Confirmed,
    Gather,
    Join,
    Joined,
    NotJoined,
    Released,
    Settle,
    Settled,
    Word,
)
from asrfs.transport.stream import ByteStream

RECONNECT_S = 1.0
_WORDS_WAITING = 4
POINTS_AWAITED_MAX = 32
"""Points that may still be confirmed, and waits for the store that a coordinator may have open here."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a group needs of the machine it runs on. `confirmed` notes a point that is real, `settled` waits until the
    store has acknowledged an LSN."""

    id: str
    server: HoldingServer
    instants: Instants
    confirmed: Callable[[Point], Awaitable[None]]
    settled: Callable[[int], Awaitable[None]]
    confirm: Callable[[bytes], Awaitable[tuple[int, int]]]
    """Append the record that makes a point real, durably: `(lsn, time_ns)`."""


class Taking:
    """Takes part in points, one after the other, for a coordinator that is spoken to through `say`; `attend` waits for
    its next word as `GroupStream.attend` does."""

    def __init__(
        self,
        machine: Machine,
        order: GroupOrder,
        say: Callable[[Word], None],
        nursery: trio.Nursery,
        attend: Callable[[float], None] = lambda seconds_max: None,
    ) -> None:
        self._machine = machine
        self._order = order
        self._say = say
        self._attend = attend
        self._nursery = nursery
        self._names = GroupNames(order.name, tuple(member.machine_id for member in order.members))
        self._tell: trio.MemorySendChannel[Word] | None = None
        self._share: GroupShare | None = None
        self.idle = trio.Event()
        """Set whenever no point is being cut here; another one when one is."""
        self.idle.set()
        self._made: dict[str, Point] = {}
        self._settling = 0

    def hear(self, word: Word) -> None:
        """A word of the coordinator that concerns a point."""
        if isinstance(word, Gather) and self._tell is None:
            self._begin(word)
        elif isinstance(word, LATER_WORDS) and self._tell is not None:
            try:
                self._tell.send_nowait(word)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._tell = None
        elif isinstance(word, Confirmed):
            self._nursery.start_soon(self._confirm, word)
        elif isinstance(word, Settle) and self._settling < POINTS_AWAITED_MAX:
            self._settling += 1
            self._nursery.start_soon(self._settle, word)

    def lose(self) -> None:
        """The coordinator is gone: whatever is held is let go."""
        if self._tell is not None:
            self._tell.close()
            self._tell = None

    def _begin(self, word: Gather) -> None:
        if word.generation != self._order.generation:
            raise ProtocolError("the coordinator cuts a point of another order of the group than it agreed to")
        self._tell, told = trio.open_memory_channel[Word](_WORDS_WAITING)
        self.idle = trio.Event()
        self._share = share = GroupShare(
            self._machine.server, self._machine.instants, self._names, self._say_of_share, told, self._attend
        )
        self._nursery.start_soon(share.run, word)

    def _say_of_share(self, word: Word) -> None:
        """With RELEASED the point is over here, whatever is still to be undone: another one may begin."""
        if isinstance(word, Released):
            self._tell = None
            self.idle.set()
            if self._share is not None and (made := self._share.made) is not None:
                self._made[made.id] = made
                while len(self._made) > POINTS_AWAITED_MAX:
                    self._made.pop(next(iter(self._made)))
        self._say(word)

    async def _confirm(self, word: Confirmed) -> None:
        made = self._made.pop(word.point, None)
        if made is not None:
            await self._machine.confirmed(confirmed_point(made, word))

    async def _settle(self, word: Settle) -> None:
        try:
            await self._machine.settled(word.lsn)
        except AsrfsError:
            return
        finally:
            self._settling -= 1
        self._say(Settled(point=word.point))


class GroupMember:
    """`run` for ever, in a nursery of its own; `ask` for a point from any task. `connect` dials the coordinator."""

    def __init__(self, machine: Machine, order: GroupOrder, connect: Callable[[], Awaitable[ByteStream]]) -> None:
        self._machine = machine
        self._order = order
        self._connect = connect
        self._stream: GroupStream | None = None
        self._asked: dict[int, trio.MemorySendChannel[Answer]] = {}
        self._request = 0
        self._log = structlog.get_logger("asrfs.group").bind(group=order.name)
        self.reason = "not connected yet"
        """Why there is no connection to the coordinator; empty while there is one."""

    async def run(self) -> None:
        """Be connected, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await self._once(nursery)
                except AsrfsError as error:
                    if str(error) != self.reason:
                        self._log.info("no connection to the coordinator", reason=str(error))
                    self.reason = str(error)
                await trio.sleep(RECONNECT_S)

    async def ask(self, word: Ask, seconds_max: float = math.inf) -> Answer:
        """What the coordinator answers; the request's number is put in here. Raises TemporaryError."""
        stream = self._stream
        if stream is None:
            raise TemporaryError(f"the coordinator of group {self._order.name} cannot be reached: {self.reason}")
        self._request += 1
        number = self._request
        answer, answered = trio.open_memory_channel[Answer](1)
        self._asked[number] = answer
        try:
            stream.say(msgspec.structs.replace(word, request=number))
            with trio.fail_after(seconds_max):
                return await answered.receive()
        except trio.TooSlowError:
            raise TemporaryError(f"the coordinator of group {self._order.name} did not answer in time") from None
        except trio.EndOfChannel:
            raise TemporaryError(
                f"the connection to the coordinator of group {self._order.name} was lost: whether there is a point is "
                "seen at the store"
            ) from None
        finally:
            self._asked.pop(number, None)

    async def _once(self, nursery: trio.Nursery) -> None:
        """One connection, until it is lost. Raises AsrfsError."""
        connection = await self._connect()
        stream = GroupStream(connection, "member")
        taking = Taking(self._machine, self._order, stream.say, nursery, stream.attend)
        try:
            stream.say(_join(self._order))
            await stream.converse(lambda word: self._hear(word, stream, taking))
        finally:
            self._stream = None
            taking.lose()
            self._forget_questions()
            await connection.aclose()
        raise TemporaryError("the coordinator closed the connection")

    def _hear(self, word: Word, stream: GroupStream, taking: Taking) -> None:
        if isinstance(word, Joined):
            self._stream = stream
            self.reason = ""
            self._log.info("joined")
        elif isinstance(word, NotJoined):
            raise TemporaryError(f"the coordinator does not take this machine yet: {foreign_line(word.text)}")
        elif isinstance(word, Answer):
            if (asked := self._asked.get(word.request)) is not None:
                asked.send_nowait(word)
        else:
            taking.hear(word)

    def _forget_questions(self) -> None:
        for asked in self._asked.values():
            asked.close()
        self._asked.clear()


def confirmed_point(made: Point, word: Confirmed) -> Point:
    """The share as the point of the group that it has become a part of."""
    return msgspec.structs.replace(made, members=word.members, ready=word.ready)


def _join(order: GroupOrder) -> Join:
    return Join(protocol=GROUP_PROTOCOL_VERSION, group=order.id, generation=order.generation)
