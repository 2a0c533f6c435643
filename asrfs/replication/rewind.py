"""Finds the place of an LSN in the journal: where shipping goes on when the store's word differs from ours. Blocks."""

from __future__ import annotations

from collections.abc import Iterator

from asrfs.format.segment import SEGMENT_HEADER_BYTES, SegmentHeader
from asrfs.journal.reader import JournalReader
from asrfs.journal.segments import list_journal, read_header, segment_name
from asrfs.model.positions import Cursor
from asrfs.replication.reconciliation import check_can_resend
from asrfs.storage.interface import Storage

_PIECE_BYTES = 8 << 20
_PIECE_RECORDS_MAX = 64 * 1024


def cursor_at(storage: Storage, machine_id: bytes, reader: JournalReader, start: Cursor, lsn: int) -> Cursor:
    """The place just after record `lsn`, with the time of that record. `start` is a good cursor; reading begins there
    unless it lies behind `lsn`.

    Raises StoreLostError when the journal does not have record `lsn + 1` any more, IntegrityError when it is corrupt.
    """
    cursor = start if start.lsn <= lsn else _start_of(storage, machine_id, lsn)
    while cursor.lsn < lsn:
        cursor = reader.read(cursor, min(lsn, cursor.lsn + _PIECE_RECORDS_MAX), _PIECE_BYTES).cursor
    return cursor


def check_kept(storage: Storage, machine_id: bytes, lsn: int, store_lsn: int) -> None:
    """Raise StoreLostError when the journal does not have record `lsn + 1` any more, for a store at `store_lsn`."""
    oldest = next(iter(_headers(storage, machine_id)), None)
    if oldest is not None and oldest.first_lsn > lsn + 1:
        check_can_resend(store_lsn, oldest.first_lsn)


def _start_of(storage: Storage, machine_id: bytes, lsn: int) -> Cursor:
    """The beginning of the segment that holds record `lsn + 1`."""
    best: SegmentHeader | None = None
    oldest = 0
    for header in _headers(storage, machine_id):
        oldest = oldest or header.first_lsn
        if header.first_lsn <= lsn + 1:
            best = header
    if best is None:
        check_can_resend(lsn, oldest)
        return Cursor(lsn=lsn)
    return Cursor(lsn=best.first_lsn - 1, segment=best.number, offset=SEGMENT_HEADER_BYTES, time_ns=best.last_time_ns)


def _headers(storage: Storage, machine_id: bytes) -> Iterator[SegmentHeader]:
    """Of the segments that have one, oldest first."""
    for number in list_journal(storage).segments:
        file = storage.open(segment_name(number))
        try:
            header = read_header(file, number, machine_id)
        finally:
            file.close()
        if header is not None:
            yield header
