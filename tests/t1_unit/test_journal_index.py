"""A segment's index is as good as its records, and is believed only where it is theirs."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise

import pytest

from asrfs.errors import FormatError, IntegrityError
from asrfs.format.record import READS_AS_ZEROS, RECORD_HEADER_BYTES
from asrfs.format.segment_index import decode_segment_index, encode_segment_index
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import rebuild_maps
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import Recovered, RecoveredRecord, recover
from asrfs.journal.segments import index_name, list_indexes, list_journal, segment_name
from asrfs.model.positions import Positions
from asrfs.storage.interface import Bytes, Storage, read_whole
from tests.fakes.crash_storage import CrashFile, CrashStorage
from tests.fakes.journal_world import MACHINE_ID, SEGMENT_BYTES, JournalWorld, load_positions

BLOCK = 4096
BLOCKS = 16


def look(storage: CrashStorage, *, by_indexes: bool = True) -> Recovered:
    found = load_positions(storage)
    return recover(storage.below("journal"), found, MACHINE_ID, segment_bytes=SEGMENT_BYTES, by_indexes=by_indexes)


def places(storage: CrashStorage, recovered: Recovered) -> list[list[int | None]]:
    """Of both disks, where each block lies."""
    maps = {0: BlockMap(), 1: BlockMap()}
    rebuild_maps(recovered, maps, storage.below("journal"))
    return [[block_map.get(block) for block in range(BLOCKS)] for block_map in maps.values()]


def header_at(record: RecoveredRecord) -> int:
    """Byte of its segment at which a record begins."""
    at = record.position & ((1 << 26) - 1)
    return at if record.kind in READS_AS_ZEROS else at - RECORD_HEADER_BYTES


def put(storage: Storage, name: str, content: bytes) -> None:
    storage.unlink(name)
    with closing(storage.create(name)) as file:
        file.write_at([content], 0)


@pytest.fixture
def storage(rng: random.Random) -> CrashStorage:
    """A host killed with some segments, all but the last of them indexed."""
    world = JournalWorld(CrashStorage())
    for step in range(30):
        slot = rng.randrange(2)
        if step % 7 == 3:
            world.disks[slot].discard(0, rng.choice((1, 3, 9)) * BLOCK)
        else:
            world.disks[slot].write(rng.randrange(8) * BLOCK, rng.randbytes(rng.choice((1, 2)) * BLOCK))
    world.sync()
    world.disks[0].write(0, b"not durable".ljust(BLOCK, b"."))
    world.close()
    found = world.storage.killed()
    assert len(list_indexes(found.below("journal"))) >= 4
    return found


def test_what_an_index_says_is_what_the_records_say(storage: CrashStorage) -> None:
    by_records, by_indexes = look(storage.killed(), by_indexes=False), look(storage.killed())
    assert len(by_indexes.tables) >= 4 and not by_records.tables
    assert len(list(by_indexes.records())) < len(list(by_records.records())) / 2
    assert by_indexes.segments == by_records.segments
    assert (by_indexes.last_lsn, by_indexes.last_time_ns) == (by_records.last_lsn, by_records.last_time_ns)
    assert places(storage, by_indexes) == places(storage, by_records)


def cut_short(content: bytes, _: bytes) -> bytes:
    return content[:-8]


def one_bit(content: bytes, _: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


def nothing(content: bytes, _: bytes) -> bytes:
    return b""


def of_the_next_segment(_: bytes, following: bytes) -> bytes:
    return following


def of_another_use_of_the_number(content: bytes, _: bytes) -> bytes:
    """A sound index, of a segment that had this number in another life and held something else."""
    segment, disks = decode_segment_index(content, "here")
    stale = [disk._replace(positions=disk.positions[::-1]) for disk in disks]
    return encode_segment_index(segment._replace(salt=segment.salt ^ 1), stale)[0]


STALE = (cut_short, one_bit, nothing, of_another_use_of_the_number, of_the_next_segment)


@pytest.mark.parametrize("change", STALE)
def test_an_index_that_is_not_that_of_its_segment_is_as_good_as_none(
    storage: CrashStorage, change: Callable[[bytes, bytes], bytes]
) -> None:
    journal = storage.below("journal")
    expected = places(storage.killed(), look(storage.killed(), by_indexes=False))
    numbers = list_indexes(journal)
    contents = {number: read_whole(journal, index_name(number)) for number in numbers}
    for number, following in pairwise(numbers):
        put(journal, index_name(number), change(contents[number], contents[following]))
    recovered = look(storage)
    assert list(recovered.tables) == numbers[-1:], "a stale index was believed"
    assert places(storage, recovered) == expected
    assert list_indexes(journal) == numbers[-1:], "what is not believed goes"


def test_without_indexes_nothing_is_lost(storage: CrashStorage) -> None:
    expected = places(storage.killed(), look(storage.killed(), by_indexes=False))
    for number in list_indexes(storage.below("journal")):
        storage.unlink(f"journal/{index_name(number)}")
    assert places(storage, look(storage)) == expected


def test_an_index_is_a_claim_that_its_records_were_durable(storage: CrashStorage) -> None:
    """The journal ends before an indexed segment: it is corrupt and not torn, and is left as it is."""
    numbers = list_indexes(storage.below("journal"))
    for number in numbers[1:]:
        segment = decode_segment_index(read_whole(storage, f"journal/{index_name(number)}"), "")[0]
        damaged = storage.killed()
        with closing(damaged.open(f"journal/{segment_name(number)}", write=True)) as file:
            file.write_at([bytes(8192)], 0)
        before = damaged.contents()
        with pytest.raises(IntegrityError, match=rf"LSN {segment.first_lsn} is missing or damaged"):
            look(damaged)
        assert damaged.contents() == before


def test_who_reads_the_records_all_the_same_believes_what_an_index_shows(storage: CrashStorage) -> None:
    """Damage in a segment that was durable is corruption, also where indexes are not taken for records."""
    journal = storage.below("journal")
    first = list_indexes(journal)[0]
    for number in list_journal(journal).segments:  # what came later would say so, too
        if number > first:
            journal.unlink(segment_name(number))
    record = next(r for r in look(storage.killed(), by_indexes=False).records() if r.position >> 26 == first)
    with closing(storage.open(f"journal/{segment_name(first)}", write=True)) as file:
        at = header_at(record) + 44
        file.write_at([bytes([file.read_at(1, at)[0] ^ 1])], at)
    before = storage.contents()
    with pytest.raises(IntegrityError, match="is missing or damaged"):
        look(storage, by_indexes=False)
    assert storage.contents() == before


def test_damage_below_an_index_is_found_by_who_reads_the_record(storage: CrashStorage) -> None:
    records = list(look(storage.killed(), by_indexes=False).records())
    indexed = look(storage.killed()).tables
    for lsn, record in enumerate(records, 1):
        number, at = record.position >> 26, header_at(record)
        if number not in indexed:
            continue
        damaged = storage.killed()
        with closing(damaged.open(f"journal/{segment_name(number)}", write=True)) as file:
            file.write_at([bytes([file.read_at(1, at + 44)[0] ^ 1])], at + 44)
        recovered = look(damaged)
        with (
            closing(JournalReader(damaged.below("journal"), MACHINE_ID)) as reader,
            pytest.raises(IntegrityError, match=rf"{segment_name(number)} offset {at}: LSN {lsn} is missing"),
        ):
            cursor = Positions().applied
            while cursor.lsn < recovered.last_lsn:
                cursor = reader.read(cursor, recovered.last_lsn, BLOCK).cursor


@pytest.mark.parametrize("suffix", [".index", ".map-new"])
@pytest.mark.parametrize("kind", ["create", "write"])
def test_where_no_file_can_be_made_the_maps_stay_as_they_are(suffix: str, kind: str, rng: random.Random) -> None:
    """What a restart finds then has no index; everything reads as it should."""
    storage = CrashStorage()
    world = JournalWorld(storage)
    refused = 0

    def refuse(self: CrashFile, buffers: Sequence[Bytes], offset: int) -> None:
        nonlocal refused
        refused += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sound = type(storage).create

    def create(self: CrashStorage, made: str) -> CrashFile:
        nonlocal refused
        if made.endswith(suffix):
            if kind == "create":
                refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = sound(self, made)
            file.write_at = partial(refuse, file)  # type: ignore[method-assign]
            return file
        return sound(self, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrashStorage, "create", create)
        for _ in range(40):
            world.disks[0].write(rng.randrange(8) * BLOCK, rng.randbytes(BLOCK))
        world.sync()
        world.check()
    assert refused, "nothing was refused"
    world = world.restart()
    world.check()
    world.close()


def test_a_round_trip_and_what_is_refused(storage: CrashStorage) -> None:
    for number in list_indexes(storage.below("journal")):
        content = read_whole(storage, f"journal/{index_name(number)}")
        segment, disks = decode_segment_index(content, "here")
        assert segment.number == number
        assert encode_segment_index(segment, disks) == (content, disks)
        for size in range(0, len(content), 5):
            with pytest.raises(FormatError, match="here"):
                decode_segment_index(content[:size], "here")
        with pytest.raises(FormatError, match="checksum"):
            decode_segment_index(content + bytes(8), "here")
