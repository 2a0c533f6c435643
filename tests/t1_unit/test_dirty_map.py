"""The dirty map against a set of chunk numbers, its file, and the places of what was given up."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from crc32c import crc32c

from asrfs.errors import FormatError
from asrfs.format.dirty_map import decode_dirty_map, encode_dirty_map
from asrfs.model.dirty_map import CHUNK_SHIFT, GAPS_MAX, DirtyMap, Gap, GivenUp, Reason
from asrfs.model.machine import DiskRecord
from asrfs.model.positions import Cursor

CHUNK = 1 << CHUNK_SHIFT
SLOT = 3


def chunks_of(offset: int, length: int) -> range:
    return range(offset // CHUNK, (offset + length - 1) // CHUNK + 1)


def marked(dirty: DirtyMap, bytes_max: int = 1 << 20) -> set[int]:
    found: list[int] = []
    for offset, length in dirty.runs(SLOT, bytes_max):
        assert length <= bytes_max and offset // bytes_max == (offset + length - 1) // bytes_max
        found += chunks_of(offset, length)
    assert found == sorted(set(found)), "in order, and none twice"
    return set(found)


@pytest.mark.parametrize("number", range(60))
def test_marked_is_what_was_marked_and_not_cleared(number: int, rng: random.Random) -> None:
    disk_bytes = rng.choice((1 << 20, 1 << 26, 1 << 33))
    dirty, model = DirtyMap(), set[int]()
    dirty.enter(SLOT, Reason.GIVEN_UP)
    for _ in range(20):
        length = rng.choice((1, 4096, CHUNK, CHUNK + 1, rng.randrange(1, 1 << 21), rng.randrange(1, 1 << 26)))
        offset = rng.randrange(disk_bytes)
        if rng.random() < 0.7:
            dirty.mark(SLOT, offset, length)
            model |= set(chunks_of(offset, length))
        else:
            dirty.clear(SLOT, offset, length)
            model -= set(chunks_of(offset, length))
        assert dirty.dirty_chunks(SLOT) == len(model)
    assert marked(dirty, rng.choice((CHUNK, 4 * CHUNK, 1 << 20))) == model
    again, _ = decode_dirty_map(encode_dirty_map(dirty, GivenUp()), "map")
    assert marked(again) == model
    dirty.cut(SLOT, disk_bytes)
    model = {chunk for chunk in model if chunk * CHUNK < disk_bytes}
    assert marked(dirty) == model
    assert dirty.dirty_bytes(SLOT, disk_bytes) <= disk_bytes


def test_many_extents_at_once_are_as_many_one_by_one(rng: random.Random) -> None:
    offsets = np.array([rng.randrange(1 << 32) for _ in range(5000)], np.int64)
    lengths = np.array([rng.choice((512, 4096, 1 << 20, 1 << 24)) for _ in range(5000)], np.int64)
    together, each = DirtyMap(), DirtyMap()
    for dirty in (together, each):
        dirty.enter(SLOT, Reason.GIVEN_UP)
    together.mark_all(SLOT, offsets, lengths)
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        each.mark(SLOT, offset, length)
    assert together.bitmap(SLOT) == each.bitmap(SLOT)


def test_a_tebibyte_costs_four_mebibytes_at_most() -> None:
    dirty = DirtyMap()
    dirty.enter(SLOT, Reason.GIVEN_UP)
    for end in range(1 << 30, (1 << 40) + 1, 1 << 30):
        dirty.mark(SLOT, end - 1, 1)
    assert len(dirty.bitmap(SLOT)) == 2 << 20
    assert dirty._bits[SLOT].nbytes <= 4 << 20
    assert len(encode_dirty_map(dirty, GivenUp())) <= (2 << 20) + 4096


def test_a_disk_is_in_the_map_from_entering_to_leaving() -> None:
    dirty = DirtyMap()
    dirty.enter(SLOT, Reason.INITIAL | Reason.UNREAD)
    dirty.enter(SLOT, Reason.GIVEN_UP)
    dirty.settle(SLOT, Reason.UNREAD)
    assert dirty.reasons(SLOT) == Reason.INITIAL | Reason.GIVEN_UP
    assert SLOT in dirty and not dirty.dirty_chunks(SLOT)
    dirty.forget(SLOT)
    assert SLOT not in dirty and not dirty.slots() and not dirty.reasons(SLOT)


# ---- given up ----


def test_what_is_needed_by_a_store_depends_on_where_it_stands() -> None:
    given_up = GivenUp(10, Cursor(lsn=20, segment=4, offset=9000))
    for lsn, needed in ((9, 9), (10, 20), (19, 20), (20, 20), (21, 21)):
        assert given_up.needed_behind(Cursor(lsn=lsn)).lsn == needed
        assert given_up.covers(lsn) == (10 <= lsn < 20)


def test_states_in_a_gap_are_lost() -> None:
    given_up = GivenUp().opened(10)
    assert given_up.opened(50) == given_up, "one gap at a time"
    assert [given_up.is_lost(lsn) for lsn in (10, 11, 1000)] == [False, True, True]
    closed = given_up.closed(30)
    assert [closed.is_lost(lsn) for lsn in (10, 11, 29, 30)] == [False, True, True, False]
    assert closed.closed(99) == closed
    many = closed
    for lsn in range(100, 100 + 2 * GAPS_MAX):
        many = many.opened(lsn).closed(lsn + 1)
    assert len(many.gaps) == GAPS_MAX


# ---- the file ----


def some_file() -> tuple[DirtyMap, GivenUp, bytes]:
    dirty = DirtyMap()
    dirty.enter(0, Reason.GIVEN_UP | Reason.NOW)
    dirty.mark(0, 5 * CHUNK, 3 * CHUNK)
    dirty.enter(7, Reason.INITIAL)
    disks = tuple(
        DiskRecord(slot=slot, id=f"{slot:032x}", name=f"d{slot}", size_bytes=1 << 20, removed=slot == 2, gap=slot != 2)
        for slot in (0, 2)
    )
    through = Cursor(lsn=99, segment=3, offset=8192, time_ns=77)
    given_up = GivenUp(42, through, disks, (Gap(1, 5), Gap(42)))
    return dirty, given_up, encode_dirty_map(dirty, given_up)


def test_the_file_says_all_of_it() -> None:
    dirty, given_up, content = some_file()
    found, found_given_up = decode_dirty_map(content, "map")
    assert found_given_up == given_up
    assert found.slots() == [0, 7]
    assert [found.reasons(slot) for slot in (0, 7)] == [dirty.reasons(slot) for slot in (0, 7)]
    assert found.bitmap(0) == dirty.bitmap(0) == bytes([0b11100000])
    assert decode_dirty_map(encode_dirty_map(DirtyMap(), GivenUp()), "map")[1] == GivenUp()


def test_a_file_that_is_not_whole_is_refused(rng: random.Random) -> None:
    content = some_file()[2]
    for at in range(len(content)):
        with pytest.raises(FormatError, match="map: "):
            decode_dirty_map(content[:at], "map")
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError, match="map: "):
            decode_dirty_map(bytes(flipped), "map")
    with pytest.raises(FormatError):
        decode_dirty_map(content + b"\0", "map")


def test_lengths_are_checked_also_where_the_checksum_is_right(rng: random.Random) -> None:
    content = some_file()[2]
    for at in range(16, len(content)):
        changed = bytearray(content)
        changed[at] = rng.choice((0x00, 0x7F, 0xFF))
        struct.pack_into("<I", changed, 12, crc32c(bytes(changed[16:])))
        try:
            decode_dirty_map(bytes(changed), "map")
        except FormatError:
            continue
