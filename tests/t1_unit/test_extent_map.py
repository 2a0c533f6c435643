"""The extents of a disk against painting bytes one by one."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from replica_store.points import extent_map, layers
from replica_store.points.extent_map import (
    EXTENT_END_MAX,
    ZEROS,
    ExtentMap,
    make_refs,
    merge,
    objects_of,
    positions_of,
    subtract,
)
from replica_store.points.layers import Layer, Layers
from replica_store.points.painting import MapPainter, paint

SECTOR = 512
COLUMNS = ("start", "end", "ref")
Extent = tuple[int, int, int]
"""Start and end in sectors, and the reference to the first sector."""


def as_map(extents: list[Extent]) -> ExtentMap:
    start, end, ref = zip(*extents, strict=True) if extents else ((), (), ())
    return ExtentMap(np.array(start, np.int64) * SECTOR, np.array(end, np.int64) * SECTOR, np.array(ref, np.uint64))


def sectors(whole: ExtentMap, size: int) -> list[int]:
    """What each sector of a disk refers to."""
    disk = [ZEROS] * size
    for start, end, ref in zip(whole.start.tolist(), whole.end.tolist(), whole.ref.tolist(), strict=True):
        for i in range(start // SECTOR, end // SECTOR):
            disk[i] = ref + (i - start // SECTOR) if ref else ZEROS
    return disk


def paint_slowly(extents: list[Extent], size: int) -> list[int]:
    disk = [ZEROS] * size
    for start, end, ref in extents:
        for i in range(start, min(end, size)):
            disk[i] = ref + (i - start) if ref else ZEROS
    return disk


def check_order(whole: ExtentMap) -> None:
    assert bool(np.all(whole.start < whole.end))
    assert bool(np.all(whole.end[:-1] <= whole.start[1:]))


def random_extents(rng: random.Random, count: int, size: int) -> list[Extent]:
    extents = []
    position = 0
    for _ in range(count):
        start = rng.randrange(size)
        # Mostly short, some that cover much: both ends of the sparse table.
        end = rng.randint(start + 1, size) if rng.random() < 0.1 else min(size, start + rng.randint(1, 8))
        if rng.random() < 0.3:
            extents.append((start, end, ZEROS))
        else:
            if rng.random() < 0.5 and extents and extents[-1][2] and extents[-1][1] < size:
                start, end = extents[-1][1], min(size, extents[-1][1] + end - start)  # goes on where the last ended
            extents.append((start, end, int(make_refs(0, np.array([position * SECTOR], np.uint64))[0])))
            position += end - start
    return extents


def painted(extents: list[Extent], rng: random.Random) -> ExtentMap:
    painter = MapPainter()
    done = 0
    while done < len(extents):
        count = rng.randint(1, 20)
        part = as_map(extents[done : done + count])
        painter.add(part.start, part.end, part.ref)
        done += count
    return painter.finish()


def joined(parts: list[ExtentMap]) -> ExtentMap:
    """Disjoint maps as one, sorted."""
    extents = sorted(
        extent for part in parts for extent in zip(*(getattr(part, c).tolist() for c in COLUMNS), strict=True)
    )
    start, end, ref = zip(*extents, strict=True) if extents else ((), (), ())
    return ExtentMap(np.array(start, np.int64), np.array(end, np.int64), np.array(ref, np.uint64))


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 100_000])
def test_i9_newest_wins(batch: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of the extents are painted at once, and whether the layers are merged or read through."""
    for _ in range(60):
        monkeypatch.setattr(extent_map, "_MERGE_EXTENTS", rng.choice((1, 3, 1000)))
        monkeypatch.setattr(layers, "GROUP_EXTENTS_FIRST", rng.choice((1, 3, 1000)))
        size = rng.choice((1, 2, 9, 64, 400))
        extents = random_extents(rng, rng.randint(0, 120), size)
        maps = [painted(extents[at : at + batch], rng) for at in range(0, len(extents), batch)]
        cut = rng.randint(1, size)  # the disk may have become smaller
        expected = paint_slowly(extents, size)[:cut]
        disk = Layers([Layer(each, 0) for each in maps], cut * SECTOR)
        low, high = sorted(rng.sample(range(cut + 1), 2))
        for whole in (disk.between(0, size * SECTOR), joined(list(disk.groups()))):
            check_order(whole)
            assert sectors(whole, cut) == expected
            assert not np.any(whole.ref == ZEROS), "zeros need no extent in the end"
            assert whole.mapped_bytes <= disk.bytes_max
        part = disk.between(low * SECTOR, high * SECTOR)
        assert sectors(part, cut) == [ZEROS] * low + expected[low:high] + [ZEROS] * (cut - high)
        merged = extent_map.empty_map()
        for number, each in enumerate(maps):
            merged = merge(merged, each, keep_zeros=number % 2 > 0)
        check_order(merged)
        assert sectors(merged, size)[:cut] == expected


def test_layers_count_their_objects_through(rng: random.Random) -> None:
    """Each layer's references count its own objects from 0; groups share no object and come in the order of objects."""
    for _ in range(60):
        size, counts, maps, whole = 100, [], [], [ZEROS] * 100
        for _ in range(rng.randint(1, 5)):
            counts.append(rng.randint(1, 4))
            extents = [
                (start, end, int(make_refs(rng.randrange(counts[-1]), np.array([start * SECTOR], np.uint64))[0]))
                for start in rng.sample(range(size - 1), rng.randint(1, 30))
                for end in [rng.randint(start + 1, size)]
            ]
            maps.append(painted(extents, rng))
            base = sum(counts[:-1])
            for start, end, ref in extents:
                number = int(objects_of(np.array([ref], np.uint64))[0])
                moved = int(make_refs(base + number, np.array([start * SECTOR], np.uint64))[0])
                whole[start:end] = range(moved, moved + end - start)
        disk = Layers([Layer(*each) for each in zip(maps, counts, strict=True)], size * SECTOR)
        groups = list(disk.groups())
        assert sectors(disk.between(0, size * SECTOR), size) == sectors(joined(groups), size) == whole
        numbers = [objects_of(group.ref) for group in groups]
        assert all(before.max() < after.min() for before, after in pairwise(numbers))


def test_what_is_subtracted_leaves_no_more_than_what_shows(rng: random.Random) -> None:
    for _ in range(200):
        size = rng.choice((5, 50, 200))
        old, new = (random_extents(rng, rng.randint(0, 30), size) for _ in range(2))
        left = subtract(painted(old, rng), painted(new, rng))
        check_order(left)
        under = [ZEROS] * size
        for start, end, _ in new:
            under[start:end] = [1] * (end - start)
        expected = [ZEROS if over else ref for ref, over in zip(paint_slowly(old, size), under, strict=True)]
        assert sectors(left, size) == expected


@pytest.mark.parametrize("far", [0, 1 << 40, EXTENT_END_MAX - 500 * SECTOR])
def test_i9_many_extents_far_out_are_painted(far: int, rng: random.Random) -> None:
    """So far out and so many that a place and a number do not fit into one word."""
    for count in (1, 100, 3000):
        extents = random_extents(rng, count, 500)
        part = as_map(extents)
        whole = paint(part.start + far, part.end + far, part.ref)
        check_order(whole)
        assert sectors(ExtentMap(whole.start - far, whole.end - far, whole.ref), 500) == paint_slowly(extents, 500)


def test_merge_puts_newer_above_older(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(200):
        monkeypatch.setattr(extent_map, "_MERGE_EXTENTS", rng.choice((1, 2, 5, 1000)))
        size = rng.choice((5, 50, 200))
        old, new = (random_extents(rng, rng.randint(0, 30), size) for _ in range(2))
        older, newer = (
            paint(*(getattr(as_map(part), column) for column in COLUMNS)) if part else extent_map.empty_map()
            for part in (old, new)
        )
        for keep_zeros in (True, False):
            merged = extent_map.merge(older, newer, keep_zeros=keep_zeros)
            check_order(merged)
            assert sectors(merged, size) == paint_slowly(old + new, size)
            assert keep_zeros or not np.any(merged.ref == ZEROS)


def test_what_follows_in_the_payload_is_one_extent() -> None:
    painter = MapPainter()
    count = 1000
    start = np.arange(count, dtype=np.int64) * 4096
    refs = make_refs(3, np.arange(count, dtype=np.uint64) * np.uint64(4096))
    painter.add(start, start + 4096, refs)
    whole = painter.finish()
    assert len(whole) == 1
    assert (whole.start[0], whole.end[0]) == (0, count * 4096)


def test_neighbours_of_different_objects_stay_apart() -> None:
    end_of_one = make_refs(0, np.array([8 * SECTOR], np.uint64))
    start_of_next = make_refs(1, np.array([0], np.uint64))
    painter = MapPainter()
    painter.add(
        np.array([0, 4096], np.int64), np.array([4096, 8192], np.int64), np.concatenate((end_of_one, start_of_next))
    )
    assert len(painter.finish()) == 2


def test_references_keep_object_and_position() -> None:
    positions = np.array([0, 512, extent_map.POSITION_BYTES_END - 512], np.uint64)
    for number in (0, 1, 77, extent_map.OBJECTS_MAX - 1):
        refs = make_refs(number, positions)
        assert not np.any(refs == ZEROS)
        assert set(objects_of(refs).tolist()) == {number}
        assert positions_of(refs).tolist() == positions.tolist()


def test_a_large_discard_costs_as_much_as_a_small_one() -> None:
    """20,000 discards of 1 TiB over 40,000 writes: per block that would be 5 · 10^12 steps."""
    rng = np.random.default_rng(1)
    painter = MapPainter()
    whole = extent_map.empty_map()
    tib = 1 << 40
    for number in range(20):
        writes = rng.integers(0, tib // 4096, 2000) * 4096
        painter.add(writes, writes + 4096, make_refs(number, np.arange(2000, dtype=np.uint64) * np.uint64(4096)))
        discards = rng.integers(0, 1000, 1000) * 4096
        painter.add(discards, discards + tib, np.zeros(1000, np.uint64))
        if number % 5 == 4:
            whole = merge(whole, painter.finish(), keep_zeros=False)
    last = np.array([8192], np.int64)
    painter.add(last, last + 4096, make_refs(20, np.array([0], np.uint64)))
    whole = merge(whole, painter.finish(), keep_zeros=False)
    assert len(whole) < 20, "nearly every write lies under a later discard"
    assert 8192 in whole.start.tolist()


def test_between_finds_what_touches() -> None:
    whole = as_map([(8, 16, 1 << 31), (16, 24, 5 << 31), (32, 40, 9 << 31)])
    assert whole.between(0, 8 * SECTOR) == slice(0, 0)
    assert whole.between(15 * SECTOR, 17 * SECTOR) == slice(0, 2)
    assert whole.between(24 * SECTOR, 32 * SECTOR) == slice(2, 2)
    assert whole.between(0, 100 * SECTOR) == slice(0, 3)
    assert whole.mapped_bytes == 24 * SECTOR
