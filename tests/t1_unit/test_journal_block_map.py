"""The block map against the plainest map there is: a dictionary of blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT, SEGMENT_HEADER_BYTES
from asrfs.format.segment_index import SealedSegment
from asrfs.journal import map_keeper, map_table
from asrfs.journal.block_map import ZEROS_EXPANDED_MAX, BlockMap
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.recovery import Recovered
from asrfs.journal.zero_extents import ZeroExtents
from asrfs.model.positions import Positions
from tests.fakes.crash_storage import CrashStorage

BLOCK = 4096
BLOCKS = 400


def place(segment: int, offset: int) -> int:
    return segment << POSITION_SHIFT | offset


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("note"), st.integers(0, BLOCKS - 1), st.integers(1, 20), st.booleans()),
        st.tuples(st.just("zeros"), st.integers(0, BLOCKS - 1), st.integers(1, 2 * ZEROS_EXPANDED_MAX), st.booleans()),
        st.tuples(st.just("zeros"), st.just(0), st.just(BLOCKS), st.booleans()),
        st.tuples(st.just("drop"), st.integers(0, 3), st.just(0), st.just(False)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS)
def test_equals_a_dictionary(steps: list[tuple[str, int, int, bool]]) -> None:
    play(steps, BlockMap(), lambda segment: None)


@settings(max_examples=300)
@given(STEPS, st.integers(0, 2), st.integers(2, 4), st.sampled_from((2, 3, 16)))
def test_equals_a_dictionary_when_most_of_it_is_tables(
    steps: list[tuple[str, int, int, bool]], layers_kept: int, at_once: int, page: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_table, "PAGE_BLOCKS", page)
        patch.setattr(map_table, "_STEP_BLOCKS", 2 * page)
        patch.setattr(map_keeper, "MERGED_AT_ONCE", at_once)
        block_map, storage = BlockMap(), CrashStorage()
        seal = keep({7: block_map}, storage, layers_kept)
        play(steps, block_map, seal)
        assert not [name for name in storage.names("") if not name.endswith(".index")], "a merge left its file"


def keep(maps: dict[int, BlockMap], storage: CrashStorage, layers_kept: int) -> Callable[[int], None]:
    """What a keeper of these maps does when a segment is sealed, done at once."""
    journal: Any = SimpleNamespace(lock=threading.Lock())
    MapKeeper(journal, storage, maps, Recovered(Positions()), ahead=False, layers_kept=layers_kept)
    return lambda segment: journal.when_sealed([SealedSegment(segment, 1, 1, 1, 1, SEGMENT_HEADER_BYTES)])


def sealed_segments(storage: CrashStorage, count: int, ahead: bool) -> tuple[BlockMap, MapKeeper, Callable[[], None]]:
    """A map of segments 1 to `count`, its keeper, and what tells the keeper that all of them are sealed."""
    block_map, journal = BlockMap(), SimpleNamespace(lock=threading.Lock(), when_sealed=None)
    given: Any = journal
    keeper = MapKeeper(given, storage, {0: block_map}, Recovered(Positions()), ahead=ahead, layers_kept=0)
    for segment in range(1, count + 1):
        block_map.note(segment, 1, place(segment, BLOCK))
    take: Any = journal.when_sealed
    return block_map, keeper, lambda: take([SealedSegment(n, 1, 1, 1, 1, BLOCK) for n in range(1, count + 1)])


def test_who_closes_does_not_wait_for_the_work_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper rests after its first step for longer than anybody would wait."""
    begun = threading.Event()

    def rest(self: MapKeeper) -> None:
        self._worked_since -= 1.0
        begun.set()
        sound(self)

    sound = MapKeeper._rest
    monkeypatch.setattr(MapKeeper, "_rest", rest)
    monkeypatch.setattr(map_keeper, "REST", 10_000)
    monkeypatch.setattr(map_keeper, "HURRIED_REST", 10_000)
    storage = CrashStorage()
    block_map, keeper, seal = sealed_segments(storage, 9, ahead=True)
    seal()
    assert begun.wait(10)
    keeper.close()
    assert keeper._thread is not None and not keeper._thread.is_alive()
    assert not block_map.tables()[0], "it went on"
    assert [block_map.get(n) for n in range(1, 10)] == [place(n, BLOCK) for n in range(1, 10)]


def test_a_map_that_is_given_up_closes_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    block_map, _, seal = sealed_segments(CrashStorage(), 3, ahead=False)
    seal()
    tables = block_map.tables()[0]
    assert len(tables) == 3
    tables[0].pin()  # it is being merged
    files = [table._file for table in tables]
    closed: list[object] = []
    for file in files:
        monkeypatch.setattr(file, "close", lambda file=file: closed.append(file))
    block_map.close()
    assert set(map(id, closed)) == set(map(id, files[1:]))
    tables[0].unpin()
    assert set(map(id, closed)) == set(map(id, files))
    assert block_map.get(1) is None and len(block_map) == 0


EXTENTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12)


@given(EXTENTS, EXTENTS)
def test_extents_laid_over_others_are_what_covering_one_by_one_gives(
    older: list[tuple[int, int]], newer: list[tuple[int, int]]
) -> None:
    below, above, both = ZeroExtents(), ZeroExtents(), ZeroExtents()
    for number, (first, count) in enumerate(older):
        for extents in (below, both):
            extents.cover(first, first + count, 1 + number % 2)
    for first, count in newer:
        for extents in (above, both):
            extents.cover(first, first + count, 3)
    made = above.laid_over(below)
    assert (made.starts, made.ends, made.segments) == (both.starts, both.ends, both.segments)


def play(steps: list[tuple[str, int, int, bool]], block_map: BlockMap, seal: Callable[[int], None]) -> None:
    """Do the same to the map and to a dictionary, and compare them after each step."""
    model: dict[int, int] = {}
    segment, offset = 5, BLOCK
    for step, first, count, rolls in steps:
        if rolls:
            seal(segment)
            segment, offset = segment + 1, BLOCK
        if step == "drop":
            through = segment - first
            block_map.drop_through(through)
            model = {block: at for block, at in model.items() if at >> POSITION_SHIFT > through}
            if through == segment:  # a journal never drops the segment it writes to
                segment, offset = segment + 1, BLOCK
        elif step == "note":
            offset += 64
            block_map.note(first, count, place(segment, offset))
            model |= {first + i: place(segment, offset + i * BLOCK) for i in range(count)}
            offset += count * BLOCK
        else:
            block_map.note_zeros(first, count, segment)
            model |= dict.fromkeys(range(first, first + count), place(segment, 0))
        check(block_map, model)
    block_map.drop_through(segment)
    assert len(block_map) == 0
    assert block_map.runs(0, BLOCKS * BLOCK) == [(0, BLOCKS * BLOCK, None)]


def check(block_map: BlockMap, model: dict[int, int]) -> None:
    """Every block, and runs that cover the extent, agree with the model and could not be merged further."""
    end = BLOCKS + 2 * ZEROS_EXPANDED_MAX
    assert all(_same(block_map.get(block), model.get(block)) for block in range(end))
    start, length = 777, end * BLOCK - 1500
    runs = block_map.runs(start, length)
    at = start
    for offset, size, position in runs:
        assert offset == at
        assert size > 0
        for byte in {offset, offset + size - 1, *range(offset - offset % BLOCK + BLOCK, offset + size, BLOCK)}:
            expected = model.get(byte // BLOCK)
            if expected is None or not expected & POSITION_MASK:
                assert _same(position, expected)
            else:
                assert position is not None
                assert position + byte - offset == expected + byte % BLOCK
        at += size
    assert at == start + length
    for (_, size, left), (_, _, right) in pairwise(runs):
        if left is None or not left & POSITION_MASK:
            assert not _same(left, right)
        else:
            assert right is None or not right & POSITION_MASK or right != left + size


def _same(left: int | None, right: int | None) -> bool:
    """Equal; zeros of one segment are as good as of another, except that they are dropped with their own."""
    if left is None or right is None:
        return left is right
    return left == right or (not left & POSITION_MASK and not right & POSITION_MASK)


def test_a_run_never_goes_on_from_the_end_of_a_segment_into_the_zeros_of_the_next() -> None:
    block_map = BlockMap()
    block_map.note(0, 1, place(4, (1 << POSITION_SHIFT) - BLOCK))
    block_map.note_zeros(1, 1, 5)
    assert place(4, (1 << POSITION_SHIFT) - BLOCK) + BLOCK == place(5, 0)
    assert block_map.runs(0, 2 * BLOCK) == [
        (0, BLOCK, place(4, (1 << POSITION_SHIFT) - BLOCK)),
        (BLOCK, BLOCK, place(5, 0)),
    ]


def test_zeros_of_a_huge_disk_are_one_entry() -> None:
    block_map = BlockMap()
    block_map.note(1 << 40, 3, place(1, 8192))
    block_map.note(5, 1, place(1, 40960))
    block_map.note_zeros(0, 1 << 51, 1)
    assert len(block_map) == 1
    block_map.note_zeros(1 << 30, 1 << 20, 2)
    assert len(block_map) == 2
    block_map.note((1 << 30) + 7, 1, place(2, 4160))
    assert block_map.get((1 << 30) + 7) == place(2, 4160)
    assert block_map.runs(((1 << 30) + 6) * BLOCK, 3 * BLOCK) == [
        (((1 << 30) + 6) * BLOCK, BLOCK, place(2, 0)),
        (((1 << 30) + 7) * BLOCK, BLOCK, place(2, 4160)),
        (((1 << 30) + 8) * BLOCK, BLOCK, place(2, 0)),
    ]
    block_map.drop_through(1)
    assert block_map.get(0) is None
    assert block_map.get(1 << 30) == place(2, 0)
    assert block_map.get((1 << 30) - 1) is None
    assert len(block_map) == 2


def test_neighbouring_zeros_of_a_segment_become_one_extent() -> None:
    block_map = BlockMap()
    for i in range(1000):
        block_map.note_zeros(i * 100, 100, 3)
    assert len(block_map) == 1
    for i in range(500, 0, -1):
        block_map.note_zeros(200_000 + i * 100, 100, 3)
    assert len(block_map) == 2


def test_dropping_keeps_what_was_written_again_later() -> None:
    block_map = BlockMap()
    block_map.note(0, 300, place(1, 4160))
    block_map.note(10, 1, place(2, 4160))
    block_map.drop_through(1)
    assert [block for block in range(300) if block_map.get(block) is not None] == [10]
    assert len(block_map) == 1
    block_map.drop_through(0)
    assert block_map.get(10) == place(2, 4160)


def test_a_drop_is_one_step_and_takes_all_that_is_in_the_image() -> None:
    block_map = BlockMap()
    block_map.note_zeros(0, 1000, 1)
    for block in range(0, 200, 2):
        block_map.note(block, 1, place(1, 8192 + block * 5000))
    block_map.note(50, 1, place(2, 4160))
    block_map.drop_through(1)
    assert [block for block in range(1000) if block_map.get(block) is not None] == [50]
    block_map.note(51, 1, place(2, 9000))
    assert [block for block in range(1000) if block_map.get(block) is not None] == [50, 51]
    assert block_map.has_dropped(1) and not block_map.has_dropped(2)


def test_nothing_is_no_run() -> None:
    assert BlockMap().runs(4096, 0) == []
