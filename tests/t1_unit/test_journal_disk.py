"""The journaled disk: what becomes a record, how reads are put together, and who may come between."""

from __future__ import annotations

import errno
import random
import threading

import pytest

from asrfs.format.record import PAYLOAD_BYTES_MAX, Kind
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, WriteTogether
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.positions import Cursor, Positions
from asrfs.storage.interface import Bytes
from tests.fakes.crash_storage import CrashFile, CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
MiB = 1 << 20
SIZE = 5 * MiB + 512


class Rig:
    """One disk over an image of random bytes."""

    def __init__(self, *, segment_bytes: int = 8 * MiB) -> None:
        self.storage = CrashStorage()
        self.initial = random.Random(4).randbytes(SIZE)
        image = self.storage.create("image")
        image.write_at([self.initial], 0)
        recovered = recover(self.storage, Positions(), MACHINE_ID, segment_bytes=segment_bytes)
        self.journal = Journal(
            self.storage, MACHINE_ID, recovered, StepClock(), segment_bytes=segment_bytes, prepare_ahead=False
        )
        self.map = BlockMap()
        self.disk = JournaledDisk(2, SIZE, image, self.journal, self.map)

    def records(self) -> list[tuple[int, int, int]]:
        self.journal.sync()
        reader = JournalReader(self.storage, MACHINE_ID)
        batch = reader.read(Cursor(), self.journal.durable_lsn, 1 << 40)
        reader.close()
        assert all(header.slot == 2 for header, _ in batch.records)
        return [(header.kind, header.offset, header.length) for header, _ in batch.records]

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.disk.read(offset, length))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_whole_blocks_are_one_record(rig: Rig) -> None:
    rig.disk.write(BLOCK, b"a" * BLOCK)
    rig.disk.write(0, b"b" * PAYLOAD_BYTES_MAX)
    rig.disk.write(0, b"")
    assert rig.records() == [(Kind.WRITE, BLOCK, BLOCK), (Kind.WRITE, 0, PAYLOAD_BYTES_MAX)]


@pytest.mark.parametrize(
    ("offset", "length", "extent"),
    [
        (1, 1, (0, BLOCK)),
        (BLOCK - 1, 2, (0, 2 * BLOCK)),
        (100, BLOCK, (0, 2 * BLOCK)),
        (BLOCK, 512, (BLOCK, BLOCK)),
        (SIZE - 512, 512, (SIZE - 512, 512)),
        (SIZE - 100, 7, (SIZE - 512, 512)),
        (SIZE - BLOCK, BLOCK, (SIZE - 512 - BLOCK, BLOCK + 512)),
    ],
)
def test_other_writes_are_widened(rig: Rig, offset: int, length: int, extent: tuple[int, int]) -> None:
    rig.disk.write(offset, b"x" * length)
    assert rig.records() == [(Kind.WRITE, *extent)]
    expected = bytearray(rig.initial)
    expected[offset : offset + length] = b"x" * length
    assert rig.read(0, SIZE) == expected


def test_a_long_write_is_cut_into_records(rig: Rig) -> None:
    rig.disk.write(512, b"x" * (2 * MiB))
    assert rig.records() == [
        (Kind.WRITE, 0, MiB),
        (Kind.WRITE, MiB, MiB),
        (Kind.WRITE, 2 * MiB, BLOCK),
    ]
    assert rig.read(0, 512) + rig.read(2 * MiB + 512, 512) == rig.initial[:512] + rig.initial[2 * MiB + 512 :][:512]


def test_zeros_are_records_without_payload(rig: Rig) -> None:
    rig.disk.write(0, bytes(2 * BLOCK))
    rig.disk.write(SIZE - 512, bytes(512))
    rig.disk.write(BLOCK, bytes(BLOCK - 1) + b"\1")
    rig.disk.write(BLOCK, bytes(BLOCK // 2) + b"\1" + bytes(BLOCK // 2 - 1))
    assert [kind for kind, _, _ in rig.records()] == [Kind.ZERO, Kind.ZERO, Kind.WRITE, Kind.WRITE]
    assert rig.read(0, BLOCK) == bytes(BLOCK)
    assert rig.read(SIZE - 512, 512) == bytes(512)


def test_a_discard_writes_the_edges_and_one_record_for_the_rest(rig: Rig) -> None:
    rig.disk.discard(100, 3 * BLOCK)
    assert rig.records() == [
        (Kind.WRITE, 0, BLOCK),
        (Kind.DISCARD, BLOCK, 2 * BLOCK),
        (Kind.WRITE, 3 * BLOCK, BLOCK),
    ]
    rig.disk.zero(SIZE - 3 * BLOCK - 512, 3 * BLOCK + 512)
    rig.disk.zero(BLOCK + 5, 10)
    rig.disk.discard(0, SIZE)
    assert rig.records()[3:] == [
        (Kind.ZERO, SIZE - 3 * BLOCK - 512, 3 * BLOCK + 512),
        (Kind.ZERO, BLOCK, BLOCK),
        (Kind.DISCARD, 0, SIZE),
    ]
    assert rig.read(0, SIZE) == bytes(SIZE)


def test_a_fill_is_the_present_content_journal_and_image(rig: Rig) -> None:
    rig.disk.write(BLOCK, b"n" * BLOCK)
    rig.disk.zero(3 * BLOCK, BLOCK)
    assert rig.disk.fill(0, 6 * BLOCK) == 3
    assert rig.disk.fill(SIZE - 2 * MiB - 1, 2 * MiB) == 6
    rig.journal.sync()
    reader = JournalReader(rig.storage, MACHINE_ID)
    records = reader.read(Cursor(), 6, 1 << 40).records[2:]
    expected = bytearray(rig.initial)
    expected[BLOCK : 2 * BLOCK] = b"n" * BLOCK
    expected[3 * BLOCK : 4 * BLOCK] = bytes(BLOCK)
    for header, payload in records:
        assert header.kind == Kind.FILL
        assert payload == expected[header.offset : header.offset + header.length]
    assert sum(header.length for header, _ in records[1:]) == 2 * MiB + 512
    reader.close()
    assert rig.read(0, SIZE) == expected


def test_a_fill_lets_no_write_come_between_reading_and_appending(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()
    real = CrashFile.read_at

    def held(file: CrashFile, length: int, offset: int) -> bytes:
        content = real(file, length, offset)
        reading.set()
        assert go_on.wait(20)
        return content

    monkeypatch.setattr(CrashFile, "read_at", held)
    filler = threading.Thread(target=rig.disk.fill, args=(0, BLOCK))
    filler.start()
    assert reading.wait(20)
    writer = threading.Thread(target=rig.disk.write, args=(0, b"w" * BLOCK))
    writer.start()
    assert rig.journal.appended_lsn == 0
    go_on.set()
    for thread in (filler, writer):
        thread.join()
    assert [kind for kind, _, _ in rig.records()] == [Kind.FILL, Kind.WRITE]
    assert rig.read(0, BLOCK) == b"w" * BLOCK


def test_reads_take_few_calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = CrashFile.read_at

    def counted(file: CrashFile, length: int, offset: int) -> bytes:
        calls.append(length)
        return real(file, length, offset)

    monkeypatch.setattr(CrashFile, "read_at", counted)
    assert rig.read(0, 32 * BLOCK) == rig.initial[: 32 * BLOCK]
    assert calls == [32 * BLOCK]
    for block in range(32):
        rig.disk.write(block * BLOCK, bytes([block + 1]) * BLOCK)
    calls.clear()
    assert rig.read(0, 32 * BLOCK) == b"".join(bytes([block + 1]) * BLOCK for block in range(32))
    assert calls == [31 * (64 + BLOCK) + BLOCK]
    rig.disk.write(0, b"x" * 32 * BLOCK)
    calls.clear()
    assert rig.read(512, 32 * BLOCK - 1024) == b"x" * (32 * BLOCK - 1024)
    assert calls == [32 * BLOCK - 1024]
    for block in range(0, 32, 2):
        rig.disk.write((100 + block) * BLOCK, b"y" * BLOCK)
    calls.clear()
    found = rig.read(100 * BLOCK, 32 * BLOCK)
    assert found[:BLOCK] == b"y" * BLOCK
    assert found[BLOCK : 2 * BLOCK] == rig.initial[101 * BLOCK : 102 * BLOCK]
    assert len(calls) == 16 + 1, "what lies in the image is read in one go"
    assert rig.read(0, 0) == b""


def test_zeros_larger_than_any_request_are_read(rig: Rig) -> None:
    rig.disk.discard(0, SIZE)
    assert rig.read(1, SIZE - 1) == bytes(SIZE - 1)


def test_the_callers_buffer_is_used_only_during_the_call(rig: Rig) -> None:
    buffer = bytearray(b"1" * (2 * BLOCK))
    rig.disk.write(0, memoryview(buffer)[100 : 100 + BLOCK])
    rig.disk.write(BLOCK + 7, memoryview(buffer)[:BLOCK])
    buffer[:] = b"2" * len(buffer)
    assert rig.read(0, BLOCK) == b"1" * BLOCK
    assert rig.read(BLOCK + 7, BLOCK) == b"1" * BLOCK


def test_a_refused_write_leaves_the_disk_as_it_was(rig: Rig) -> None:
    rig.disk.write(0, b"a" * BLOCK)
    rig.storage.inject(Fault(0, errno.ENOSPC, for_ever=True, kinds=frozenset(["write"]), partial=0.5))
    refused: list[Bytes] = [b"b" * BLOCK, b"b" * 100, bytes(BLOCK)]
    for payload in refused:
        with pytest.raises(OSError) as caught:
            rig.disk.write(0, payload)
        assert caught.value.errno == errno.ENOSPC
    assert rig.read(0, BLOCK) == b"a" * BLOCK
    rig.storage.assert_fired()


def test_a_failed_journal_still_reads(rig: Rig) -> None:
    rig.disk.write(0, b"a" * BLOCK)
    rig.storage.inject(Fault(0, kinds=frozenset(["datasync"])))
    with pytest.raises(OSError):
        rig.journal.sync()
    with pytest.raises(OSError) as caught:
        rig.disk.write(0, b"b" * BLOCK)
    assert caught.value.errno == errno.EIO
    assert rig.read(0, 2 * BLOCK) == b"a" * BLOCK + rig.initial[BLOCK : 2 * BLOCK]


def test_an_image_that_is_too_short_is_an_error_and_never_short_bytes(rig: Rig) -> None:
    rig.disk.image.truncate(BLOCK)
    with pytest.raises(OSError) as caught:
        rig.disk.read(0, 2 * BLOCK)
    assert caught.value.errno == errno.EIO


def test_drops_never_touch_the_open_segment_and_close_what_they_drop() -> None:
    rig = Rig(segment_bytes=2 * MiB)
    for block in range(1000):
        rig.disk.write(block * BLOCK, bytes([block % 255 + 1]) * BLOCK)
    rig.journal.sync()
    last = rig.journal.segment
    assert last == 2
    image = rig.storage.open("image", write=True)
    image.write_at([b"i" * SIZE], 0)
    rig.journal.drop_through(last + 5, [rig.disk.map])
    assert rig.read(0, BLOCK) == b"i" * BLOCK, "dropped: now from the image"
    assert rig.read(999 * BLOCK, BLOCK) == bytes([999 % 255 + 1]) * BLOCK
    rig.disk.write(0, b"z" * BLOCK)
    assert rig.read(0, BLOCK) == b"z" * BLOCK
    assert list(rig.journal._files) == [last]


def test_segments_from_before_the_start_are_opened_on_demand_and_not_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asrfs.journal.writer.OPEN_SEGMENTS_MAX", 3)
    rig = Rig(segment_bytes=2 * MiB)
    disk = rig.disk
    for i in range(16):
        disk.write(i % 5 * MiB, bytes([i + 1]) * MiB)
        disk.write(i % 5 * MiB, bytes([i + 101]) * BLOCK)
    rig.journal.sync()
    number = rig.journal.segment
    rig.journal.drop_through(number, [])
    assert list(rig.journal._files) == [number]
    expected = rig.read(0, 5 * MiB)
    assert [expected[i * MiB] for i in range(5)] == [116, 112, 113, 114, 115]
    assert len(rig.journal._files) <= 4


def test_writes_together_are_what_they_are_one_by_one(rig: Rig, rng: random.Random) -> None:
    """Random turns, plain or not, against the bytes they should leave; what cannot be done together changes nothing."""
    together = WriteTogether(rig.journal)
    expected = bytearray(rig.initial)
    done = {True: 0, False: 0}
    for _ in range(200):
        writes = []
        for _ in range(rng.randint(1, 6)):
            length = rng.choice((BLOCK, BLOCK, 2 * BLOCK, 8 * BLOCK))
            offset = rng.randrange(0, SIZE - 8 * BLOCK) & -BLOCK
            if rng.random() < 0.05:
                length, offset = rng.choice(((512, offset), (BLOCK, offset + 512), (BLOCK, SIZE & -BLOCK)))
            content = bytes(length) if rng.random() < 0.02 else rng.randbytes(length - 1) + b"e"
            writes.append((offset, content))
        before = rig.journal.appended_lsn
        framed = [together.frame(memoryview(bytearray(together.room) + content)) for _, content in writes]
        taken = together([(rig.disk, offset, each) for (offset, _), each in zip(writes, framed, strict=True)])
        done[taken] += 1
        assert rig.journal.appended_lsn == before + len(writes) * taken
        if taken:
            for offset, content in writes:
                expected[offset : offset + len(content)] = content
    assert min(done.values()) > 5
    assert rig.read(0, SIZE) == expected
    assert together([(object(), 0, together.frame(memoryview(bytearray(64 + BLOCK))))]) is False
