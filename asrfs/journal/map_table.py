"""A part of a block map that does not change any more and lies in a file: blocks, ascending, and their positions.

In memory are one block of every `PAGE_BLOCKS` and the extents of zeros; a search reads one page of blocks and one
position, from the page cache as a rule. Two columns of 8 bytes each: all blocks, then all positions.

Tables of neighbouring segments are merged into one (`merge`), as soon as there are `MERGED_AT_ONCE` of about one size:
so there are few of them, however long a journal grows. What a merge makes has no name: it ends with the process.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from asrfs.format.segment_index import DiskColumns
from asrfs.journal.zero_extents import ZeroExtents
from asrfs.storage.interface import File, Storage

PAGE_BLOCKS = 512
MERGED_AT_ONCE = 4
UNNAMED_FILE = ".map-new"
"""What a merge writes to; the name is gone before the first byte is."""
_STEP_BLOCKS = 2 * PAGE_BLOCKS
"""Of each table, at one step of a merge: the interpreter is held for as long as it takes to sort a few of these."""
_WORD = 8


class TableShape(NamedTuple):
    """Where a table's columns lie in its file, and what of it is kept in memory. `pages`: the first block of each."""

    blocks_at: int
    positions_at: int
    block_count: int
    pages: array[int]
    zeros: ZeroExtents


def shape_of(segment: int, disk: DiskColumns) -> TableShape:
    """The table that one disk's part of a segment's index is."""
    count = len(disk.blocks)
    zeros = ZeroExtents.of_segment(segment, disk.zero_starts, disk.zero_ends)
    return TableShape(disk.blocks_at, disk.blocks_at + count * _WORD, count, disk.blocks[::PAGE_BLOCKS], zeros)


class MapTable:
    """See the module. Covers segments `first` to `last`. `level`: how many merges made it.

    `close` is for the map that lets go of it; one that is being merged (`pin`) is closed by `unpin`.
    """

    def __init__(self, file: File, shape: TableShape, first: int, last: int, *, level: int = 0) -> None:
        self.first = first
        self.last = last
        self.level = level
        self.count = shape.block_count
        self.zeros = shape.zeros
        self._file = file
        self._blocks_at = shape.blocks_at
        self._positions_at = shape.positions_at
        self._pages = shape.pages
        self._is_pinned = False
        self._is_closed = False

    def __len__(self) -> int:
        """Blocks and extents of zeros in it."""
        return self.count + len(self.zeros)

    def find(self, block: int) -> int | None:
        """The position of a block, None if it is not here. Raises OSError."""
        page = bisect_right(self._pages, block) - 1
        if page >= 0:
            low = page * PAGE_BLOCKS
            blocks = self.blocks(low, min(low + PAGE_BLOCKS, self.count))
            i = bisect_left(blocks, block)
            if i < len(blocks) and blocks[i] == block:
                return self.positions(low + i, low + i + 1)[0]
        return self.zeros.find(block) if self.zeros.starts else None

    def gather(self, found: dict[int, int], first: int, end: int) -> None:
        """Add the positions of the blocks in `[first, end)` that are here. Raises OSError."""
        for low, high, position in self.zeros.overlapping(first, end):
            found.update(dict.fromkeys(range(low, high), position))
        page = max(0, bisect_right(self._pages, first) - 1)
        low = page * PAGE_BLOCKS
        high = min(bisect_left(self._pages, end, page) * PAGE_BLOCKS, self.count)
        if low < high:
            blocks = self.blocks(low, high)
            left, right = bisect_left(blocks, first), bisect_left(blocks, end)
            if left < right:
                found.update(zip(blocks[left:right], self.positions(low + left, low + right), strict=True))

    def blocks(self, low: int, high: int) -> Sequence[int]:
        """Blocks number `low` to `high` of the column. Raises OSError."""
        return self._column(self._blocks_at, low, high)

    def positions(self, low: int, high: int) -> Sequence[int]:
        """Their positions. Raises OSError."""
        return self._column(self._positions_at, low, high)

    def _column(self, at: int, low: int, high: int) -> memoryview:
        raw = self._file.read_at((high - low) * _WORD, at + low * _WORD)
        if len(raw) != (high - low) * _WORD:
            raise OSError(f"the table of segments {self.first} to {self.last} is too short")
        return memoryview(raw).cast("Q")

    # ---- under the lock of the map ----

    def pin(self) -> None:
        self._is_pinned = True

    def unpin(self) -> None:
        self._is_pinned = False
        if self._is_closed:
            self._file.close()

    def close(self) -> None:
        assert not self._is_closed
        self._is_closed = True
        if not self._is_pinned:
            self._file.close()


def merge(storage: Storage, tables: Sequence[MapTable], breathe: Callable[[], None]) -> MapTable:
    """One table for those of neighbouring segments, oldest first: of each block the newest position.

    `breathe` is called after each step, of a few milliseconds. Raises OSError, and what that raises.
    """
    if storage.exists(UNNAMED_FILE):
        storage.unlink(UNNAMED_FILE)  # of one who died between the next two lines
    file = storage.create(UNNAMED_FILE)
    try:
        storage.unlink(UNNAMED_FILE)
        positions_at = sum(table.count for table in tables) * _WORD
        pages = array("Q")
        count = 0
        for blocks, positions in _merged(tables):
            file.write_at((blocks.tobytes(),), count * _WORD)
            file.write_at((positions.tobytes(),), positions_at + count * _WORD)
            pages.extend(blocks[-count % PAGE_BLOCKS :: PAGE_BLOCKS])
            count += len(blocks)
            breathe()
        shape = TableShape(0, positions_at, count, pages, _zeros(tables))
        level = max(table.level for table in tables) + 1
        return MapTable(file, shape, tables[0].first, tables[-1].last, level=level)
    except BaseException:
        file.close()
        raise


def _merged(tables: Sequence[MapTable]) -> Iterator[tuple[array[int], array[int]]]:
    """Blocks, ascending, and their positions, piece by piece."""
    at = [0] * len(tables)
    while any(place < table.count for place, table in zip(at, tables, strict=True)):
        pieces = [
            table.blocks(place, min(place + _STEP_BLOCKS, table.count)) for place, table in zip(at, tables, strict=True)
        ]
        ends = [
            piece[-1]
            for piece, place, table in zip(pieces, at, tables, strict=True)
            if place + len(piece) < table.count
        ]
        found: dict[int, int] = {}
        for number, (table, piece) in enumerate(zip(tables, pieces, strict=True)):
            if table.zeros.starts and found:
                for block in list(table.zeros.covered(sorted(found))):
                    del found[block]
            have = bisect_right(piece, min(ends)) if ends else len(piece)
            if have:
                found.update(zip(piece[:have], table.positions(at[number], at[number] + have), strict=True))
                at[number] += have
        blocks = sorted(found)
        yield array("Q", blocks), array("Q", map(found.__getitem__, blocks))


def _zeros(tables: Sequence[MapTable]) -> ZeroExtents:
    zeros = ZeroExtents()
    for table in tables:
        zeros = table.zeros.laid_over(zeros)
    return zeros
