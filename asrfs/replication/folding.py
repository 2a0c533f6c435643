"""PURE: what is left of consecutive records when the blocks that later ones of them overwrite are left out.

The content of every disk behind the last record is the same with what is left as with all of them; in between there is
no state. A record stays one piece: blocks that were overwritten go from its ends, not from its middle. Records without
bytes stay as they are: they cost nothing to send. Only whole blocks hide others and are hidden, so no disk that
becomes longer or shorter within can make a difference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.format.record import CARRIES_EXTENT_BYTES
from asrfs.journal.columns import Table
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT

_SLOT_SHIFT = 48
_OFFSET_END = 1 << (_SLOT_SHIFT + BLOCK_SHIFT)
_CARRIES = sorted(int(kind) for kind in CARRIES_EXTENT_BYTES)

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


class Kept(NamedTuple):
    """The records that are left, by their number among all, ascending; `offset`, `length`: their extents now, and
    `skipped`: how many bytes went from the beginning."""

    number: Int64s
    offset: Int64s
    length: Int64s
    skipped: Int64s


class _Blocks(NamedTuple):
    """The whole blocks that records write: of which record, the how manieth of it, and which block of which slot."""

    record: Int64s
    nth: Int64s
    key: UInt64s


class Room:
    """How many consecutive records a stretch can stand for, in whose whole blocks at most `bytes_max` are left, and of
    which at most `records_max` are."""

    def __init__(self, bytes_max: int, records_max: int) -> None:
        self._blocks_max = max(1, bytes_max // BLOCK_BYTES)
        self._records_max = records_max
        self._seen: UInt64s = np.empty(0, np.uint64)
        self._others = 0
        self._is_empty = True
        self.is_full = False

    def add(self, headers: Table) -> int:
        """Take these in, up to the first that does not fit any more; how many were taken. The first always fits."""
        blocks = _blocks_of(headers)
        key, first_at = np.unique(blocks.key, return_index=True)
        first_at = first_at[~np.isin(key, self._seen, assume_unique=True)]
        new = np.bincount(blocks.record[first_at], minlength=len(headers))
        total = len(self._seen) + np.cumsum(new)
        is_even = (np.bincount(blocks.record, minlength=len(headers)) > 0) & (headers["length"] % BLOCK_BYTES == 0)
        others = self._others + np.cumsum(~is_even)  # those stay, whatever comes
        fits = (total <= self._blocks_max) & (total + others <= self._records_max)
        taken = len(headers) if fits.all() else int(np.argmin(fits))
        taken = max(taken, 1) if self._is_empty else taken
        if taken < len(headers):
            self.is_full = True
            blocks = _blocks_of(headers[:taken])
        self._seen = np.union1d(self._seen, blocks.key)
        self._others = int(others[taken - 1]) if taken else self._others
        self._is_empty = False
        return taken


def fold(headers: Table) -> Kept:
    """What is left of these records, which follow one another. The last one is."""
    blocks = _blocks_of(headers)
    offset, length = headers["offset"].astype(np.int64), headers["length"].astype(np.int64)
    is_hidden = np.bincount(blocks.record, minlength=len(headers)) > 0
    is_hidden &= length % BLOCK_BYTES == 0  # else a part of a block is left in any case
    start, end = offset.copy(), offset + length
    shown = _newest(blocks.key)
    if len(shown):
        record, first_at = np.unique(blocks.record[shown], return_index=True)
        last_at = np.append(first_at[1:], len(shown)) - 1
        start[record] = offset[record] + blocks.nth[shown[first_at]] * BLOCK_BYTES
        is_even = is_hidden[record]
        end[record[is_even]] = offset[record[is_even]] + (blocks.nth[shown[last_at[is_even]]] + 1) * BLOCK_BYTES
        is_hidden[record] = False
    number = np.flatnonzero(~is_hidden)
    return Kept(number, start[number], (end - start)[number], (start - offset)[number])


def _newest(key: UInt64s) -> Int64s:
    """Places, ascending, of those that do not come again."""
    order = np.argsort(key, kind="stable")
    in_order = key[order]
    is_last = np.append(in_order[1:] != in_order[:-1], True) if len(key) else np.empty(0, np.bool_)
    return np.sort(order[is_last])


def _blocks_of(headers: Table) -> _Blocks:
    offset = headers["offset"].astype(np.int64)
    carries = np.isin(headers["kind"], _CARRIES) & (offset % BLOCK_BYTES == 0) & (offset < _OFFSET_END >> 1)
    count = np.where(carries, headers["length"].astype(np.int64) >> BLOCK_SHIFT, 0)
    record = np.repeat(np.arange(len(headers), dtype=np.int64), count)
    nth = np.arange(len(record), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
    key = headers["slot"].astype(np.uint64)[record] << np.uint64(_SLOT_SHIFT)
    key |= (offset[record] >> BLOCK_SHIFT).astype(np.uint64) + nth.astype(np.uint64)
    return _Blocks(record, nth, key)
