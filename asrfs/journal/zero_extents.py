"""Extents of blocks that read as zeros: disjoint, ascending, 24 bytes each. No lock: who shares them guards them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from asrfs.format.segment import POSITION_SHIFT


class ZeroExtents:
    """Columns: first block, block behind the last, segment whose record said so."""

    __slots__ = ("ends", "segments", "starts")

    def __init__(self) -> None:
        self.starts = array("Q")
        self.ends = array("Q")
        self.segments = array("Q")

    @classmethod
    def of_segment(cls, segment: int, starts: array[int], ends: array[int]) -> ZeroExtents:
        """Extents that records of one segment made."""
        made = cls()
        made.starts, made.ends = starts, ends
        made.segments = array("Q", (segment,)) * len(starts)
        return made

    def __len__(self) -> int:
        return len(self.starts)

    def find(self, block: int) -> int | None:
        """The position (offset 0) of a block that reads as zeros, else None."""
        i = bisect_right(self.starts, block) - 1
        if i >= 0 and block < self.ends[i]:
            return self.segments[i] << POSITION_SHIFT
        return None

    def overlapping(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """`(first block, block behind the last, position)` of what lies in `[first, end)`, cut to it, ascending."""
        i = bisect_right(self.ends, first)
        while i < len(self.starts) and self.starts[i] < end:
            yield max(first, self.starts[i]), min(end, self.ends[i]), self.segments[i] << POSITION_SHIFT
            i += 1

    def cover(self, first: int, end: int, segment: int) -> None:
        """Put an extent over the older ones, cut them where they overlap it, join it with its like."""
        starts, ends, segments = self.starts, self.ends, self.segments
        low = high = bisect_left(ends, first)
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
        starts[low:high] = array("Q", [piece[0] for piece in pieces])
        ends[low:high] = array("Q", [piece[1] for piece in pieces])
        segments[low:high] = array("Q", [piece[2] for piece in pieces])

    def laid_over(self, older: ZeroExtents) -> ZeroExtents:
        """These extents, and of the older ones what they leave of them. Takes as long as there are extents."""
        made = ZeroExtents()
        i = after = 0
        for first, end, segment in zip(self.starts, self.ends, self.segments, strict=True):
            i = made._take(older, i, after, first)
            made._append(first, end, segment)
            after = end
        made._take(older, i, after, 1 << 64)
        return made

    def _take(self, older: ZeroExtents, i: int, low: int, high: int) -> int:
        """Append what lies in `[low, high)` of the older extents from the i-th on; the first that goes beyond it."""
        starts, ends, segments = older.starts, older.ends, older.segments
        while i < len(starts) and starts[i] < high:
            first, end = max(starts[i], low), min(ends[i], high)
            if first < end:
                self._append(first, end, segments[i])
            if ends[i] > high:
                break
            i += 1
        return i

    def _append(self, first: int, end: int, segment: int) -> None:
        if self.ends and self.ends[-1] == first and self.segments[-1] == segment:
            self.ends[-1] = end
            return
        self.starts.append(first)
        self.ends.append(end)
        self.segments.append(segment)

    def covered(self, blocks: Sequence[int]) -> Iterator[int]:
        """Those of some ascending blocks that lie in an extent."""
        if blocks:
            for first, end, _ in self.overlapping(blocks[0], blocks[-1] + 1):
                low = bisect_left(blocks, first)
                yield from blocks[low : bisect_left(blocks, end, low)]
