"""A disk as it was at an LSN, readable at any place (I9).

`DiskState` is what the builder made: runs and the log objects they point into. `PointDisk` reads through it.
Payloads are stored in frames of about 128 KiB that can only be opened whole, so every read is first cut into pieces by
frame and then served frame by frame: within one call each frame is opened once, and a shared cache keeps the last ones
open for the next call. Safe for threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.disk.interface import check_extent
from asrfs.errors import FormatError, IntegrityError
from asrfs.format.log_object import FrameTable, ObjectHeader
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import DiskRecord
from asrfs.model.quantities import SECTOR_BYTES
from replica_store.points.extent_map import ExtentMap, Int64s, UInt64s, objects_of, positions_of
from replica_store.points.history import History, LogObject, ObjectReader
from replica_store.points.layers import Layers
from replica_store.points.run import Run, join_objects
from replica_store.points.shared_cache import SharedCache

FRAME_CACHE_BYTES = 64 << 20
_HEADS_KEPT = 1024
_FIRST_WINDOW_BYTES = 1 << 20
_CONTENT_WINDOW_BYTES, _CONTENT_WINDOW_BYTES_MAX = 64 << 20, 64 << 30
REOPENED_MAX = 1.1
"""Frames are read in the order of the disk where none, or hardly any, is then opened again."""


class FrameCache:
    """Opened frames of log objects, bounded in bytes. One serves all disks of a process."""

    def __init__(self, reader: ObjectReader, bytes_max: int = FRAME_CACHE_BYTES) -> None:
        self._reader = reader
        self._frames: SharedCache[tuple[str, int], bytes] = SharedCache(bytes_max, len)
        self._heads: SharedCache[str, tuple[ObjectHeader, FrameTable]] = SharedCache(_HEADS_KEPT, lambda head: 1)
        self._opened_once = 0

    @property
    def frames_opened(self) -> int:
        """How often a frame was read and opened: the cost that order of reading decides about."""
        return self._frames.loads + self._opened_once

    def head(self, row: LogObject) -> tuple[ObjectHeader, FrameTable]:
        """Of a log object. Raises IntegrityError."""
        return self._heads.get(row.name, lambda: self._head(row))

    def open_once(self, row: LogObject, header: ObjectHeader, table: FrameTable, i: int) -> bytes:
        """As `frame`, for who will not ask again: keeping it costs more than it brings."""
        self._opened_once += 1
        return self._reader.read_frame(row, header, table, i)

    def frame(self, row: LogObject, i: int) -> bytes:
        """The raw bytes of frame i. Raises IntegrityError naming the object and its LSNs."""
        return self._frames.get((row.name, i), lambda: self._open(row, i))

    def _open(self, row: LogObject, i: int) -> bytes:
        header, table = self.head(row)
        return self._reader.read_frame(row, header, table, i)

    def _head(self, row: LogObject) -> tuple[ObjectHeader, FrameTable]:
        header, _, table = self._reader.object_head(row)
        return header, table


class DiskState:
    """A disk at an LSN, immutable: the runs from record 1 to there, and the log objects that they refer to.

    Objects are counted through all runs. Their rows are asked for when they are read, and are believed when they have
    the digest that they had when the run was made.
    """

    def __init__(self, disk: DiskRecord, lsn: int, runs: tuple[Run, ...], history: History, machine_id: str) -> None:
        self.disk = disk
        self.lsn = lsn
        self.runs = runs
        self.layers = Layers([run.layer for run in runs], disk.size_bytes)
        self.objects = join_objects([run.objects for run in runs])
        self._history = history
        self._machine_id = machine_id
        self._rows: dict[int, LogObject] = {}

    @property
    def nbytes(self) -> int:
        """About how much memory this holds."""
        return sum(run.nbytes for run in self.runs) + sum(column.nbytes for column in self.objects)

    def object(self, number: int) -> LogObject:
        """Raises IntegrityError when the catalog has another object, or none, in its place."""
        row = self._rows.get(number)
        if row is None:
            first_lsn = int(self.objects.first_lsn[number])
            row = self._history.object_with(self._machine_id, first_lsn)
            if row is None or row.first_lsn != first_lsn or row.digest != self.objects.digest[number].tobytes():
                raise IntegrityError(
                    f"the catalog does not have the log object from LSN {first_lsn} on that this disk needs: "
                    "run `replica-store rebuild`"
                )
            self._rows[number] = row
        return row


class Window(NamedTuple):
    """Pieces of a disk in order of offset, their bytes end to end in `buffer`."""

    offsets: Int64s
    lengths: Int64s
    buffer: memoryview


class _Parts(NamedTuple):
    """Parts of pieces, each in one frame: number of the piece, of the frame, how far the part lies in the piece and in
    the frame, bytes."""

    piece: Int64s
    frame: Int64s
    skipped: Int64s
    at: Int64s
    size: Int64s


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
        end = offset + length
        # References count sectors, so it is whole sectors that are looked up.
        found = self.state.layers.between(offset - offset % SECTOR_BYTES, end + -end % SECTOR_BYTES)
        if not len(found) or not length:
            return bytes(length)
        start: Int64s = np.maximum(found.start, offset)
        lengths: Int64s = np.minimum(found.end, end) - start
        buffer = bytearray(length)
        positions = positions_of(found.ref) + (start - found.start)
        self._gather(buffer, start - offset, lengths, objects_of(found.ref), positions)
        return bytes(buffer)

    def content(self, offset: int, extents_max: int) -> list[tuple[int, int]]:
        """The first extents `(offset, length)` from `offset` on that were written and not with zeros, adjacent ones
        together; see `MappedDisk`."""
        found: list[tuple[int, int]] = []
        at, window = offset - offset % SECTOR_BYTES, _CONTENT_WINDOW_BYTES
        while at < self.size_bytes and len(found) < extents_max:
            part = self.state.layers.between(at, at + window)
            for start, end in _rows(part.start, part.end):
                if found and start == sum(found[-1]):
                    found[-1] = found[-1][0], end - found[-1][0]
                else:
                    found.append((start, end - start))
            at, window = at + window, min(2 * window, _CONTENT_WINDOW_BYTES_MAX)
        return found[:extents_max]

    def stored(self, offset: int, end: int, room: bytearray) -> Iterator[tuple[int, memoryview]]:
        """What was written of `[offset, end)`, multiples of 512: pieces in order of offset, each good until the next is
        asked for. The rest reads as zeros and costs nothing.

        Where frames lie in the order of the disk, pieces are parts of them. Else the bytes are put into `room` first,
        which grows to what is needed: memory that is there already costs far less than fresh memory.
        """
        found = self.state.layers.between(offset, end)
        lengths, objects, positions = found.end - found.start, objects_of(found.ref), positions_of(found.ref)
        parts = self._cut(lengths, objects, positions)
        object_of = objects[parts.piece]
        order = np.lexsort((parts.frame, object_of))
        openings = _changes(object_of, parts.frame)
        if openings <= REOPENED_MAX * _changes(object_of[order], parts.frame[order]):
            reader, at = _OrderedReader(self.state, self._frames), found.start[parts.piece] + parts.skipped
            for to, n, i, begin, size in _rows(at, object_of, parts.frame, parts.at, parts.size):
                yield to, reader.read(n, i, begin, size)
            return
        if (more := int(lengths.sum()) - len(room)) > 0:
            room.extend(bytes(more))
        places = np.cumsum(lengths) - lengths
        self._gather(room, places, lengths, objects, positions)
        whole = memoryview(room)
        for to, place, size in _rows(found.start, places, lengths):
            yield to, whole[place : place + size]

    def windows(self, bytes_max: int) -> Iterator[Window]:
        """All extents, in the order in which their bytes are stored, in windows of up to `bytes_max` bytes.

        So a whole pass opens every frame about once, however the writes were scattered over the disk. The first
        windows are small, so that there is something to begin with.
        """
        assert bytes_max % BLOCK_BYTES == 0
        window_bytes = min(bytes_max, _FIRST_WINDOW_BYTES)
        for group in self.state.layers.groups():
            yield from self._windows_of(group, window_bytes)
            window_bytes = min(bytes_max, 4 * window_bytes)

    def _windows_of(self, extents: ExtentMap, bytes_max: int) -> Iterator[Window]:
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
        parts = self._cut(lengths, objects, positions)
        place, object_of = places[parts.piece] + parts.skipped, objects[parts.piece]
        order = np.lexsort((parts.frame, object_of))
        reader = _FrameReader(self.state, self._frames)
        for n, i, to, at, size in _rows(
            object_of[order], parts.frame[order], place[order], parts.at[order], parts.size[order]
        ):
            buffer[to : to + size] = reader.read(n, i, at, size)

    def _cut(self, lengths: Int64s, objects: Int64s, positions: Int64s) -> _Parts:
        """Pieces of payloads, cut where frames end."""
        frame_bytes = self.state.objects.frame_bytes[objects]
        first = positions // frame_bytes
        counts = (positions + lengths - 1) // frame_bytes - first + 1
        piece = np.repeat(np.arange(len(lengths)), counts)
        frame = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        frame_start = frame * frame_bytes[piece]
        begin = np.maximum(positions[piece], frame_start)
        end = np.minimum((positions + lengths)[piece], frame_start + frame_bytes[piece])
        return _Parts(piece, frame, begin - positions[piece], begin - frame_start, end - begin)


class _FrameReader:
    """Reads parts of frames for one call. What asks for the same frame again at once gets it without a look."""

    def __init__(self, state: DiskState, frames: FrameCache) -> None:
        self._state = state
        self._frames = frames
        self._opened: tuple[int, int] | None = None
        self._raw = memoryview(b"")

    def read(self, n: int, i: int, at: int, size: int) -> memoryview:
        """Bytes of frame i of object n."""
        if self._opened != (n, i):
            self._raw = memoryview(self._open(n, i))
            self._opened = n, i
        if at + size > len(self._raw):
            raise FormatError(f"{self._state.object(n).name}: frame {i} ends before byte {at + size} of a record")
        return self._raw[at : at + size]

    def _open(self, n: int, i: int) -> bytes:
        return self._frames.frame(self._state.object(n), i)


class _OrderedReader(_FrameReader):
    """Reads parts of frames that are hardly ever asked for again."""

    def __init__(self, state: DiskState, frames: FrameCache) -> None:
        super().__init__(state, frames)
        self._object: int | None = None

    def _open(self, n: int, i: int) -> bytes:
        if self._object != n:
            self._row = self._state.object(n)
            self._header, self._table = self._frames.head(self._row)
            self._object = n
        return self._frames.open_once(self._row, self._header, self._table, i)


def _changes(objects: Int64s, frames: Int64s) -> int:
    """How often the frame changes from one part to the next."""
    return int(np.count_nonzero((objects[1:] != objects[:-1]) | (frames[1:] != frames[:-1])))


def _rows(*columns: npt.NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
    """Rows of equally long columns as plain integers, which Python handles several times as fast as numpy's."""
    return zip(*(column.tolist() for column in columns), strict=True)
