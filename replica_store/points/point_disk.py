"""A disk as it was at an LSN, readable at any place (I9).

`DiskState` is what the builder made: extents and the log objects they point into; immutable. `PointDisk` reads
through it. Payloads are stored in frames of about 128 KiB that can only be opened whole, so every read is first cut
into pieces by frame and then served frame by frame: within one call each frame is opened once, and a shared cache
keeps the last ones open for the next call. Safe for threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.disk.interface import check_extent
from asrfs.errors import FormatError
from asrfs.format.log_object import FrameTable, ObjectHeader
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import DiskRecord
from replica_store.points.extent_map import ExtentMap, Int64s, UInt64s, objects_of, positions_of
from replica_store.points.history import LogObject, ObjectReader
from replica_store.points.shared_cache import SharedCache

FRAME_CACHE_BYTES = 64 << 20
_HEADS_KEPT = 1024


class FrameCache:
    """Opened frames of log objects, bounded in bytes. One serves all disks of a process."""

    def __init__(self, reader: ObjectReader, bytes_max: int = FRAME_CACHE_BYTES) -> None:
        self._reader = reader
        self._frames: SharedCache[tuple[str, int], bytes] = SharedCache(bytes_max, len)
        self._heads: SharedCache[str, tuple[ObjectHeader, FrameTable]] = SharedCache(_HEADS_KEPT, lambda head: 1)

    @property
    def frames_opened(self) -> int:
        """How often a frame was read and opened: the cost that order of reading decides about."""
        return self._frames.loads

    def frame(self, row: LogObject, i: int) -> bytes:
        """The raw bytes of frame i. Raises IntegrityError naming the object and its LSNs."""
        return self._frames.get((row.name, i), lambda: self._open(row, i))

    def _open(self, row: LogObject, i: int) -> bytes:
        header, table = self._heads.get(row.name, lambda: self._head(row))
        return self._reader.read_frame(row, header, table, i)

    def _head(self, row: LogObject) -> tuple[ObjectHeader, FrameTable]:
        header, _, table = self._reader.object_head(row)
        return header, table


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk at an LSN. `objects[n]` and `frame_bytes[n]` belong to object number n of the references in `extents`."""

    disk: DiskRecord
    lsn: int
    extents: ExtentMap
    objects: Sequence[LogObject]
    frame_bytes: Int64s

    @property
    def nbytes(self) -> int:
        """About how much memory this holds."""
        return self.extents.nbytes + self.frame_bytes.nbytes + 200 * len(self.objects)


class Window(NamedTuple):
    """Pieces of a disk in order of offset, their bytes end to end in `buffer`."""

    offsets: Int64s
    lengths: Int64s
    buffer: memoryview


class PointDisk:
    """`asrfs.disk.interface.ReadableDisk` over a `DiskState`."""

    def __init__(self, state: DiskState, frames: FrameCache) -> None:
        self.state = state
        self._frames = frames

    @property
    def size_bytes(self) -> int:
        return self.state.disk.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises IntegrityError when a stored frame is damaged."""
        check_extent(offset, length, self.size_bytes)
        extents = self.state.extents
        touched = extents.between(offset, offset + length)
        if touched.start == touched.stop:
            return bytes(length)
        start: Int64s = np.maximum(extents.start[touched], offset)
        ends: Int64s = np.minimum(extents.end[touched], offset + length)
        positions = positions_of(extents.ref[touched]) + (start - extents.start[touched])
        buffer = bytearray(length)
        self._gather(buffer, start - offset, ends - start, objects_of(extents.ref[touched]), positions)
        return bytes(buffer)

    def windows(self, bytes_max: int) -> Iterator[Window]:
        """All extents, in the order in which their bytes are stored, in windows of up to `bytes_max` bytes.

        So a whole pass opens every frame about once, however the writes were scattered over the disk.
        """
        assert bytes_max % BLOCK_BYTES == 0
        extents = self.state.extents
        stored = np.argsort(extents.ref)
        # Counted in whole blocks, so that a disk's short last block does not make later cuts fall within blocks.
        stored_end = np.cumsum((-(-(extents.end - extents.start) // BLOCK_BYTES) * BLOCK_BYTES)[stored])
        total = int(stored_end[-1]) if len(stored_end) else 0
        for low in range(0, total, bytes_max):
            high = min(low + bytes_max, total)
            first = int(np.searchsorted(stored_end, low, side="right"))
            last = int(np.searchsorted(stored_end, high, side="left"))
            chosen = stored[first : last + 1]
            skipped = np.zeros(len(chosen), np.int64)
            skipped[0] = low - (int(stored_end[first - 1]) if first else 0)
            ends = extents.end[chosen]
            ends[-1] = min(ends[-1], extents.start[chosen[-1]] + high - (int(stored_end[last - 1]) if last else 0))
            offsets = extents.start[chosen] + skipped
            yield self._window(offsets, ends - offsets, extents.ref[chosen], skipped)

    def _window(self, offsets: Int64s, lengths: Int64s, refs: UInt64s, skipped: Int64s) -> Window:
        by_offset = np.argsort(offsets)
        offsets, lengths = offsets[by_offset], lengths[by_offset]
        refs, skipped = refs[by_offset], skipped[by_offset]
        buffer = bytearray(int(lengths.sum()))
        places = np.cumsum(lengths) - lengths
        self._gather(buffer, places, lengths, objects_of(refs), positions_of(refs) + skipped)
        return Window(offsets, lengths, memoryview(buffer))

    def _gather(self, buffer: bytearray, places: Int64s, lengths: Int64s, objects: Int64s, positions: Int64s) -> None:
        """Fill `buffer`: piece i goes to `places[i]` and comes from a position in the payload of an object."""
        frame_bytes = self.state.frame_bytes[objects]
        first = positions // frame_bytes
        counts = (positions + lengths - 1) // frame_bytes - first + 1
        piece = np.repeat(np.arange(len(places)), counts)
        frame = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        frame_start = frame * frame_bytes[piece]
        begin = np.maximum(positions[piece], frame_start)
        end = np.minimum((positions + lengths)[piece], frame_start + frame_bytes[piece])
        place = places[piece] + (begin - positions[piece])
        order = np.lexsort((frame, objects[piece]))
        opened: tuple[int, int] | None = None
        raw = memoryview(b"")
        for n, i, to, at, size in _rows(
            objects[piece][order], frame[order], place[order], (begin - frame_start)[order], (end - begin)[order]
        ):
            if opened != (n, i):
                raw = memoryview(self._frames.frame(self.state.objects[n], i))
                opened = n, i
            if at + size > len(raw):
                raise FormatError(f"{self.state.objects[n].name}: frame {i} ends before byte {at + size} of a record")
            buffer[to : to + size] = raw[at : at + size]


def _rows(*columns: npt.NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
    """Rows of equally long columns as plain integers, which Python handles several times as fast as numpy's."""
    return zip(*(column.tolist() for column in columns), strict=True)
