"""Recovery points as the host knows them: making a marker's payload, and the list of markers this host has seen.

The list (`points.jsonl`) is for people and is not the truth: a point is real when the store has its LSN. One JSON
object a line, appended when a marker is made and again when the applier passes it, unless it is known; a torn last
line is dropped. What falls out of the newest POINTS_MAX is forgotten here, never at the store.
"""

from __future__ import annotations

import threading
import uuid
from typing import Any

import msgspec

from asrfs.errors import FormatError
from asrfs.format.record import RecordHeader
from asrfs.model.machine import Consistency, MarkerRecord, decode_marker
from asrfs.model.names import check_point_name
from asrfs.model.quantities import format_time
from asrfs.storage.interface import Storage, read_whole, write_atomically

POINTS_MAX = 10_000


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A marker and its place in the history."""

    id: str
    lsn: int
    epoch: int
    time_ns: int
    consistency: Consistency = "crash"
    group: str | None = None
    name: str | None = None
    hold_ms: float | None = None

    @classmethod
    def of(cls, marker: MarkerRecord, *, lsn: int, epoch: int, time_ns: int) -> Point:
        return cls(
            id=marker.id,
            lsn=lsn,
            epoch=epoch,
            time_ns=time_ns,
            consistency=marker.consistency,
            group=marker.group,
            name=marker.name,
            hold_ms=marker.hold_ms,
        )

    def document(self, machine: str) -> dict[str, Any]:
        """The point as commands print it."""
        return {
            "id": self.id,
            "machine": machine,
            "lsn": self.lsn,
            "epoch": self.epoch,
            "time": format_time(self.time_ns),
            "consistency": self.consistency,
            "group": self.group,
            "name": self.name,
            "hold_ms": self.hold_ms,
        }


def crash_marker(name: str | None) -> MarkerRecord:
    """A new crash-consistent point: no write is held, so the hold time is 0. Raises BadInputError for a bad name."""
    if name is not None:
        check_point_name(name)
    return MarkerRecord(id=uuid.uuid4().hex, consistency="crash", name=name, hold_ms=0.0)


class PointLog:
    """`name` in `storage`. Thread-safe; methods that add block for a datasync."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._lock = threading.Lock()
        self._points: dict[str, Point] = {}
        self._load()

    def points(self) -> list[Point]:
        """Oldest first."""
        with self._lock:
            return sorted(self._points.values(), key=lambda point: point.lsn)

    def add(self, point: Point) -> None:
        """Note a point unless it is known. Raises OSError; then it is noted in memory only."""
        with self._lock:
            if point.id in self._points:
                return
            self._points[point.id] = point
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

    def add_marker(self, header: RecordHeader, payload: bytes, epoch: int) -> None:
        """Note the point of a MARKER record of the history. Raises FormatError, OSError."""
        marker = decode_marker(payload)
        self.add(Point.of(marker, lsn=header.lsn, epoch=epoch, time_ns=header.time_ns))

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
            content = b"".join(msgspec.json.encode(point) + b"\n" for point in kept)
            write_atomically(self._storage, self._name, content)


def _decode(line: bytes) -> Point:
    try:
        return msgspec.json.decode(line, type=Point)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a line of the list of points cannot be read: {error}") from None
