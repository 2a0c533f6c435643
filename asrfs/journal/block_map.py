"""Where the newest bytes of each block of one disk lie in the journal. Blocks it does not know are in the image.

A position is `segment << 26 | offset of the block's bytes`; offset 0 stands for zeros. Extents of zeros longer than
`ZEROS_EXPANDED_MAX` blocks are never expanded: they lie in a sorted list of disjoint extents below the entries of
single blocks, and an entry of a block, when there is one, is always newer than the extent that covers it.

Memory is at most some 160 bytes for each block noted (table, two integers, its place in the segment's list).
No lock and no I/O: whoever shares a map guards it (`Journal.lock`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT

ZEROS_EXPANDED_MAX = 64
_IN_BLOCK = BLOCK_BYTES - 1
_NOTE_SHIFT = 8
_NOTE_MASK = (1 << _NOTE_SHIFT) - 1

Run = tuple[int, int, int | None]
"""`(offset, length, position)` in bytes of the disk; position None: in the image."""


class BlockMap:
    """See the module."""

    def __init__(self) -> None:
        self._entries: dict[int, int] = {}
        self._get = self._entries.get
        # What was noted in each segment, as `first block << 8 | count - 1`, so that a segment can be dropped.
        self._noted: dict[int, array[int]] = {}
        self._segment = -1
        self._note = array("Q").append
        # Disjoint extents of zeros, ascending: first block, block behind the last, segment.
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._segments: list[int] = []

    def __len__(self) -> int:
        """Entries held: blocks and extents of zeros."""
        return len(self._entries) + len(self._starts)

    def note(self, first_block: int, count: int, position: int) -> None:
        """`count` blocks were journaled end to end; the first one's bytes lie at `position`."""
        segment = position >> POSITION_SHIFT
        if segment != self._segment:
            self._open(segment)
        if count == 1:
            self._entries[first_block] = position
            self._note(first_block << _NOTE_SHIFT)
            return
        positions = range(position, position + (count << BLOCK_SHIFT), BLOCK_BYTES)
        self._entries.update(zip(range(first_block, first_block + count), positions, strict=True))
        self._note_blocks(first_block, count)

    def note_zeros(self, first_block: int, count: int, segment: int) -> None:
        """A record in `segment` made these blocks read as zeros."""
        if segment != self._segment:
            self._open(segment)
        if count == 1:
            self._entries[first_block] = segment << POSITION_SHIFT
            self._note(first_block << _NOTE_SHIFT)
            return
        if count <= ZEROS_EXPANDED_MAX:
            self._entries.update(dict.fromkeys(range(first_block, first_block + count), segment << POSITION_SHIFT))
            self._note_blocks(first_block, count)
            return
        end = first_block + count
        entries = self._entries
        if count <= len(entries):
            for block in range(first_block, end):
                entries.pop(block, None)
        else:
            for block in [b for b in entries if first_block <= b < end]:
                del entries[block]
        self._cover(first_block, end, segment)

    def get(self, block: int) -> int | None:
        """The position of a block's newest bytes (offset 0: zeros), or None: in the image."""
        position = self._get(block)
        if position is None and self._starts:
            i = bisect_right(self._starts, block) - 1
            if i >= 0 and block < self._ends[i]:
                return self._segments[i] << POSITION_SHIFT
        return position

    def runs(self, offset: int, length: int) -> list[Run]:
        """The extent cut into runs that lie together, in order. Byte exact: positions point at the first byte."""
        if length <= 0:
            return []
        first = offset >> BLOCK_SHIFT
        last = (offset + length - 1) >> BLOCK_SHIFT
        if not self._starts:
            if first == last:
                position = self._get(first)
                if position is not None and position & POSITION_MASK:
                    position += offset & _IN_BLOCK
                return [(offset, length, position)]
            if not self._entries:
                return [(offset, length, None)]
        return self._merge(offset, length, first, last)

    def drop_through(self, segment: int) -> None:
        """Forget exactly the blocks whose newest bytes lie in segments up to `segment`: they are in the image now."""
        while not self.drop_some(segment, 1 << 62):
            pass

    def drop_some(self, segment: int, notes_max: int) -> bool:
        """A share of `drop_through`, so that whoever waits for the lock may come between; True when all is done.

        Extents of zeros go first: what lies above one of them is newer, so it must not go before it.
        """
        if self._starts and min(self._segments) <= segment:
            kept = [i for i, number in enumerate(self._segments) if number > segment]
            self._starts = [self._starts[i] for i in kept]
            self._ends = [self._ends[i] for i in kept]
            self._segments = [self._segments[i] for i in kept]
        if self._segment <= segment:
            self._segment = -1
        for number in [n for n in self._noted if n <= segment]:
            notes = self._noted[number]
            self._forget(notes[-notes_max:], (segment + 1) << POSITION_SHIFT)
            if len(notes) > notes_max:
                del notes[-notes_max:]
                return False
            del self._noted[number]
            notes_max -= len(notes)
            if notes_max <= 0:
                return not any(n <= segment for n in self._noted)
        if not self._entries:
            self._entries.clear()
        return True

    def _forget(self, notes: array[int], limit: int) -> None:
        """Drop the entries of noted blocks that lie below position `limit`."""
        entries, get = self._entries, self._get
        for noted in notes:
            first = noted >> _NOTE_SHIFT
            if get(first, limit) < limit:
                del entries[first]
            if noted & _NOTE_MASK:
                for block in range(first + 1, first + (noted & _NOTE_MASK) + 1):
                    if get(block, limit) < limit:
                        del entries[block]

    def _merge(self, offset: int, length: int, first: int, last: int) -> list[Run]:
        runs: list[Run] = []
        end = offset + length
        get = self.get if self._starts else self._get
        start = offset
        place = get(first)
        expected = self._follows(place)
        for block in range(first + 1, last + 1):
            position = get(block)
            if position is None or not position & POSITION_MASK:
                joins = _sort(position) == _sort(place)
            else:
                joins = position == expected
            if not joins:
                at = block << BLOCK_SHIFT
                runs.append((start, at - start, _inside(place, start)))
                start, place = at, position
                expected = self._follows(place)
            elif expected is not None:
                expected += BLOCK_BYTES
        runs.append((start, end - start, _inside(place, start)))
        return runs

    @staticmethod
    def _follows(place: int | None) -> int | None:
        """The position a block must have to go on with one that lies at `place`."""
        return place + BLOCK_BYTES if place is not None and place & POSITION_MASK else None

    def _open(self, segment: int) -> None:
        self._segment = segment
        self._note = self._noted.setdefault(segment, array("Q")).append

    def _note_blocks(self, first: int, count: int) -> None:
        while count > _NOTE_MASK + 1:
            self._note(first << _NOTE_SHIFT | _NOTE_MASK)
            first += _NOTE_MASK + 1
            count -= _NOTE_MASK + 1
        self._note(first << _NOTE_SHIFT | (count - 1))

    def _cover(self, first: int, end: int, segment: int) -> None:
        """Put an extent of zeros over the older ones, cut them where they overlap it, join it with its like."""
        starts, ends, segments = self._starts, self._ends, self._segments
        low = bisect_right(ends, first - 1)
        high = low
        pieces: list[tuple[int, int, int]] = []
        tail: list[tuple[int, int, int]] = []
        while high < len(starts) and starts[high] <= end:
            if segments[high] == segment:
                first, end = min(first, starts[high]), max(end, ends[high])
            else:
                if starts[high] < first:
                    pieces.append((starts[high], min(first, ends[high]), segments[high]))
                if ends[high] > end:
                    tail.append((max(end, starts[high]), ends[high], segments[high]))
            high += 1
        pieces = [piece for piece in [*pieces, (first, end, segment), *tail] if piece[0] < piece[1]]
        starts[low:high] = [piece[0] for piece in pieces]
        ends[low:high] = [piece[1] for piece in pieces]
        segments[low:high] = [piece[2] for piece in pieces]


def _sort(position: int | None) -> int | None:
    """What two neighbours must share to be one run, if they are not bytes in the journal."""
    return None if position is None else position & POSITION_MASK


def _inside(place: int | None, offset: int) -> int | None:
    """The position of the byte at `offset` of the disk, whose block lies at `place`."""
    if place is None or not place & POSITION_MASK:
        return place
    return place + (offset & _IN_BLOCK)
