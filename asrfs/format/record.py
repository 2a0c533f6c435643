"""A record: one entry of the history as it lies in a journal segment. 64 bytes of header, then the payload.

The header's checksum also covers the number and the salt of the segment, so that neither what a recycled segment held
before nor what a guest wrote into a payload is ever taken for a record. `durable_lsn` is what was known durable when
the record was appended: a later record that claims more than a scan can read proves that something is corrupt, and not
merely torn.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError

RECORD_MAGIC = b"ASRR"
RECORD_HEADER_BYTES = 64
PAYLOAD_BYTES_MAX = 1 << 20
"""One FUSE request; longer extents without payload (ZERO, DISCARD) have no such bound."""


class Kind(IntEnum):
    """What a record does. WRITE and FILL carry the extent's bytes; ZERO and DISCARD carry none and read as zeros."""

    WRITE = 1
    ZERO = 2
    DISCARD = 3
    MARKER = 4
    DISK = 5
    FILL = 6


CARRIES_EXTENT_BYTES = frozenset((Kind.WRITE, Kind.FILL))
READS_AS_ZEROS = frozenset((Kind.ZERO, Kind.DISCARD))
CHANGES = frozenset((Kind.WRITE, Kind.ZERO, Kind.DISCARD))
"""What guests do. Filling may say ZERO, too."""

_BODY = struct.Struct("<QQQQQIIHHI")
_PREFIX = struct.Struct("<4sI")
_SEGMENT = struct.Struct("<QQ")


class RecordHeader(NamedTuple):
    """One record without its payload. `offset`, `length`: the extent in bytes on the disk of `slot`."""

    lsn: int
    time_ns: int
    durable_lsn: int
    offset: int
    length: int
    payload_length: int
    payload_crc: int
    kind: int
    slot: int


class WriteFrame(NamedTuple):
    """Memory in which a WRITE record is made: `whole` has room for the header and then the `payload`, which is there
    already; `body` is the share of the header behind its checksum."""

    whole: memoryview
    body: memoryview
    payload: memoryview


def frame_write(whole: memoryview) -> WriteFrame:
    """`whole`: 64 bytes that may be written over, then a payload."""
    return WriteFrame(whole, whole[_PREFIX.size : RECORD_HEADER_BYTES], whole[RECORD_HEADER_BYTES:])


def segment_seed(number: int, salt: int) -> int:
    """Checksum state every record header of a segment starts from: its number and its salt, see `SegmentHeader`."""
    return crc32c(_SEGMENT.pack(number, salt))


def encode_record_header(header: RecordHeader, seed: int) -> bytes:
    """The 64 bytes of a header; `seed` is `segment_seed` of the segment it goes to."""
    body = _BODY.pack(*header, 0)
    return _PREFIX.pack(RECORD_MAGIC, crc32c(body, seed)) + body


def decode_record_header(buffer: bytes | bytearray | memoryview, at: int, seed: int) -> RecordHeader | None:
    """The header at byte `at` of `buffer`, or None where no valid record of this segment begins.

    Checks lengths too: a caller may believe `payload_length` of what is returned.
    """
    if at + RECORD_HEADER_BYTES > len(buffer):
        return None
    magic, crc = _PREFIX.unpack_from(buffer, at)
    if magic != RECORD_MAGIC:
        return None
    body = bytes(buffer[at + _PREFIX.size : at + RECORD_HEADER_BYTES])
    if crc32c(body, seed) != crc:
        return None
    *fields, reserved = _BODY.unpack(body)
    header = RecordHeader._make(fields)
    return header if reserved == 0 and _is_sound(header) else None


def payload_crc(payload: bytes | bytearray | memoryview) -> int:
    """CRC-32C of a payload."""
    return crc32c(payload)


def check_payload(header: RecordHeader, payload: bytes | bytearray | memoryview, where: str) -> None:
    """Raise FormatError, naming `where`, if these are not the bytes the header was written with."""
    if len(payload) != header.payload_length or crc32c(payload) != header.payload_crc:
        raise FormatError(f"{where}: the payload of LSN {header.lsn} does not match its checksum")


def _is_sound(header: RecordHeader) -> bool:
    if header.lsn == 0 or header.payload_length > PAYLOAD_BYTES_MAX or header.offset + header.length >= 1 << 64:
        return False
    if header.kind in CARRIES_EXTENT_BYTES:
        return header.payload_length == header.length > 0
    if header.kind in READS_AS_ZEROS:
        return header.payload_length == 0 < header.length
    return header.kind in (Kind.MARKER, Kind.DISK) and header.length == 0
