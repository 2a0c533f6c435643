"""What one round of records leaves on each disk: the newest bytes of every block, and the extents that become zeros.

Pure bookkeeping, no I/O. Zeros go to the image first and the blocks over them, because a block that was written and
then zeroed is not among the blocks any more. Payloads are views of the journal's buffer and are not copied.

All records of a disk are looked at together, as columns: each extent with bytes is cut into blocks, the blocks are
sorted, and of each the last one stays. Extents of zeros are never cut, they may be as long as a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.journal.columns import Columns
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT

BUFFERS_MAX = 1024
"""IOV_MAX of Linux: buffers in one write."""

Integers = npt.NDArray[np.int64]


class _Noted(NamedTuple):
    """Some of a disk's records whose payloads lie in one view. `order` counts the round's records from 0."""

    view: memoryview
    order: Integers
    offset: Integers
    length: Integers
    place: Integers
    """Of the payload in the view."""


class _Blocks(NamedTuple):
    """One row a block. `place`: of its bytes in the views, laid end to end; `length` is less than a whole block only
    at the end of a disk."""

    number: Integers
    order: Integers
    place: Integers
    length: Integers

    def of(self, chosen: npt.NDArray[np.bool_] | Integers) -> _Blocks:
        return _Blocks(*(column[chosen] for column in self))


class DiskRound:
    """One disk's share of a round. Extents are whole blocks, the disk's last one may be short."""

    def __init__(self) -> None:
        self._written: list[_Noted] = []
        self._zeroed: list[_Noted] = []
        self._count = 0
        self.end = 0
        """First byte behind all extents noted. The rest can be asked for if the disk has so many."""

    def note(self, records: Columns, chosen: npt.NDArray[np.bool_]) -> None:
        """The chosen ones are this disk's. Later records win; all of these are later than those noted before."""
        headers = records.headers
        for noted, mask in ((self._written, records.carries_bytes()), (self._zeroed, records.reads_as_zeros())):
            which = np.flatnonzero(chosen & mask)
            if len(which):
                offset, length = headers["offset"][which], headers["length"][which]
                self.end = max(self.end, int((offset + length).max()))
                extents = (offset.astype(np.int64), length.astype(np.int64))
                noted.append(_Noted(records.view, which + self._count, *extents, records.payload_at[which]))
        self._count += len(records)

    def writes(self) -> Iterator[tuple[int, list[memoryview]]]:
        """`(offset, buffers)` in block order, adjacent blocks together, at most BUFFERS_MAX buffers each."""
        if not self._written:
            return
        blocks = self._newest()
        if not len(blocks.number):
            return
        is_next = (blocks.number[1:] == blocks.number[:-1] + 1) & (blocks.length[:-1] == BLOCK_BYTES)
        goes_on = is_next & (blocks.place[1:] == blocks.place[:-1] + BLOCK_BYTES)
        buffer_at, run_at = _starts(goes_on), _starts(is_next)
        buffers = self._views(blocks.place[buffer_at], np.add.reduceat(blocks.length, buffer_at))
        firsts = np.searchsorted(buffer_at, run_at).tolist()
        offsets = (blocks.number[run_at] << BLOCK_SHIFT).tolist()
        for offset, first, end in zip(offsets, firsts, [*firsts[1:], len(buffers)], strict=True):
            at = offset
            for start in range(first, end, BUFFERS_MAX):
                together = buffers[start : min(end, start + BUFFERS_MAX)]
                yield at, together
                at += sum(map(len, together)) if end - first > BUFFERS_MAX else 0

    def punches(self) -> Iterator[tuple[int, int]]:
        """`(offset, length)` of extents that read as zeros unless written, merged, in order."""
        start = end = -1
        zeros: list[tuple[int, int]] = []
        for noted in self._zeroed:
            zeros += zip(noted.offset.tolist(), noted.length.tolist(), strict=True)
        for offset, length in sorted(zeros):
            if offset > end:
                if end > start:
                    yield start, end - start
                start, end = offset, offset + length
            else:
                end = max(end, offset + length)
        if end > start:
            yield start, end - start

    def _newest(self) -> _Blocks:
        """Of each block that has bytes at the end of the round, the row that holds them; in block order."""
        blocks = _blocks_of(self._written)
        blocks = blocks.of(np.argsort(blocks.number, kind="stable"))  # later rows of a block stay the later ones
        blocks = blocks.of(_is_last_of_its_block(blocks.number))
        zeroed_at = np.full(len(blocks.number), -1)
        for noted in self._zeroed:
            first = np.searchsorted(blocks.number, noted.offset >> BLOCK_SHIFT).tolist()
            end = np.searchsorted(blocks.number, noted.offset + noted.length + BLOCK_BYTES - 1 >> BLOCK_SHIFT).tolist()
            for at, until, order in zip(first, end, noted.order.tolist(), strict=True):
                zeroed_at[at:until] = order
        return blocks.of(blocks.order > zeroed_at) if self._zeroed else blocks

    def _views(self, place: Integers, length: Integers) -> list[memoryview]:
        begins = _begins_of(self._written)
        which = np.searchsorted(begins, place, side="right") - 1
        start = place - begins[which]
        views = [noted.view for noted in self._written]
        rows = zip(which.tolist(), start.tolist(), (start + length).tolist(), strict=True)
        return [views[i][a:b] for i, a, b in rows]


def _blocks_of(written: list[_Noted]) -> _Blocks:
    """All blocks of all extents, in LSN order."""
    begins = _begins_of(written)
    order = np.concatenate([noted.order for noted in written])
    length = np.concatenate([noted.length for noted in written])
    first = np.concatenate([noted.offset for noted in written]) >> BLOCK_SHIFT
    place = np.concatenate([noted.place + begin for noted, begin in zip(written, begins, strict=True)])
    counts = length + BLOCK_BYTES - 1 >> BLOCK_SHIFT
    if counts.max() == 1:
        return _Blocks(first, order, place, length)
    extent = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(extent)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = nth << BLOCK_SHIFT
    return _Blocks(
        first[extent] + nth, order[extent], place[extent] + begin, np.minimum(length[extent] - begin, BLOCK_BYTES)
    )


def _begins_of(written: list[_Noted]) -> Integers:
    """Where the views would begin if they lay end to end. A payload has its header before it, so none touches another
    view's."""
    return np.cumsum([0, *(len(noted.view) for noted in written[:-1])])


def _is_last_of_its_block(numbers: Integers) -> npt.NDArray[np.bool_]:
    """For ascending block numbers."""
    return np.append(numbers[1:] != numbers[:-1], True)


def _starts(joined: npt.NDArray[np.bool_]) -> Integers:
    """Rows that are not joined to the one before them. `joined[i]`: row i + 1 is."""
    return np.flatnonzero(np.append(True, ~joined))
