"""What a store lacks and no record will bring any more: a bit for each chunk of 64 KiB of each disk. Pure.

Two MiB for each TiB of a disk, as far as its last chunk that was ever marked. A chunk that is marked for nothing costs
64 KiB of traffic; one that should be marked and is not is lost to the replica: so marks are set generously, and taken
back only when a durable record carries the chunk's content (I4).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import DiskRecord
from asrfs.model.positions import Cursor

CHUNK_SHIFT = 16
assert CHUNK_BYTES == 1 << CHUNK_SHIFT
GAPS_MAX = 128
_WINDOW_BYTES = 4096
"""Of a bitmap, looked at in one go: 2 GiB of a disk."""
_LONG_CHUNKS = 64
"""Extents of so many chunks are set by themselves, shorter ones together."""

Bits = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class Reason(enum.IntFlag):
    """Why chunks of a disk are to be sent, and what was ordered for them."""

    INITIAL = 1
    """The content its image was adopted with is copied for the first time."""
    GIVEN_UP = 2
    """Records were given up."""
    DIFFERS = 4
    """Comparing has found a difference."""
    UNREAD = 8
    """Its adopted image has not been looked at yet: what has content in it will be marked."""
    NOW = 16
    """Somebody wants it healed whatever the time of the day."""
    UNKNOWN = 32
    """What of it is missing is not known, because the map was lost: comparing will say."""
    REJOINED = 64
    """Host and store went on in a new epoch, and it has not been compared yet: anything may differ."""


TO_COMPARE = Reason.UNKNOWN | Reason.REJOINED
"""What of the disk is missing is found out by comparing only."""


class Gap(NamedTuple):
    """The store never has the states behind `after_lsn` up to, not including, `until_lsn`; 0: it is still open."""

    after_lsn: int
    until_lsn: int = 0

    def contains(self, lsn: int) -> bool:
        return self.after_lsn < lsn and (not self.until_lsn or lsn < self.until_lsn)


class GivenUp(NamedTuple):
    """Records `since_lsn + 1` to `through` were given up: their extents are marked, they need not be kept nor sent.

    `disks`: each disk as it was at `through`. `gaps`: the newest there were, oldest first, with the one that is open.
    """

    since_lsn: int = 0
    through: Cursor = Cursor()
    disks: tuple[DiskRecord, ...] = ()
    gaps: tuple[Gap, ...] = ()

    def covers(self, lsn: int) -> bool:
        """Whether a store that has everything up to `lsn` can be brought to `through` by the map alone."""
        return self.since_lsn <= lsn < self.through.lsn

    def needed_behind(self, acknowledged: Cursor) -> Cursor:
        """The place behind which records are still needed for a store that has acknowledged so much (I4)."""
        return self.through if self.covers(acknowledged.lsn) else acknowledged

    def known_from(self, lsn: int) -> GivenUp:
        """Of no store that has less than everything up to `lsn`."""
        return self._replace(since_lsn=min(max(self.since_lsn, lsn), self.through.lsn))

    @property
    def is_open(self) -> bool:
        return bool(self.gaps) and not self.gaps[-1].until_lsn

    def is_lost(self, lsn: int) -> bool:
        """Whether the store will never have this state of the machine."""
        return any(gap.contains(lsn) for gap in self.gaps)

    def opened(self, after_lsn: int) -> GivenUp:
        """With a gap that is open: the one there is, or one that begins here."""
        return self if self.is_open else self._replace(gaps=(*self.gaps, Gap(after_lsn))[-GAPS_MAX:])

    def rejoined(self, store_lsn: int, common_lsn: int, through: Cursor, disks: tuple[DiskRecord, ...]) -> GivenUp:
        """Everything the store has not got, which is at `store_lsn` of another history, up to `through`. Both histories
        are the same up to `common_lsn`: later states of this host never came to the store."""
        before = tuple(gap for gap in self.gaps if gap.until_lsn and gap.after_lsn < common_lsn)
        after_lsn = min(self.gaps[-1].after_lsn, common_lsn) if self.is_open else common_lsn
        return GivenUp(store_lsn, through, disks, (*before, Gap(after_lsn))[-GAPS_MAX:])

    def closed(self, until_lsn: int) -> GivenUp:
        """With no gap open behind `until_lsn`."""
        if not self.is_open:
            return self
        return self._replace(gaps=(*self.gaps[:-1], self.gaps[-1]._replace(until_lsn=until_lsn)))


class DirtyMap:
    """A disk is in the map from `enter` to `forget`, marked or not: its content at the store is not trusted."""

    def __init__(self) -> None:
        self._bits: dict[int, Bits] = {}
        self._reasons: dict[int, Reason] = {}

    # ---- disks ----

    def slots(self) -> list[int]:
        return sorted(self._reasons)

    def __contains__(self, slot: int) -> bool:
        return slot in self._reasons

    def reasons(self, slot: int) -> Reason:
        """None of them for a disk that is not in the map."""
        return self._reasons.get(slot, Reason(0))

    def enter(self, slot: int, reasons: Reason) -> None:
        """Take a disk in, or add to its reasons."""
        self._reasons[slot] = self.reasons(slot) | reasons
        self._bits.setdefault(slot, np.zeros(0, np.uint8))

    def settle(self, slot: int, reasons: Reason) -> None:
        """These reasons hold no more."""
        self._reasons[slot] = self.reasons(slot) & ~reasons

    def forget(self, slot: int) -> None:
        """The store has the disk, or nobody wants it any more."""
        self._reasons.pop(slot, None)
        self._bits.pop(slot, None)

    # ---- chunks ----

    def mark(self, slot: int, offset: int, length: int) -> None:
        """Every chunk that the extent touches, of a disk that is in the map."""
        self.mark_all(slot, np.array([offset], np.int64), np.array([length], np.int64))

    def mark_all(self, slot: int, offsets: Numbers, lengths: Numbers) -> None:
        """As `mark`, for many extents of one disk; none has the length 0."""
        if not len(offsets):
            return
        first, last = offsets >> CHUNK_SHIFT, offsets + lengths - 1 >> CHUNK_SHIFT
        bits = self._room(slot, int(last.max()))
        is_long = last - first >= _LONG_CHUNKS
        for start, end in zip(first[is_long].tolist(), last[is_long].tolist(), strict=True):
            _set(bits, start, end + 1)
        first, last = first[~is_long], last[~is_long]
        while len(first):  # the first chunk of each, then the second of those that have one, …
            chunks = np.unique(first)
            np.bitwise_or.at(bits, chunks >> 3, _bit_of(chunks))
            more = first < last
            first, last = first[more] + 1, last[more]

    def clear(self, slot: int, offset: int, length: int) -> None:
        """Every chunk that the extent touches: all of each is in it, or behind the disk's end."""
        bits = self._bits[slot]
        end = min((offset + length - 1 >> CHUNK_SHIFT) + 1, len(bits) * 8)
        if offset >> CHUNK_SHIFT < end:
            _set(bits, offset >> CHUNK_SHIFT, end, to=0)

    def cut(self, slot: int, size_bytes: int) -> None:
        """Nothing behind the end of a disk of this size is dirty."""
        self.clear(slot, -(-size_bytes >> CHUNK_SHIFT) << CHUNK_SHIFT, len(self._bits[slot]) * 8 << CHUNK_SHIFT)

    def dirty_chunks(self, slot: int) -> int:
        bits = self._bits.get(slot)
        return 0 if bits is None else int(np.bitwise_count(bits).sum(dtype=np.int64))

    def dirty_bytes(self, slot: int, size_bytes: int) -> int:
        """Bytes of a disk of this size that are in chunks that are marked."""
        return min(self.dirty_chunks(slot) << CHUNK_SHIFT, size_bytes)

    def runs(self, slot: int, bytes_max: int) -> Iterator[tuple[int, int]]:
        """Marked extents `(offset, length)` from the beginning on, none across a multiple of `bytes_max`, which is one
        of a chunk. They may reach behind the disk's end. The map may change meanwhile."""
        chunks_max = bytes_max >> CHUNK_SHIFT
        at = 0
        while (bits := self._bits.get(slot)) is not None and at < len(bits):
            window = bits[at : at + _WINDOW_BYTES]
            if not window.any():
                at += _WINDOW_BYTES
                continue
            chunks = np.flatnonzero(np.unpackbits(window, bitorder="little")) + at * 8
            at += _WINDOW_BYTES
            breaks = np.flatnonzero((np.diff(chunks) > 1) | (chunks[1:] % chunks_max == 0)) + 1
            for run in np.split(chunks, breaks):
                yield int(run[0]) << CHUNK_SHIFT, len(run) << CHUNK_SHIFT

    # ---- as bytes ----

    def bitmap(self, slot: int) -> bytes:
        """Chunk n is bit `n % 8` of byte `n // 8`; what lies behind the last byte is not marked."""
        bits = self._bits[slot]
        used = np.flatnonzero(bits)
        return bits[: int(used[-1]) + 1].tobytes() if len(used) else b""

    @classmethod
    def of(cls, disks: Iterable[tuple[int, Reason, bytes]]) -> DirtyMap:
        """From `(slot, reasons, bitmap)` of each disk."""
        dirty = cls()
        for slot, reasons, bitmap in disks:
            dirty._reasons[slot] = reasons
            dirty._bits[slot] = np.frombuffer(bitmap, np.uint8).copy()
        return dirty

    def _room(self, slot: int, last_chunk: int) -> Bits:
        """The bits of a disk, at least up to this chunk."""
        bits = self._bits[slot]
        if last_chunk >= len(bits) * 8:
            count = max((last_chunk >> 3) + 1, min(2 * len(bits), len(bits) + (1 << 20)))
            bits = self._bits[slot] = np.concatenate([bits, np.zeros(count - len(bits), np.uint8)])
        return bits


def _bit_of(chunks: Numbers) -> Bits:
    return (np.int64(1) << (chunks & 7)).astype(np.uint8)


def _set(bits: Bits, start: int, end: int, *, to: int = 1) -> None:
    """All bits from `start` up to `end`."""
    first, last = start >> 3, end - 1 >> 3
    head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
    masks = {first: head & tail} if first == last else {first: head, last: tail}
    for at, mask in masks.items():
        bits[at] = int(bits[at]) | mask if to else int(bits[at]) & (0xFF ^ mask)
    if last - first > 1:
        bits[first + 1 : last] = 0xFF if to else 0
