"""From a history to a disk: which LSN is meant, which disks there are, and what they consist of.

    selector → Cut (one LSN for all disks of the machine) → DiskState of each, from the indexes → PointDisk

Only the listed history counts: objects that follow one another without a hole from record 1 on. A cut inside a gap is
refused (I5). A disk that was removed and made again is another slot, so nothing of the old one shows in the new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asrfs.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.log_object import Index
from asrfs.format.record import Kind
from asrfs.model.machine import DiskRecord, decode_disk
from asrfs.model.quantities import SECTOR_BYTES
from replica_store.points.extent_map import (
    EXTENT_END_MAX,
    POSITION_BYTES_END,
    ZEROS,
    Int64s,
    MapBuilder,
    UInt64s,
    make_refs,
)
from replica_store.points.history import History, LogObject, Machine, Point
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from replica_store.points.selector import AtTime, choose_lsn, lsn_at_time, object_at_time, parse_selector

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
    """The cut a selector means now. Raises BadInputError, NotFoundError, RefusedError (inside a gap)."""
    selector = parse_selector(selector_text)
    machine = history.machine(machine_name)
    points = history.points(machine.id)
    received = history.received_lsn(machine.id)
    if isinstance(selector, AtTime):
        found = object_at_time(selector.time_ns, history.objects_of(machine.id, received))
        times_ns = history.object_head(found)[1].time_ns
        lsn = lsn_at_time(selector.time_ns, found.first_lsn, times_ns)
        cut = Cut(machine, lsn, int(times_ns[lsn - found.first_lsn]), found.epoch, _point_at(points, lsn))
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

    `base` may hold one earlier state, which is then continued instead of reading the history from its beginning.
    """
    base = base or {}
    assert not base or len(disks) == 1, "a state is continued by itself: the numbers of its objects are its own"
    known = base.get(disks[0].slot) if disks else None
    builders = {disk.slot: MapBuilder(known.extents if known else None) for disk in disks}
    objects: list[LogObject] = list(known.objects) if known else []
    frame_bytes: list[int] = known.frame_bytes.tolist() if known else []
    after = known.lsn if known else 0
    rows = history.objects_of(machine_id, lsn)
    _check_whole(rows, lsn)
    rows = [row for row in rows if row.last_lsn > after]
    for done, row in enumerate(rows):
        header, index, _ = history.object_head(row)
        _check_extents(index, header.payload_raw_length, row.name)
        chosen = slice(max(0, after + 1 - row.first_lsn), lsn + 1 - row.first_lsn)
        for slot, builder in builders.items():
            _add_object(builder, index, chosen, slot, len(objects))
        objects.append(row)
        frame_bytes.append(max(header.frame_raw_bytes, SECTOR_BYTES))
        if progress is not None:
            progress(done + 1, len(rows))
    sizes = np.array(frame_bytes, np.int64)
    return {
        disk.slot: DiskState(disk, lsn, builders[disk.slot].finish(disk.size_bytes), objects, sizes) for disk in disks
    }


def _point_at(points: Sequence[Point], lsn: int) -> Point | None:
    return next((point for point in points if point.lsn == lsn), None)


def _cut(history: History, machine: Machine, lsn: int, point: Point | None) -> Cut:
    if point is not None:
        return cut_at(machine, point)
    rows = history.objects_of(machine.id, lsn)
    if not rows or not rows[-1].first_lsn <= lsn <= rows[-1].last_lsn:
        raise IntegrityError(f"no log object of machine {machine.name} holds LSN {lsn}: run `replica-store rebuild`")
    time_ns = int(history.object_head(rows[-1])[1].time_ns[lsn - rows[-1].first_lsn])
    return Cut(machine, lsn, time_ns, rows[-1].epoch, None)


def _check_whole(rows: Sequence[LogObject], lsn: int) -> None:
    """Raise IntegrityError unless the objects hold every record from 1 to `lsn` once: a hole would be a wrong image."""
    expected = 1
    for row in rows:
        if row.first_lsn != expected:
            raise IntegrityError(
                f"the history has no log object for LSN {expected} to {row.first_lsn - 1}: run `replica-store rebuild`"
            )
        expected = row.last_lsn + 1
    if expected <= lsn:
        raise IntegrityError(f"the history ends at LSN {expected - 1} instead of {lsn}: run `replica-store rebuild`")


def _check_extents(index: Index, payload_bytes: int, where: str) -> None:
    """Raise FormatError for extents no disk can have; what came from a host is not believed."""
    is_note = (index.kind == Kind.MARKER) | (index.kind == Kind.DISK)
    odd = (index.offset | index.length | np.where(is_note, 0, index.payload_position)) % SECTOR_BYTES != 0
    odd |= index.offset + index.length > EXTENT_END_MAX
    if odd.any():
        i = int(np.argmax(odd))
        raise FormatError(f"{where}: the extent of LSN {index.first_lsn + i} cannot be one of a disk")
    if payload_bytes >= POSITION_BYTES_END:
        raise FormatError(f"{where}: the payload from LSN {index.first_lsn} on is impossibly long")


def _add_object(builder: MapBuilder, index: Index, records: slice, slot: int, number: int) -> None:
    """Give a builder what the chosen records of one object say of one slot."""
    kind = index.kind[records]
    chosen = np.flatnonzero((index.slot[records] == slot) & (kind != Kind.MARKER))
    if not len(chosen):
        return
    kind = kind[chosen]
    start: Int64s = index.offset[records][chosen].astype(np.int64)
    end: Int64s = start + index.length[records][chosen].astype(np.int64)
    carries = (kind == Kind.WRITE) | (kind == Kind.FILL)
    positions = index.payload_position[records][chosen]
    ref: UInt64s = np.where(carries, make_refs(number, positions), np.uint64(ZEROS))
    for i in np.flatnonzero(kind == Kind.DISK).tolist():
        # What lies beyond a disk's end is gone, should the disk grow again later.
        start[i] = decode_disk(index.note(records.start + int(chosen[i]))).size_bytes
        end[i] = EXTENT_END_MAX
    if bool(np.any(start >= end)):
        keep = start < end
        start, end, ref = start[keep], end[keep], ref[keep]
    builder.add(start, end, ref)
