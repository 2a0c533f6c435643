"""Writes that a full disk refused, although all that matters of them had come to lie there: never found as records
in the place of what came later."""

from __future__ import annotations

import errno
import random

import pytest

from asrfs.format.record import RECORD_HEADER_BYTES, Kind, WriteFrame, frame_write
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.segments import segment_name
from asrfs.journal.writer import Journal
from asrfs.model.positions import Cursor, Positions
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
SMALL = SEGMENT_HEADER_BYTES + 4 * (64 + BLOCK)
ZEROS_BEHIND = b"x".ljust(BLOCK, b"\0")
"""Of this, the first sectors are as good as all in a file of zeros."""


def look(storage: CrashStorage) -> Recovered:
    return recover(storage, Positions(), MACHINE_ID, segment_bytes=SMALL)


def begin(storage: CrashStorage) -> Journal:
    return Journal(storage, MACHINE_ID, look(storage), StepClock(), segment_bytes=SMALL, prepare_ahead=False)


def write(journal: Journal, content: bytes) -> None:
    journal.append(Kind.WRITE, 0, 0, len(content), content)


def refuse(storage: CrashStorage, journal: Journal, content: bytes, partial: float) -> None:
    storage.inject(Fault(0, errno.ENOSPC, kinds=frozenset(("write",)), partial=partial))
    with pytest.raises(OSError) as caught:
        write(journal, content)
    assert caught.value.errno == errno.ENOSPC
    storage.assert_fired()


def frame(content: bytes) -> tuple[int, int, WriteFrame]:
    """A write of slot 0 at 0 with room for its header."""
    return 0, 0, frame_write(memoryview(bytearray(RECORD_HEADER_BYTES) + content))


def check_found(storage: CrashStorage, expected: list[bytes]) -> None:
    """Recovery and a reader find exactly these payloads."""
    assert look(storage).last_lsn == len(expected)
    reader = JournalReader(storage, MACHINE_ID)
    assert [bytes(payload) for _, payload in reader.read(Cursor(), len(expected), 1 << 20).records] == expected
    reader.close()


def test_i9_a_refused_write_is_not_found_once_a_segment_begins_with_its_lsn() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    for content in (b"1" * BLOCK, b"2" * BLOCK):
        write(journal, content)
    refuse(storage, journal, ZEROS_BEHIND, 0.9)
    write(journal, b"3" * 3 * BLOCK)
    assert journal.segment == 2
    journal.close()
    for seed in range(20):
        for fate in Fate:
            assert look(storage.crash(fate, random.Random(seed))).last_lsn <= 3
    check_found(storage, [b"1" * BLOCK, b"2" * BLOCK, b"3" * 3 * BLOCK])


def test_i9_a_refused_write_never_comes_back_for_a_later_one() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    refuse(storage, journal, ZEROS_BEHIND, 0.9)
    write(journal, b"1" * BLOCK)
    write(journal, b"2" * BLOCK)
    journal.close()
    for seed in range(60):
        for fate in (Fate.SUBSET, Fate.TORN, Fate.REORDERED):
            after = storage.crash(fate, random.Random(seed))
            found = look(after).last_lsn
            check_found(after, [b"1" * BLOCK, b"2" * BLOCK][:found])


def test_i2_after_a_refused_header_the_segment_before_it_takes_no_more_records() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    for byte in b"123":
        write(journal, bytes([byte]) * BLOCK)
    refuse(storage, journal, b"4" * 2 * BLOCK, 0.6)  # the header of segment 2, of which one copy is whole
    assert storage.open(segment_name(2)).read_at(8, 0) == b"ASRSEG1\n"
    write(journal, b"5" * BLOCK)  # would have had room in segment 1
    journal.sync()
    assert journal.segment == 2
    journal.close()
    check_found(storage, [b"1" * BLOCK, b"2" * BLOCK, b"3" * BLOCK, b"5" * BLOCK])


@pytest.mark.parametrize(
    ("kind", "error"), [("write", errno.ENOSPC), ("datasync", errno.EIO), ("datasync", errno.ENOSPC)]
)
def test_a_refused_write_that_cannot_be_taken_back(kind: str, error: int) -> None:
    """No room to take it back: refused again, and tried again. A failed sync is final, as always, whatever it says."""
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, b"1" * BLOCK)
    refuse(storage, journal, ZEROS_BEHIND, 0.9)
    storage.inject(Fault(0, error, kinds=frozenset((kind,))))
    with pytest.raises(OSError) as caught:
        write(journal, b"2" * BLOCK)
    assert caught.value.errno == (errno.ENOSPC if kind == "write" else errno.EIO)
    storage.assert_fired()
    if kind == "write":
        write(journal, b"2" * BLOCK)
        journal.close()
        check_found(storage, [b"1" * BLOCK, b"2" * BLOCK])
        return
    assert journal.failed is not None
    with pytest.raises(OSError, match="failed"):
        journal.sync()
    journal.close()


@pytest.mark.parametrize("partial", [0.0, 0.4, 0.7, 0.99])
def test_i9_of_writes_refused_together_none_comes_back_behind_a_later_one(partial: float) -> None:
    """All but the last of them may lie there whole, each with the number that a later write gets."""
    storage = CrashStorage()
    journal = begin(storage)
    write(journal, b"1" * BLOCK)
    storage.inject(Fault(0, errno.ENOSPC, kinds=frozenset(("write",)), partial=partial))
    with journal.lock:
        assert journal.append_framed_locked([frame(b"a" * BLOCK), frame(b"b" * BLOCK), frame(b"c" * BLOCK)]) is None
    storage.assert_fired()
    assert journal.appended_lsn == 1
    with journal.lock:
        assert journal.append_framed_locked([frame(b"d" * BLOCK)]) is None, "only one by itself finds out"
    write(journal, b"2" * BLOCK)
    for seed in range(30):
        for fate in Fate:
            after = storage.crash(fate, random.Random(seed))
            assert look(after).last_lsn <= 2
    journal.sync()
    journal.close()
    check_found(storage, [b"1" * BLOCK, b"2" * BLOCK])


def test_writes_together_are_records_like_others_and_fail_like_others() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    with journal.lock:
        first = journal.append_framed_locked([frame(b"1" * BLOCK), frame(b"2" * 2 * BLOCK)])
        assert first is not None
        assert journal.read_locked(first, BLOCK) == b"1" * BLOCK
        assert journal.read_locked(first + BLOCK + RECORD_HEADER_BYTES, 2 * BLOCK) == b"2" * 2 * BLOCK
        assert journal.append_framed_locked([frame(b"x" * BLOCK), frame(b"y" * BLOCK)]) is None, "no room left"
    journal.sync()
    check_found(storage, [b"1" * BLOCK, b"2" * 2 * BLOCK])
    storage.inject(Fault(0, errno.EIO, kinds=frozenset(("write",))))
    with journal.lock:
        assert journal.append_framed_locked([frame(b"3" * BLOCK)]) is None
    with pytest.raises(OSError) as caught:
        write(journal, b"3" * BLOCK)
    assert caught.value.errno == errno.EIO
    journal.close()
