"""Where the newest bytes of each block of one disk lie in the journal. Blocks it does not know are in the image.

A position is `segment << 26 | offset of the block's bytes`; offset 0 stands for zeros. A map is a pile of layers, one
for each segment: what is asked for is found in the newest layer that knows it, and what was applied goes with its
layers, at once.

    open layer       a dictionary of blocks; only here things are noted
    sealed layers    the same, of segments before the open one
    tables           older ones, sorted and in files (`map_table.py`): their blocks take next to no memory

While the agent keeps up there are one or two layers. While it lags, whoever keeps the map (`map_keeper.py`) turns
sealed layers into tables. Extents of zeros longer than `ZEROS_EXPANDED_MAX` blocks are never expanded: they lie in a
sorted list of disjoint extents below the blocks of their layer, and a block, when it is there, is newer than an extent
of the same layer that covers it.

A block of a layer takes some 160 bytes, so memory is what the layers that are no tables take, whatever the backlog: a
segment has at most 16,000 blocks with bytes, and ends when it has made `ZERO_BLOCKS_MAX` (`writer.py`) of zeros.
No lock: whoever shares a map guards it (`Journal.lock`). No I/O but that of tables.
"""

from __future__ import annotations

from collections.abc import Callable

from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.journal.map_table import MapTable
from asrfs.journal.zero_extents import ZeroExtents
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT

ZEROS_EXPANDED_MAX = 64
_IN_BLOCK = BLOCK_BYTES - 1

Run = tuple[int, int, int | None]
"""`(offset, length, position)` in bytes of the disk; position None: in the image."""


class Layer:
    """What one segment's records did to a disk. It does not change any more once the segment is sealed."""

    __slots__ = ("blocks", "first", "last", "zeros")

    def __init__(self, segment: int) -> None:
        self.first = self.last = segment
        self.blocks: dict[int, int] = {}
        self.zeros = ZeroExtents()

    def __len__(self) -> int:
        return len(self.blocks) + len(self.zeros)

    def find(self, block: int) -> int | None:
        position = self.blocks.get(block)
        return self.zeros.find(block) if position is None and self.zeros.starts else position

    def gather(self, found: dict[int, int], first: int, end: int) -> None:
        """Add the positions of the blocks in `[first, end)` that are here."""
        if self.zeros.starts:
            for low, high, position in self.zeros.overlapping(first, end):
                found.update(dict.fromkeys(range(low, high), position))
        blocks = self.blocks
        if not blocks.keys().isdisjoint(range(first, end)):
            found.update([(block, blocks[block]) for block in range(first, end) if block in blocks])


class BlockMap:
    """See the module. Segments must be noted in ascending order."""

    def __init__(self) -> None:
        self._open_layer(-1)
        # Newest first; and of each what finds a block in it.
        self._older: list[Layer | MapTable] = []
        self._finders: list[Callable[[int], int | None]] = []
        # Positions below this are in the image: a table may have some of them among others.
        self._applied_below = 0

    def __len__(self) -> int:
        """Entries held: blocks and extents of zeros, each once a layer."""
        return len(self._layer) + sum(map(len, self._older))

    # ---- change ----

    def note(self, first_block: int, count: int, position: int) -> None:
        """`count` blocks were journaled end to end; the first one's bytes lie at `position`."""
        if position >> POSITION_SHIFT != self._segment:
            self._begin(position >> POSITION_SHIFT)
        if count == 1:
            self._blocks[first_block] = position
            return
        positions = range(position, position + (count << BLOCK_SHIFT), BLOCK_BYTES)
        self._blocks.update(zip(range(first_block, first_block + count), positions, strict=True))

    def note_zeros(self, first_block: int, count: int, segment: int) -> None:
        """A record in `segment` made these blocks read as zeros."""
        if segment != self._segment:
            self._begin(segment)
        blocks, end = self._blocks, first_block + count
        if count <= ZEROS_EXPANDED_MAX:
            blocks.update(dict.fromkeys(range(first_block, end), segment << POSITION_SHIFT))
            return
        if count <= len(blocks):
            for block in range(first_block, end):
                blocks.pop(block, None)
        else:
            for block in [b for b in blocks if first_block <= b < end]:
                del blocks[block]
        self._layer.zeros.cover(first_block, end, segment)

    def put_table(self, table: MapTable) -> list[Layer] | None:
        """Put a table in the place of the layers and tables of its segments that are left. Tables are closed.

        Returns what takes time to be freed, as `drop_through` does; None: nothing was left, the table is the caller's.
        """
        if self._segment <= table.last:
            self._begin(-1)
        inside = [each for each in self._older if table.first <= each.first and each.last <= table.last]
        if not inside:
            return None
        assert table.first == table.last or not any(isinstance(each, Layer) for each in inside)
        at = self._older.index(inside[0])
        self._older[at : at + len(inside)] = [table]
        self._arrange(inside)
        return [each for each in inside if isinstance(each, Layer)]

    def add_table(self, table: MapTable) -> None:
        """Put a table over everything noted so far, all of which is of older segments."""
        self._begin(-1)
        assert not self._older or self._older[0].last < table.first
        self._older.insert(0, table)
        self._arrange([])

    def drop_through(self, segment: int) -> list[Layer]:
        """Forget exactly the blocks whose newest bytes lie in segments up to `segment`: they are in the image now.

        Returns what takes time to be freed, so that the caller may let go of it, and of its lock, at leisure.
        """
        if self._segment <= segment:
            self._begin(-1)
        dropped = [each for each in self._older if each.last <= segment]
        self._older = self._older[: len(self._older) - len(dropped)]
        self._applied_below = max(self._applied_below, (segment + 1) << POSITION_SHIFT)
        self._arrange(dropped)
        return [each for each in dropped if isinstance(each, Layer)]

    def close(self) -> None:
        """Forget everything: all of it is in the image, and nothing is noted here any more."""
        gone, self._older = self._older, []
        self._open_layer(-1)
        self._arrange(gone)

    # ---- look ----

    def has_dropped(self, segment: int) -> bool:
        return segment << POSITION_SHIFT < self._applied_below

    def layer(self, segment: int) -> Layer | None:
        """What was noted of a segment, if that is no table."""
        for each in (self._layer, *self._older):
            if isinstance(each, Layer) and each.first == segment:
                return each
        return None

    def tables(self) -> list[list[MapTable]]:
        """Oldest first; those between which no layer lies are together."""
        groups: list[list[MapTable]] = [[]]
        for each in reversed(self._older):
            if isinstance(each, MapTable):
                groups[-1].append(each)
            elif groups[-1]:
                groups.append([])
        return groups

    def get(self, block: int) -> int | None:
        """The position of a block's newest bytes (offset 0: zeros), or None: in the image. Raises OSError (a table)."""
        position = self._get(block)
        if position is None and (self._finders or self._zeros.starts):
            return self._find(block)
        return position

    def runs(self, offset: int, length: int) -> list[Run]:
        """The extent cut into runs that lie together, in order. Byte exact: positions point at the first byte.

        Raises OSError (a table).
        """
        if length <= 0:
            return []
        first = offset >> BLOCK_SHIFT
        last = (offset + length - 1) >> BLOCK_SHIFT
        if first == last:
            position = self._get(first)
            if position is None and (self._finders or self._zeros.starts):
                position = self._find(first)
            if position is not None and position & POSITION_MASK:
                position += offset & _IN_BLOCK
            return [(offset, length, position)]
        blocks = self._blocks
        if self._older or self._zeros.starts:
            blocks = self._gather(first, last + 1)
        if blocks.keys().isdisjoint(range(first, last + 1)):
            return [(offset, length, None)]
        return self._cut(offset, length, blocks.get)

    # ---- within ----

    def _open_layer(self, segment: int) -> None:
        self._segment = segment
        self._layer = Layer(segment)
        self._blocks = self._layer.blocks
        self._get = self._blocks.get
        self._zeros = self._layer.zeros

    def _begin(self, segment: int) -> None:
        """Seal the open layer; -1: the segment of the next one is not known yet."""
        if len(self._layer):
            self._older.insert(0, self._layer)
            self._arrange([])
        assert segment < 0 or not self._older or segment > self._older[0].last
        self._open_layer(segment)

    def _arrange(self, gone: list[Layer | MapTable]) -> None:
        for each in gone:
            if isinstance(each, MapTable):
                each.close()
        self._finders = [
            each.blocks.get if isinstance(each, Layer) and not each.zeros.starts else each.find for each in self._older
        ]

    def _find(self, block: int) -> int | None:
        position = self._zeros.find(block) if self._zeros.starts else None
        if position is None:
            for find in self._finders:
                position = find(block)
                if position is not None:
                    return position if position >= self._applied_below else None
        return position

    def _gather(self, first: int, end: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for each in reversed(self._older):
            each.gather(found, first, end)
        self._layer.gather(found, first, end)
        if self._older and self._older[-1].first << POSITION_SHIFT < self._applied_below:
            found = {block: position for block, position in found.items() if position >= self._applied_below}
        return found

    def _cut(self, offset: int, length: int, get: Callable[[int], int | None]) -> list[Run]:
        """The runs of an extent of several blocks, each of which lies where `get` says."""
        runs: list[Run] = []
        end = offset + length
        first = offset >> BLOCK_SHIFT
        start = offset
        place = get(first)
        expected = _follows(place)
        for block in range(first + 1, ((end - 1) >> BLOCK_SHIFT) + 1):
            position = get(block)
            if position is None or not position & POSITION_MASK:
                joins = _sort(position) == _sort(place)
            else:
                joins = position == expected
            if not joins:
                at = block << BLOCK_SHIFT
                runs.append((start, at - start, _inside(place, start)))
                start, place = at, position
                expected = _follows(place)
            elif expected is not None:
                expected += BLOCK_BYTES
        runs.append((start, end - start, _inside(place, start)))
        return runs


def _follows(place: int | None) -> int | None:
    """The position a block must have to go on with one that lies at `place`."""
    return place + BLOCK_BYTES if place is not None and place & POSITION_MASK else None


def _sort(position: int | None) -> int | None:
    """What two neighbours must share to be one run, if they are not bytes in the journal."""
    return None if position is None else position & POSITION_MASK


def _inside(place: int | None, offset: int) -> int | None:
    """The position of the byte at `offset` of the disk, whose block lies at `place`."""
    if place is None or not place & POSITION_MASK:
        return place
    return place + (offset & _IN_BLOCK)
