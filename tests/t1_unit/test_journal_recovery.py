"""Where a history ends after a crash, and what is a torn tail and what is corruption."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asrfs.errors import FormatError, IntegrityError
from asrfs.format.record import Kind
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT, SECOND_COPY_OFFSET, SEGMENT_HEADER_BYTES
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import rebuild_maps
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.segments import list_journal, segment_name, spare_name
from asrfs.journal.spares import prepare_spare
from asrfs.journal.writer import Journal
from asrfs.model.positions import Cursor, Positions
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
STEP = 64 + BLOCK
SMALL = SEGMENT_HEADER_BYTES + 4 * STEP


def look(storage: CrashStorage, positions: Positions | None = None) -> Recovered:
    return recover(storage, positions or Positions(), MACHINE_ID, segment_bytes=SMALL)


def begin(storage: CrashStorage, positions: Positions | None = None, *, epoch: int | None = None) -> Journal:
    recovered = look(storage, positions)
    return Journal(storage, MACHINE_ID, recovered, StepClock(), epoch=epoch, segment_bytes=SMALL, prepare_ahead=False)


def written(records: int, *, synced: int = 0) -> CrashStorage:
    """A journal of 4-record segments: record n writes block n. The first `synced` are known durable to later ones."""
    storage = CrashStorage()
    journal = begin(storage)
    for lsn in range(1, records + 1):
        journal.append(Kind.WRITE, 0, lsn * BLOCK, BLOCK, bytes([lsn]) * BLOCK)
        if lsn == synced:
            journal.sync()
    journal.close()
    return storage


def place(lsn: int) -> tuple[str, int]:
    """File and offset of a record's header."""
    return segment_name((lsn - 1) // 4 + 1), SEGMENT_HEADER_BYTES + (lsn - 1) % 4 * STEP


def damage(storage: CrashStorage, name: str, at: int, length: int = 1) -> None:
    file = storage.open(name, write=True)
    found = file.read_at(length, at)
    file.write_at([bytes(byte ^ 0x40 for byte in found)], at)
    file.close()


def damage_segment_header(storage: CrashStorage, number: int) -> None:
    """Both copies."""
    for copy in (0, SECOND_COPY_OFFSET):
        damage(storage, segment_name(number), copy + 40)


def damage_header(storage: CrashStorage, lsn: int) -> None:
    damage(storage, place(lsn)[0], place(lsn)[1] + 20)


def damage_payload(storage: CrashStorage, lsn: int) -> None:
    damage(storage, place(lsn)[0], place(lsn)[1] + 64 + 4000)


Damage = Callable[[CrashStorage, int], None]
BOTH = pytest.mark.parametrize("harm", [damage_header, damage_payload])


def test_a_new_machine() -> None:
    recovered = look(CrashStorage())
    assert (recovered.last_lsn, recovered.next_segment_number, recovered.segments) == (0, 1, [])
    assert list(recovered.records()) == []
    assert recovered.cut is None


def test_everything_that_was_written_is_found_and_made_durable() -> None:
    storage = written(10)
    recovered = look(storage)
    assert (recovered.last_lsn, recovered.next_segment_number, recovered.epoch) == (10, 4, 1)
    assert recovered.last_time_ns > 0
    assert [(r.kind, r.slot, r.offset, r.length) for r in recovered.records()] == [
        (Kind.WRITE, 0, lsn * BLOCK, BLOCK) for lsn in range(1, 11)
    ]
    assert [(s.number, s.first_lsn, s.last_lsn) for s in recovered.segments] == [(1, 1, 4), (2, 5, 8), (3, 9, 10)]
    for lsn, record in enumerate(recovered.records(), 1):
        name, at = place(lsn)
        assert segment_name(record.position >> POSITION_SHIFT) == name
        assert record.position & POSITION_MASK == at + 64
    assert all(storage.unsynced_bytes(segment_name(number)) == 0 for number in (1, 2, 3))
    assert storage.log[-1][0] == "sync_directory"


def test_nothing_is_changed_before_the_history_is_known_to_be_sound() -> None:
    storage = written(10, synced=10)
    damage_payload(storage, 9)
    operations = storage.operations
    with pytest.raises(IntegrityError):
        look(storage, Positions(acknowledged=Cursor(lsn=10, segment=3, offset=0)))
    assert storage.operations == operations


def test_maps_are_rebuilt_from_what_was_found() -> None:
    storage = CrashStorage()
    journal = begin(storage)
    journal.append(Kind.WRITE, 1, BLOCK, BLOCK, b"x" * BLOCK)
    journal.append(Kind.ZERO, 0, 0, 1 << 40)
    journal.append(Kind.MARKER, 0xFFFF, 0, 0, b"m")
    journal.append(Kind.FILL, 1, 2 * BLOCK, 512, b"y" * 512)
    journal.append(Kind.DISCARD, 9, 0, BLOCK)
    journal.close()
    maps = {0: BlockMap(), 1: BlockMap()}
    rebuild_maps(look(storage), maps, storage)
    assert maps[0].get(1 << 20) == 1 << POSITION_SHIFT
    assert maps[1].get(1) == 1 << POSITION_SHIFT | SEGMENT_HEADER_BYTES + 64
    assert maps[1].get(2) is not None
    assert maps[1].get(0) is None


@BOTH
def test_a_torn_tail_is_cut(harm: Damage) -> None:
    storage = written(7)
    harm(storage, 6)
    recovered = look(storage)
    assert recovered.last_lsn == 5
    assert recovered.cut is not None
    assert segment_name(2) in recovered.cut
    assert str(SEGMENT_HEADER_BYTES + STEP) in recovered.cut
    assert "LSN 6" in recovered.cut
    assert recovered.next_segment_number == 3


@BOTH
def test_a_cut_names_the_bad_record_although_an_empty_segment_follows(harm: Damage) -> None:
    storage = written(4)
    prepare_spare(storage, segment_bytes=SMALL)
    storage.rename("fresh-0000000000000000", segment_name(2))
    harm(storage, 2)
    recovered = look(storage)
    assert recovered.last_lsn == 1
    name, offset = place(2)
    assert (
        recovered.cut == f"{name} offset {offset}: LSN 2: not valid, and {recovered_behind(harm)} valid records follow"
    )


def recovered_behind(harm: Damage) -> int:
    """The header of a record with a bad payload is valid itself."""
    return 2 if harm is damage_header else 3


def test_a_tail_that_ends_cleanly_is_not_called_cut() -> None:
    storage = written(6)
    assert look(storage).cut is None
    assert look(storage).last_lsn == 6


@BOTH
def test_the_history_goes_on_behind_a_cut_in_a_new_segment(harm: Damage) -> None:
    storage = written(7)
    harm(storage, 6)
    journal = begin(storage)
    assert (journal.appended_lsn, journal.segment) == (5, 3)
    for lsn in range(6, 12):
        journal.append(Kind.WRITE, 0, lsn * BLOCK, BLOCK, b"new" + bytes(BLOCK - 3))
    journal.sync()
    journal.close()
    recovered = look(storage)
    assert recovered.last_lsn == 11
    assert [(s.number, s.first_lsn, s.last_lsn) for s in recovered.segments] == [
        (1, 1, 4),
        (2, 5, 5),
        (3, 6, 9),
        (4, 10, 11),
    ]
    assert recovered.cut is None


@BOTH
@pytest.mark.parametrize("lsn", [2, 4, 5, 6])
def test_damage_below_what_a_later_record_says_was_durable_is_corruption(harm: Damage, lsn: int) -> None:
    storage = written(11, synced=6)
    harm(storage, lsn)
    name, at = place(lsn)
    with pytest.raises(IntegrityError) as caught:
        look(storage)
    # Where a segment's first record is bad, the place is the end of what was good before it.
    before = place(lsn - 1)
    assert f"{name} offset {at}" in str(caught.value) or f"{before[0]} offset {before[1] + STEP}" in str(caught.value)
    assert f"LSN {lsn} " in str(caught.value)
    assert caught.value.exit_code == 5


@BOTH
def test_damage_at_what_the_store_acknowledged_is_corruption(harm: Damage) -> None:
    storage = written(6, synced=6)
    harm(storage, 6)
    assert look(storage.killed()).last_lsn == 5, "nobody says that it was durable"
    with pytest.raises(IntegrityError, match="LSN 6 is missing"):
        look(storage, Positions(acknowledged=Cursor(lsn=6, segment=2, offset=0)))


def test_a_lost_segment_header_hides_no_durable_record() -> None:
    storage = written(11, synced=6)
    damage_segment_header(storage, 3)
    assert look(storage.killed()).last_lsn == 8, "LSN 9 was never durable"
    storage = written(11, synced=9)
    damage(storage, segment_name(3), 40)
    assert look(storage.killed()).last_lsn == 11, "one copy of the header is enough"
    damage_segment_header(storage, 2)
    with pytest.raises(IntegrityError, match="LSN 5 is missing"):
        look(storage)


def test_a_missing_segment_is_corruption_only_if_it_was_durable() -> None:
    storage = written(11, synced=2)
    storage.unlink(segment_name(2))
    recovered = look(storage.killed())
    assert recovered.last_lsn == 4
    assert recovered.cut is not None
    storage = written(11, synced=9)
    storage.unlink(segment_name(2))
    with pytest.raises(IntegrityError, match="LSN 5 is missing"):
        look(storage)


def test_segments_that_were_cut_become_spares_and_their_numbers_are_not_used_again() -> None:
    storage = written(11, synced=2)
    damage_segment_header(storage, 2)
    recovered = look(storage)
    assert recovered.last_lsn == 4
    assert list_journal(storage) == ([1], [2, 3], [])
    assert recovered.next_segment_number == 4
    again = look(storage)
    assert (again.last_lsn, again.next_segment_number, again.cut) == (4, 4, None)


def test_an_empty_last_segment_becomes_a_spare_and_a_part_of_one_goes() -> None:
    storage = written(4)
    begin(storage).close()
    assert list_journal(storage) == ([1, 2], [], [])
    file = storage.create(segment_name(3))
    file.allocate(SMALL - 1)
    file.close()
    recovered = look(storage)
    assert recovered.last_lsn == 4
    assert recovered.cut is None
    assert list_journal(storage) == ([1], [2], [])
    assert recovered.next_segment_number == 4


def test_what_a_spare_held_before_is_not_taken_for_new() -> None:
    storage = written(8, synced=8)
    applied = Positions(applied=Cursor(lsn=8, segment=2, offset=SMALL))
    for number in (1, 2):
        storage.rename(segment_name(number), spare_name(number))
    journal = begin(storage, applied)
    assert journal.segment == 3
    journal.append(Kind.WRITE, 0, 0, BLOCK, b"9" * BLOCK)
    journal.sync()
    journal.close()
    recovered = look(storage, applied)
    assert [(s.number, s.first_lsn, s.last_lsn) for s in recovered.segments] == [(3, 9, 9)]
    assert recovered.cut is None


# ---- from the applied position on ----


def test_only_what_is_behind_the_applied_position_is_scanned() -> None:
    storage = written(11, synced=11)
    damage_payload(storage, 5)
    applied = Cursor(lsn=6, segment=2, offset=SEGMENT_HEADER_BYTES + 2 * STEP, time_ns=5)
    recovered = look(storage, Positions(applied=applied))
    assert [record.offset // BLOCK for record in recovered.records()] == [7, 8, 9, 10, 11]
    storage.unlink(segment_name(1))
    assert look(storage, Positions(applied=applied)).last_lsn == 11


def test_the_applied_segment_may_be_freed_when_all_of_it_is_applied() -> None:
    storage = written(12, synced=11)
    for number in (1, 2):
        storage.rename(segment_name(number), spare_name(number))
    recovered = look(storage, Positions(applied=Cursor(lsn=8, segment=2, offset=SMALL)))
    assert recovered.last_lsn == 12
    with pytest.raises(IntegrityError, match="LSN 8 is missing"):
        look(storage, Positions(applied=Cursor(lsn=7, segment=2, offset=SMALL - STEP)))


def test_a_journal_of_which_nothing_is_left_but_all_was_applied() -> None:
    applied = Cursor(lsn=8, segment=7, offset=SMALL, time_ns=1 << 62)
    recovered = look(CrashStorage(), Positions(applied=applied, epoch=3))
    assert (recovered.last_lsn, recovered.next_segment_number, recovered.epoch) == (8, 8, 3)
    assert recovered.last_time_ns == 1 << 62
    with pytest.raises(IntegrityError, match="LSN 9 is missing"):
        look(CrashStorage(), Positions(applied=applied, acknowledged=Cursor(lsn=9, segment=7)))


def test_the_applied_segment_stays_even_when_nothing_follows_in_it() -> None:
    """What is applied may not be acknowledged yet."""
    storage = written(3, synced=3)
    recovered = look(storage, Positions(applied=Cursor(lsn=3, segment=1, offset=SEGMENT_HEADER_BYTES + 3 * STEP)))
    assert recovered.last_lsn == 3
    assert list_journal(storage).segments == [1]


def test_a_damaged_header_of_the_applied_segment_is_corruption() -> None:
    storage = written(3, synced=3)
    damage_segment_header(storage, 1)
    with pytest.raises(IntegrityError, match=f"{segment_name(1)} offset 0"):
        look(storage, Positions(applied=Cursor(lsn=2, segment=1, offset=SEGMENT_HEADER_BYTES + 2 * STEP)))


# ---- what does not fit ----


def test_another_machine() -> None:
    storage = written(3)
    with pytest.raises(IntegrityError, match="belongs to machine"):
        recover(storage, Positions(), b"another machine!", segment_bytes=SMALL)


def test_an_unknown_format_is_not_taken_for_a_torn_segment() -> None:
    storage = written(3)
    file = storage.open(segment_name(1), write=True)
    for copy in (0, SECOND_COPY_OFFSET):
        file.write_at([(7).to_bytes(4, "little")], copy + 8)
    file.close()
    with pytest.raises(FormatError):
        look(storage)


def test_epochs_go_up_only() -> None:
    storage = written(3)
    begin(storage, epoch=4).append(Kind.ZERO, 0, 0, BLOCK)
    assert look(storage).epoch == 4
    journal = begin(storage, epoch=2)
    journal.append(Kind.ZERO, 0, 0, BLOCK)
    journal.close()
    with pytest.raises(IntegrityError, match="epoch 2 follows epoch 4"):
        look(storage)


def test_segments_that_overlap() -> None:
    storage = written(6)
    recovered = look(written(4))
    assert recovered.last_lsn == 4
    recovered.next_segment_number = 9
    journal = Journal(storage, MACHINE_ID, recovered, StepClock(), segment_bytes=SMALL, prepare_ahead=False)
    journal.append(Kind.ZERO, 0, 0, BLOCK)
    journal.close()
    with pytest.raises(IntegrityError, match="begins with LSN 5"):
        look(storage)


def test_bytes_of_a_guest_that_look_like_a_record_are_not_believed() -> None:
    """A torn record's payload holds a whole record of this segment with a durable LSN that was never reached."""
    inner = written(1)
    file = inner.open(segment_name(1))
    trap = file.read_at(64, SEGMENT_HEADER_BYTES)
    storage = CrashStorage()
    journal = begin(storage)
    journal.append(Kind.WRITE, 0, 0, BLOCK, trap.ljust(BLOCK, b"."))
    journal.append(Kind.WRITE, 0, 0, BLOCK, (bytes(100) + trap).ljust(BLOCK, b"."))
    journal.close()
    damage_payload(storage, 2)
    assert look(storage).last_lsn == 1


def test_a_failed_sync_of_what_was_found_is_an_error() -> None:
    storage = written(3)
    storage.inject(Fault(0, kinds=frozenset(["datasync"])))
    with pytest.raises(OSError):
        look(storage)
    storage.assert_fired()


def test_spares_and_other_names_do_not_disturb() -> None:
    storage = written(3)
    prepare_spare(storage, segment_bytes=SMALL)
    storage.rename("fresh-0000000000000000", spare_name(50))
    for name in ("README", "1.segment", "0000000000000009.segment.bak"):
        storage.create(name).close()
    recovered = look(storage)
    assert (recovered.last_lsn, recovered.next_segment_number) == (3, 51)
