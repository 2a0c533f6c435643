"""The journal read by its specification alone: FORMAT.md's tables, nothing of the product's code.

What a disk must be at an LSN is computed from this, so it has to be something else than what is being tested.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_SEGMENT = struct.Struct("<8sIIQQ")
_RECORD = struct.Struct("<4sIQQQQQIIHHI")
RECORDS_AT = 8192
ZEROS_AT_ONCE = 1 << 20
WRITE, ZERO, DISCARD, MARKER, DISK, FILL = range(1, 7)
KIND_NAMES = {WRITE: "WRITE", ZERO: "ZERO", DISCARD: "DISCARD", MARKER: "MARKER", DISK: "DISK", FILL: "FILL"}


class Record(NamedTuple):
    """`payload` of what has an extent and no bytes of its own is empty; it reads as zeros."""

    lsn: int
    durable_lsn: int
    kind: int
    slot: int
    offset: int
    length: int
    payload: bytes


def read_write_log(journal: Path, last_lsn: int) -> list[Record]:
    """All records of a journal that was never trimmed, from LSN 1 to `last_lsn`, which is known from elsewhere."""
    segments = []
    for path in journal.glob("*.segment"):
        content = path.read_bytes()
        if content.startswith(b"ASRSEG1\n"):
            segments.append((_SEGMENT.unpack_from(content)[3], content))
    records: list[Record] = []
    for number, content in sorted(segments):
        first_lsn = _SEGMENT.unpack_from(content)[4]
        assert first_lsn <= len(records) + 1, f"segment {number} begins with LSN {first_lsn}"
        del records[first_lsn - 1 :]
        records += _records_of(content, len(records) + 1, last_lsn)
    assert len(records) == last_lsn, f"the journal ends at LSN {len(records)} instead of {last_lsn}"
    return records


def _records_of(content: bytes, lsn: int, last_lsn: int) -> Iterable[Record]:
    at = RECORDS_AT
    while lsn <= last_lsn and at + _RECORD.size <= len(content):
        magic, _, found, _, durable, offset, length, size, _, kind, slot, _ = _RECORD.unpack_from(content, at)
        if magic != b"ASRR" or found != lsn:
            return
        at += _RECORD.size
        yield Record(lsn, durable, kind, slot, offset, length, content[at : at + size])
        at += size
        lsn += 1


def put(disk: bytearray, record: Record) -> None:
    """What a record does to its disk."""
    if record.kind in (WRITE, FILL):
        assert len(record.payload) == record.length
        disk[record.offset : record.offset + record.length] = record.payload
    elif record.kind in (ZERO, DISCARD):
        disk[record.offset : record.offset + record.length] = bytes(record.length)


def put_into_file(fd: int, record: Record) -> None:
    """The same to a sparse file as large as the disk. Its zeros are written only where there may be something else."""
    if record.kind in (WRITE, FILL):
        written = os.pwrite(fd, record.payload, record.offset)
        assert written == record.length
    elif record.kind in (ZERO, DISCARD):
        end = record.offset + record.length
        for start, stop in _data_extents(fd, record.offset, end):
            for at in range(start, stop, ZEROS_AT_ONCE):
                os.pwrite(fd, bytes(min(ZEROS_AT_ONCE, stop - at)), at)


def _data_extents(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        if start >= end:
            return
        at = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, at


def flush_boundaries(records: Iterable[Record]) -> list[int]:
    """LSNs up to which a flush is known to have made everything durable, ascending."""
    return sorted({record.durable_lsn for record in records})
