"""One replication session, seen from either end: states, what may be said in each, and the bytes of it.

The table below is the protocol. An illegal word from the peer raises ProtocolError; an illegal word of our own is our
bug and trips an assertion. Either way nothing has changed.

    host                           store
      HELLO            ──▶
                       ◀──         WELCOME | REFUSED
      OBJECT_BEGIN     ──▶
      OBJECT_BYTES …   ──▶
                       ◀──         ACKNOWLEDGE (in LSN order)
      HEARTBEAT        ◀─▶         HEARTBEAT
                       ◀──         CONFIGURE (to a host whose HELLO said that it takes it)
      COMPARE          ──▶         (to a store whose WELCOME said how many at once)
                       ◀──         COMPARED (in any order)
      MATCH            ──▶         (to a store whose WELCOME said that it takes it)
                       ◀──         MATCHED (in any order)
                       ◀──         HANDOVER (to a host whose HELLO said that it takes it)
      HANDED_OVER      ──▶
                       ◀──         PROMOTE (to a host whose HELLO said that it takes it)
      PROMOTED         ──▶
      FETCH            ──▶         (to a store whose WELCOME said that it takes it)
                       ◀──         FETCHED (in any order)
      GOODBYE          ──▶
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Literal, NamedTuple

from asrfs.format.log_object import OBJECT_BYTES_MAX, OBJECT_HEADER_BYTES
from asrfs.protocol.frames import Bytes, Frame, FrameReader, FrameType, ProtocolError, encode_frame_header
from asrfs.protocol.messages import (
    OBJECT_CHUNK_BYTES,
    TYPE_OF,
    Compare,
    Match,
    Message,
    ObjectBegin,
    check_match,
    decode_message,
    encode_message,
    region_of,
)

Role = Literal["host", "store"]
_PIECE_BYTES_MIN = 4 << 10


class State(Enum):
    START = "start"
    GREETED = "greeted"
    STREAMING = "streaming"
    IN_OBJECT = "in object"
    CLOSED = "closed"


class Speaks(NamedTuple):
    """Who says what, and in which state that leaves both."""

    role: Role
    type: FrameType


F = FrameType
TABLE: dict[State, dict[Speaks, State]] = {
    State.START: {
        Speaks("host", F.HELLO): State.GREETED,
    },
    State.GREETED: {
        Speaks("store", F.WELCOME): State.STREAMING,
        Speaks("store", F.REFUSED): State.CLOSED,
    },
    State.STREAMING: {
        Speaks("host", F.OBJECT_BEGIN): State.IN_OBJECT,
        Speaks("host", F.HEARTBEAT): State.STREAMING,
        Speaks("host", F.COMPARE): State.STREAMING,
        Speaks("host", F.MATCH): State.STREAMING,
        Speaks("host", F.HANDED_OVER): State.STREAMING,
        Speaks("host", F.PROMOTED): State.STREAMING,
        Speaks("host", F.FETCH): State.STREAMING,
        Speaks("host", F.GOODBYE): State.CLOSED,
        Speaks("store", F.ACKNOWLEDGE): State.STREAMING,
        Speaks("store", F.HEARTBEAT): State.STREAMING,
        Speaks("store", F.CONFIGURE): State.STREAMING,
        Speaks("store", F.COMPARED): State.STREAMING,
        Speaks("store", F.MATCHED): State.STREAMING,
        Speaks("store", F.HANDOVER): State.STREAMING,
        Speaks("store", F.PROMOTE): State.STREAMING,
        Speaks("store", F.FETCHED): State.STREAMING,
        Speaks("store", F.REFUSED): State.CLOSED,
    },
    State.IN_OBJECT: {
        Speaks("host", F.OBJECT_BYTES): State.IN_OBJECT,
        Speaks("store", F.ACKNOWLEDGE): State.IN_OBJECT,
        Speaks("store", F.HEARTBEAT): State.IN_OBJECT,
        Speaks("store", F.CONFIGURE): State.IN_OBJECT,
        Speaks("store", F.COMPARED): State.IN_OBJECT,
        Speaks("store", F.MATCHED): State.IN_OBJECT,
        Speaks("store", F.HANDOVER): State.IN_OBJECT,
        Speaks("store", F.PROMOTE): State.IN_OBJECT,
        Speaks("store", F.FETCHED): State.IN_OBJECT,
        Speaks("store", F.REFUSED): State.CLOSED,
    },
    State.CLOSED: {},
}


class ObjectReceived(NamedTuple):
    """A whole log object came; its content is still to be checked."""

    begin: ObjectBegin
    content: Bytes


Event = Message | ObjectReceived


class Session:
    """One end of a session. Feed it what arrives, send what its `send_*` return.

    IN_OBJECT belongs to the host's direction alone: what the store says meanwhile does not end it.
    """

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.peer: Role = "store" if role == "host" else "host"
        self.state = State.START
        self._reader = FrameReader()
        self._sequence = 0
        self._begin: ObjectBegin | None = None
        self._pieces: list[memoryview | bytearray] = []
        self._received = 0

    def send(self, message: Message) -> bytes:
        """The bytes of one message."""
        frame_type = TYPE_OF[type(message)]
        following = TABLE[self.state].get(Speaks(self.role, frame_type))
        assert following is not None, f"{self.role} may not send {frame_type.name} when {self.state.value}"
        payload = encode_message(message)
        header = self._header(frame_type, len(payload))
        self.state = following
        return header + payload

    def send_object(self, begin: ObjectBegin, pieces: Sequence[Bytes]) -> Iterator[Bytes]:
        """The buffers of one log object, at most about 1 MiB each. The iterator must be exhausted.

        They are views of the pieces where these are large.
        """
        assert sum(map(len, pieces)) == begin.length, "the pieces are not the object announced"
        yield self.send(begin)
        for chunk in _chunks(pieces):
            if self.state is State.CLOSED:  # the store ended the session meanwhile
                return
            yield self._header(F.OBJECT_BYTES, sum(map(len, chunk)))
            yield b"".join(chunk) if len(chunk) > 1 else chunk[0]
        if self.state is State.IN_OBJECT:
            self.state = State.STREAMING

    def receive(self, received: Bytes) -> list[Event]:
        """Events completed by these bytes, which must not change any more: of an object they are kept as they are.

        Raises ProtocolError; then the session is closed.
        """
        try:
            return [event for frame in self._reader.feed(received) if (event := self._on_frame(frame)) is not None]
        except ProtocolError:
            self.state = State.CLOSED
            raise

    def receive_end(self) -> None:
        """The peer closed its side. Raises ProtocolError if it did so within a frame or an object."""
        closed, self.state = self.state, State.CLOSED
        if not self._reader.is_empty() or (self.role == "store" and closed is State.IN_OBJECT):
            raise ProtocolError("the connection ended in the middle of a frame")

    def _on_frame(self, frame: Frame) -> Event | None:
        following = TABLE[self.state].get(Speaks(self.peer, frame.type))
        if following is None:
            raise ProtocolError(f"{self.peer} sent {frame.type.name} when {self.state.value}")
        if frame.type is F.OBJECT_BYTES:
            return self._on_object_bytes(memoryview(frame.payload), frame.rest)
        message = decode_message(frame.type, frame.payload)
        if isinstance(message, ObjectBegin):
            if not OBJECT_HEADER_BYTES < message.length <= OBJECT_BYTES_MAX:
                raise ProtocolError(f"a log object of {message.length} bytes is not acceptable")
            if not 0 < message.first_lsn <= message.last_lsn:
                raise ProtocolError(f"a log object of LSN {message.first_lsn}..{message.last_lsn} is not acceptable")
            self._begin = message
            self.state = following
            return None
        if isinstance(message, Compare):
            region_of(message)
        if isinstance(message, Match):
            check_match(message)
        self.state = following
        return message

    def _on_object_bytes(self, chunk: memoryview, rest: int) -> ObjectReceived | None:
        assert self._begin is not None
        if not chunk or self._received + len(chunk) + rest > self._begin.length:
            raise ProtocolError(f"log object of LSN {self._begin.first_lsn} has more or fewer bytes than announced")
        self._keep(chunk)
        if self._received < self._begin.length:
            return None
        whole = ObjectReceived(self._begin, b"".join(self._pieces))
        self._begin, self._pieces, self._received = None, [], 0
        self.state = State.STREAMING
        return whole

    def _keep(self, chunk: memoryview) -> None:
        """Small pieces are put together, so that no peer can make us hold much more than the bytes it sent."""
        self._received += len(chunk)
        last = self._pieces[-1] if self._pieces else None
        if len(chunk) >= _PIECE_BYTES_MIN:
            self._pieces.append(chunk)
        elif isinstance(last, bytearray) and len(last) < OBJECT_CHUNK_BYTES:
            last += chunk
        else:
            self._pieces.append(bytearray(chunk))

    def _header(self, frame_type: FrameType, length: int) -> bytes:
        header = encode_frame_header(frame_type, length, self._sequence)
        self._sequence += 1
        return header


def _chunks(pieces: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """The pieces, grouped or cut to chunks of at most OBJECT_CHUNK_BYTES."""
    chunk: list[Bytes] = []
    room = OBJECT_CHUNK_BYTES
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest) > room:
            chunk.append(rest[:room])
            yield chunk
            rest, chunk, room = rest[room:], [], OBJECT_CHUNK_BYTES
        if len(rest):
            chunk.append(rest)
            room -= len(rest)
    if chunk:
        yield chunk
