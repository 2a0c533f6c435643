"""PURE: from the extents of records, in the order of the history, to the map they make: the newest wins (I9).

Most extents of a batch meet no other: sorted by their start they are the map already. The few that overlap are painted:
their edges cut the disk into elementary pieces, and each piece belongs to the newest record that covers it. So n
records cost O(n log n), whatever overlaps, and a 4 GiB discard costs as much as a 4 KiB write.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from replica_store.points.extent_map import (
    SECTOR_SHIFT,
    ExtentMap,
    Int64s,
    UInt64s,
    advance,
    coalesce,
    empty_map,
)


class MapPainter:
    """Takes the extents of one disk in the order of the history and ends as their map. Zeros stay in it: they may lie
    over older content."""

    def __init__(self) -> None:
        self._parts: list[tuple[Int64s, Int64s, UInt64s]] = []

    def add(self, start: Int64s, end: Int64s, ref: UInt64s) -> None:
        """Extents in LSN order, later than all that came before; each `start < end`, in bytes, multiples of 512."""
        if len(start):
            self._parts.append((start, end, ref))

    def finish(self) -> ExtentMap:
        """The map of all that was added."""
        if not self._parts:
            return empty_map()
        start, end, ref = (np.concatenate(columns) for columns in zip(*self._parts, strict=True))
        self._parts.clear()
        return paint(start, end, ref)


def paint(start: Int64s, end: Int64s, ref: UInt64s) -> ExtentMap:
    """The map of extents that overlap as they like, given in LSN order; zeros stay, as they may cover older maps."""
    assert bool(np.all(start < end))
    order = _by_start(start)
    first, last = start[order], end[order]
    hidden = (first[:-1] == first[1:]) & (last[:-1] <= last[1:])  # under the next, which is newer: written again
    if hidden.any():
        shown = np.append(~hidden, True)
        order, first, last = order[shown], first[shown], last[shown]
    apart = first[1:] >= np.maximum.accumulate(last)[:-1]
    alone = np.append(True, apart) & np.append(apart, True)
    if alone.all():
        return coalesce(first, last, ref[order])
    others = np.sort(order[~alone])
    mixed = _paint_overlapping(start[others], end[others], ref[others])
    first = np.concatenate((first[alone], mixed.start))
    by_start = np.argsort(first, kind="stable")  # two sorted halves: little to do
    last = np.concatenate((last[alone], mixed.end))
    refs = np.concatenate((ref[order[alone]], mixed.ref))
    return coalesce(first[by_start], last[by_start], refs[by_start])


def _by_start(start: Int64s) -> npt.NDArray[np.intp]:
    """The order by start, and in it by LSN. Sorting whole numbers that hold both takes a tenth of a stable argsort."""
    bits = max(1, (len(start) - 1).bit_length())
    if int(start.max()) >> (SECTOR_SHIFT + 64 - bits):
        return np.argsort(start, kind="stable")
    keys = (start.astype(np.uint64) >> np.uint64(SECTOR_SHIFT)) << np.uint64(bits)
    keys |= np.arange(len(start), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64((1 << bits) - 1)).astype(np.intp)


def _paint_overlapping(start: Int64s, end: Int64s, ref: UInt64s) -> ExtentMap:
    edges = np.sort(np.concatenate((start, end)))
    edges = edges[np.concatenate(([True], edges[1:] != edges[:-1]))]
    by_start = np.argsort(start)  # sorted needles make the searches thirty times as fast
    first = np.searchsorted(edges, start[by_start])
    last = np.searchsorted(edges, end[by_start])
    winner = _newest_cover(first, last, by_start.astype(np.int32), len(edges) - 1)
    covered = np.flatnonzero(winner >= 0)
    winner = winner[covered]
    piece_start = edges[covered]
    return coalesce(piece_start, edges[covered + 1], advance(ref[winner], piece_start - start[winner]))


def _newest_cover(
    first: npt.NDArray[np.intp], last: npt.NDArray[np.intp], number: npt.NDArray[np.int32], count: int
) -> npt.NDArray[np.int32]:
    """For each of `count` pieces the greatest `number[i]` with `first[i] <= piece < last[i]`, or -1.

    A sparse table filled backwards: extent i is two overlapping windows of a power of two pieces; from the widest to
    the narrowest, each window hands its value down to its halves. O(count log(widest extent)), whatever the overlaps.
    """
    newest = np.full(count, -1, np.int32)
    level = np.frexp((last - first).astype(np.float64))[1] - 1
    for k in range(int(level.max()), -1, -1):
        chosen = level == k
        at = number[chosen]
        np.maximum.at(newest, first[chosen], at)
        if k > 0:
            np.maximum.at(newest, last[chosen] - (1 << k), at)
            half = 1 << (k - 1)
            np.maximum(newest[half:], newest[:-half].copy(), out=newest[half:])
    return newest
