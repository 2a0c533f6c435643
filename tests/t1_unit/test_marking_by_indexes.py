"""Giving up by indexes marks what reading every record marks, wherever it begins and ends, and reads almost nothing."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from asrfs.journal.reader import JournalReader
from asrfs.journal.segments import index_name, list_indexes
from asrfs.model.dirty_map import DirtyMap, Reason
from asrfs.model.positions import Cursor
from asrfs.replication import quota
from asrfs.replication.quota import mark_records, mark_segments
from asrfs.storage.interface import Storage, read_whole, write_atomically
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld

BLOCK = 4096


def some_world(rng: random.Random) -> JournalWorld:
    """Writes of all kinds and lengths in several lives; nothing is applied, so all segments are there."""
    world = JournalWorld(CrashStorage(), seed=rng.getrandbits(30))
    for _ in range(rng.randrange(1, 4)):
        for _ in range(rng.randrange(5, 30)):
            disk = rng.choice(world.disks)
            offset = rng.randrange(disk.size_bytes)
            length = min(rng.choice((512, BLOCK, 3 * BLOCK)), disk.size_bytes - offset)
            rng.choice((disk.discard, disk.zero, lambda o, n: disk.write(o, rng.randbytes(n))))(offset, length)  # type: ignore[misc]  # noqa: B023
            if rng.random() < 0.1:
                world.marker()
        world.sync()
        world = world.restart()
    return world


def replace(storage: Storage, name: str, content: bytes) -> None:
    storage.unlink(name)
    write_atomically(storage, name, content)


def fresh_map() -> DirtyMap:
    dirty = DirtyMap()
    dirty.enter(0, Reason.GIVEN_UP)  # disk 1 is not in the map
    return dirty


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrfs.model.dirty_map.CHUNK_SHIFT", 12)


@pytest.mark.parametrize("number", range(20))
def test_it_marks_the_same_from_anywhere_to_anywhere(number: int, rng: random.Random) -> None:
    world = some_world(rng)
    with closing(JournalReader(world.journal_storage, MACHINE_ID)) as reader:
        last = world.journal.durable_lsn
        for _ in range(10):
            first = rng.randrange(last)
            start = reader.read(Cursor(), first, 1 << 30).cursor if first else Cursor()
            while start.lsn < first:
                start = reader.read(start, first, 1 << 30).cursor
            until = rng.choice((last, rng.randrange(first, last) + 1))
            by_reading, by_indexes = fresh_map(), fresh_map()
            behind, _ = mark_records(reader, start, until, by_reading)
            assert mark_segments(reader, start, until, by_indexes) == behind
            assert by_indexes.bitmap(0) == by_reading.bitmap(0) and by_indexes.slots() == [0]
    world.close()


def test_what_has_an_index_is_not_read(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    world = some_world(rng)
    read: list[int] = []

    def noted(reader: JournalReader, cursor: Cursor, until_lsn: int, dirty: DirtyMap) -> tuple[Cursor, object]:
        read.append(until_lsn - cursor.lsn)
        return sound(reader, cursor, until_lsn, dirty)

    sound = quota.mark_records
    monkeypatch.setattr(quota, "mark_records", noted)
    with closing(JournalReader(world.journal_storage, MACHINE_ID)) as reader:
        mark_segments(reader, Cursor(), world.journal.durable_lsn, fresh_map())
    indexed = len(list_indexes(world.journal_storage))
    segments = len([name for name in world.journal_storage.names("") if name.endswith(".segment")])
    assert indexed and len(read) <= segments - indexed
    world.close()


def test_an_index_that_is_damaged_or_of_another_segment_is_not_believed(rng: random.Random) -> None:
    world = some_world(rng)
    storage, last = world.journal_storage, world.journal.durable_lsn
    with closing(JournalReader(storage, MACHINE_ID)) as reader:
        whole = fresh_map()
        behind, _ = mark_records(reader, Cursor(), last, whole)
        numbers = list_indexes(storage)
        contents = {number: read_whole(storage, index_name(number)) for number in numbers}
        for number in numbers:
            damaged = bytearray(contents[number])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            for content in (bytes(damaged), contents[rng.choice(numbers)], b""):
                replace(storage, index_name(number), content)
                marked = fresh_map()
                assert mark_segments(reader, Cursor(), last, marked) == behind
                assert marked.bitmap(0) == whole.bitmap(0)
            replace(storage, index_name(number), contents[number])
    world.close()
