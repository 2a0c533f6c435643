"""Journal segments: what recovery, the reader and `asrfs inspect` make of files that were changed.

Where a checksum was not made right again, what is found is a prefix of what was written, byte for byte, and holds all
that the positions claim, or IntegrityError says what is missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asrfs.cli.inspect import describe_segment
from asrfs.format.record import (
    RECORD_HEADER_BYTES,
    Kind,
    RecordHeader,
    encode_record_header,
    payload_crc,
    segment_seed,
)
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT, SegmentHeader, encode_segment_header
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.segments import segment_name
from asrfs.model.machine import DiskRecord, encode_disk
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Cursor, Positions
from tests.fakes.crash_storage import CrashStorage
from tests.proof.fuzzing.mutations import Strike, any_extreme, flip, mutate_bytes, mutate_fields
from tests.proof.fuzzing.target import Target, Trial, refused

_MACHINE = bytes(range(16))
_SEGMENTS = 3
_RECORDS_EACH = 6
_SEGMENT_BYTES = 40_000
_RECORD_BITS = (64, 64, 64, 64, 64, 32, 32, 16, 16)
_SEGMENT_BITS = (32, 64, 64, 64, 64, 0, 64)
_BEGIN_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class Written:
    """A record as it was written, and where."""

    header: RecordHeader
    payload: bytes
    segment: int
    at: int


@dataclass(frozen=True)
class Journal:
    """Sound segments and what is in them."""

    segments: dict[int, bytes]
    headers: dict[int, SegmentHeader]
    records: list[Written]

    def cursor(self, lsn: int) -> Cursor:
        """The place behind a record."""
        if not lsn:
            return Cursor()
        record = self.records[lsn - 1]
        end = record.at + RECORD_HEADER_BYTES + len(record.payload)
        return Cursor(lsn=lsn, segment=record.segment, offset=end, time_ns=record.header.time_ns)


def make_journal() -> Journal:
    """All kinds of records in three segments, each record durable two records later."""
    rng = random.Random(11)
    journal = Journal({}, {}, [])
    for number in range(1, _SEGMENTS + 1):
        first = len(journal.records) + 1
        last_ns = journal.records[-1].header.time_ns if journal.records else 0
        header = SegmentHeader(1, number, first, max(0, first - 3), last_ns, _MACHINE, rng.getrandbits(64))
        content = bytearray(encode_segment_header(header))
        for i in range(_RECORDS_EACH):
            lsn = first + i
            kind = (Kind.DISK, Kind.WRITE, Kind.WRITE, Kind.ZERO, Kind.FILL, Kind.MARKER)[i]
            payload = _payload(kind, rng)
            extent = 0 if kind in (Kind.DISK, Kind.MARKER) else 4096
            record = RecordHeader(
                *(lsn, _BEGIN_NS + lsn, max(0, lsn - 3), rng.randrange(9) * 4096 if extent else 0, extent),
                *(len(payload), payload_crc(payload), int(kind), 0),
            )
            journal.records.append(Written(record, payload, number, len(content)))
            content += encode_record_header(record, segment_seed(number, header.salt)) + payload
        journal.headers[number] = header
        journal.segments[number] = bytes(content.ljust(_SEGMENT_BYTES, b"\0"))
    return journal


def _payload(kind: Kind, rng: random.Random) -> bytes:
    if kind in (Kind.WRITE, Kind.FILL):
        return rng.randbytes(4096)
    if kind == Kind.DISK:
        return encode_disk(DiskRecord(slot=0, id="0" * 32, name="disk0", size_bytes=1 << 20))
    return encode_marker(MarkerRecord(id="1" * 32, name="noon")) if kind == Kind.MARKER else b""


def storage_with(segments: dict[str, bytes]) -> CrashStorage:
    storage = CrashStorage()
    for name, content in segments.items():
        file = storage.create(name)
        file.write_at([content], 0)
        file.datasync()
        file.close()
    storage.sync_directory("")
    return storage


# ---- breaking -----------------------------------------------------------------------------------------------------


def break_unsealed(rng: random.Random, journal: Journal, strike: Strike) -> dict[int, bytes]:
    """One segment changed as a disk might: no checksum is made right again."""
    number = rng.choice(list(journal.segments))
    end = max(record.at + 4200 for record in journal.records if record.segment == number)
    content = journal.segments[number]
    other = journal.segments[rng.choice(list(journal.segments))]
    changed = mutate_bytes(rng, content[:end], other[:end], strike)
    return {**journal.segments, number: changed.ljust(_SEGMENT_BYTES, b"\0")}


def break_sealed(rng: random.Random, journal: Journal, strike: Strike) -> dict[int, bytes]:
    """A header of a segment or of a record says something else, and its checksum is right."""
    strike("field")
    number = rng.choice(list(journal.segments))
    header = journal.headers[number]
    content = bytearray(journal.segments[number])
    if rng.random() < 0.3:
        changed = SegmentHeader._make(mutate_fields(rng, header, _SEGMENT_BITS))
        encoded = encode_segment_header(changed)
        content[: len(encoded)] = encoded
    else:
        record = rng.choice([each for each in journal.records if each.segment == number])
        fields = RecordHeader._make(mutate_fields(rng, record.header, _RECORD_BITS))
        content[record.at : record.at + RECORD_HEADER_BYTES] = encode_record_header(
            fields, segment_seed(number, header.salt)
        )
    return {**journal.segments, number: bytes(content)}


def break_positions(rng: random.Random, positions: Positions) -> Positions:
    """Positions such as no agent would have saved, of the sizes that their file is allowed to hold."""

    def broken(cursor: Cursor) -> Cursor:
        fields = {"lsn": 63, "segment": POSITION_SHIFT + 11, "offset": POSITION_SHIFT}
        field, bits = rng.choice(list(fields.items()))
        values = {name: getattr(cursor, name) for name in ("lsn", "segment", "offset", "time_ns")}
        return Cursor(**{**values, field: abs(any_extreme(rng)) & ((1 << bits) - 1)})

    if rng.random() < 0.5:
        return Positions(applied=broken(positions.applied), acknowledged=positions.acknowledged)
    return Positions(applied=positions.applied, acknowledged=broken(positions.acknowledged))


# ---- trials -------------------------------------------------------------------------------------------------------


def try_recovery(journal: Journal, rng: random.Random, strike: Strike) -> None:
    is_sealed = rng.random() < 0.4
    segments = (break_sealed if is_sealed else break_unsealed)(rng, journal, strike)
    named = {segment_name(number): content for number, content in segments.items()}
    applied, acknowledged = (rng.choice((0, 0, rng.randrange(len(journal.records)))) for _ in "ab")
    positions = Positions(applied=journal.cursor(applied), acknowledged=journal.cursor(acknowledged))
    if rng.random() < 0.15:
        strike("value")
        is_sealed = True
        positions = break_positions(rng, positions)
    if rng.random() < 0.05:
        strike("text")
        is_sealed = True
        moved = rng.choice(list(named))
        named[rng.choice(("f" * 16, "0" * 16, "8" + "0" * 15)) + ".segment"] = named.pop(moved)
    storage = storage_with(named)
    found = refused(lambda: recover(storage, positions, _MACHINE, segment_bytes=_SEGMENT_BYTES))
    if found is None:
        return
    assert found.next_segment_number < 1 << (64 - POSITION_SHIFT), "the next segment could not be found again"
    if not is_sealed:
        _check_prefix(journal, found, max(applied, acknowledged), storage)
    _read_all(storage, found, positions.applied, journal, exact=not is_sealed)


def _check_prefix(journal: Journal, found: Recovered, claimed: int, storage: CrashStorage) -> None:
    assert found.last_lsn >= claimed, f"LSN {claimed} was durable, and recovery ends at LSN {found.last_lsn}"
    records = list(found.records())
    for record, written in zip(records, journal.records[found.last_lsn - len(records) :], strict=False):
        header = written.header
        assert (record.kind, record.slot, record.offset, record.length) == (
            header.kind,
            header.slot,
            header.offset,
            header.length,
        )
        file = storage.open(segment_name(record.position >> POSITION_SHIFT))
        assert file.read_at(len(written.payload), record.position & POSITION_MASK) == written.payload
        file.close()


def _read_all(storage: CrashStorage, found: Recovered, start: Cursor, journal: Journal, *, exact: bool) -> None:
    reader = JournalReader(storage, _MACHINE)
    try:
        batch = refused(lambda: reader.read(start, found.last_lsn, 1 << 20))
    finally:
        reader.close()
    if exact and batch is not None:
        for header, payload in batch.records:
            written = journal.records[header.lsn - 1]
            assert header == written.header and payload == written.payload


def try_reader(journal: Journal, rng: random.Random, strike: Strike) -> None:
    """Reading up to what is durable: all of it as it was written, or IntegrityError."""
    segments = break_unsealed(rng, journal, strike)
    reader = JournalReader(storage_with({segment_name(n): content for n, content in segments.items()}), _MACHINE)
    last = len(journal.records)
    start = rng.choice((0, rng.randrange(last)))
    try:
        batch = refused(lambda: reader.read(journal.cursor(start), last, 1 << 20))
    finally:
        reader.close()
    if batch is None:
        return
    assert batch.cursor.lsn == last, "durable records are missing, and nobody was told"
    for (header, payload), written in zip(batch.records, journal.records[start:], strict=True):
        assert header == written.header and payload == written.payload, f"LSN {header.lsn} is not what was written"


def try_inspect(journal: Journal, rng: random.Random, strike: Strike) -> None:
    segments = (break_sealed if rng.random() < 0.6 else break_unsealed)(rng, journal, strike)
    refused(lambda: describe_segment(segments[rng.choice(list(segments))], "a file"))
    record = rng.choice([each for each in journal.records if each.header.kind in (Kind.MARKER, Kind.DISK)])
    payload = flip(rng, record.payload) if rng.random() < 0.5 else bytes([rng.randrange(256)]) + record.payload[1:]
    fields = record.header._replace(payload_length=len(payload), payload_crc=payload_crc(payload))
    content = bytearray(journal.segments[record.segment])
    seed = segment_seed(record.segment, journal.headers[record.segment].salt)
    sealed = encode_record_header(fields, seed) + payload
    content[record.at : record.at + len(sealed)] = sealed
    refused(lambda: describe_segment(bytes(content), "a file"))


def _target(name: str, trial: object, weight: int) -> Target:
    assert callable(trial)

    @contextmanager
    def opened(_scratch: Path) -> Iterator[Trial]:
        journal = make_journal()
        whole = recover(
            storage_with({segment_name(n): content for n, content in journal.segments.items()}),
            Positions(),
            _MACHINE,
            segment_bytes=_SEGMENT_BYTES,
        )
        assert whole.last_lsn == len(journal.records), "the journal itself is a good one"
        yield lambda rng, strike: trial(journal, rng, strike)

    return Target(name, weight, opened)


TARGETS = (
    _target("journal recovery", try_recovery, 8),
    _target("journal reader", try_reader, 8),
    _target("inspect", try_inspect, 6),
)
