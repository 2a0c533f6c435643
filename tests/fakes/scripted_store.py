"""A store for the shipper: the real protocol on a wire in memory, real log objects opened and kept, and a script.

It keeps every record it acknowledged, checks that they follow one another without gap or repetition and that each
object names the digest of the one before, and does what its fields say: be down, refuse, withhold acknowledgements,
fall silent, end the connection. `Wire` breaks at a byte of choice in either direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import trio
import trio.testing

from asrfs.format.log_object import NO_DIGEST, FrameTable, check_digest, decode_object_header
from asrfs.format.object_index import Index, decode_index
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.model.machine import DiskRecord, decode_disk
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import (
    PROTOCOL_VERSION,
    Acknowledge,
    Goodbye,
    Heartbeat,
    Hello,
    RefusalCode,
    Refused,
    Welcome,
)
from asrfs.protocol.session import Bytes, Event, ObjectReceived, Session
from asrfs.replication.object_builder import MachineKeys
from asrfs.transport.stream import LinkError

MemoryStream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


class Received(NamedTuple):
    """A record as the store has it. `content`: the extent's bytes, or the note of a marker or disk."""

    kind: int
    slot: int
    offset: int
    length: int
    content: bytes


GIVEN_UP = Received(0, 0, 0, 0, b"")
"""In the place of each record that a gap object stands for."""


class Wire:
    """The host's end. Breaks for both after so many bytes sent or received."""

    def __init__(
        self, stream: MemoryStream, send_bytes_max: float = math.inf, receive_bytes_max: float = math.inf
    ) -> None:
        self._stream = stream
        self._send_room = send_bytes_max
        self._receive_room = receive_bytes_max
        self.is_broken = False

    async def send_all(self, data: Bytes) -> None:
        content = bytes(data)
        room = int(min(self._send_room, len(content)))
        self._send_room -= room
        try:
            await self._stream.send_all(content[:room])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise LinkError("the connection broke") from None
        if room < len(content):
            await self._break()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            received = bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise LinkError("the connection broke") from None
        room = int(min(self._receive_room, len(received)))
        self._receive_room -= room
        if room < len(received):
            if room == 0:
                await self._break()
            self._receive_room = 0
        return received[:room]

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _break(self) -> None:
        self.is_broken = True
        await self._stream.aclose()
        raise LinkError("the connection broke")


@dataclass
class ScriptedStore:
    """See the module. The nursery runs one task a connection."""

    nursery: trio.Nursery
    keys: MachineKeys
    epoch: int = 1
    acknowledged_lsn: int = 0
    times_ns: list[int] = field(default_factory=list)
    last_digest: str = ""
    records: list[Received] = field(default_factory=list)
    objects: list[tuple[int, int]] = field(default_factory=list)
    gaps: list[list[DiskRecord]] = field(default_factory=list)
    """Of each gap object what it says of the disks."""
    hellos: list[Hello] = field(default_factory=list)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    goodbyes: list[str] = field(default_factory=list)
    tries: list[float] = field(default_factory=list)
    bytes_received: int = 0
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """Of `objects`, those that need not have all records."""
    # the script
    takes_stretches: bool = True
    is_down: bool = False
    is_silent: bool = False
    refusal: tuple[RefusalCode, str] | None = None
    withholds: bool = False
    loses_acknowledgements: bool = False
    send_bytes_max: float = math.inf
    receive_bytes_max: float = math.inf
    sessions: int = 0
    wires: list[Wire] = field(default_factory=list)
    withheld: list[Acknowledge] = field(default_factory=list)
    _streams: list[MemoryStream] = field(default_factory=list)
    _current: Session | None = None

    async def connect(self) -> Wire:
        self.tries.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise LinkError("connection refused")
        host, store = trio.testing.memory_stream_pair()
        self._streams.append(store)
        self.nursery.start_soon(self._serve, store)
        wire = Wire(host, self.send_bytes_max, self.receive_bytes_max)
        self.wires.append(wire)
        return wire

    async def hang_up(self) -> None:
        """End every connection."""
        for stream in self._streams:
            await stream.aclose()
        self._streams.clear()

    async def acknowledge_withheld(self) -> None:
        """Say what was withheld in the present session, and withhold no longer."""
        self.withholds = False
        session = self._current
        assert session is not None
        said = b"".join(session.send(acknowledge) for acknowledge in self.withheld)
        self.withheld.clear()
        await self._streams[-1].send_all(said)

    async def _serve(self, stream: MemoryStream) -> None:
        session = Session("store")
        self._current = session
        try:
            while True:
                received = await stream.receive_some(1 << 16)
                if not received:
                    session.receive_end()
                    return
                self.bytes_received += len(received)
                for event in session.receive(bytes(received)):
                    await self._answer(stream, session, event)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError):
            return
        finally:
            await stream.aclose()

    async def _answer(self, stream: MemoryStream, session: Session, event: Event) -> None:
        if isinstance(event, Hello):
            self.hellos.append(event)
            if self.refusal is not None:
                await stream.send_all(session.send(Refused(code=self.refusal[0], text=self.refusal[1])))
                return
            self.sessions += 1
            if event.rejoin:
                self.epoch = max(self.epoch, event.epoch) + 1
            await stream.send_all(session.send(self._welcome()))
        elif isinstance(event, ObjectReceived):
            acknowledge = self._keep(event)
            if self.withholds:
                self.withheld.append(acknowledge)
            elif self.loses_acknowledgements:
                await stream.aclose()
            elif not self.is_silent:
                await stream.send_all(session.send(acknowledge))
        elif isinstance(event, Heartbeat):
            self.heartbeats.append(event)
            if not self.is_silent:
                await stream.send_all(session.send(Heartbeat()))
        elif isinstance(event, Goodbye):
            self.goodbyes.append(event.reason)

    def _welcome(self) -> Welcome:
        return Welcome(
            protocol=PROTOCOL_VERSION,
            store_id="5" * 32,
            session_salt=self.sessions.to_bytes(32, "little"),
            epoch=self.epoch,
            acknowledged_lsn=self.acknowledged_lsn,
            acknowledged_time_ns=self._time_ns(),
            last_digest=self.last_digest,
            takes_stretches=self.takes_stretches,
        )

    def _time_ns(self) -> int:
        """Of the last record that is here; of one that never came, something that cannot be."""
        if not self.acknowledged_lsn:
            return 0
        return self.times_ns[self.acknowledged_lsn - 1] if self.acknowledged_lsn <= len(self.times_ns) else 1

    def _keep(self, received: ObjectReceived) -> Acknowledge:
        """Open the object, check that it follows, keep its records: they are durable here now."""
        content = received.content
        header = decode_object_header(content, "received")
        digest = check_digest(content, "received")
        assert (header.first_lsn, header.last_lsn) == (received.begin.first_lsn, received.begin.last_lsn)
        assert header.first_lsn == self.acknowledged_lsn + 1, "the object does not follow what is here"
        assert header.previous_digest == (bytes.fromhex(self.last_digest) or NO_DIGEST)
        keys = self.keys.of_session(header.epoch, header.session_salt)
        index = decode_index(header, content, keys, "received")
        table = FrameTable(header, content, "received")
        payload = b""
        for i in range(header.frame_count):
            at, length = table.extent(i)
            payload += table.open_frame(i, content[at : at + length], keys.payload)
        del self.times_ns[header.first_lsn - 1 :]
        if index.is_stretch and (index.kind == Kind.DISK).all():
            self.gaps.append([decode_disk(index.note(i)) for i in range(len(index))])
            self.records += [GIVEN_UP] * (header.last_lsn - header.first_lsn + 1)
            self.times_ns += [int(index.time_ns[-1])] * (header.last_lsn - header.first_lsn + 1)
        else:
            self._keep_records(index, payload)
        self.objects.append((header.first_lsn, header.last_lsn))
        if header.is_stretch:
            assert self.takes_stretches, "the host was not told that stretches are taken"
            self.stretches.append(self.objects[-1])
        self.acknowledged_lsn, self.last_digest = header.last_lsn, digest.hex()
        return Acknowledge(lsn=header.last_lsn, digest=digest.hex())

    def _keep_records(self, index: Index, payload: bytes) -> None:
        for i, lsn in enumerate(index.lsn.tolist()):
            self.records.append(_record_of(index, i, payload))
            self.times_ns += [int(index.time_ns[i])] * (lsn - len(self.times_ns))


def _record_of(index: Index, i: int, payload: bytes) -> Received:
    kind, length = int(index.kind[i]), int(index.length[i])
    content = index.note(i) if index.note_length[i] else b""
    if kind in CARRIES_EXTENT_BYTES:
        start = int(index.payload_position[i])
        content = payload[start : start + length]
    return Received(kind, int(index.slot[i]), int(index.offset[i]), length, content)
