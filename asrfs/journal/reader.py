"""Reads records of the journal in order, for those who apply and ship them. Never changes anything.

Follows a cursor through segments. The writer goes on meanwhile, so nothing behind `until_lsn`, which the caller
knows to be durable, is looked at. At or below it, a record that is missing or damaged is corruption: IntegrityError
names file, offset and LSN.
"""

from __future__ import annotations

from typing import NamedTuple

from asrfs.errors import IntegrityError
from asrfs.format.record import PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader, segment_seed
from asrfs.format.segment import SEGMENT_HEADER_BYTES, SegmentHeader
from asrfs.journal.segments import Scan, Stop, list_journal, read_header, scan, segment_name
from asrfs.model.positions import Cursor
from asrfs.storage.interface import File, Storage

_PIECE_BYTES = 2 << 20
_PIECE_BYTES_MIN = PAYLOAD_BYTES_MAX + RECORD_HEADER_BYTES


class Batch(NamedTuple):
    """Consecutive records with their payloads, and the cursor behind the last. The views stay valid."""

    records: list[tuple[RecordHeader, memoryview]]
    cursor: Cursor


class JournalReader:
    """See the module. One reader belongs to one thread; `close` it."""

    def __init__(self, storage: Storage, machine_id: bytes, *, check_payloads: bool = True) -> None:
        self._storage = storage
        self._machine_id = machine_id
        self._check_payloads = check_payloads
        self._file: File | None = None
        self._number = 0
        self._header: SegmentHeader | None = None
        self._next: SegmentHeader | None = None

    def read(self, cursor: Cursor, until_lsn: int, bytes_max: int) -> Batch:
        """Records behind `cursor` up to `until_lsn`, until their payloads reach `bytes_max`; at least one if there is.

        A batch never crosses from one epoch to the next. Raises IntegrityError, OSError.
        """
        records: list[tuple[RecordHeader, memoryview]] = []
        taken = 0
        epoch: int | None = None
        while cursor.lsn < until_lsn and taken < bytes_max:
            header = self._enter(cursor)
            if epoch not in (None, header.epoch):
                break
            epoch = header.epoch
            found, cursor = self._read_piece(cursor, header, until_lsn, bytes_max - taken)
            records += found.records
            taken += found.payload_bytes
        return Batch(records, cursor)

    def epoch(self, cursor: Cursor) -> int:
        """The epoch of the record behind `cursor`, which must be there."""
        return self._enter(cursor).epoch

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _enter(self, cursor: Cursor) -> SegmentHeader:
        """Open the segment that holds the record behind `cursor`; returns its header."""
        if self._file is None or self._header is None or self._number != cursor.segment:
            self._open_at(cursor)
        # A segment ends where the next one begins, whatever a crash left behind that place.
        while (following := self._following()) is not None and following.first_lsn == cursor.lsn + 1:
            self._open(following.number)
        assert self._header is not None
        if self._number != cursor.segment and self._header.first_lsn != cursor.lsn + 1:
            raise IntegrityError(
                f"{segment_name(self._number)} offset 0: begins with LSN {self._header.first_lsn}, "
                f"LSN {cursor.lsn + 1} is missing"
            )
        return self._header

    def _open_at(self, cursor: Cursor) -> None:
        """Open the cursor's segment or, where it was freed because all of it is behind us, the first one after it."""
        numbers = [number for number in list_journal(self._storage).segments if number >= cursor.segment]
        if not numbers:
            raise IntegrityError(
                f"{segment_name(cursor.segment)}: LSN {cursor.lsn + 1} is missing, no segment holds it"
            )
        self._open(numbers[0])

    def _open(self, number: int) -> None:
        self.close()
        self._header = self._next = None
        try:
            self._file = self._storage.open(segment_name(number))
        except FileNotFoundError:
            raise IntegrityError(f"{segment_name(number)}: was freed before it was read") from None
        self._number = number
        self._header = read_header(self._file, number, self._machine_id)
        if self._header is None:
            raise IntegrityError(f"{segment_name(number)} offset 0: has no valid header")

    def _following(self) -> SegmentHeader | None:
        """The header of the segment after the open one, once there is one."""
        if self._next is not None and not self._storage.exists(segment_name(self._next.number)):
            self._next = None  # it held nothing, and the disk server's next start made it a spare
        if self._next is None:
            for number in list_journal(self._storage).segments:
                if number > self._number:
                    self._next = self._peek(number)
                    break
        return self._next

    def _peek(self, number: int) -> SegmentHeader | None:
        try:
            file = self._storage.open(segment_name(number))
        except FileNotFoundError:
            return None
        try:
            return read_header(file, number, self._machine_id)
        finally:
            file.close()

    def _read_piece(
        self, cursor: Cursor, segment: SegmentHeader, until_lsn: int, bytes_max: int
    ) -> tuple[Scan, Cursor]:
        """One read of the open segment. At least one record, or IntegrityError."""
        assert self._file is not None
        at = cursor.offset if cursor.segment == segment.number else 0
        at = max(at, SEGMENT_HEADER_BYTES)
        size = max(_PIECE_BYTES_MIN, min(_PIECE_BYTES, bytes_max + bytes_max // 32 + _PIECE_BYTES_MIN))
        piece = memoryview(self._file.read_at(size, at))
        lsn_max = until_lsn if self._next is None else min(until_lsn, self._next.first_lsn - 1)
        found = scan(
            piece,
            0,
            segment_seed(segment.number, segment.salt),
            cursor.lsn + 1,
            lsn_max=lsn_max,
            payload_bytes_max=bytes_max,
            check_payloads=self._check_payloads,
        )
        end = at + found.end
        last = found.records[-1][0] if found.records else None
        if last is None or (found.stop is Stop.INVALID and last.lsn < lsn_max):
            lsn = cursor.lsn + 1 if last is None else last.lsn + 1
            raise IntegrityError(
                f"{segment_name(segment.number)} offset {end}: LSN {lsn} is missing or damaged, "
                f"although LSN {until_lsn} is durable"
            )
        return found, Cursor(lsn=last.lsn, segment=segment.number, offset=end, time_ns=last.time_ns)
