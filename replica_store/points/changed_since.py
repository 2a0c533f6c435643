"""What was written to a disk behind a record, and what was there before: all that bringing it back takes.

The history says both. Nothing is scanned, and what was not written since is neither read nor sent. Extents are whole
blocks, as everything a host journals; what lies behind the end that the disk had at the record reads as zeros.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from asrfs.errors import AsrfsError, BadInputError, NotFoundError, TemporaryError
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import DiskRecord
from asrfs.model.quantities import SECTOR_BYTES
from asrfs.protocol.messages import FETCHED_BYTES_MAX, FETCHED_EXTENTS_MAX, Extent, Fetch, Fetched
from replica_store.points.builder import RUN_WEIGHT, build_states, check_whole, paint_runs
from replica_store.points.extent_map import Int64s
from replica_store.points.history import History
from replica_store.points.point_disk import FrameCache, PointDisk

_WINDOW_BYTES = 64 << 20
FRAMES_BYTES = 8 << 20


class Changed(NamedTuple):
    """Extents `[start, end)`, whole blocks, sorted and apart from each other."""

    start: Int64s
    end: Int64s

    @property
    def total_bytes(self) -> int:
        return int((self.end - self.start).sum())


def changed_since(history: History, machine_id: str, slot: int, lsn: int, size_bytes: int) -> Changed:
    """What of the first `size_bytes` of a disk was written behind a record that has a state. Raises IntegrityError."""
    return changed_between(history, machine_id, slot, lsn, history.received_lsn(machine_id), size_bytes)


def changed_between(history: History, machine_id: str, slot: int, lsn: int, until: int, size_bytes: int) -> Changed:
    """The same, by records up to and with `until`, which has a state, too."""
    rows = history.objects_of(machine_id, until, lsn)
    check_whole(rows, lsn, until)
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for painted in paint_runs(history, rows, {slot: lsn}, until, RUN_WEIGHT):
        if slot in painted:
            starts.append(painted[slot].extents.start)
            ends.append(painted[slot].extents.end)
    return united(np.concatenate(starts), np.concatenate(ends), size_bytes)


def united(start: Int64s, end: Int64s, size_bytes: int) -> Changed:
    """Extents in any order that may overlap, as one says it once. `size_bytes`: 2^62 at most."""
    start = start // BLOCK_BYTES * BLOCK_BYTES
    end = np.minimum(end, size_bytes)  # what a DISK record says of what lies behind it has no end
    end = np.minimum(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size_bytes)
    keep = start < end
    start, end = start[keep], end[keep]
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order]) if len(end) else end
    is_first = np.ones(len(start), bool)
    is_first[1:] = start[1:] > end[:-1]
    last = np.append(np.flatnonzero(is_first)[1:] - 1, len(start) - 1) if len(start) else np.empty(0, np.int64)
    return Changed(start[is_first], end[last])


class _Open(NamedTuple):
    asked: tuple[str, int, str, int, int]
    disk: PointDisk
    changed: Changed


class Fetcher:
    """Answers one FETCH after the other of each machine. Blocks; safe for threads.

    What it read is kept for the next."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._open: dict[str, _Open] = {}
        self._turns: dict[str, threading.Lock] = {}

    def answer(self, machine_id: str, wanted: Fetch) -> Fetched:
        """Failures are answers, too."""
        with self._turns.setdefault(machine_id, threading.Lock()):
            try:
                return _fetched(self._opened(machine_id, wanted), wanted)
            except (AsrfsError, OSError) as error:
                code = error.exit_code if isinstance(error, AsrfsError) else TemporaryError.exit_code
                return Fetched(number=wanted.number, exit_code=code, text=" ".join(str(error).split())[:500])

    def forget(self, machine_id: str) -> None:
        """What is kept for a machine."""
        self._open.pop(machine_id, None)

    def _opened(self, machine_id: str, wanted: Fetch) -> _Open:
        asked = machine_id, wanted.slot, wanted.disk_id, wanted.lsn, wanted.size_bytes
        known = self._open.get(machine_id)
        if known is not None and known.asked == asked and wanted.offset:
            return known
        record = self._disk(machine_id, wanted)
        changed = changed_since(self._history, machine_id, wanted.slot, wanted.lsn, wanted.size_bytes)
        state = build_states(self._history, machine_id, wanted.lsn, [record])[record.slot]
        opened = self._open[machine_id] = _Open(
            asked, PointDisk(state, FrameCache(self._history, FRAMES_BYTES)), changed
        )
        return opened

    def _disk(self, machine_id: str, wanted: Fetch) -> DiskRecord:
        for disk in self._history.disks_at(machine_id, wanted.lsn):
            if disk.slot == wanted.slot and disk.id == wanted.disk_id and not disk.removed:
                return disk
        raise NotFoundError(f"there was no such disk in slot {wanted.slot} at LSN {wanted.lsn}")


def _fetched(opened: _Open, wanted: Fetch) -> Fetched:
    """As much as one answer holds, from the offset on."""
    changed, at = opened.changed, wanted.offset
    if at >= wanted.size_bytes or at % SECTOR_BYTES:
        raise BadInputError(f"nothing of the disk lies behind byte {at}")
    extents: list[Extent] = []
    zeros: list[Extent] = []
    content: list[bytes] = []
    room = FETCHED_BYTES_MAX
    index = int(np.searchsorted(changed.end, at, side="right"))
    while index < len(changed.start) and room and len(extents) + len(zeros) < FETCHED_EXTENTS_MAX:
        begin, end = max(at, int(changed.start[index])), int(changed.end[index])
        stored_at = _first_stored(opened.disk, begin, min(end, begin + _WINDOW_BYTES))
        if stored_at > begin:
            at = stored_at
            if zeros and sum(zeros[-1]) == begin:
                zeros[-1] = zeros[-1][0], at - zeros[-1][0]
            else:
                zeros.append((begin, at - begin))
        else:
            at = min(end, begin + room)
            extents.append((begin, at - begin))
            content.append(_read(opened.disk, begin, at))
            room -= at - begin
        index += at >= end
    if index == len(changed.start):
        at = wanted.size_bytes
    return Fetched(
        number=wanted.number,
        next=at,
        extents=tuple(extents),
        zeros=tuple(zeros),
        content=b"".join(content),
        total=changed.total_bytes,
    )


def _first_stored(disk: PointDisk, begin: int, end: int) -> int:
    """Block in `[begin, end)` from which on something was ever written, else `end`."""
    aligned = begin - begin % SECTOR_BYTES
    found = disk.state.layers.between(aligned, end + -end % SECTOR_BYTES) if begin < disk.size_bytes else ()
    if not len(found):
        return end
    return max(begin, int(found.start[0]) // BLOCK_BYTES * BLOCK_BYTES)  # type: ignore[union-attr]


def _read(disk: PointDisk, begin: int, end: int) -> bytes:
    there = min(end, disk.size_bytes)
    return disk.read(begin, there - begin) + bytes(end - there)
