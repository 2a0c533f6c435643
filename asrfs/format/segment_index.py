"""The index of a sealed segment: what its records did to the disks, sorted, so that nobody has to read them for that.

It is bound to its segment by number and salt, and written when the segment is durable. Nothing depends on there being
one: what is missing or does not match is as good as none, and the segment itself is read.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError

INDEX_MAGIC = b"ASRIDX1\n"
INDEX_VERSION = 1

_PREFIX = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QQQQQII")
_DISK = struct.Struct("<HHIII")
_HEADER_BYTES = _PREFIX.size + _FIELDS.size
_WORD = 8


class SealedSegment(NamedTuple):
    """A segment that gets no more records, and what is known of it. `end`: byte behind the last one.

    `last_lsn` < `first_lsn`: it has none. `last_time_ns`: of the last record, or of the one before the segment.
    """

    number: int
    salt: int
    first_lsn: int
    last_lsn: int
    last_time_ns: int
    end: int


class DiskColumns(NamedTuple):
    """What a segment did to one disk: blocks, ascending, with their positions in the journal (offset 0: zeros).

    Below them disjoint extents of zeros, from `zero_starts` to the blocks before `zero_ends`. `blocks_at`: byte of the
    index at which the column of blocks lies; that of positions follows it.
    """

    slot: int
    blocks: array[int]
    positions: array[int]
    zero_starts: array[int]
    zero_ends: array[int]
    blocks_at: int = 0


def encode_segment_index(segment: SealedSegment, disks: Sequence[DiskColumns]) -> tuple[bytes, list[DiskColumns]]:
    """A whole index, and the disks with their `blocks_at`. Columns are words in the machine's order, which is ours."""
    assert sys.byteorder == "little"
    at = _HEADER_BYTES + len(disks) * _DISK.size
    parts: list[bytes | array[int]] = [_FIELDS.pack(*segment, len(disks))]
    placed: list[DiskColumns] = []
    for disk in disks:
        assert len(disk.blocks) == len(disk.positions) and len(disk.zero_starts) == len(disk.zero_ends)
        parts.append(_DISK.pack(disk.slot, 0, len(disk.blocks), len(disk.zero_starts), 0))
        placed.append(disk._replace(blocks_at=at))
        at += 2 * _WORD * (len(disk.blocks) + len(disk.zero_starts))
    for disk in disks:
        parts += [disk.blocks, disk.positions, disk.zero_starts, disk.zero_ends]
    body = b"".join(parts)
    return _PREFIX.pack(INDEX_MAGIC, INDEX_VERSION, crc32c(body)) + body, placed


def decode_segment_index(content: bytes, where: str) -> tuple[SealedSegment, list[DiskColumns]]:
    """The inverse. Raises FormatError, naming `where`, for anything but a whole index of this version."""
    if len(content) < _HEADER_BYTES:
        raise FormatError(f"{where}: {len(content)} bytes are too few for a segment's index")
    magic, version, crc = _PREFIX.unpack_from(content)
    if magic != INDEX_MAGIC or version != INDEX_VERSION or sys.byteorder != "little":
        raise FormatError(f"{where}: not a segment's index of this version")
    if crc32c(memoryview(content)[_PREFIX.size :]) != crc:
        raise FormatError(f"{where}: the index does not match its checksum")
    *fields, disk_count = _FIELDS.unpack_from(content, _PREFIX.size)
    at = _HEADER_BYTES + disk_count * _DISK.size
    if at > len(content):
        raise FormatError(f"{where}: {disk_count} disks do not fit into it")
    heads = [_DISK.unpack_from(content, _HEADER_BYTES + i * _DISK.size) for i in range(disk_count)]
    disks: list[DiskColumns] = []
    for slot, _, block_count, zero_count, _ in heads:
        end = at + 2 * _WORD * (block_count + zero_count)
        if end > len(content):
            raise FormatError(f"{where}: ends within a column")
        words = array("Q", content[at:end])
        blocks, positions = words[:block_count], words[block_count : 2 * block_count]
        zeros = words[2 * block_count :]
        disks.append(DiskColumns(slot, blocks, positions, zeros[:zero_count], zeros[zero_count:], at))
        at = end
    if at != len(content):
        raise FormatError(f"{where}: goes on behind its last column")
    return SealedSegment(*fields), disks
