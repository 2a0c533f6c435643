"""From a history to a disk: which LSN is meant, which disks there are, and what they consist of.

    selector → Cut (one LSN for all disks of the machine) → DiskState of each → PointDisk

A state is made of runs: those that map checkpoints hold, and what the indexes say of the records behind them.

Only the listed history counts: objects that follow one another without a hole from record 1 on. A cut inside a gap is
refused (I5). A disk that was removed and made again is another slot, so nothing of the old one shows in the new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asrfs.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.log_object import DIGEST_BYTES
from asrfs.format.map_checkpoint import MapObjects
from asrfs.format.object_index import Index
from asrfs.format.record import Kind
from asrfs.model.machine import DiskRecord, decode_disk
from asrfs.model.quantities import SECTOR_BYTES
from replica_store.points.extent_map import (
    EXTENT_END_MAX,
    POSITION_BYTES_END,
    ZEROS,
    Int64s,
    UInt64s,
    make_refs,
    without_zeros,
)
from replica_store.points.history import History, LogObject, Machine, ObjectReader, Point
from replica_store.points.kept_maps import load_runs
from replica_store.points.painting import MapPainter
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from replica_store.points.run import Run, stack, weight_of
from replica_store.points.selector import (
    AtPoint,
    AtTime,
    check_exists,
    choose_lsn,
    lsn_at_time,
    object_at_time,
    parse_selector,
)

RUN_WEIGHT = 1 << 20
"""Of a run that is painted at once: bounds memory; see `run.weight_of`."""

# As plain numbers: comparing a column with a member of an enumeration costs more than the comparison.
_WRITE, _FILL, _DISK, _MARKER = int(Kind.WRITE), int(Kind.FILL), int(Kind.DISK), int(Kind.MARKER)

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One LSN of a machine's history: the same for all its disks. `point` is the listed point there, if any."""

    machine: Machine
    lsn: int
    time_ns: int
    epoch: int
    point: Point | None


def resolve(history: History, machine_name: str, selector_text: str) -> Cut:
    """The cut a selector means now. Raises BadInputError, NotFoundError (also inside a stretch), RefusedError (inside a
    gap)."""
    selector = parse_selector(selector_text)
    machine = history.machine(machine_name)
    if isinstance(selector, AtPoint) and (tail := history.tail(machine.id, selector.label)) is not None:
        return cut_at(*tail)
    points = history.points(machine.id)
    received = history.received_lsn(machine.id)
    if isinstance(selector, AtTime):
        found = object_at_time(selector.time_ns, history.objects_of(machine.id, received))
        lsn = found.last_lsn
        if not found.is_stretch:
            lsn = lsn_at_time(selector.time_ns, found.first_lsn, history.object_index(found)[1].time_ns)
        cut = _cut(history, machine, lsn, _point_at(points, lsn))
    else:
        lsn = choose_lsn(selector, points, received)
        cut = _cut(history, machine, lsn, _point_at(points, lsn))
    gap = history.gap_at(machine.id, cut.lsn)
    if gap is not None:
        raise RefusedError(
            f"LSN {cut.lsn} of machine {machine.name} lies in a gap ({gap}), where its disks were not all here: "
            "choose a listed point"
        )
    return cut


def cut_at(machine: Machine, point: Point) -> Cut:
    """The cut of a listed point."""
    return Cut(machine, point.lsn, point.time_ns, point.epoch, point)


def disks_of(history: History, cut: Cut) -> list[DiskRecord]:
    """The disks the machine has at the cut, by slot."""
    disks = [disk for disk in history.disks_at(cut.machine.id, cut.lsn) if not disk.removed]
    return sorted(disks, key=lambda disk: disk.slot)


def find_disk(disks: Iterable[DiskRecord], name: str, cut: Cut) -> DiskRecord:
    """The disk of that name. Raises NotFoundError naming those there are."""
    known = {disk.name: disk for disk in disks}
    if name not in known:
        there = ", ".join(sorted(known)) or "no disk"
        raise NotFoundError(f"machine {cut.machine.name} has no disk {name!r} at LSN {cut.lsn}: it has {there}")
    return known[name]


def open_disks(
    history: History,
    cut: Cut,
    names: Sequence[str],
    frames: FrameCache,
    progress: Progress | None = None,
) -> dict[str, PointDisk]:
    """The named disks, cut together, from one pass over the history. Raises NotFoundError."""
    disks = disks_of(history, cut)
    wanted = [find_disk(disks, name, cut) for name in names]
    states = build_states(history, cut.machine.id, cut.lsn, wanted, progress=progress)
    return {disk.name: PointDisk(states[disk.slot], frames) for disk in wanted}


def build_states(
    history: History,
    machine_id: str,
    lsn: int,
    disks: Sequence[DiskRecord],
    *,
    base: Mapping[int, DiskState] | None = None,
    progress: Progress | None = None,
) -> dict[int, DiskState]:
    """The states of the disks at `lsn`, by slot. `progress` counts log objects.

    `base` may hold earlier states, which are then continued; else map checkpoints are, where there are any.
    """
    runs: dict[int, list[Run]] = {}
    for disk in disks:
        known = base.get(disk.slot) if base else None
        runs[disk.slot] = list(known.runs) if known else load_runs(history, machine_id, disk.slot, lsn)
    after = {slot: known[-1].lsn if known else 0 for slot, known in runs.items()}
    begin = min(after.values(), default=lsn)
    rows = history.objects_of(machine_id, lsn, begin)
    check_whole(rows, begin, lsn)
    for painted in paint_runs(history, rows, after, lsn, RUN_WEIGHT, progress):
        for slot, run in painted.items():
            runs[slot] = stack(runs[slot], run)
    return {disk.slot: DiskState(disk, lsn, tuple(runs[disk.slot]), history, machine_id) for disk in disks}


def paint_runs(
    history: ObjectReader,
    rows: Sequence[LogObject],
    after: Mapping[int, int],
    lsn: int,
    weight_max: int,
    progress: Progress | None = None,
) -> Iterator[dict[int, Run]]:
    """What the objects say of some disks up to `lsn`, by slot, in runs of about `weight_max`.

    `after`: by slot, up to which LSN a disk is known already; records up to there are left out.
    """
    at = dict(after)
    painter = _RunPainter(at)
    for done, row in enumerate(rows):
        painter.add(history, row, lsn)
        if progress is not None:
            progress(done + 1, len(rows))
        if painter.weight >= weight_max or row is rows[-1]:
            painted = painter.finish(min(row.last_lsn, lsn))
            at.update((slot, run.lsn) for slot, run in painted.items())
            yield painted
            painter = _RunPainter(at)


class _RunPainter:
    """Log objects that become one run of each disk. `after`: where these begin."""

    def __init__(self, after: Mapping[int, int]) -> None:
        self.weight = 0
        self._after = dict(after)
        self._painters = {slot: MapPainter() for slot in after}
        self._rows: list[LogObject] = []
        self._frame_bytes: list[int] = []

    def add(self, history: ObjectReader, row: LogObject, lsn: int) -> None:
        header, index = history.object_index(row)
        _check_extents(index, header.payload_raw_length, row.name)
        for slot, painter in self._painters.items():
            chosen = _records_of(index, self._after[slot], lsn)
            if chosen.start < len(index):
                _add_object(painter, index, chosen, slot, len(self._rows))
        self._rows.append(row)
        self._frame_bytes.append(max(header.frame_raw_bytes, SECTOR_BYTES))
        self.weight += weight_of(row.first_lsn - 1, row.last_lsn, 1)

    def finish(self, lsn: int) -> dict[int, Run]:
        """The runs of the disks that are not known up to `lsn`."""
        first, last = self._rows[0], self._rows[-1]
        objects = MapObjects(
            np.array([row.first_lsn for row in self._rows], np.int64),
            np.frombuffer(b"".join(row.digest for row in self._rows), np.uint8).reshape(-1, DIGEST_BYTES),
            np.array(self._frame_bytes, np.int64),
        )
        runs = {}
        for slot, painter in self._painters.items():
            after = self._after[slot]
            if after >= lsn:
                continue
            extents = painter.finish()
            is_whole = lsn == last.last_lsn and (
                after < first.first_lsn or any(after == r.last_lsn for r in self._rows)
            )
            runs[slot] = Run(
                after, lsn, extents if after else without_zeros(extents), objects, last.digest if is_whole else None
            )
        return runs


def _records_of(index: Index, after_lsn: int, lsn: int) -> slice:
    """Which records lie behind `after_lsn` and at or below `lsn`; no LSN inside a stretch."""
    if index.is_stretch:
        assert index.last_lsn <= lsn and not index.first_lsn <= after_lsn < index.last_lsn, "I9: a stretch is cut"
        return slice(0 if after_lsn < index.first_lsn else len(index), len(index))
    return slice(max(0, after_lsn + 1 - index.first_lsn), lsn + 1 - index.first_lsn)


def _point_at(points: Sequence[Point], lsn: int) -> Point | None:
    return next((point for point in points if point.lsn == lsn), None)


def _cut(history: History, machine: Machine, lsn: int, point: Point | None) -> Cut:
    if point is not None:
        return cut_at(machine, point)
    row = history.object_with(machine.id, lsn)
    if row is None:
        raise IntegrityError(f"no log object of machine {machine.name} holds LSN {lsn}: run `replica-store rebuild`")
    check_exists(lsn, row)
    if row.is_stretch:
        return Cut(machine, lsn, row.last_time_ns, row.epoch, None)
    time_ns = int(history.object_index(row)[1].time_ns[lsn - row.first_lsn])
    return Cut(machine, lsn, time_ns, row.epoch, None)


def check_whole(rows: Sequence[LogObject], after_lsn: int, lsn: int) -> None:
    """Raise IntegrityError unless the objects hold every record from `after_lsn + 1` to `lsn` once, and no stretch is
    cut: a hole would be a wrong image."""
    expected = after_lsn + 1
    if rows and rows[0].first_lsn <= after_lsn:
        expected = rows[0].first_lsn
    for row in rows:
        if row.first_lsn != expected:
            raise IntegrityError(
                f"the history has no log object for LSN {expected} to {row.first_lsn - 1}: run `replica-store rebuild`"
            )
        expected = row.last_lsn + 1
        if row.is_stretch and (row.first_lsn <= after_lsn or lsn < row.last_lsn):
            raise IntegrityError(
                f"records {row.first_lsn} to {row.last_lsn} came as one stretch, so nothing begins or ends within: "
                "run `replica-store rebuild`"
            )
    if expected <= lsn:
        raise IntegrityError(f"the history ends at LSN {expected - 1} instead of {lsn}: run `replica-store rebuild`")


def _check_extents(index: Index, payload_bytes: int, where: str) -> None:
    """Raise FormatError for extents no disk can have; what came from a host is not believed."""
    has_note = (index.kind == _MARKER) | (index.kind == _DISK)
    positions = np.where(has_note, 0, index.payload_position) if has_note.any() else index.payload_position
    odd = (index.offset | index.length | positions) & np.uint64(SECTOR_BYTES - 1) != 0
    odd |= index.offset + index.length > EXTENT_END_MAX
    if odd.any():
        i = int(np.argmax(odd))
        raise FormatError(f"{where}: the extent of LSN {index.lsn[i]} cannot be one of a disk")
    if payload_bytes >= POSITION_BYTES_END:
        raise FormatError(f"{where}: the payload from LSN {index.first_lsn} on is impossibly long")


def _add_object(painter: MapPainter, index: Index, records: slice, slot: int, number: int) -> None:
    """Give a painter what the chosen records of one object say of one slot."""
    chosen = np.flatnonzero((index.slot[records] == slot) & (index.kind[records] != _MARKER)) + records.start
    if not len(chosen):
        return
    here = chosen if len(chosen) < len(index) else slice(None)  # all of an object needs no picking
    kind = index.kind[here]
    start: Int64s = index.offset[here].astype(np.int64)
    end: Int64s = start + index.length[here].astype(np.int64)
    ref: UInt64s = make_refs(number, index.payload_position[here])
    carries = (kind == _WRITE) | (kind == _FILL)
    if not carries.all():
        ref[~carries] = ZEROS
    for i in np.flatnonzero(kind == _DISK).tolist():
        # What lies beyond a disk's end is gone, should the disk grow again later.
        start[i] = decode_disk(index.note(int(chosen[i]))).size_bytes
        end[i] = EXTENT_END_MAX
    keep = start < end
    if not keep.all():
        start, end, ref = start[keep], end[keep], ref[keep]
    painter.add(start, end, ref)
