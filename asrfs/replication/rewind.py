"""Finds the place of an LSN in the journal: where shipping goes on when the store's word differs from ours. Blocks."""

from __future__ import annotations

from collections.abc import Iterator

from asrfs.errors import IntegrityError
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

    Raises StoreLostError when the journal does not have record `lsn + 1` any more, or has it of an epoch before the one
    that goes on, in which nothing can be sent any more; IntegrityError when it is corrupt.
    """
    if start.lsn > lsn:
        cursor = _start_of(storage, machine_id, lsn)
    else:
        check_kept(storage, machine_id, lsn, lsn)
        cursor = start
    while cursor.lsn < lsn:
        cursor = reader.read(cursor, min(lsn, cursor.lsn + _PIECE_RECORDS_MAX), _PIECE_BYTES).cursor
    if cursor.lsn > lsn:
        raise IntegrityError(f"LSN {lsn} lies where the journal's LSNs jump to {cursor.lsn}")
    return cursor


def check_kept(storage: Storage, machine_id: bytes, lsn: int, store_lsn: int) -> None:
    """Raise StoreLostError when the journal does not have record `lsn + 1` any more, for a store at `store_lsn`."""
    kept = _of_this_epoch(storage, machine_id)
    if kept and kept[0].first_lsn > lsn + 1:
        check_can_resend(store_lsn, kept[0].first_lsn)


def _start_of(storage: Storage, machine_id: bytes, lsn: int) -> Cursor:
    """The beginning of the segment that holds record `lsn + 1`."""
    kept = _of_this_epoch(storage, machine_id)
    best = next((header for header in reversed(kept) if header.first_lsn <= lsn + 1), None)
    if best is None:
        check_can_resend(lsn, kept[0].first_lsn if kept else 0)
        return Cursor(lsn=lsn)
    return _before(best)


def epoch_start(storage: Storage, machine_id: bytes) -> Cursor:
    """The place before the first record of the epoch that goes on, which is there whole."""
    first = _of_this_epoch(storage, machine_id)[0]
    return _before(first)


def _before(header: SegmentHeader) -> Cursor:
    return Cursor(
        lsn=header.first_lsn - 1, segment=header.number, offset=SEGMENT_HEADER_BYTES, time_ns=header.last_time_ns
    )


def _of_this_epoch(storage: Storage, machine_id: bytes) -> list[SegmentHeader]:
    """Of the segments of the epoch that goes on, oldest first. Other epochs' records are never sent again."""
    headers = list(_headers(storage, machine_id))
    return [header for header in headers if header.epoch == headers[-1].epoch]


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
