"""The journal's tail: bytes, segments, group commit, and what becomes of it when storage fails."""

from __future__ import annotations

import errno
import threading

import pytest

from asrfs.format.record import (
    PAYLOAD_BYTES_MAX,
    Kind,
    RecordHeader,
    decode_record_header,
    encode_record_header,
    payload_crc,
    segment_seed,
)
from asrfs.format.segment import (
    POSITION_MASK,
    POSITION_SHIFT,
    SEGMENT_BYTES,
    SEGMENT_HEADER_BYTES,
    decode_segment_header,
)
from asrfs.journal.recovery import recover
from asrfs.journal.segments import list_journal, segment_name
from asrfs.journal.spares import prepare_spare
from asrfs.journal.writer import Journal
from asrfs.model.positions import Positions
from asrfs.storage.interface import read_whole
from tests.fakes.crash_storage import CrashFile, CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
SMALL = SEGMENT_HEADER_BYTES + 4 * (64 + BLOCK)


def begin(
    storage: CrashStorage, *, segment_bytes: int = SMALL, zero_blocks_max: int = 64, ahead: bool = False
) -> Journal:
    recovered = recover(storage, Positions(), MACHINE_ID, segment_bytes=segment_bytes)
    return Journal(
        storage,
        MACHINE_ID,
        recovered,
        StepClock(),
        segment_bytes=segment_bytes,
        zero_blocks_max=zero_blocks_max,
        prepare_ahead=ahead,
    )


def write(journal: Journal, content: bytes = b"x" * BLOCK, offset: int = 0) -> int:
    return journal.append(Kind.WRITE, 3, offset, len(content), content)


def test_a_record_lies_as_the_format_says() -> None:
    """The header is packed by hand on the write path: it equals what the format's own function makes."""
    storage = CrashStorage()
    journal = begin(storage)
    records = [
        (Kind.WRITE, 3, 8192, b"a" * BLOCK),
        (Kind.MARKER, 0xFFFF, 0, b"marker"),
        (Kind.FILL, 0, (1 << 62) + 512, b"\0" * 512),
        (Kind.ZERO, 7, 1 << 40, b""),
    ]
    place = SEGMENT_HEADER_BYTES
    for lsn, (kind, slot, offset, payload) in enumerate(records, 1):
        length = 1 << 45 if kind is Kind.ZERO else 0 if kind is Kind.MARKER else len(payload)
        before = journal.last_time_ns
        position = journal.append(kind, slot, offset, length, payload)
        assert position == 1 << POSITION_SHIFT | place + 64
        assert journal.last_time_ns >= before > -1
        expected = RecordHeader(
            lsn,
            journal.last_time_ns,
            journal.durable_lsn,
            offset,
            length,
            len(payload),
            payload_crc(payload),
            kind,
            slot,
        )
        raw = read_whole(storage, segment_name(1))[place : place + 64 + len(payload)]
        seed = segment_seed(1, decode_segment_header(read_whole(storage, segment_name(1)), "").salt)
        assert raw == encode_record_header(expected, seed) + payload
        assert decode_record_header(raw, 0, seed) == expected
        place += len(raw)
        assert (journal.segment, journal.offset) == (1, place)
        if lsn == 2:
            journal.sync()
    journal.close()


def test_times_never_go_back() -> None:
    journal = begin(CrashStorage())
    times = []
    for _ in range(60):  # the clock is set back every 17th time
        journal.append(Kind.DISCARD, 0, 0, BLOCK)
        times.append(journal.last_time_ns)
    assert times == sorted(times)
    journal.close()


def test_segments_follow_one_another() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    places = [write(journal) for _ in range(10)]
    assert [place >> POSITION_SHIFT for place in places] == [1] * 4 + [2] * 4 + [3] * 2
    assert list_journal(storage).segments == [1, 2, 3]
    for number, first in ((1, 1), (2, 5), (3, 9)):
        raw = read_whole(storage, segment_name(number))
        assert len(raw) == SMALL
        header = decode_segment_header(raw, "")
        assert (header.number, header.first_lsn, header.epoch, header.machine_id) == (number, first, 1, MACHINE_ID)
    with journal.lock:
        assert journal.read_locked(places[0] + 100, 50) == b"x" * 50
    journal.close()


def test_a_full_sized_segment_takes_a_record_of_the_largest_size() -> None:
    journal = begin(CrashStorage(), segment_bytes=SEGMENT_BYTES)
    for _ in range(64):
        position = journal.append(Kind.WRITE, 0, 0, PAYLOAD_BYTES_MAX, bytes(PAYLOAD_BYTES_MAX))
        assert SEGMENT_HEADER_BYTES < position & POSITION_MASK <= SEGMENT_BYTES - PAYLOAD_BYTES_MAX
    assert journal.segment == 2
    journal.close()


def test_a_flood_of_zeros_rolls_before_the_maps_grow() -> None:
    journal = begin(CrashStorage(), zero_blocks_max=640)
    segments = [journal.append(Kind.ZERO, 0, 0, 64 * BLOCK) >> POSITION_SHIFT for _ in range(22)]
    assert segments == [1] * 11 + [2] * 11
    journal.close()
    journal = begin(CrashStorage(), zero_blocks_max=100)
    segments = [journal.append(Kind.DISCARD, 0, 0, 1 << 50) >> POSITION_SHIFT for _ in range(102)]
    assert segments == [1] * 51 + [2] * 51, "an extent that is not expanded counts as two entries"
    journal.close()


def test_a_spare_is_used_before_a_new_file_is_made() -> None:
    storage = CrashStorage()
    for segment_bytes in (SMALL, SMALL - 512):
        prepare_spare(storage, segment_bytes=segment_bytes)
    journal = begin(storage)
    assert list_journal(storage) == ([1], [], [1]), "the first is taken, the second is too short"
    for _ in range(5):
        write(journal)
    assert list_journal(storage) == ([1, 2], [], [1])
    journal.close()


# ---- durability ----


def test_a_sync_covers_sealed_segments_and_what_was_appended_before_it() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    for _ in range(9):
        write(journal)
    assert journal.durable_lsn == 0
    journal.sync()
    assert journal.durable_lsn == 9
    assert all(storage.unsynced_bytes(segment_name(number)) == 0 for number in (1, 2, 3))
    syncs = [name for kind, name in storage.log if kind == "datasync"]
    assert syncs == [segment_name(number) for number in (1, 2, 3)]
    write(journal)
    journal.sync()
    assert [name for kind, name in storage.log if kind == "datasync"] == [*syncs, segment_name(3)]
    journal.close()


def test_a_sync_with_nothing_to_do_answers_at_once_and_syncs_nothing() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal)
    journal.sync()
    operations = storage.operations
    answers: list[tuple[OSError | None, threading.Thread]] = []
    journal.request_sync(lambda error: answers.append((error, threading.current_thread())))
    assert answers == [(None, threading.current_thread())]
    assert storage.operations == operations
    journal.close()


def test_i2_all_who_wait_share_one_sync_and_nobody_is_told_early(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    real = CrashFile.datasync

    def held(file: CrashFile) -> None:
        inside.set()
        assert go_on.wait(20)
        real(file)

    monkeypatch.setattr(CrashFile, "datasync", held)
    storage = CrashStorage()
    journal = begin(storage)
    told: list[tuple[int, int]] = []

    def tell(number: int) -> None:
        journal.request_sync(lambda error: told.append((number, journal.durable_lsn if error is None else -1)))

    write(journal)
    tell(0)
    assert inside.wait(20)
    for number in range(1, 4):  # the journal goes on while a sync is under way
        write(journal)
        tell(number)
    assert (told, journal.durable_lsn) == ([], 0)
    go_on.set()
    journal.close()
    assert told == [(0, 1), (1, 4), (2, 4), (3, 4)]
    assert [kind for kind, _ in storage.log].count("datasync") == 2


def test_many_threads_append_and_sync() -> None:
    storage = CrashStorage()
    journal = begin(storage, ahead=True)
    failures: list[BaseException] = []

    def work(slot: int) -> None:
        try:
            for i in range(40):
                journal.append(Kind.WRITE, slot, i * BLOCK, BLOCK, bytes([slot]) * BLOCK)
                if i % 7 == slot:
                    lsn = journal.appended_lsn
                    journal.sync()
                    assert journal.durable_lsn >= lsn
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert journal.appended_lsn == 160
    journal.sync()
    journal.close()
    recovered = recover(storage.killed(), Positions(), MACHINE_ID, segment_bytes=SMALL)
    found = [(record.slot, record.offset) for record in recovered.records()]
    assert [sorted(offset for slot, offset in found if slot == s) for s in range(4)] == [
        [*range(0, 40 * BLOCK, BLOCK)]
    ] * 4
    assert recovered.cut is None


def test_the_next_segment_is_ready_under_a_durable_name_before_it_is_needed() -> None:
    storage = CrashStorage()
    made = threading.Event()

    def note(kind: str, name: str) -> None:
        if kind == "sync_directory" and storage.exists(segment_name(3)):
            made.set()

    storage.after_operation = note
    journal = begin(storage, ahead=True)
    for _ in range(5):
        write(journal)
    assert made.wait(20)
    journal.close()  # waits for the thread
    assert list_journal(storage).segments == [1, 2, 3]
    creates = [i for i, (kind, _) in enumerate(storage.log) if kind == "create"]
    writes = [i for i, (kind, name) in enumerate(storage.log) if kind == "write" and name == segment_name(2)]
    assert "sync_directory" in [kind for kind, _ in storage.log[creates[1] : writes[0]]]


# ---- failure ----


def test_a_failed_datasync_is_final_and_never_tried_again() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal)
    storage.inject(Fault(0, kinds=frozenset(["datasync"])))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            journal.sync()
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        write(journal)
    assert caught.value.errno == errno.EIO
    assert (journal.appended_lsn, journal.durable_lsn) == (1, 0)
    assert journal.failed is not None
    assert segment_name(1) in journal.failed
    storage.assert_fired()  # and the double refuses a second datasync
    journal.close()


def test_a_failed_write_is_final() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    write(journal)
    storage.inject(Fault(0, kinds=frozenset(["write"]), partial=0.6))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            write(journal)
        assert caught.value.errno == errno.EIO
    assert journal.appended_lsn == 1
    with pytest.raises(OSError):
        journal.sync()
    assert journal.failed is not None
    storage.assert_fired()
    journal.close()
    assert recover(storage, Positions(), MACHINE_ID, segment_bytes=SMALL).last_lsn == 1


def test_no_space_inside_a_segment_leaves_the_tail_where_it_was() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    storage.inject(Fault(1, errno.ENOSPC, kinds=frozenset(["write"]), partial=0.5))
    write(journal, b"1" * BLOCK)
    place = journal.offset
    with pytest.raises(OSError) as caught:
        write(journal, b"2" * BLOCK)
    assert caught.value.errno == errno.ENOSPC
    assert (journal.offset, journal.appended_lsn, journal.failed) == (place, 1, None)
    assert write(journal, b"3" * BLOCK) & POSITION_MASK == place + 64
    journal.sync()
    storage.assert_fired()
    journal.close()
    assert recover(storage, Positions(), MACHINE_ID, segment_bytes=SMALL).last_lsn == 2


def test_no_space_for_the_next_segment_is_asked_for_again() -> None:
    storage = CrashStorage(capacity=SMALL + 100)
    journal = begin(storage)
    for _ in range(4):
        write(journal)
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            write(journal)
        assert caught.value.errno == errno.ENOSPC
    assert list_journal(storage).segments == [1]
    assert journal.failed is None
    journal.sync()
    storage.capacity = 10 * SMALL
    assert write(journal) >> POSITION_SHIFT == 2
    journal.sync()
    assert journal.durable_lsn == 5
    journal.close()


@pytest.mark.parametrize("has_spare", [False, True])
def test_a_file_that_could_not_be_removed_is_used_the_next_time(has_spare: bool) -> None:
    """No rename replaces its name, whatever spares there are by then."""
    storage = CrashStorage(capacity=SMALL + 100)
    storage.replaces_nothing_in.add("")
    journal = begin(storage)
    for _ in range(4):
        write(journal)
    storage.inject(Fault(0, kinds=frozenset(["unlink"])))
    with pytest.raises(OSError) as caught:
        write(journal)
    assert caught.value.errno == errno.ENOSPC
    storage.assert_fired()
    assert list_journal(storage).segments == [1, 2]
    storage.capacity = None
    if has_spare:
        prepare_spare(storage, segment_bytes=SMALL)
    assert write(journal) >> POSITION_SHIFT == 2
    journal.sync()
    assert (journal.failed, journal.durable_lsn) == (None, 5)
    assert len(list_journal(storage).fresh) == has_spare
    journal.close()
    assert recover(storage, Positions(), MACHINE_ID, segment_bytes=SMALL).last_lsn == 5


def test_a_journal_without_room_begins_and_asks_again_with_the_first_append() -> None:
    storage = CrashStorage(capacity=100)
    journal = begin(storage)
    journal.sync()
    with pytest.raises(OSError) as caught:
        write(journal)
    assert caught.value.errno == errno.ENOSPC
    storage.capacity = None
    write(journal)
    journal.sync()
    assert (journal.segment, journal.durable_lsn) == (1, 1)
    journal.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_sync_of_the_directory_is_final(ahead: bool) -> None:
    storage = CrashStorage()
    storage.inject(Fault(2, errno.ENOSPC, kinds=frozenset(["sync_directory"])))  # after recovery's and the first's
    journal = begin(storage, ahead=ahead)
    for _ in range(4):
        write(journal)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            write(journal)
        assert caught.value.errno == errno.EIO
    assert journal.failed is not None
    assert "directory" in journal.failed
    storage.assert_fired()
    journal.close()


def test_a_closed_journal_takes_nothing() -> None:
    journal = begin(CrashStorage())
    write(journal)
    journal.close()
    with pytest.raises(OSError):
        write(journal)
    with pytest.raises(OSError):
        journal.sync()


def test_closing_finishes_the_syncs_that_were_asked_for() -> None:
    journal = begin(CrashStorage())
    write(journal)
    answers: list[OSError | None] = []
    journal.request_sync(answers.append)
    journal.close()
    assert answers == [None]
    assert journal.durable_lsn == 1
