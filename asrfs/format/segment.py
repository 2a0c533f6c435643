"""The header of a journal segment: which segment this is and where the history stood when it began."""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError

SEGMENT_MAGIC = b"ASRSEG1\n"
SEGMENT_VERSION = 1
SEGMENT_HEADER_BYTES = 8192
"""The first record begins here. Without its header no record of a segment can be checked, so there are two copies."""
SECOND_COPY_OFFSET = SEGMENT_HEADER_BYTES // 2
SEGMENT_BYTES = 64 << 20
POSITION_SHIFT = 26
POSITION_MASK = (1 << POSITION_SHIFT) - 1
"""A place in the journal is one integer: `segment << 26 | offset`. Offset 0 (the header) stands for zeros."""

_HEADER = struct.Struct("<8sIIQQQQ16sQ")


class SegmentHeader(NamedTuple):
    """`first_lsn` is the LSN its first record has, or would have. `durable_lsn`: known durable at its creation.
    `last_time_ns`: time of the record before the first, 0 for none: with it two histories can be told apart there.

    `salt` is drawn anew for each segment; the checksums of its record headers start from it, so nobody who only
    writes to the disk can make bytes that look like a record.
    """

    epoch: int
    number: int
    first_lsn: int
    durable_lsn: int
    last_time_ns: int
    machine_id: bytes
    salt: int

    def ends_before(self, epoch: int) -> int:
        """The last LSN before this segment, which follows one of `epoch`.

        With the first segment of an epoch LSNs may jump: between its `durable_lsn`, up to which the epoch before went
        and was durable when it was begun, and its `first_lsn` there never was a record.
        """
        return self.durable_lsn if self.epoch > epoch else self.first_lsn - 1


def encode_segment_header(header: SegmentHeader) -> bytes:
    """All 8192 bytes: the fields twice, in two blocks."""
    fields = _HEADER.pack(SEGMENT_MAGIC, SEGMENT_VERSION, *header)
    return (fields + crc32c(fields).to_bytes(4, "little")).ljust(SECOND_COPY_OFFSET, b"\0") * 2


def decode_segment_header(buffer: bytes | bytearray | memoryview, where: str) -> SegmentHeader:
    """The first valid copy. Raises FormatError, naming `where`, where none is a whole header of this version."""
    try:
        return _decode_copy(buffer, where)
    except FormatError:
        try:
            return _decode_copy(memoryview(buffer)[SECOND_COPY_OFFSET:], where)
        except FormatError:
            pass
        raise


def _decode_copy(buffer: bytes | bytearray | memoryview, where: str) -> SegmentHeader:
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
