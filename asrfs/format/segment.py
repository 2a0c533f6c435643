"""The header of a journal segment: which segment this is and where the history stood when it began."""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError

SEGMENT_MAGIC = b"ASRSEG1\n"
SEGMENT_VERSION = 1
SEGMENT_HEADER_BYTES = 4096
"""The first record begins here; only the first `_HEADER.size + 4` bytes carry meaning, the rest are zeros."""
SEGMENT_BYTES = 64 << 20
POSITION_SHIFT = 26
POSITION_MASK = (1 << POSITION_SHIFT) - 1
"""A place in the journal is one integer: `segment << 26 | offset`. Offset 0 (the header) stands for zeros."""

_HEADER = struct.Struct("<8sIIQQQQ16s")


class SegmentHeader(NamedTuple):
    """`first_lsn` is the LSN its first record has, or would have. `durable_lsn`: known durable at its creation."""

    epoch: int
    number: int
    first_lsn: int
    durable_lsn: int
    created_ns: int
    machine_id: bytes


def encode_segment_header(header: SegmentHeader) -> bytes:
    """All 4096 bytes."""
    fields = _HEADER.pack(SEGMENT_MAGIC, SEGMENT_VERSION, *header)
    return (fields + crc32c(fields).to_bytes(4, "little")).ljust(SEGMENT_HEADER_BYTES, b"\0")


def decode_segment_header(buffer: bytes | bytearray | memoryview, where: str) -> SegmentHeader:
    """Raises FormatError, naming `where`, for anything that is not a whole valid header of this version."""
    size = _HEADER.size
    if len(buffer) < size + 4:
        raise FormatError(f"{where}: {len(buffer)} bytes are too few for a segment header")
    fields = bytes(buffer[:size])
    magic, version, *rest = _HEADER.unpack(fields)
    if magic != SEGMENT_MAGIC:
        raise FormatError(f"{where}: not a journal segment")
    if crc32c(fields) != int.from_bytes(buffer[size : size + 4], "little"):
        raise FormatError(f"{where}: the segment header does not match its checksum")
    if version != SEGMENT_VERSION:
        raise FormatError(f"{where}: segment format {version} is not known to this program: upgrade it")
    return SegmentHeader._make(rest)
