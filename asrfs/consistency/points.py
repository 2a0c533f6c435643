"""Recovery points as the host knows them: making a marker's payload, and the list of markers this host has seen.

The list (`points.jsonl`) is for people and is not the truth: a point is real when the store has its LSN. One JSON
object a line, appended when a marker is made and again when the applier passes it, unless it is known; the last line
of a point counts, a torn last line is dropped. What falls out of the newest POINTS_MAX is forgotten here, never at the
store.
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from asrfs.consistency.point_ages import Newest
from asrfs.errors import FormatError
from asrfs.format.record import RecordHeader
from asrfs.model.marker import MarkerRecord, check_marker, completed, decode_marker
from asrfs.model.point_alarms import kinds_of
from asrfs.model.quantities import format_time
from asrfs.storage.interface import Storage, read_whole, write_atomically

POINTS_MAX = 10_000
POINTS_TOO_MANY = 1_000
"""So many more are put up with before the oldest are forgotten."""


class Point(MarkerRecord, frozen=True, kw_only=True):
    """A marker and its place in the history."""

    lsn: int
    epoch: int
    time_ns: int

    @classmethod
    def of(cls, marker: MarkerRecord, *, lsn: int, epoch: int, time_ns: int) -> Point:
        said = {name: getattr(marker, name) for name in MarkerRecord.__struct_fields__}
        return cls(**said, lsn=lsn, epoch=epoch, time_ns=time_ns)

    def completed_by(self, last_word: MarkerRecord) -> Point:
        """Once the last word is known. The point must be unfinished."""
        return Point.of(completed(self, last_word), lsn=self.lsn, epoch=self.epoch, time_ns=self.time_ns)

    def described(self, machine: str) -> dict[str, Any]:
        """The point as commands print it."""
        document = self.document()
        del document["time_ns"]
        return document | {"machine": machine, "time": format_time(self.time_ns)}


class PointLog:
    """`name` in `storage`. Thread-safe; methods that add block for a datasync."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._lock = threading.Lock()
        self._points: dict[str, Point] = {}
        self._newest: dict[str, Newest] = {}
        self._load()
        self._find_newest()

    def points(self) -> list[Point]:
        """Oldest first."""
        with self._lock:
            return sorted(self._points.values(), key=lambda point: point.lsn)

    def newest(self) -> dict[str, Newest]:
        """The newest of each kind there is, of those that are at least that."""
        with self._lock:
            return dict(self._newest)

    def newest_of_group(self, group: str) -> dict[str, Newest]:
        """The same of a group's points."""
        with self._lock:
            newest: dict[str, Newest] = {}
            for point in self._points.values():
                if point.group == group:
                    _note_newest(newest, point)
            return newest

    def add(self, point: Point) -> None:
        """Note a point unless it is known. Raises OSError; then it is noted in memory only."""
        with self._lock:
            if point.id in self._points:
                return
            self._points[point.id] = point
            _note_newest(self._newest, point)
            self._append(point)
            if len(self._points) > POINTS_MAX + POINTS_TOO_MANY:
                self._forget_oldest()

    def complete(self, last_word: MarkerRecord) -> None:
        """Take over the last word on a point that is unfinished here. Raises OSError, as `add`."""
        with self._lock:
            point = self._points.get(last_word.id)
            if point is None or not point.unfinished or point.lsn != last_word.completes:
                return
            whole = point.completed_by(last_word)
            self._points[point.id] = whole
            self._find_newest()  # it may be less than it said it was
            self._append(whole)

    def add_marker(self, header: RecordHeader, payload: bytes, epoch: int) -> None:
        """Note the point of a MARKER record of the history. Raises FormatError, OSError."""
        marker = decode_marker(payload)
        if marker.confirms or (marker.group_point is not None and marker.completes is None):
            return  # a share is a point only once it is confirmed, and who confirms it adds it
        if marker.completes is not None:
            self.complete(marker)
            return
        self.add(Point.of(marker, lsn=header.lsn, epoch=epoch, time_ns=header.time_ns))

    def _find_newest(self) -> None:
        self._newest.clear()
        for point in self._points.values():
            _note_newest(self._newest, point)

    def _forget_oldest(self) -> None:
        """Under the lock. The file, too, so that neither grows for ever."""
        kept = sorted(self._points.values(), key=lambda point: point.lsn)[-POINTS_MAX:]
        self._points = {point.id: point for point in kept}
        self._write_all()

    def _write_all(self) -> None:
        content = b"".join(msgspec.json.encode(point) + b"\n" for point in self._points.values())
        write_atomically(self._storage, self._name, content)

    def _append(self, point: Point) -> None:
        """Under the lock."""
        line = msgspec.json.encode(point) + b"\n"
        if not self._storage.exists(self._name):
            write_atomically(self._storage, self._name, line)
            return
        file = self._storage.open(self._name, write=True)
        try:
            file.write_at([line], file.size())
            file.datasync()
        finally:
            file.close()

    def _load(self) -> None:
        """Read the file; write it anew when it has lines that cannot be read, or too many."""
        if not self._storage.exists(self._name):
            return
        *lines, rest = read_whole(self._storage, self._name).split(b"\n")
        kept = []
        for line in lines[-POINTS_MAX:]:
            try:
                kept.append(_decode(line))
            except FormatError:
                continue
        self._points = {point.id: point for point in kept}
        if rest or len(kept) != len(lines):
            self._write_all()


def _note_newest(newest: dict[str, Newest], point: Point) -> None:
    for kind in kinds_of(point.consistency):
        if kind not in newest or point.lsn > newest[kind].lsn:
            newest[kind] = Newest(point.lsn, point.time_ns)


def _decode(line: bytes) -> Point:
    try:
        point = msgspec.json.decode(line, type=Point)
        check_marker(point)
        return point
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a line of the list of points cannot be read: {error}") from None
