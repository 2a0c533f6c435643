"""Frames: how messages are cut out of a stream of bytes.

    0  2  magic "A1"
    2  1  type (FrameType)
    3  1  zero
    4  4  length of the payload, at most 4 MiB
    8  4  sequence number of the frame in its direction, from 0
    12 4  CRC-32C of bytes 0..12

The length is believed only after the header's checksum; the sequence number shows frames lost, repeated or spliced
below TLS by a faulty relay.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import IntegrityError

FRAME_HEADER_BYTES = 16
FRAME_PAYLOAD_BYTES_MAX = 4 << 20
_MAGIC = b"A1"
_HEADER = struct.Struct("<2sBBII")
_CRC = struct.Struct("<I")

Bytes = bytes | bytearray | memoryview


class ProtocolError(IntegrityError):
    """The peer broke the protocol. The connection is of no use any more."""


class FrameType(IntEnum):
    """What a frame's payload is. OBJECT_BYTES is raw; every other payload is one msgpack message."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    OBJECT_BEGIN = 4
    OBJECT_BYTES = 5
    ACKNOWLEDGE = 6
    HEARTBEAT = 7
    GOODBYE = 8
    CONFIGURE = 9
    COMPARE = 10
    COMPARED = 11
    MATCH = 12
    MATCHED = 13
    HANDOVER = 14
    HANDED_OVER = 15
    PROMOTE = 16
    PROMOTED = 17
    FETCH = 18
    FETCHED = 19
    GROUP = 32
    """Of another conversation, that between machines of a group: `group_session.py`."""


class Frame(NamedTuple):
    """`rest`: bytes of its payload that are still to come. OBJECT_BYTES comes in pieces, anything else is whole."""

    type: FrameType
    payload: Bytes
    rest: int = 0


def encode_frame_header(frame_type: FrameType, length: int, sequence: int) -> bytes:
    """The header that goes before `length` bytes of payload."""
    assert length <= FRAME_PAYLOAD_BYTES_MAX
    header = _HEADER.pack(_MAGIC, frame_type, 0, length, sequence & 0xFFFFFFFF)
    return header + _CRC.pack(crc32c(header))


class FrameReader:
    """Collects bytes and gives frames. Of OBJECT_BYTES nothing is kept here: what came is passed on, as views of it.

    So it holds at most one message beyond what it was fed, and the bytes of objects are not copied to be cut out.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._sequence = 0
        self._type: FrameType | None = None
        self._rest = 0

    def feed(self, received: Bytes) -> list[Frame]:
        """All that `received` completes or adds to. Raises ProtocolError; then this reader is finished."""
        frames = []
        view = memoryview(received)
        while view:
            if self._type is None:
                view = self._fill(view, FRAME_HEADER_BYTES)
                if len(self._buffer) < FRAME_HEADER_BYTES:
                    break
                self._type, self._rest = self._begin(bytes(self._buffer))
                self._buffer.clear()
            if self._type is FrameType.OBJECT_BYTES:
                piece, view = view[: self._rest], view[self._rest :]
                self._rest -= len(piece)
                if piece or not self._rest:
                    frames.append(Frame(self._type, piece, self._rest))
            else:
                view = self._fill(view, self._rest)
                if len(self._buffer) < self._rest:
                    break
                frames.append(Frame(self._type, bytes(self._buffer)))
                self._buffer.clear()
                self._rest = 0
            if not self._rest:
                self._type = None
        return frames

    @property
    def sequence(self) -> int:
        """Of the frame that is due next."""
        return self._sequence

    def pass_over(self) -> None:
        """The frame that is due next has been read by somebody else. Nothing of it has been fed."""
        assert self.is_empty()
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF

    def is_empty(self) -> bool:
        """Whether the stream may end here: no frame is half received."""
        return not self._buffer and self._type is None

    def _fill(self, view: memoryview, length: int) -> memoryview:
        """Move bytes to the buffer until it has `length`; what is left of them."""
        missing = length - len(self._buffer)
        self._buffer += view[:missing]
        return view[missing:]

    def _begin(self, header: bytes) -> tuple[FrameType, int]:
        """Type and length of payload of the frame that begins here."""
        magic, code, zero, length, sequence = _HEADER.unpack_from(header)
        if _CRC.unpack_from(header, _HEADER.size)[0] != crc32c(header[: _HEADER.size]):
            raise ProtocolError("a frame's header does not match its checksum")
        if magic != _MAGIC or zero or length > FRAME_PAYLOAD_BYTES_MAX:
            raise ProtocolError(f"a frame of {length} bytes with magic {magic!r} is not acceptable")
        if sequence != self._sequence:
            raise ProtocolError(f"frame {sequence} came where frame {self._sequence} was due")
        try:
            frame_type = FrameType(code)
        except ValueError:
            raise ProtocolError(f"frame type {code} is not known") from None
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return frame_type, length
