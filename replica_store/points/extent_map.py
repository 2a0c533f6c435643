"""PURE: which bytes of which log object a disk consists of at an LSN: sorted extents, newest wins (I9).

Records come in the order of the history, in bulk, as arrays. A batch of them is painted: the edges of all extents cut
the disk into elementary pieces, and each piece belongs to the newest record that covers it. Painted batches are
sorted runs; runs of similar size are merged, older below newer, so n records cost O(n log n) and a 4 GiB discard costs
as much as a 4 KiB write. No step holds a Python object for a block or a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

SECTOR_SHIFT = 9
"""Offsets, lengths and payload positions are multiples of 512 bytes."""
ZEROS = 0
"""`ref` of an extent that reads as zeros."""
POSITION_BYTES_END = 1 << 40
"""Payload positions in one log object lie below this: 2^20 records of 2^20 bytes."""
OBJECTS_MAX = (1 << 33) - 1
EXTENT_END_MAX = (1 << 63) - (1 << SECTOR_SHIFT)

_OBJECT_SHIFT = 31
_POSITION_MASK = (1 << _OBJECT_SHIFT) - 1
_BATCH_RECORDS = 1 << 20
_MERGE_EXTENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class ExtentMap:
    """Sorted, disjoint extents `[start, end)` in bytes; `ref` says where the bytes of each begin (see `make_refs`)."""

    start: Int64s
    end: Int64s
    ref: UInt64s

    def __len__(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        """Memory of the three columns."""
        return self.start.nbytes + self.end.nbytes + self.ref.nbytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the disk that lie in an extent."""
        return int((self.end - self.start).sum())

    def between(self, offset: int, end: int) -> slice:
        """Which extents touch `[offset, end)`."""
        first = int(np.searchsorted(self.end, offset, side="right"))
        return slice(first, max(first, int(np.searchsorted(self.start, end, side="left"))))


def make_refs(object_number: int, position: UInt64s) -> UInt64s:
    """References to payload bytes: number of the log object and position (bytes, multiples of 512) in its payload."""
    assert 0 <= object_number < OBJECTS_MAX
    return (position >> np.uint64(SECTOR_SHIFT)) | np.uint64((object_number + 1) << _OBJECT_SHIFT)


def objects_of(ref: UInt64s) -> Int64s:
    """Object numbers of references that are not ZEROS."""
    return (ref >> np.uint64(_OBJECT_SHIFT)).astype(np.int64) - 1


def positions_of(ref: UInt64s) -> Int64s:
    """Payload positions in bytes of references that are not ZEROS."""
    return (ref & np.uint64(_POSITION_MASK)).astype(np.int64) << SECTOR_SHIFT


def empty_map() -> ExtentMap:
    """A disk of which nothing was ever written."""
    return ExtentMap(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))


class MapBuilder:
    """Takes the extents of one disk in the order of the history and ends as its map.

    `base` is the map at an earlier LSN, whose history the added extents continue.
    """

    def __init__(self, base: ExtentMap | None = None, batch_records: int = _BATCH_RECORDS) -> None:
        self._runs = [base] if base is not None and len(base) else []
        self._pending: list[tuple[Int64s, Int64s, UInt64s]] = []
        self._pending_records = 0
        self._batch_records = batch_records

    def add(self, start: Int64s, end: Int64s, ref: UInt64s) -> None:
        """Extents in LSN order, later than all that came before; each `start < end`, in bytes, multiples of 512."""
        if len(start):
            self._pending.append((start, end, ref))
            self._pending_records += len(start)
            if self._pending_records >= self._batch_records:
                self._paint_pending()

    def finish(self, size_bytes: int) -> ExtentMap:
        """The map of the disk, which has `size_bytes` now. What no extent covers reads as zeros."""
        self._paint_pending()
        while len(self._runs) > 1:
            newer = self._runs.pop()
            self._runs[-1] = merge(self._runs[-1], newer, keep_zeros=len(self._runs) > 1)
        whole = self._runs.pop() if self._runs else empty_map()
        return _clip(without_zeros(whole), 0, size_bytes)

    def _paint_pending(self) -> None:
        if not self._pending:
            return
        run = paint(
            np.concatenate([start for start, _, _ in self._pending]),
            np.concatenate([end for _, end, _ in self._pending]),
            np.concatenate([ref for _, _, ref in self._pending]),
        )
        self._pending.clear()
        self._pending_records = 0
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = merge(self._runs.pop(), run, keep_zeros=bool(self._runs))
        self._runs.append(run)


def paint(start: Int64s, end: Int64s, ref: UInt64s) -> ExtentMap:
    """The map of extents that overlap as they like, given in LSN order; zeros stay, as they may cover older runs."""
    assert bool(np.all(start < end))
    edges = np.sort(np.concatenate((start, end)))
    edges = edges[np.concatenate(([True], edges[1:] != edges[:-1]))]
    by_start = np.argsort(start)  # sorted needles make the searches thirty times as fast
    first = np.searchsorted(edges, start[by_start])
    last = np.searchsorted(edges, end[by_start])
    winner = _newest_cover(first, last, by_start.astype(np.int32), len(edges) - 1)
    covered = np.flatnonzero(winner >= 0)
    winner = winner[covered]
    piece_start = edges[covered]
    return _coalesce(piece_start, edges[covered + 1], _advance(ref[winner], piece_start - start[winner]))


def merge(older: ExtentMap, newer: ExtentMap, *, keep_zeros: bool) -> ExtentMap:
    """Both maps as one: `newer` wherever it has an extent, else `older`. Memory beside input and output is bounded."""
    larger = older if len(older) >= len(newer) else newer
    cuts = larger.start[_MERGE_EXTENTS::_MERGE_EXTENTS].tolist()
    parts: list[ExtentMap] = []
    for low, high in zip([0, *cuts], [*cuts, EXTENT_END_MAX], strict=True):
        part = _merge_part(_clip(older, low, high), _clip(newer, low, high))
        parts.append(part if keep_zeros else without_zeros(part))
    if len(parts) == 1:
        return parts[0]
    return ExtentMap(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.end for part in parts]),
        np.concatenate([part.ref for part in parts]),
    )


def without_zeros(whole: ExtentMap) -> ExtentMap:
    """The same disk when nothing older lies below: absent extents read as zeros too."""
    keep = whole.ref != ZEROS
    return whole if keep.all() else ExtentMap(whole.start[keep], whole.end[keep], whole.ref[keep])


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


def _merge_part(older: ExtentMap, newer: ExtentMap) -> ExtentMap:
    if not len(older) or not len(newer):
        return older if len(older) else newer
    # Newer extents that overlap older one i are those from after[i] up to, not including, before[i].
    after = np.searchsorted(newer.end, older.start, side="right")
    before = np.searchsorted(newer.start, older.end, side="left")
    cut = np.flatnonzero(after < before)
    kept = np.ones(len(older), np.bool_)
    kept[cut] = False
    # An older extent under k newer ones leaves up to k + 1 pieces: between the end of one and the start of the next.
    counts = before[cut] - after[cut] + 1
    owner = np.repeat(cut, counts)
    gap = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + after[owner]
    gap_start = older.start[owner]
    inner = gap > after[owner]
    gap_start[inner] = newer.end[gap[inner] - 1]
    gap_end = older.end[owner]
    inner = gap < before[owner]
    gap_end[inner] = newer.start[gap[inner]]
    real = gap_start < gap_end
    owner, gap_start, gap_end = owner[real], gap_start[real], gap_end[real]
    gap_ref = _advance(older.ref[owner], gap_start - older.start[owner])
    start = np.concatenate((older.start[kept], gap_start, newer.start))
    order = np.argsort(start, kind="stable")
    end = np.concatenate((older.end[kept], gap_end, newer.end))
    ref = np.concatenate((older.ref[kept], gap_ref, newer.ref))
    return _coalesce(start[order], end[order], ref[order])


def _advance(ref: UInt64s, by_bytes: Int64s) -> UInt64s:
    """References `by_bytes` further on; zeros stay zeros."""
    return np.where(ref == ZEROS, ref, ref + (by_bytes.astype(np.uint64) >> np.uint64(SECTOR_SHIFT)))


def _coalesce(start: Int64s, end: Int64s, ref: UInt64s) -> ExtentMap:
    """Join neighbours whose bytes also follow one another in the same payload, and neighbouring zeros."""
    follows = (start[1:] == end[:-1]) & (ref[1:] == _advance(ref[:-1], end[:-1] - start[:-1]))
    if not follows.any():
        return ExtentMap(start, end, ref)
    heads = np.concatenate(([True], ~follows))
    tails = np.concatenate((~follows, [True]))
    return ExtentMap(start[heads], end[tails], ref[heads])


def _clip(whole: ExtentMap, low: int, high: int) -> ExtentMap:
    """The part in `[low, high)`; shares memory where nothing is cut."""
    chosen = whole.between(low, high)
    start, end, ref = whole.start[chosen], whole.end[chosen], whole.ref[chosen]
    if len(start) and int(start[0]) < low:
        ref = np.concatenate((_advance(ref[:1], np.array([low]) - start[:1]), ref[1:]))
        start = np.concatenate((np.array([low]), start[1:]))
    if len(end) and int(end[-1]) > high:
        end = np.concatenate((end[:-1], np.array([high])))
    return ExtentMap(start, end, ref)
