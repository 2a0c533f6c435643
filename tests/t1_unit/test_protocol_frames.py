"""Frames: cut out of a stream as they were put in; lengths are believed only after the header's checksum."""

from __future__ import annotations

import struct
import time

import pytest
from crc32c import crc32c

from asrfs.protocol.frames import (
    FRAME_HEADER_BYTES,
    FRAME_PAYLOAD_BYTES_MAX,
    Frame,
    FrameReader,
    FrameType,
    ProtocolError,
    encode_frame_header,
)


def frame(payload: bytes, sequence: int = 0, frame_type: FrameType = FrameType.HEARTBEAT) -> bytes:
    return encode_frame_header(frame_type, len(payload), sequence) + payload


def forged(magic: bytes = b"A1", code: int = 7, zero: int = 0, length: int = 0, sequence: int = 0) -> bytes:
    """A header with a right checksum and whatever else."""
    header = struct.pack("<2sBBII", magic, code, zero, length, sequence)
    return header + struct.pack("<I", crc32c(header))


def test_frames_come_out_as_they_went_in_wherever_they_are_cut() -> None:
    sent = b"".join(frame(bytes([n]) * n * 7, n) for n in range(5))
    for size in (1, 3, 16, 17, len(sent)):
        reader = FrameReader()
        got = [each for at in range(0, len(sent), size) for each in reader.feed(sent[at : at + size])]
        assert got == [Frame(FrameType.HEARTBEAT, bytes([n]) * n * 7) for n in range(5)]
        assert reader.is_empty()


def test_half_a_frame_is_kept_and_said_to_be_there() -> None:
    reader = FrameReader()
    assert reader.feed(frame(b"payload")[:-1]) == []
    assert not reader.is_empty()
    assert reader.feed(b"d") == [Frame(FrameType.HEARTBEAT, b"payload"[:-1] + b"d")]


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (forged(magic=b"A2"), "magic"),
        (forged(zero=1), "magic"),
        (forged(length=FRAME_PAYLOAD_BYTES_MAX + 1), "bytes"),
        (forged(length=0xFFFFFFFF), "bytes"),
        (forged(sequence=1), "came where"),
        (forged(code=0), "type"),
        (forged(code=99), "type"),
        (bytes(FRAME_HEADER_BYTES), "checksum"),
    ],
)
def test_headers_that_cannot_be_are_refused_at_once(header: bytes, match: str) -> None:
    """Also when no payload has come: nobody can make us wait, or hold memory, for a length that is a lie."""
    with pytest.raises(ProtocolError, match=match):
        FrameReader().feed(header)


def test_every_bit_of_a_header_counts() -> None:
    header = frame(b"")
    for bit in range(FRAME_HEADER_BYTES * 8):
        lie = bytearray(header)
        lie[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            FrameReader().feed(lie)


def test_sequence_numbers_wrap() -> None:
    reader = FrameReader()
    reader._sequence = 0xFFFFFFFF
    assert len(reader.feed(frame(b"", 0xFFFFFFFF) + frame(b"", 1 << 32))) == 2


def test_many_small_pieces_cost_linear_time() -> None:
    """One byte at a time through a large frame: no copy of what is there for each byte that comes."""
    sent = frame(bytes(200_000))
    reader = FrameReader()
    began = time.process_time()
    got = [each for byte in range(len(sent)) for each in reader.feed(sent[byte : byte + 1])]
    assert len(got) == 1
    assert time.process_time() - began < 5
