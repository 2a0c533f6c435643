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


class Frame(NamedTuple):
    type: FrameType
    payload: bytes


def encode_frame_header(frame_type: FrameType, length: int, sequence: int) -> bytes:
    """The header that goes before `length` bytes of payload."""
    assert length <= FRAME_PAYLOAD_BYTES_MAX
    header = _HEADER.pack(_MAGIC, frame_type, 0, length, sequence & 0xFFFFFFFF)
    return header + _CRC.pack(crc32c(header))


class FrameReader:
    """Collects bytes and gives whole frames. Holds at most one frame beyond what it was fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._sequence = 0

    def feed(self, received: bytes | bytearray | memoryview) -> list[Frame]:
        """All frames completed by `received`. Raises ProtocolError; then this reader is finished."""
        self._buffer += received
        frames = []
        at = 0
        while (frame := self._frame_at(at)) is not None:
            frames.append(frame)
            at += FRAME_HEADER_BYTES + len(frame.payload)
        if at:
            del self._buffer[:at]
        return frames

    def is_empty(self) -> bool:
        """Whether the stream may end here: no frame is half received."""
        return not self._buffer

    def _frame_at(self, at: int) -> Frame | None:
        buffer = self._buffer
        if len(buffer) - at < FRAME_HEADER_BYTES:
            return None
        magic, code, zero, length, sequence = _HEADER.unpack_from(buffer, at)
        if _CRC.unpack_from(buffer, at + _HEADER.size)[0] != crc32c(bytes(buffer[at : at + _HEADER.size])):
            raise ProtocolError("a frame's header does not match its checksum")
        if magic != _MAGIC or zero or length > FRAME_PAYLOAD_BYTES_MAX:
            raise ProtocolError(f"a frame of {length} bytes with magic {magic!r} is not acceptable")
        if sequence != self._sequence:
            raise ProtocolError(f"frame {sequence} came where frame {self._sequence} was due")
        try:
            frame_type = FrameType(code)
        except ValueError:
            raise ProtocolError(f"frame type {code} is not known") from None
        start = at + FRAME_HEADER_BYTES
        if len(buffer) - start < length:
            return None
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return Frame(frame_type, bytes(memoryview(buffer)[start : start + length]))
