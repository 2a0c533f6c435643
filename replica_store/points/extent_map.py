"""PURE: which bytes of which log object a disk consists of: sorted extents, and laying one map of them over another.

Maps are columns and their operations are numpy's on whole columns: no step holds a Python object for a block or a
record. What makes maps of records is in `painting`, what reads through several of them in `layers`.
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
        return (int(self.end.sum()) - int(self.start.sum())) % (1 << 64)  # sums may pass 2^63, their difference not

    def between(self, offset: int, end: int) -> slice:
        """Which extents touch `[offset, end)`."""
        first = int(np.searchsorted(self.end, offset, side="right"))
        return slice(first, max(first, int(np.searchsorted(self.start, end, side="left"))))


def make_refs(object_number: int, position: UInt64s) -> UInt64s:
    """References to payload bytes: number of the log object and position (bytes, multiples of 512) in its payload."""
    assert 0 <= object_number < OBJECTS_MAX
    return (position >> np.uint64(SECTOR_SHIFT)) | np.uint64((object_number + 1) << _OBJECT_SHIFT)


def first_ref(object_number: int) -> np.uint64:
    """The least reference to payload bytes of this object."""
    return np.uint64((object_number + 1) << _OBJECT_SHIFT)


def objects_of(ref: UInt64s) -> Int64s:
    """Object numbers of references that are not ZEROS."""
    numbers: Int64s = (ref >> np.uint64(_OBJECT_SHIFT)).view(np.int64)
    numbers -= 1
    return numbers


def positions_of(ref: UInt64s) -> Int64s:
    """Payload positions in bytes of references that are not ZEROS."""
    return (ref & np.uint64(_POSITION_MASK)).astype(np.int64) << SECTOR_SHIFT


def split_refs(ref: UInt64s) -> tuple[UInt64s, UInt64s]:
    """One more than the object's number, 0 for ZEROS, and the position in sectors."""
    return ref >> np.uint64(_OBJECT_SHIFT), ref & np.uint64(_POSITION_MASK)


def join_refs(number: UInt64s, position: UInt64s) -> UInt64s:
    """References of what `split_refs` gave."""
    ref = number << np.uint64(_OBJECT_SHIFT)
    ref |= position
    return ref


def renumbered(ref: UInt64s, by: int) -> UInt64s:
    """The same references when the objects' numbers are `by` higher; zeros stay zeros."""
    if not by:
        return ref
    return np.where(ref == ZEROS, ref, ref + np.uint64(by << _OBJECT_SHIFT))


def empty_map() -> ExtentMap:
    """A disk of which nothing was ever written."""
    return ExtentMap(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))


def merge(older: ExtentMap, newer: ExtentMap, *, keep_zeros: bool) -> ExtentMap:
    """Both maps as one: `newer` wherever it has an extent, else `older`. Memory beside input and output is bounded."""
    larger = older if len(older) >= len(newer) else newer
    cuts = larger.start[_MERGE_EXTENTS::_MERGE_EXTENTS].tolist()
    parts: list[ExtentMap] = []
    for low, high in zip([0, *cuts], [*cuts, EXTENT_END_MAX], strict=True):
        part = _merge_part(clip(older, low, high), clip(newer, low, high))
        parts.append(part if keep_zeros else without_zeros(part))
    if len(parts) == 1:
        return parts[0]
    return ExtentMap(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.end for part in parts]),
        np.concatenate([part.ref for part in parts]),
    )


def subtract(older: ExtentMap, newer: ExtentMap) -> ExtentMap:
    """What of `older` still shows when `newer` lies over it. Costs little where they do not meet."""
    if not len(older) or not len(newer):
        return older
    newer = clip(newer, int(older.start[0]), int(older.end[-1]))
    if not len(newer):
        return older
    kept, left = _uncovered(older, newer)
    if not len(left):
        return older if kept.all() else ExtentMap(older.start[kept], older.end[kept], older.ref[kept])
    start = np.concatenate((older.start[kept], left.start))
    order = np.argsort(start, kind="stable")
    end, ref = np.concatenate((older.end[kept], left.end)), np.concatenate((older.ref[kept], left.ref))
    return ExtentMap(start[order], end[order], ref[order])


def without_zeros(whole: ExtentMap) -> ExtentMap:
    """The same disk when nothing older lies below: absent extents read as zeros too."""
    keep = whole.ref != ZEROS
    return whole if keep.all() else ExtentMap(whole.start[keep], whole.end[keep], whole.ref[keep])


def _merge_part(older: ExtentMap, newer: ExtentMap) -> ExtentMap:
    if not len(older) or not len(newer):
        return older if len(older) else newer
    kept, left = _uncovered(older, newer)
    start = np.concatenate((older.start[kept], left.start, newer.start))
    order = np.argsort(start, kind="stable")
    end = np.concatenate((older.end[kept], left.end, newer.end))
    ref = np.concatenate((older.ref[kept], left.ref, newer.ref))
    return coalesce(start[order], end[order], ref[order])


def _uncovered(older: ExtentMap, newer: ExtentMap) -> tuple[npt.NDArray[np.bool_], ExtentMap]:
    """What of `older` lies under no extent of `newer`: a mark for each extent that is untouched, and the pieces that
    are left of the others."""
    # Newer extents that overlap older one i are those from after[i] up to, not including, before[i].
    after = np.searchsorted(newer.end, older.start, side="right")
    before = np.searchsorted(newer.start, older.end, side="left")
    kept = after >= before
    cut = np.flatnonzero(~kept)
    after, before = after[cut], before[cut]
    # An older extent under k newer ones leaves up to k + 1 pieces: between the end of one and the start of the next.
    counts = before - after + 1
    which = np.repeat(np.arange(len(cut)), counts)
    owner = cut[which]
    gap = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + after[which]
    gap_start = older.start[owner]
    inner = gap > after[which]
    gap_start[inner] = newer.end[gap[inner] - 1]
    gap_end = older.end[owner]
    inner = gap < before[which]
    gap_end[inner] = newer.start[gap[inner]]
    real = gap_start < gap_end
    owner, gap_start, gap_end = owner[real], gap_start[real], gap_end[real]
    return kept, ExtentMap(gap_start, gap_end, advance(older.ref[owner], gap_start - older.start[owner]))


def advance(ref: UInt64s, by_bytes: Int64s) -> UInt64s:
    """References `by_bytes` further on; zeros stay zeros."""
    return np.where(ref == ZEROS, ref, ref + (by_bytes.astype(np.uint64) >> np.uint64(SECTOR_SHIFT)))


def coalesce(start: Int64s, end: Int64s, ref: UInt64s) -> ExtentMap:
    """Join neighbours whose bytes also follow one another in the same payload, and neighbouring zeros."""
    follows = (start[1:] == end[:-1]) & (ref[1:] == advance(ref[:-1], end[:-1] - start[:-1]))
    if not follows.any():
        return ExtentMap(start, end, ref)
    heads = np.concatenate(([True], ~follows))
    tails = np.concatenate((~follows, [True]))
    return ExtentMap(start[heads], end[tails], ref[heads])


def clip(whole: ExtentMap, low: int, high: int) -> ExtentMap:
    """The part in `[low, high)`; shares memory where nothing is cut."""
    chosen = whole.between(low, high)
    start, end, ref = whole.start[chosen], whole.end[chosen], whole.ref[chosen]
    if len(start) and int(start[0]) < low:
        ref = np.concatenate((advance(ref[:1], np.array([low]) - start[:1]), ref[1:]))
        start = np.concatenate((np.array([low]), start[1:]))
    if len(end) and int(end[-1]) > high:
        end = np.concatenate((end[:-1], np.array([high])))
    return ExtentMap(start, end, ref)
