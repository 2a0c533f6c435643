"""What a crash left: finds the end of the history, tells a torn tail from corruption, makes the rest durable.

    list → scan from the applied cursor → first bad place → torn or corrupt → write again, datasync → cut → sync names

A history goes on as long as records are valid and consecutive; a segment ends at its first invalid record, and the next
one continues it iff its header names the expected LSN. The first place where this breaks is a **torn tail** if nothing
says that the record expected there was durable, and is cut. It is **corruption** if something does: the applied or
acknowledged position, or the `durable_lsn` in any later valid header of a record or segment. Then nothing is changed
and IntegrityError names file, offset and LSN.

Where an epoch begins LSNs may jump (`SegmentHeader.ends_before`). What its first segment says of the end of the epoch
before was durable, so that is a claim, too. Such a segment is kept although it may have no record yet: who asked for
the new epoch was told that it has begun.

What was found is synced before it counts as durable, else power could be lost under a history that was already
shipped (I1). And whatever nothing says was durable is written again first: had a sync failed before this start, the
kernel might hold these bytes for clean, and a sync alone would prove nothing. Segments cut as a whole become spares,
under their old numbers (`segments.py`). A recovered segment is never appended to: the journal goes on in a new one.

A disk server recovers by indexes: a sealed segment that has a valid one is neither read nor synced, since the index was
written after the segment was durable; that it was there is a claim, too. What of such a segment was damaged since is
found by those who read it for applying and shipping (`reader.py`), as is what is damaged while a disk server runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from asrfs.errors import FormatError, IntegrityError
from asrfs.format.record import (
    READS_AS_ZEROS,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RecordHeader,
    decode_record_header,
    segment_seed,
)
from asrfs.format.segment import (
    POSITION_MASK,
    POSITION_SHIFT,
    SEGMENT_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    encode_segment_header,
)
from asrfs.format.segment_index import DiskColumns, SealedSegment, decode_segment_index
from asrfs.journal.map_table import TableShape, shape_of
from asrfs.journal.segments import (
    Stop,
    index_name,
    list_indexes,
    list_journal,
    read_header,
    remove_index,
    scan,
    segment_name,
    spare_name,
)
from asrfs.model.positions import Positions
from asrfs.storage.interface import File, Storage, read_whole

_PIECE_BYTES = 4 << 20
_MOVES_MAX = 5
WASTE_SHARE = 16
"""What is left of a segment's room is given back where it is more than this part of it."""
"""How often a scan begins again because the agent freed a segment under it; it has at most one trim in hand."""


class RecoveredRecord(NamedTuple):
    """A record behind the applied LSN, as maps want it. `position`: of its payload; of its header if it has none."""

    kind: int
    slot: int
    offset: int
    length: int
    position: int


class Recovered:
    """The history as it is from here on. `cut`: what was torn off, in words, or None."""

    def __init__(self, positions: Positions) -> None:
        self.last_lsn = positions.applied.lsn
        self.last_time_ns = positions.applied.time_ns
        self.epoch = positions.epoch
        self.segments: list[SealedSegment] = []
        """Those behind the applied LSN; `first_lsn`: the first record behind it."""
        self.whole: set[int] = set()
        """Numbers of the segments all of whose records are among `records`."""
        self.tables: dict[int, dict[int, TableShape]] = {}
        """By number and slot, of the segments whose index was believed: none of their records is among `records`."""
        self.next_segment_number = 1
        self.cut: str | None = None
        self._places = array("Q")
        self._kinds = array("I")

    def records(self) -> Iterator[RecoveredRecord]:
        """Records behind the applied LSN, in order. Can be asked for more than once."""
        places = iter(self._places)
        for kind_and_slot, offset, length, position in zip(self._kinds, places, places, places, strict=True):
            kind = kind_and_slot >> 16
            # Behind the header of one without payload the next segment may begin.
            payload_at = position if kind in READS_AS_ZEROS else position + RECORD_HEADER_BYTES
            yield RecoveredRecord(kind, kind_and_slot & 0xFFFF, offset, length, payload_at)

    def offset_of(self, lsn: int) -> int:
        """Byte of its segment at which record `lsn`, one of those found, begins."""
        behind = self.last_lsn - lsn + 1
        return self._places[-3 * behind + 2] & POSITION_MASK

    def add(self, headers: list[RecordHeader], position: int) -> None:
        """The next records of the history; they lie end to end, the first one's header at `position`."""
        kinds, places = self._kinds.append, self._places.extend
        for _, _, _, offset, length, payload_length, _, kind, slot in headers:
            kinds(kind << 16 | slot)
            places((offset, length, position))
            position += RECORD_HEADER_BYTES + payload_length
        self.last_lsn = headers[-1].lsn
        self.last_time_ns = max(self.last_time_ns, headers[-1].time_ns)


def recover(
    storage: Storage,
    positions: Positions,
    machine_id: bytes,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    by_indexes: bool = False,
) -> Recovered:
    """Find the history behind `positions.applied`, see the module. `storage` is the journal's directory.

    `by_indexes`: sealed segments that have a valid index are not read. Raises IntegrityError, and OSError where the
    storage fails.
    """
    for attempt in range(_MOVES_MAX):
        recovery = _Recovery(storage, positions, machine_id, segment_bytes, by_indexes)
        try:
            return recovery.run()
        except FileNotFoundError:
            if attempt == _MOVES_MAX - 1:
                raise
    raise AssertionError("unreachable")


class _Bad(NamedTuple):
    """The first place where the history does not go on."""

    number: int
    offset: int
    lsn: int
    why: str

    def __str__(self) -> str:
        return f"{segment_name(self.number)} offset {self.offset}: LSN {self.lsn}: {self.why}"


class _Recovery:
    """One pass over the journal. Changes nothing before `_finish`."""

    def __init__(
        self, storage: Storage, positions: Positions, machine_id: bytes, segment_bytes: int, by_indexes: bool
    ) -> None:
        self._storage = storage
        self._waste_bytes_max = segment_bytes // WASTE_SHARE
        self._by_indexes = by_indexes
        self._machine_id = machine_id
        self._segment_bytes = segment_bytes
        self._applied = positions.applied
        self._found = Recovered(positions)
        self._claim = max(positions.applied.lsn, positions.acknowledged.lsn)
        self._claim_source = "the persisted positions"
        self._bad: _Bad | None = None
        self._torn: list[int] = []
        self._is_torn = False
        self._last_epoch = 0
        self._tail_epoch = positions.epoch
        self._begins_epoch: set[int] = set()
        self._tail_segment: SegmentHeader | None = None
        self._buffer = memoryview(bytearray(min(_PIECE_BYTES, segment_bytes)))
        known = max(positions.applied.segment, positions.acknowledged.segment)
        listing = list_journal(storage)
        self._numbers = [number for number in listing.segments if number >= positions.applied.segment]
        self._found.next_segment_number = max(listing.largest(), known) + 1
        if self._found.next_segment_number >> (64 - POSITION_SHIFT):
            raise IntegrityError(
                f"{segment_name(self._found.next_segment_number - 1)}: no segment of ours has such a number"
            )

    def run(self) -> Recovered:
        tail: tuple[int, int] | None = None
        for number in self._numbers:
            file = self._storage.open(segment_name(number))
            try:
                header = read_header(file, number, self._machine_id, self._last_epoch)
                if header is not None:
                    self._last_epoch = header.epoch
                if self._bad is None and header is not None and self._continues(header, tail):
                    tail = (number, self._take_index(header) or self._follow(file, header))
                    self._tail_segment, self._tail_epoch = header, header.epoch
                else:
                    if self._bad is None and header is None:
                        self._note_missing_header(number)
                    self._collect_claims(file, number, header)
                    self._torn.append(number)
            finally:
                file.close()
        if tail is not None:
            self._look_behind(*tail)
        if self._claim > self._found.last_lsn:
            raise IntegrityError(self._describe_corruption(tail))
        if self._is_torn:
            self._found.cut = str(self._bad)
        self._found.epoch = max(self._found.epoch, self._last_epoch)
        self._finish()
        return self._found

    # ---- reading ----

    def _continues(self, header: SegmentHeader, tail: tuple[int, int] | None) -> bool:
        """Whether the history goes on in this segment; if not, notes why."""
        number = header.number
        expected = self._found.last_lsn + 1
        is_cursor = number == self._applied.segment
        if is_cursor and header.first_lsn <= expected:
            return True
        if header.ends_before(self._tail_epoch) == expected - 1 and header.first_lsn >= expected:
            if header.epoch > self._tail_epoch:
                self._begins_epoch.add(number)
                self._believe(header.durable_lsn, number)
                self._found.last_lsn = header.first_lsn - 1
            return True
        if header.first_lsn < expected:
            raise IntegrityError(
                f"{segment_name(number)} offset 0: begins with LSN {header.first_lsn}, "
                f"but the segments before it hold LSN {expected - 1}"
            )
        at = tail or (number, 0)
        why = f"not valid, and {segment_name(number)} begins with LSN {header.first_lsn}"
        self._bad = _Bad(*at, expected, why)
        self._is_torn = True
        return False

    def _note_missing_header(self, number: int) -> None:
        """The history does not go on in a segment whose header says nothing; raises IntegrityError if it must have."""
        expected = self._found.last_lsn + 1
        if number == self._applied.segment and self._applied.offset > SEGMENT_HEADER_BYTES:
            raise IntegrityError(
                f"{segment_name(number)} offset 0: its header is damaged, although LSN {expected - 1} was durable in it"
            )
        self._bad = _Bad(number, 0, expected, "the segment has no valid header")

    def _take_index(self, segment: SegmentHeader) -> int:
        """Take the segment's index for its records; returns the byte behind the last one, 0 if they must be read.

        That there is an index shows that they were durable, also to who reads them.
        """
        found, number = self._found, segment.number
        read = self._read_index(segment)
        if read is None:
            return 0
        index, disks = read
        self._believe(index.last_lsn, number)
        if not self._by_indexes:
            return 0
        found.tables[number] = {disk.slot: shape_of(number, disk) for disk in disks}
        found.segments.append(index._replace(first_lsn=found.last_lsn + 1))
        found.last_lsn = index.last_lsn
        found.last_time_ns = max(found.last_time_ns, index.last_time_ns)
        return index.end

    def _read_index(self, segment: SegmentHeader) -> tuple[SealedSegment, list[DiskColumns]] | None:
        """The index that was written for this segment when it was sealed and durable, else None."""
        name = index_name(segment.number)
        try:
            index, disks = decode_segment_index(read_whole(self._storage, name), name)
        except (OSError, FormatError):
            return None
        bound = (index.number, index.salt, index.first_lsn) == (segment.number, segment.salt, segment.first_lsn)
        fits = SEGMENT_HEADER_BYTES <= index.end <= self._segment_bytes
        return (index, disks) if bound and fits and index.last_lsn >= self._found.last_lsn else None

    def _follow(self, file: File, segment: SegmentHeader) -> int:
        """Take the records of a segment; returns the byte behind the last one."""
        found, number = self._found, segment.number
        at = SEGMENT_HEADER_BYTES
        if number == self._applied.segment:
            at = max(at, self._applied.offset)
        first = found.last_lsn + 1
        seed = segment_seed(number, segment.salt)
        base = number << POSITION_SHIFT
        while True:
            size = file.read_into(self._buffer, at)
            piece = scan(self._buffer[:size], 0, seed, found.last_lsn + 1)
            if piece.records:
                found.add([header for header, _ in piece.records], base | at)
                self._believe(piece.records[-1][0].durable_lsn, number)
            at += piece.end
            if piece.stop is not Stop.MORE or not piece.records:
                break
        if first == segment.first_lsn:
            found.whole.add(number)
        found.segments.append(SealedSegment(number, segment.salt, first, found.last_lsn, found.last_time_ns, at))
        return at

    def _look_behind(self, number: int, at: int) -> None:
        """Look for valid records behind the last one: they show that something was torn, and what was durable."""
        file = self._storage.open(segment_name(number))
        try:
            assert self._tail_segment is not None
            valid = self._claims_behind(file, self._tail_segment, at)
        finally:
            file.close()
        if valid:  # the history breaks here, whatever was said of a later segment
            self._is_torn = True
            self._bad = _Bad(number, at, self._found.last_lsn + 1, f"not valid, and {valid} valid records follow")
        elif self._bad is None:
            self._bad = _Bad(number, at, self._found.last_lsn + 1, "torn, or not valid")

    def _collect_claims(self, file: File, number: int, header: SegmentHeader | None) -> None:
        """A segment behind the bad place: only what it says of durability counts."""
        if header is None:
            return
        self._believe(header.durable_lsn, number)
        if self._claims_behind(file, header, SEGMENT_HEADER_BYTES):
            self._is_torn = True

    def _claims_behind(self, file: File, segment: SegmentHeader, at: int) -> int:
        """Believe what valid record headers from byte `at` on say; returns how many there are.

        A header counts only with an LSN that the journal's bytes can hold and a durable LSN below its own.
        """
        seed = segment_seed(segment.number, segment.salt)
        expected = self._found.last_lsn + 1
        lsn_end = expected + len(self._numbers) * (SEGMENT_BYTES // RECORD_HEADER_BYTES)
        valid = 0
        while (size := file.read_into(self._buffer, at)) >= RECORD_HEADER_BYTES:
            piece = bytes(self._buffer[:size])
            after = size - RECORD_HEADER_BYTES + 1
            place = piece.find(RECORD_MAGIC)
            while 0 <= place <= size - RECORD_HEADER_BYTES:
                header = decode_record_header(piece, place, seed)
                if header is None:
                    place = piece.find(RECORD_MAGIC, place + 1)
                    continue
                if expected <= header.lsn < lsn_end and header.durable_lsn < header.lsn:
                    valid += 1
                    self._believe(header.durable_lsn, segment.number)
                # Its payload is the guest's: what looks like a header in there is not one.
                after = max(after, place + RECORD_HEADER_BYTES + header.payload_length)
                place = piece.find(RECORD_MAGIC, place + RECORD_HEADER_BYTES + header.payload_length)
            at += after
        return valid

    def _believe(self, durable_lsn: int, number: int) -> None:
        if durable_lsn > self._claim:
            self._claim = durable_lsn
            self._claim_source = segment_name(number)

    def _describe_corruption(self, tail: tuple[int, int] | None) -> str:
        expected = self._found.last_lsn + 1
        number, offset = tail or (self._bad[:2] if self._bad else (self._applied.segment, self._applied.offset))
        return (
            f"{segment_name(number)} offset {offset}: LSN {expected} is missing or damaged, although "
            f"{self._claim_source} shows that LSN {self._claim} was durable: the journal is corrupt, left as it is"
        )

    # ---- changing ----

    def _finish(self) -> None:
        """Make what was found durable, then cut what follows it, then make the names durable.

        No segment that is found gets another record, so what is left of the last one's room is given back: a disk
        server that dies often would fill the journal's quota with nothing.
        """
        for segment in self._found.segments:
            if segment.number in self._found.tables:
                continue  # it was durable when its index was made
            file = self._storage.open(segment_name(segment.number), write=True)
            try:
                self._write_again(file, segment)
                if segment.end > SEGMENT_HEADER_BYTES and self._segment_bytes - segment.end > self._waste_bytes_max:
                    file.truncate(segment.end)
                file.datasync()
            finally:
                file.close()
        empty = [
            segment.number
            for segment in self._found.segments[-1:]
            if segment.last_lsn < segment.first_lsn and segment.number not in self._begins_epoch
        ]
        for number in [*empty, *self._torn]:
            if number != self._applied.segment:
                self._set_free(number)
        self._found.segments = [
            s for s in self._found.segments if s.number not in empty or s.number == self._applied.segment
        ]
        self._sweep_indexes()
        self._storage.sync_directory("")

    def _sweep_indexes(self) -> None:
        """Remove those that belong to nothing, or were not believed."""
        kept = {s.number for s in self._found.segments if not self._by_indexes or s.number in self._found.tables}
        for number in list_indexes(self._storage):
            if number not in kept:
                remove_index(self._storage, number)

    def _write_again(self, file: File, segment: SealedSegment) -> None:
        """Put the segment's records above every claim of durability where they are, so that a sync takes them."""
        lsn = max(self._claim + 1, segment.first_lsn)
        is_header_open = segment.number in self._begins_epoch and lsn == segment.first_lsn
        if lsn > segment.last_lsn and not is_header_open:
            return
        at = self._found.offset_of(lsn) if lsn <= segment.last_lsn else SEGMENT_HEADER_BYTES
        if at == SEGMENT_HEADER_BYTES:  # no claim covers its header either: of the copies one may have come through
            header = read_header(file, segment.number, self._machine_id)
            assert header is not None, "it was just read"
            file.write_at((encode_segment_header(header),), 0)
        while at < segment.end:
            piece = self._buffer[: min(len(self._buffer), segment.end - at)]
            size = file.read_into(piece, at)
            assert size == len(piece), "what was just scanned is there"
            file.write_at((piece,), at)
            at += size

    def _set_free(self, number: int) -> None:
        file = self._storage.open(segment_name(number))
        try:
            is_whole = file.size() >= self._segment_bytes
        finally:
            file.close()
        if is_whole:
            self._storage.rename(segment_name(number), spare_name(number))
        else:
            self._storage.unlink(segment_name(number))
