"""The reader of the journal, and the freeing of what was read."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from asrfs.errors import IntegrityError
from asrfs.format.record import (
    CARRIES_EXTENT_BYTES,
    Kind,
    RecordHeader,
    decode_record_header,
    encode_record_header,
    payload_crc,
    segment_seed,
)
from asrfs.format.segment import SEGMENT_BYTES, SEGMENT_HEADER_BYTES
from asrfs.journal.columns import ColumnScan, scan_columns
from asrfs.journal.reader import JournalReader, Slabs
from asrfs.journal.recovery import recover
from asrfs.journal.segments import Scan, Stop, list_journal, scan, segment_name
from asrfs.journal.spares import prepare_spare, trim
from asrfs.journal.writer import Journal
from asrfs.model.positions import Cursor, Positions
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
STEP = 64 + BLOCK
SMALL = SEGMENT_HEADER_BYTES + 4 * STEP
MiB = 1 << 20


def begin(storage: CrashStorage, *, segment_bytes: int = SMALL, epoch: int | None = None) -> Journal:
    recovered = recover(storage, Positions(), MACHINE_ID, segment_bytes=segment_bytes)
    return Journal(
        storage, MACHINE_ID, recovered, StepClock(), epoch=epoch, segment_bytes=segment_bytes, prepare_ahead=False
    )


def write(journal: Journal, count: int) -> None:
    for lsn in range(journal.appended_lsn + 1, journal.appended_lsn + count + 1):
        journal.append(Kind.WRITE, 1, lsn * BLOCK, BLOCK, lsn.to_bytes(2, "little") * (BLOCK // 2))
    journal.sync()


def read_all(reader: JournalReader, cursor: Cursor, until: int, bytes_max: int) -> tuple[list[int], Cursor]:
    """LSNs read, each checked against what `write` wrote."""
    found: list[int] = []
    while cursor.lsn < until:
        batch = reader.read(cursor, until, bytes_max)
        assert batch.records
        for header, payload in batch.records:
            assert (header.kind, header.slot, header.offset) == (Kind.WRITE, 1, header.lsn * BLOCK)
            assert payload == header.lsn.to_bytes(2, "little") * (BLOCK // 2)
            found.append(header.lsn)
        assert batch.cursor.lsn == found[-1]
        cursor = batch.cursor
    return found, cursor


@pytest.mark.parametrize("bytes_max", [1, BLOCK, 3 * BLOCK, MiB])
@pytest.mark.parametrize("check", [True, False])
def test_reads_every_record_once_across_segments(bytes_max: int, check: bool) -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 23)
    reader = JournalReader(storage, MACHINE_ID, check_payloads=check)
    found, cursor = read_all(reader, Cursor(), 10, bytes_max)
    assert found == list(range(1, 11))
    found, cursor = read_all(reader, cursor, 23, bytes_max)
    assert found == list(range(11, 24))
    assert (cursor.segment, cursor.offset) == (journal.segment, journal.offset)
    assert cursor.time_ns == journal.last_time_ns
    assert reader.read(cursor, 23, bytes_max) == ([], cursor)
    write(journal, 9)
    assert read_all(reader, cursor, 32, bytes_max)[0] == list(range(24, 33))
    reader.close()
    journal.close()


def test_a_batch_ends_with_the_record_that_fills_it() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 8)
    reader = JournalReader(storage, MACHINE_ID)
    assert len(reader.read(Cursor(), 8, 2 * BLOCK).records) == 2
    assert len(reader.read(Cursor(), 8, 2 * BLOCK + 1).records) == 3
    assert len(reader.read(Cursor(), 8, 6 * BLOCK).records) == 6
    assert len(reader.read(Cursor(), 5, MiB).records) == 5
    reader.close()
    journal.close()


def test_large_records_that_straddle_the_pieces_read() -> None:
    storage = CrashStorage()
    journal = begin(storage, segment_bytes=SEGMENT_BYTES // 4)
    sizes = [MiB, 512, MiB - 512, 700_000 // 512 * 512, MiB] * 5
    for i, size in enumerate(sizes):
        journal.append(Kind.WRITE, 0, i * MiB, size, bytes([i]) * size)
    reader = JournalReader(storage, MACHINE_ID)
    cursor, found = Cursor(), []
    while cursor.lsn < len(sizes):
        batch = reader.read(cursor, len(sizes), 3 * MiB)
        found += [(header.length, bytes(payload[:1]), len(payload)) for header, payload in batch.records]
        cursor = batch.cursor
    assert found == [(size, bytes([i]), size) for i, size in enumerate(sizes)]
    assert list_journal(storage).segments == [1, 2]
    reader.close()
    journal.close()


def test_payloads_stay_what_they_are_after_the_next_read() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 12)
    reader = JournalReader(storage, MACHINE_ID)
    first = reader.read(Cursor(), 12, 4 * BLOCK)
    reader.read(first.cursor, 12, 8 * BLOCK)
    assert [payload[0] for _, payload in first.records] == [1, 2, 3, 4]
    reader.close()
    journal.close()


def test_nothing_behind_the_durable_lsn_is_looked_at() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 2)
    file = storage.open(segment_name(1), write=True)
    file.write_at([b"half a record"], SEGMENT_HEADER_BYTES + 2 * STEP)
    file.close()
    reader = JournalReader(storage, MACHINE_ID)
    assert read_all(reader, Cursor(), 2, MiB)[0] == [1, 2]
    reader.close()
    journal.close()


@pytest.mark.parametrize(("lsn", "at"), [(1, 30), (1, 100), (3, 3), (4, 4000), (6, 9), (8, 1000)])
def test_damage_names_file_offset_and_lsn(lsn: int, at: int) -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 9)
    number, offset = (lsn - 1) // 4 + 1, SEGMENT_HEADER_BYTES + (lsn - 1) % 4 * STEP
    file = storage.open(segment_name(number), write=True)
    file.write_at([bytes([file.read_at(1, offset + at)[0] ^ 1])], offset + at)
    file.close()
    reader = JournalReader(storage, MACHINE_ID)
    with pytest.raises(IntegrityError) as caught:
        read_all(reader, Cursor(), 9, BLOCK)
    for word in (segment_name(number), f"offset {offset}:", f"LSN {lsn} "):
        assert word in str(caught.value)
    reader.close()
    journal.close()


@pytest.mark.parametrize("check", [True, False])
def test_a_segment_ends_where_the_next_one_begins_whatever_a_crash_left_behind(check: bool) -> None:
    """A torn record may have a valid header; the record that took its LSN later is the true one."""
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 3)
    journal.close()
    file = storage.open(segment_name(1), write=True)
    file.write_at([b"torn"], SEGMENT_HEADER_BYTES + 2 * STEP + 64 + 2000)
    file.close()
    journal = begin(storage)
    assert journal.appended_lsn == 2
    reader = JournalReader(storage, MACHINE_ID, check_payloads=check)
    _, cursor = read_all(reader, Cursor(), 2, MiB)
    write(journal, 4)
    found, cursor = read_all(reader, cursor, 6, MiB)
    assert found == [3, 4, 5, 6]
    assert read_all(JournalReader(storage, MACHINE_ID, check_payloads=check), Cursor(), 6, MiB)[0] == [1, 2, 3, 4, 5, 6]
    reader.close()
    journal.close()


def test_a_reader_outlives_restarts_that_leave_empty_segments() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 3)
    reader = JournalReader(storage, MACHINE_ID)
    _, cursor = read_all(reader, Cursor(), 2, MiB)
    for _ in range(3):
        journal.close()
        journal = begin(storage)
        assert reader.read(cursor, 2, MiB).records == []
        assert reader.read(Cursor(), 3, MiB).cursor.lsn == 3
    write(journal, 2)
    assert read_all(reader, cursor, 5, MiB)[0] == [3, 4, 5]
    reader.close()
    journal.close()


def test_a_batch_stays_within_an_epoch() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 3)
    journal.close()
    journal = begin(storage, epoch=2)
    write(journal, 3)
    reader = JournalReader(storage, MACHINE_ID)
    batch = reader.read(Cursor(), 6, MiB)
    assert (batch.cursor.lsn, reader.epoch(Cursor()), reader.epoch(batch.cursor)) == (3, 1, 2)
    assert reader.read(batch.cursor, 6, MiB).cursor.lsn == 6
    reader.close()
    journal.close()


def test_other_machines_and_missing_segments() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 12)
    with pytest.raises(IntegrityError, match="belongs to machine"):
        JournalReader(storage, b"another machine!").read(Cursor(), 12, MiB)
    storage.unlink(segment_name(2))
    reader = JournalReader(storage, MACHINE_ID)
    assert reader.read(Cursor(), 4, MiB).cursor.lsn == 4
    with pytest.raises(IntegrityError, match="LSN 5 is missing"):
        read_all(reader, Cursor(), 12, MiB)
    with pytest.raises(IntegrityError, match="LSN 3 is missing"):
        JournalReader(CrashStorage(), MACHINE_ID).read(Cursor(lsn=2, segment=1, offset=9000), 12, MiB)
    reader.close()
    journal.close()


# ---- the scan under it ----


def test_the_fast_way_to_a_header_finds_what_the_formats_own_function_finds() -> None:
    payload = b"p" * 512
    good = RecordHeader(7, 1, 2, 4096, 512, 512, payload_crc(payload), Kind.WRITE, 3)
    variants = [
        good,
        good._replace(kind=Kind.FILL),
        good._replace(kind=9),
        good._replace(length=1024),
        good._replace(offset=(1 << 64) - 512),
        good._replace(offset=(1 << 64) - 513),
        good._replace(length=0, payload_length=0, payload_crc=0),
        good._replace(kind=Kind.ZERO, payload_length=0, payload_crc=0),
        good._replace(kind=Kind.DISK, length=0),
        good._replace(lsn=8),
        good._replace(payload_length=(1 << 20) + 1, length=(1 << 20) + 1),
    ]
    seen = set()
    for header in variants:
        for seed in (segment_seed(4, 9), segment_seed(5, 9), segment_seed(4, 8)):
            raw = encode_record_header(header, segment_seed(4, 9)) + payload[: header.payload_length]
            for broken in (raw, b"X" + raw[1:], raw[:60] + b"\1" + raw[61:], raw[:30] + b"\xff" + raw[31:]):
                expected = decode_record_header(broken, 0, seed)
                found = scan(memoryview(broken), 0, seed, 7, lsn_max=7)
                if expected is not None and expected.lsn == 7:
                    assert [(h, bytes(p)) for h, p in found.records] == [(expected, payload[: header.payload_length])]
                    assert type(found.records[0][0]) is RecordHeader
                else:
                    assert (found.records, found.stop) == ([], Stop.INVALID)
                seen.add(found.stop)
    assert seen == {Stop.INVALID, Stop.LIMIT}


def test_a_scan_of_every_prefix_of_two_records() -> None:
    seed = segment_seed(1, 0)
    raw = b""
    for lsn in (1, 2):
        payload = bytes([lsn]) * 512
        header = RecordHeader(lsn, 5, 0, 0, 512, 512, payload_crc(payload), Kind.WRITE, 0)
        raw += encode_record_header(header, seed) + payload
    for length in range(len(raw) + 1):
        found = scan(memoryview(raw)[:length], 0, seed, 1)
        assert (len(found.records), found.stop) == (length // 576, Stop.MORE)
        assert found.end == length // 576 * 576
        assert found.payload_bytes == length // 576 * 512


def as_scan(found: ColumnScan) -> Scan:
    columns = found.columns
    records = [(columns.header(i), columns.payload(i)) for i in range(len(columns))]
    return Scan(records, found.payload_bytes, found.end, found.stop)


def assert_same(view: memoryview, seed: int, first: int, **limits: Any) -> Scan:
    """Both ways to scan find the same; what they find."""
    found = scan(view, 0, seed, first, **limits)
    assert as_scan(scan_columns(view, 0, seed, first, **limits)) == found
    return found


def some_records(rng: random.Random, seed: int, first: int) -> bytes:
    """Records of every kind, most of them sound; the others are what a checksum alone would not refuse."""
    raw = b""
    for lsn in range(first, first + rng.randint(0, 12)):
        kind = rng.choice((*Kind, Kind.WRITE, Kind.WRITE))
        length = rng.choice((512, 4096)) if kind in CARRIES_EXTENT_BYTES else rng.choice((512, 1 << 40))
        payload = rng.randbytes(length) if kind in CARRIES_EXTENT_BYTES else b""
        if kind in (Kind.MARKER, Kind.DISK):
            length, payload = 0, rng.randbytes(rng.randrange(80))
        header = RecordHeader(lsn, 7, 0, rng.randrange(99) * BLOCK, length, len(payload), payload_crc(payload), kind, 1)
        if rng.random() < 0.05:
            wrong: dict[str, int] = rng.choice(
                (
                    {"lsn": lsn + 1},
                    {"kind": 0},
                    {"kind": 300},
                    {"length": 0},
                    {"length": length + 1},
                    {"offset": (1 << 64) - 1},
                    {"payload_crc": 1},
                )
            )
            header = header._replace(**wrong)
        raw += encode_record_header(header, seed if rng.random() < 0.98 else seed + 1) + payload
    return raw


def test_records_as_columns_are_the_records_one_by_one(rng: random.Random) -> None:
    """Whole or damaged anywhere, cut anywhere, with every limit: the reader takes what recovery would take."""
    stops = Counter[Stop]()
    for _ in range(600):
        seed, first = segment_seed(rng.randrange(9), 3), rng.choice((1, 1 << 40))
        raw = bytearray(some_records(rng, seed, first) + rng.choice((b"", bytes(200), rng.randbytes(100))))
        if raw and rng.random() < 0.5:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        view = memoryview(raw)[: rng.choice((len(raw), rng.randrange(len(raw) + 1)))]
        limits = rng.choice(({}, {"lsn_max": first + rng.randrange(-1, 9)}, {"payload_bytes_max": rng.randrange(9999)}))
        stops[assert_same(view, seed, first, check_payloads=rng.random() < 0.8, **limits).stop] += 1
    assert min(stops[stop] for stop in Stop) > 30, stops


def test_every_flipped_bit_of_a_record_is_seen_both_ways() -> None:
    seed = segment_seed(1, 0)
    payload = b"p" * 64
    header = RecordHeader(5, 1, 0, 0, 64, 64, payload_crc(payload), Kind.WRITE, 0)
    raw = bytearray(encode_record_header(header, seed) + payload)
    for bit in range(len(raw) * 8):
        raw[bit // 8] ^= 1 << bit % 8
        assert not assert_same(memoryview(raw), seed, 5, lsn_max=5).records
        raw[bit // 8] ^= 1 << bit % 8


def test_slabs_are_used_again_and_the_batch_is_right(rng: random.Random) -> None:
    """Payloads of all sizes, so that records end anywhere in a slab and go on in the next one."""
    storage = CrashStorage()
    journal = begin(storage, segment_bytes=32 * MiB)
    sizes = [rng.choice((BLOCK, 64 * 1024, MiB, 300 * BLOCK // 2 * 2 % MiB + BLOCK)) for _ in range(24)]
    for lsn, size in enumerate(sizes, 1):
        journal.append(Kind.WRITE, 1, 0, size, bytes([lsn]) * size)
    journal.sync()
    reader, slabs, cursor = JournalReader(storage, MACHINE_ID), Slabs(), Cursor()
    found: list[tuple[int, bytes]] = []
    while cursor.lsn < len(sizes):
        batch = reader.read(cursor, len(sizes), rng.choice((1, MiB, 9 * MiB)), slabs)
        found += [(len(payload), bytes(payload[:1])) for _, payload in batch.records]
        cursor = batch.cursor
    assert found == [(size, bytes([lsn])) for lsn, size in enumerate(sizes, 1)]
    reader.close()
    journal.close()


def test_parts_of_short_segments_share_memory_and_keep_their_bytes() -> None:
    """One batch over 300 segments of a record or two: memory follows the bytes, not the number of segments."""
    storage = CrashStorage()
    journal = begin(storage, segment_bytes=SEGMENT_HEADER_BYTES + 2 * BLOCK)
    for lsn in range(1, 301):
        journal.append(Kind.WRITE, 1, 0, BLOCK, lsn.to_bytes(4, "little") * (BLOCK // 4))
    journal.sync()
    reader = JournalReader(storage, MACHINE_ID)
    tracemalloc.start()
    batch = reader.read(Cursor(), 300, 300 * BLOCK)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batch.parts) > 200
    assert peak < 16 * MiB
    assert [bytes(payload) for _, payload in batch.records] == [
        lsn.to_bytes(4, "little") * (BLOCK // 4) for lsn in range(1, 301)
    ]
    reader.close()
    journal.close()


# ---- spares ----


def test_a_prepared_spare_is_whole_written_and_durable() -> None:
    storage = CrashStorage()
    assert [prepare_spare(storage, segment_bytes=3 * MiB + 512) for _ in range(2)] == [0, 1]
    storage.rename("fresh-0000000000000000", "spare-0000000000000000")
    assert prepare_spare(storage, segment_bytes=SMALL) == 0, "counts are used again, unlike a segment's number"
    assert storage.names("") == ["fresh-0000000000000000", "fresh-0000000000000001", "spare-0000000000000000"]
    assert storage.open("spare-0000000000000000").size() == 3 * MiB + 512
    assert sum(1 for kind, _ in storage.log if kind == "write") == 4 + 4 + 1
    assert storage.unsynced_bytes("fresh-0000000000000001") == 0
    assert storage.log[-1] == ("sync_directory", "")


def test_a_spare_that_failed_leaves_nothing_and_what_died_is_swept() -> None:
    storage = CrashStorage(capacity=3 * SMALL)
    storage.create(".spare-0000000000000004").close()
    assert prepare_spare(storage, segment_bytes=SMALL) == 0
    storage.inject(Fault(0, kinds=frozenset(["datasync"])))
    with pytest.raises(OSError):
        prepare_spare(storage, segment_bytes=SMALL)
    with pytest.raises(OSError):
        prepare_spare(storage, segment_bytes=4 * SMALL)
    assert storage.names("") == ["fresh-0000000000000000"]
    storage.assert_fired()


def test_i4_only_whole_segments_at_or_below_the_lsn_are_freed() -> None:
    for through in range(14):
        storage = CrashStorage()
        journal = begin(storage)
        write(journal, 13)
        freed = trim(storage, MACHINE_ID, through, spares_max=1, segment_bytes=SMALL)
        assert freed == list(range(1, through // 4 + 1))
        assert list_journal(storage) == (list(range(through // 4 + 1, 5)), [1] if freed else [], [])
        assert trim(storage, MACHINE_ID, through, spares_max=1, segment_bytes=SMALL) == []
        journal.close()


def test_i4_nothing_behind_the_segment_the_maps_still_need_is_freed() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, 13)
    assert trim(storage, MACHINE_ID, 13, spares_max=0, through_segment=2, segment_bytes=SMALL) == [1, 2]
    assert list_journal(storage) == ([3, 4], [], [])
    assert trim(storage, MACHINE_ID, 13, spares_max=0, segment_bytes=SMALL) == [3]
    journal.close()


def test_freed_segments_are_used_again_and_read_again() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    cursor = Cursor()
    reader = JournalReader(storage, MACHINE_ID)
    for _ in range(6):
        write(journal, 7)
        _, cursor = read_all(reader, cursor, journal.durable_lsn, MiB)
        trim(storage, MACHINE_ID, cursor.lsn, spares_max=3, segment_bytes=SMALL)
    assert sum(1 for kind, _ in storage.log if kind == "create") <= 4
    reader.close()
    journal.close()
