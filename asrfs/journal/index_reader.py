"""What sealed segments did to the disks, by their indexes, for who needs to know no more: a thousandth of the reading.

For the agent, beside a disk server that writes indexes and an order of freeing that is the agent's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from asrfs.errors import FormatError
from asrfs.format.segment import SegmentHeader
from asrfs.format.segment_index import DiskColumns, SealedSegment, decode_segment_index
from asrfs.journal.segments import index_name, list_journal, read_header, segment_name
from asrfs.model.positions import Cursor
from asrfs.storage.interface import Storage, read_whole


class Stretch(NamedTuple):
    """Records up to `last_lsn`, of one segment. `known`: what these did and the place behind the last; None where they
    have to be read."""

    last_lsn: int
    known: tuple[list[DiskColumns], Cursor] | None


def stretches(storage: Storage, machine_id: bytes, cursor: Cursor, until_lsn: int) -> Iterator[Stretch]:
    """The records behind `cursor` up to `until_lsn`, segment by segment. `storage` is the journal's directory.

    A segment has to be read where only part of it is wanted, or where it has no index of exactly its records. Raises
    IntegrityError, OSError.
    """
    headers = [header for number in list_journal(storage).segments if number >= cursor.segment
               if (header := _header(storage, number, machine_id)) is not None]  # fmt: skip
    lsn = cursor.lsn
    for i, header in enumerate(headers):
        last_lsn = min(until_lsn, headers[i + 1].first_lsn - 1) if i + 1 < len(headers) else until_lsn
        if last_lsn <= lsn:
            continue
        is_whole = header.first_lsn == lsn + 1
        yield Stretch(last_lsn, _index(storage, header, last_lsn) if is_whole else None)
        lsn = last_lsn
    if lsn < until_lsn:
        yield Stretch(until_lsn, None)  # whoever reads it says what is missing


def _header(storage: Storage, number: int, machine_id: bytes) -> SegmentHeader | None:
    try:
        file = storage.open(segment_name(number))
    except FileNotFoundError:
        return None
    try:
        return read_header(file, number, machine_id)
    finally:
        file.close()


def _index(storage: Storage, header: SegmentHeader, last_lsn: int) -> tuple[list[DiskColumns], Cursor] | None:
    name = index_name(header.number)
    try:
        segment, disks = decode_segment_index(read_whole(storage, name), name)
    except (FileNotFoundError, FormatError):
        return None
    if not _is_of(segment, header) or segment.last_lsn != last_lsn:
        return None
    behind = Cursor(lsn=last_lsn, segment=header.number, offset=segment.end, time_ns=segment.last_time_ns)
    return disks, behind


def _is_of(segment: SealedSegment, header: SegmentHeader) -> bool:
    return (segment.number, segment.salt, segment.first_lsn) == (header.number, header.salt, header.first_lsn)
