"""Wires in memory: a pair of protocol ends with nothing between them, and a connection that misbehaves as told.

`SessionPair` has no task, no clock and no socket: `carry` takes what one end sent and feeds it to the other in pieces,
one byte at a time, all at once, or cut where the test says.

`Wire` is a connection with two ends that are `asrfs.transport.stream.ByteStream`s, in virtual or real time:

    delay    bytes come late, in their order          cut       both ends break, at once or after the n-th byte
    silence  bytes of one direction vanish (half-open) stall    bytes of one direction wait, the sender is held back
    echo     what the host says first is also said on another wire: a connection attempt that was doubled

Only a first word can come twice. Later ones lie inside TLS and TCP: a segment that the network repeats, TCP drops, and
a record that anybody sends again, TLS refuses and breaks the connection, which is a cut.

Each of them says afterwards whether it struck (`cuts`, `swallowed`, `held_back`, `late`, `echoed`).
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import trio

from asrfs.protocol.messages import Message, ObjectBegin
from asrfs.protocol.session import Bytes, Event, Role, Session
from asrfs.transport.stream import LinkError

Cut = Callable[[bytes], Iterable[bytes]]


def all_at_once(sent: bytes) -> Iterator[bytes]:
    if sent:
        yield sent


def byte_by_byte(sent: bytes) -> Iterator[bytes]:
    for at in range(len(sent)):
        yield sent[at : at + 1]


def cut_at(*places: int) -> Cut:
    """In pieces that end at these places, the rest in one."""

    def cut(sent: bytes) -> Iterator[bytes]:
        edges = [0, *sorted({min(max(place, 0), len(sent)) for place in places}), len(sent)]
        for i in range(len(edges) - 1):
            if piece := sent[edges[i] : edges[i + 1]]:
                yield piece

    return cut


class SessionPair:
    """`events[role]`: what that end has heard. What an end has sent waits until `carry`."""

    def __init__(self) -> None:
        self.ends: dict[Role, Session] = {"host": Session("host"), "store": Session("store")}
        self.events: dict[Role, list[Event]] = {"host": [], "store": []}
        self.sent: dict[Role, bytearray] = {"host": bytearray(), "store": bytearray()}

    def say(self, role: Role, message: Message) -> None:
        self.sent[role] += self.ends[role].send(message)

    def say_object(self, begin: ObjectBegin, pieces: list[bytes]) -> None:
        for buffer in self.ends["host"].send_object(begin, pieces):
            self.sent["host"] += buffer

    def carry(self, sender: Role, cut: Cut = all_at_once) -> list[Event]:
        """Deliver everything `sender` has sent; what the other end made of it."""
        receiver: Role = "store" if sender == "host" else "host"
        heard: list[Event] = []
        for piece in cut(bytes(self.sent[sender])):
            heard += self.ends[receiver].receive(piece)
        self.sent[sender].clear()
        self.events[receiver] += heard
        return heard

    def inject(self, receiver: Role, received: Bytes) -> list[Event]:
        """Deliver bytes that nobody here has sent."""
        return self.ends[receiver].receive(received)


CAPACITY_BYTES = 64 << 10
"""What one direction holds, as a socket's buffers do, before its sender waits."""


class Lane:
    """One direction of a wire: bytes come out as they went in, unless it was told otherwise."""

    def __init__(self, capacity: int, latency: Callable[[], float], chop: random.Random | None) -> None:
        self._capacity = capacity
        self._latency = latency
        self._chop = chop
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._change = trio.Event()
        self.is_silent = False
        self.is_stalled = False
        self.ends_at = math.inf
        """When the other end learns that nothing more will come."""
        self.bytes_until_cut = math.inf
        self.sent = 0
        self.swallowed = 0
        self.held_back = 0
        self.late = 0

    def wake(self) -> None:
        self._change.set()
        self._change = trio.Event()

    async def change(self, until: float) -> None:
        """Wait for a change or for a moment."""
        if until == math.inf:
            await self._change.wait()
            return
        with trio.move_on_at(until):
            await self._change.wait()

    @property
    def room(self) -> int:
        return self._capacity - self._held

    def put(self, content: bytes) -> None:
        self.sent += len(content)
        if self.is_silent:
            self.swallowed += len(content)
            return
        delay = self._latency()
        due = trio.current_time() + delay
        if self._chunks:
            due = max(due, self._chunks[-1][0])
        self.late += delay > 0
        self.held_back += self.is_stalled
        self._chunks.append((due, content))
        self._held += len(content)
        self.wake()

    def end(self) -> None:
        """Nothing more will be sent; in a silent lane the other end never learns of it."""
        if not self.is_silent and self.ends_at == math.inf:
            self.ends_at = max(trio.current_time() + self._latency(), self._chunks[-1][0] if self._chunks else 0.0)
        self.wake()

    def lose(self) -> None:
        """Whatever is under way is gone."""
        self._chunks.clear()
        self._held = 0

    @property
    def is_ready(self) -> bool:
        """Whether something has come by now."""
        return not self.is_stalled and bool(self._chunks) and self._chunks[0][0] <= trio.current_time()

    def take(self, max_bytes: int) -> bytes:
        """What has come by now; nothing if there is none."""
        if not self.is_ready:
            return b""
        now = trio.current_time()
        if self._chop is not None and self._chop.random() < 0.3:
            max_bytes = self._chop.randint(1, max_bytes if max_bytes < 600 else 600)
        pieces: list[bytes] = []
        while max_bytes > 0 and self._chunks and self._chunks[0][0] <= now:
            due, content = self._chunks.popleft()
            if len(content) > max_bytes:
                self._chunks.appendleft((due, content[max_bytes:]))
                content = content[:max_bytes]
            pieces.append(content)
            self._held -= len(content)
            max_bytes -= len(content)
        self.wake()
        return b"".join(pieces)

    @property
    def is_over(self) -> bool:
        """All has been received, and the end has come."""
        return not self._chunks and not self.is_stalled and self.ends_at <= trio.current_time()

    @property
    def next_at(self) -> float:
        """When something will be there that is not there now, if nothing changes."""
        if self.is_stalled:
            return math.inf
        return self._chunks[0][0] if self._chunks else self.ends_at


class WireEnd:
    """`asrfs.transport.stream.ByteStream` over a `Wire`."""

    def __init__(self, wire: Wire, outward: Lane, inward: Lane) -> None:
        self.wire = wire
        self.outward = outward
        self.inward = inward
        self.peer: WireEnd
        self.is_closed = False

    async def send_all(self, data: Bytes) -> None:
        await trio.lowlevel.checkpoint()
        content = bytes(data)
        self.wire.echo_first(self, content)
        while content:
            self._check()
            if (room := self.outward.room) <= 0:
                await self.outward.change(math.inf)
                continue
            count = int(min(room, len(content), self.outward.bytes_until_cut))
            self.outward.bytes_until_cut -= count
            if count:
                self.outward.put(content[:count])
            content = content[count:]
            if self.outward.bytes_until_cut <= 0:
                self.wire.cut(lose=False)
        self._check()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._is_settled:
            await trio.lowlevel.checkpoint()
        while not self._is_settled:
            await self.inward.change(self.inward.next_at)
        if self.is_closed:
            raise LinkError("the connection was closed here")
        if received := self.inward.take(max_bytes or CAPACITY_BYTES):
            return received
        if self.wire.is_cut:
            raise LinkError("the connection broke")
        return b""

    @property
    def _is_settled(self) -> bool:
        """Whether somebody who receives need not wait."""
        return self.is_closed or self.wire.is_cut or self.inward.is_ready or self.inward.is_over

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.outward.end()
            self.inward.wake()

    def vanish(self) -> None:
        """As a machine does that loses power: the other end hears nothing, not even that."""
        self.outward.is_silent = self.inward.is_silent = True
        self.outward.lose()
        self.close()

    def _check(self) -> None:
        if self.is_closed:
            raise LinkError("the connection was closed here")
        if self.wire.is_cut:
            raise LinkError("the connection broke")
        if self.outward.is_silent:
            return
        if self.peer.is_closed and self.peer.outward.ends_at <= trio.current_time():
            raise LinkError("the connection was closed by the peer")


class Wire:
    """`latency` gives seconds for each piece sent; with `chop` what has come is received in pieces of any length."""

    def __init__(
        self,
        *,
        latency: Callable[[], float] = lambda: 0.0,
        capacity: int = CAPACITY_BYTES,
        chop: random.Random | None = None,
    ) -> None:
        self.upward = Lane(capacity, latency, chop)
        self.downward = Lane(capacity, latency, chop)
        self.host = WireEnd(self, self.upward, self.downward)
        self.store = WireEnd(self, self.downward, self.upward)
        self.host.peer, self.store.peer = self.store, self.host
        self.is_cut = False
        self.cuts = 0
        """1 once a cut has broken what was not closed already."""
        self.echoed = 0
        self._echo: Wire | None = None

    @property
    def is_alive(self) -> bool:
        return not (self.is_cut or self.host.is_closed or self.store.is_closed)

    def cut(self, *, lose: bool = True) -> None:
        """Both ends break. What was under way is lost, or still comes before the error."""
        if self.is_cut:
            return
        self.cuts += self.is_alive
        self.is_cut = True
        for lane in (self.upward, self.downward):
            if lose:
                lane.lose()
            lane.is_stalled = False
            lane.wake()

    def cut_after(self, lane: Lane, count: int) -> None:
        """Break behind the `count`-th byte sent from now on in this direction."""
        lane.bytes_until_cut = count

    def silence(self, lane: Lane) -> None:
        """This direction carries nothing any more, and nobody is told (half-open)."""
        lane.is_silent = True
        lane.swallowed += sum(len(content) for _, content in lane._chunks)
        lane.lose()
        lane.wake()

    def stall(self, lane: Lane) -> None:
        """Hold what goes in this direction until `release`."""
        lane.is_stalled = True
        lane.held_back += len(lane._chunks)

    def release(self, lane: Lane) -> None:
        lane.is_stalled = False
        lane.wake()

    def echo_to(self, other: Wire) -> None:
        """What the host says first is said on `other` too."""
        self._echo = other

    def echo_first(self, end: WireEnd, content: bytes) -> None:
        if self._echo is not None and end is self.host:
            self._echo.upward.put(content)
            self._echo = None
            self.echoed += 1
