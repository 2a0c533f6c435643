"""The block map against the plainest map there is: a dictionary of blocks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.journal.block_map import ZEROS_EXPANDED_MAX, BlockMap

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
    block_map = BlockMap()
    model: dict[int, int] = {}
    segment, offset = 5, BLOCK
    for step, first, count, rolls in steps:
        if rolls:
            segment, offset = segment + 1, BLOCK
        if step == "drop":
            through = segment - first
            block_map.drop_through(through)
            model = {block: at for block, at in model.items() if at >> POSITION_SHIFT > through}
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
    assert len(block_map) == 3
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


def test_between_shares_of_a_drop_every_block_is_in_its_image_or_as_it_was() -> None:
    block_map = BlockMap()
    block_map.note_zeros(0, 1000, 1)
    for block in range(0, 200, 2):
        block_map.note(block, 1, place(1, 8192 + block * 5000))
    block_map.note(50, 1, place(2, 4160))
    before = [block_map.get(block) for block in range(1000)]
    shares = 0
    done = False
    while not done:
        done = block_map.drop_some(1, 7)
        shares += 1
        for block in range(1000):
            assert block_map.get(block) in (None, before[block])
        if shares == 3:
            block_map.note(51, 1, place(2, 9000))
            before[51] = place(2, 9000)
    assert shares == 15
    assert [block for block in range(1000) if block_map.get(block) is not None] == [50, 51]


def test_nothing_is_no_run() -> None:
    assert BlockMap().runs(4096, 0) == []
