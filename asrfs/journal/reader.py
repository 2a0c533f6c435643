"""Reads records of the journal in order, for those who apply and ship them. Never changes anything.

Follows a cursor through segments. The writer goes on meanwhile, so nothing behind `until_lsn`, which the caller
knows to be durable, is looked at. At or below it, a record that is missing or damaged is corruption: IntegrityError
names file, offset and LSN. Where an epoch begins LSNs may jump; a cursor goes over that place by itself.

Bytes are read into slabs, which are the only copy of them that is made here. Who reads without end hands in `Slabs` of
its own and gets the same memory again with each batch: fresh memory costs more to come by than the bytes to read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from asrfs.errors import IntegrityError
from asrfs.format.record import PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader, segment_seed
from asrfs.format.segment import SEGMENT_HEADER_BYTES, SegmentHeader
from asrfs.journal.columns import Columns, ColumnScan, scan_columns
from asrfs.journal.segments import Stop, list_journal, read_header, segment_name
from asrfs.model.positions import Cursor
from asrfs.storage.interface import File, Storage

_SLAB_BYTES = (4 << 20) + (128 << 10)
"""Room for 4 MiB of payload in records of 4 KiB, or of 1 MiB, with their headers: the usual log object."""
_FIRST_READ_BYTES = 128 << 10
_ROOM_BYTES_MIN = RECORD_HEADER_BYTES + PAYLOAD_BYTES_MAX + _FIRST_READ_BYTES
assert _SLAB_BYTES > _ROOM_BYTES_MIN


class Batch(NamedTuple):
    """Consecutive records and the cursor behind the last. Each part has its payloads in one slab; none is empty."""

    parts: list[Columns]
    cursor: Cursor

    @property
    def records(self) -> list[tuple[RecordHeader, memoryview]]:
        """All of them one by one, for those who read few."""
        return [(part.header(i), part.payload(i)) for part in self.parts for i in range(len(part))]


class Slabs:
    """Memory for one batch after the other: what the last one's views show is gone when the next is read."""

    def __init__(self) -> None:
        self._slabs: list[memoryview] = []
        self._slab = self._used = 0

    def begin(self) -> None:
        """A new batch: all of the memory is free again."""
        self._slab = self._used = 0

    def room(self) -> memoryview:
        """What is free in one piece: enough for any record. Parts of short segments share a slab."""
        if self._slab < len(self._slabs) and _SLAB_BYTES - self._used < _ROOM_BYTES_MIN:
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._slabs.append(np.empty(_SLAB_BYTES, np.uint8).data)  # pages come when they are touched
        return self._slabs[self._slab][self._used :]

    def take(self, count: int) -> None:
        """The first `count` bytes of `room` are in use until the next batch begins."""
        self._used += count


class JournalReader:
    """See the module. One reader belongs to one thread; `close` it."""

    def __init__(self, storage: Storage, machine_id: bytes, *, check_payloads: bool = True) -> None:
        self.storage = self._storage = storage
        self.machine_id = self._machine_id = machine_id
        self._check_payloads = check_payloads
        self._file: File | None = None
        self._number = 0
        self._header: SegmentHeader | None = None
        self._next: SegmentHeader | None = None

    def read(self, cursor: Cursor, until_lsn: int, bytes_max: int, slabs: Slabs | None = None) -> Batch:
        """Records behind `cursor` up to `until_lsn`, until their payloads reach `bytes_max`; at least one if there is.

        A batch never crosses from one epoch to the next. The views stay valid, unless `slabs` were given: then until
        these are used again. Raises IntegrityError, OSError.
        """
        slabs = slabs or Slabs()
        slabs.begin()
        parts: list[Columns] = []
        taken = 0
        epoch: int | None = None
        while cursor.lsn < until_lsn and taken < bytes_max:
            header, cursor = self._enter(cursor)
            if epoch not in (None, header.epoch):
                break
            epoch = header.epoch
            if cursor.lsn >= until_lsn:
                break
            found, cursor = self._read_part(slabs, cursor, header, until_lsn, bytes_max - taken)
            parts += [each.columns for each in found]
            taken += sum(each.payload_bytes for each in found)
        return Batch(parts, cursor)

    def epoch(self, cursor: Cursor) -> int:
        """The epoch of the record behind `cursor`, which must be there."""
        return self._enter(cursor)[0].epoch

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _enter(self, cursor: Cursor) -> tuple[SegmentHeader, Cursor]:
        """Open the segment that holds the record behind `cursor`; returns its header, and the cursor behind the LSNs
        that were jumped over there."""
        if self._file is None or self._header is None or self._number != cursor.segment:
            self._open_at(cursor)
        # A segment ends where the next one begins, whatever a crash left behind that place.
        while (following := self._following()) is not None:
            assert self._header is not None
            if following.ends_before(self._header.epoch) != cursor.lsn:
                break
            cursor = _behind_jump(cursor, following)
            self._open(following.number)
        assert self._header is not None
        if self._number != cursor.segment and self._header.first_lsn != cursor.lsn + 1:
            raise IntegrityError(
                f"{segment_name(self._number)} offset 0: begins with LSN {self._header.first_lsn}, "
                f"LSN {cursor.lsn + 1} is missing"
            )
        return self._header, cursor

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

    def _read_part(
        self, slabs: Slabs, cursor: Cursor, segment: SegmentHeader, until_lsn: int, bytes_max: int
    ) -> tuple[list[ColumnScan], Cursor]:
        """As much of the open segment as is wanted and has room. At least one record, or IntegrityError.

        Reads a little first and then, knowing how long records are, about what is needed: behind the last durable
        record there may be old bytes that are nowhere in memory any more.
        """
        assert self._file is not None
        slab = slabs.room()
        begin = max(cursor.offset if cursor.segment == segment.number else 0, SEGMENT_HEADER_BYTES)
        seed = segment_seed(segment.number, segment.salt)
        lsn_max = until_lsn if self._next is None else min(until_lsn, self._next.ends_before(segment.epoch))
        found: list[ColumnScan] = []
        filled = at = count = taken = 0
        stop = Stop.INVALID
        target = _FIRST_READ_BYTES
        while cursor.lsn < lsn_max and taken < bytes_max:
            got = self._file.read_into(slab[filled:target], begin + filled) if target > filled else 0
            filled += got
            scanned = scan_columns(
                slab[:filled],
                at,
                seed,
                cursor.lsn + 1,
                lsn_max=lsn_max,
                payload_bytes_max=bytes_max - taken,
                check_payloads=self._check_payloads,
            )
            stop, at = scanned.stop, scanned.end
            if len(scanned.columns):
                found.append(scanned)
                count += len(scanned.columns)
                taken += scanned.payload_bytes
                last = scanned.columns.header(-1)
                cursor = Cursor(lsn=last.lsn, segment=segment.number, offset=begin + at, time_ns=last.time_ns)
            if stop is Stop.INVALID or not got:
                break
            more = _bytes_wanted(at, count, taken, lsn_max - cursor.lsn, bytes_max - taken)
            target = min(max(at + more, 2 * filled if not count else filled + _FIRST_READ_BYTES), len(slab))
        if not found or (stop is Stop.INVALID and cursor.lsn < lsn_max):
            raise IntegrityError(
                f"{segment_name(segment.number)} offset {begin + at}: LSN {cursor.lsn + 1} is missing or damaged, "
                f"although LSN {until_lsn} is durable"
            )
        slabs.take(at)
        return found, cursor


def _behind_jump(cursor: Cursor, following: SegmentHeader) -> Cursor:
    """The cursor at the beginning of a segment that goes on there, if it goes on with a later LSN; else as it is."""
    if following.first_lsn == cursor.lsn + 1:
        return cursor
    last_lsn = following.first_lsn - 1
    return Cursor(lsn=last_lsn, segment=following.number, offset=SEGMENT_HEADER_BYTES, time_ns=cursor.time_ns)


def _bytes_wanted(at: int, count: int, taken: int, lsns: int, payload_bytes: int) -> int:
    """About the bytes that the next `lsns` records or `payload_bytes` of payload take, whichever is less, if they are
    like the `count` records with `taken` bytes of payload in `at` bytes."""
    if not count:
        return 0
    wanted = lsns * at // count
    if taken:
        wanted = min(wanted, payload_bytes * at // taken + at // count)
    return wanted
