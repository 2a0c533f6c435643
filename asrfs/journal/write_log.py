"""The journal as a write log that other programs can replay: reads segments, writes one file, changes nothing else.

It goes through the segments twice. A flush stands in no record of its own: a record says only which LSN was durable
when it was appended. So the first pass collects those LSNs, and the second sets a flush behind each of them, which is
where the disk's content was that the flush made durable.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from asrfs.errors import BadInputError, FormatError, IntegrityError
from asrfs.format.log_writes import LOG_SECTOR_BYTES, LogFlag, encode_log_entry, encode_log_super
from asrfs.format.record import READS_AS_ZEROS, Kind, RecordHeader, segment_seed
from asrfs.format.segment import SEGMENT_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, decode_segment_header
from asrfs.journal.segments import list_journal, scan, segment_name
from asrfs.model.machine import NO_SLOT
from asrfs.model.marker import decode_marker
from asrfs.storage.interface import Bytes, File, Storage

_ZEROS_BYTES_MAX = 1 << 20
"""One entry's worth of zeros: who replays a log holds an entry in memory."""


class WriteLog(NamedTuple):
    """What was written: which part of the history, of which disk, and how many entries of each sort."""

    machine_id: str
    slot: int | None
    first_lsn: int
    last_lsn: int
    writes: int
    flushes: int
    discards: int
    marks: int
    bytes: int


class _Survey(NamedTuple):
    """What the first pass found. `flushes`: LSNs up to which a flush made everything durable."""

    machine_id: bytes
    first_lsn: int
    last_lsn: int
    slots: frozenset[int]
    flushes: frozenset[int]


def write_log(journal: Storage, names: list[str], output: File, slot: int | None) -> WriteLog:
    """Write what the segments `names` of `journal` hold of the disk `slot` to `output`, an empty file, durably.

    `slot` None: of the only disk there is. Raises IntegrityError where the history breaks off below what is known
    durable, BadInputError for a disk that is not there, OSError.
    """
    survey = _survey(journal, names)
    if slot is None and len(survey.slots) > 1:
        raise BadInputError(f"the journal has writes of {len(survey.slots)} disks: choose one with --slot")
    if slot is not None and survey.slots and slot not in survey.slots:
        raise BadInputError(f"the journal has no writes of slot {slot}: it has {sorted(survey.slots)}")
    chosen = min(survey.slots, default=None) if slot is None else slot
    writer = _Writer(output)
    for header, payload in _records(journal, names):
        if header.lsn > survey.last_lsn:
            break  # appended since the first pass
        if header.kind == Kind.MARKER:
            marker = decode_marker(bytes(payload))
            if marker.completes is None:
                writer.mark(marker.name or marker.id)
        elif header.kind != Kind.DISK and header.slot == chosen:
            writer.put(header, payload)
        if header.lsn in survey.flushes:
            writer.flush()
    writer.finish()
    return WriteLog(
        machine_id=survey.machine_id.hex(),
        slot=chosen,
        first_lsn=survey.first_lsn,
        last_lsn=survey.last_lsn,
        writes=writer.writes,
        flushes=writer.flushes,
        discards=writer.discards,
        marks=writer.marks,
        bytes=writer.end,
    )


def segment_names(journal: Storage) -> list[str]:
    """The names of a journal's segments, in order."""
    return [segment_name(number) for number in list_journal(journal).segments]


class _Writer:
    """Entries one after the other. Zeros are left as holes."""

    def __init__(self, output: File) -> None:
        self._output = output
        self.end = LOG_SECTOR_BYTES
        self.writes = self.flushes = self.discards = self.marks = 0

    def put(self, header: RecordHeader, payload: Bytes) -> None:
        if header.kind == Kind.DISCARD:
            self._entry(encode_log_entry(header.offset, header.length, LogFlag.DISCARD))
            self.discards += 1
        elif header.kind in READS_AS_ZEROS:
            for offset in range(header.offset, header.offset + header.length, _ZEROS_BYTES_MAX):
                length = min(_ZEROS_BYTES_MAX, header.offset + header.length - offset)
                self._entry(encode_log_entry(offset, length))
                self.end += length
                self.writes += 1
        else:
            self._entry(encode_log_entry(header.offset, header.length), payload)
            self.writes += 1

    def flush(self) -> None:
        self._entry(encode_log_entry(0, 0, LogFlag.FLUSH))
        self.flushes += 1

    def mark(self, name: str) -> None:
        self._entry(encode_log_entry(0, 0, LogFlag.MARK, name.encode()))
        self.marks += 1

    def finish(self) -> None:
        self._output.truncate(self.end)
        self._output.write_at((encode_log_super(self.writes + self.flushes + self.discards + self.marks),), 0)
        self._output.datasync()

    def _entry(self, *buffers: Bytes) -> None:
        self._output.write_at(buffers, self.end)
        self.end += sum(map(len, buffers))


def _survey(journal: Storage, names: list[str]) -> _Survey:
    heads = [segment for _, segment in _heads(journal, names)]
    if not heads:
        raise FormatError("no journal segment with a valid header is there")
    last_lsn = heads[0].first_lsn - 1
    slots, flushes = set(), set()
    for header, _ in _records(journal, names):
        last_lsn = header.lsn
        if header.kind not in (Kind.MARKER, Kind.DISK) and header.slot != NO_SLOT:
            slots.add(header.slot)
        flushes.add(header.durable_lsn)
    claim = max(0, *flushes, *(segment.durable_lsn for segment in heads))
    if claim > last_lsn:
        raise IntegrityError(f"the journal ends at LSN {last_lsn}, although LSN {claim} was durable: it is damaged")
    return _Survey(heads[0].machine_id, heads[0].first_lsn, last_lsn, frozenset(slots), frozenset(flushes))


def _heads(journal: Storage, names: list[str]) -> Iterator[tuple[str, SegmentHeader]]:
    """Segments that were begun; the file of the next one is made ahead."""
    for name in names:
        file = journal.open(name)
        try:
            raw = file.read_at(SEGMENT_HEADER_BYTES, 0)
        finally:
            file.close()
        if any(raw):
            yield name, decode_segment_header(raw, name)


def _records(journal: Storage, names: list[str]) -> Iterator[tuple[RecordHeader, memoryview]]:
    """The records of consecutive segments; ends where the history does."""
    last: tuple[int, int] | None = None
    heads = list(_heads(journal, names))
    for (name, segment), following in zip_longest(heads, heads[1:]):
        if last is not None and segment.ends_before(last[0]) != last[1]:
            return
        file = journal.open(name)
        try:
            view = memoryview(file.read_at(SEGMENT_BYTES, 0))
        finally:
            file.close()
        end = following[1].ends_before(segment.epoch) if following is not None else (1 << 64) - 1
        seed = segment_seed(segment.number, segment.salt)
        found = scan(view, SEGMENT_HEADER_BYTES, seed, segment.first_lsn, lsn_max=end)
        yield from found.records
        last = segment.epoch, segment.first_lsn + len(found.records) - 1
