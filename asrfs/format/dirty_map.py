"""The file of a host's dirty map: which chunks are to be sent, and up to where records were given up. One file, so that
either of them never outlives the other (I4).

    header | a head for each disk | gaps | for each disk its record and its bitmap
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError
from asrfs.model.dirty_map import GAPS_MAX, DirtyMap, Gap, GivenUp, Reason
from asrfs.model.machine import SLOT_MAX, decode_disk, encode_disk
from asrfs.model.positions import Cursor

DIRTY_MAGIC = b"ASRDRT1\n"
DIRTY_VERSION = 1

_PREFIX = struct.Struct("<8sII")
_HEADER = struct.Struct("<QQQQIIII")
_DISK = struct.Struct("<HHIQ")
_GAP = struct.Struct("<QQ")
_HEADER_BYTES = _PREFIX.size + _HEADER.size
_REASONS = sum(Reason)
_IS_IN_MAP = 1 << 15
_NUMBER_END = 1 << 63
_SEGMENT_END = 1 << 38
_OFFSET_MAX = 1 << 26


class _Disk(NamedTuple):
    """Head of a disk. `flags`: reasons, and the highest bit for one that is in the map."""

    slot: int
    flags: int
    record_length: int
    bitmap_length: int


def encode_dirty_map(dirty: DirtyMap, given_up: GivenUp) -> bytes:
    """The whole file."""
    through = given_up.through
    records = {record.slot: encode_disk(record) for record in given_up.disks}
    heads: list[bytes] = []
    contents: list[bytes] = []
    for slot in sorted({*records, *dirty.slots()}):
        record = records.get(slot, b"")
        bitmap = dirty.bitmap(slot) if slot in dirty else b""
        flags = int(dirty.reasons(slot)) | _IS_IN_MAP if slot in dirty else 0
        heads.append(_DISK.pack(slot, flags, len(record), len(bitmap)))
        contents += [record, bitmap]
    gaps = [_GAP.pack(*gap) for gap in given_up.gaps]
    fields = (
        given_up.since_lsn,
        through.lsn,
        through.segment,
        through.time_ns,
        through.offset,
        len(heads),
        len(gaps),
        0,
    )
    body = b"".join([_HEADER.pack(*fields), *heads, *gaps, *contents])
    return _PREFIX.pack(DIRTY_MAGIC, DIRTY_VERSION, crc32c(body)) + body


def decode_dirty_map(content: bytes, where: str) -> tuple[DirtyMap, GivenUp]:
    """The inverse. Raises FormatError, naming `where`, for anything but a whole file of this version."""
    if len(content) < _HEADER_BYTES:
        raise FormatError(f"{where}: {len(content)} bytes are too few for a dirty map")
    magic, version, crc = _PREFIX.unpack_from(content)
    if magic != DIRTY_MAGIC or version != DIRTY_VERSION:
        raise FormatError(f"{where}: not a dirty map of this version")
    if crc32c(memoryview(content)[_PREFIX.size :]) != crc:
        raise FormatError(f"{where}: the dirty map does not match its checksum")
    since_lsn, lsn, segment, time_ns, offset, disk_count, gap_count, _ = _HEADER.unpack_from(content, _PREFIX.size)
    gaps_at = _HEADER_BYTES + disk_count * _DISK.size
    at = gaps_at + gap_count * _GAP.size
    if at > len(content) or gap_count > GAPS_MAX:
        raise FormatError(f"{where}: {disk_count} disks and {gap_count} gaps do not fit into it")
    if max(since_lsn, lsn, time_ns) >= _NUMBER_END or segment >= _SEGMENT_END or offset > _OFFSET_MAX:
        raise FormatError(f"{where}: names a place that cannot be in a journal")
    heads = [_Disk._make(_DISK.unpack_from(content, _HEADER_BYTES + i * _DISK.size)) for i in range(disk_count)]
    if any(head.slot >= following.slot for head, following in pairwise(heads)):
        raise FormatError(f"{where}: its disks are not in the order of their slots")
    entries: list[tuple[int, Reason, bytes]] = []
    records = []
    for head in heads:
        middle, end = at + head.record_length, at + head.record_length + head.bitmap_length
        if end > len(content) or head.slot > SLOT_MAX or head.flags & ~(_REASONS | _IS_IN_MAP):
            raise FormatError(f"{where}: the entry of the disk in slot {head.slot} cannot be")
        if head.record_length:
            records.append(decode_disk(content[at:middle]))
            if records[-1].slot != head.slot:
                raise FormatError(f"{where}: the entry of the disk in slot {head.slot} is of another one")
        if head.flags & _IS_IN_MAP:
            entries.append((head.slot, Reason(head.flags & _REASONS), content[middle:end]))
        at = end
    if at != len(content):
        raise FormatError(f"{where}: goes on behind its last disk")
    gaps = tuple(Gap._make(_GAP.unpack_from(content, gaps_at + i * _GAP.size)) for i in range(gap_count))
    through = Cursor(lsn=lsn, segment=segment, offset=offset, time_ns=time_ns)
    return DirtyMap.of(entries), GivenUp(since_lsn, through, tuple(records), gaps)
