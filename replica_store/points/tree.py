"""What `replica-store mount` shows: machines, their recovery points, the disks of each as image files.

    /                      one directory a machine
    /MACHINE/              one directory a listed point by its id, and by its name, where the newest of several counts;
                           any other selector resolves when it is looked up: lsn:N, time:T, latest, …; a label may
                           stand before lsn: and time:, as in before-update-lsn:4711
    /MACHINE/POINT/        DISK.img of every disk the machine had there, all cut at the one LSN

Everything is asked of the history anew, so points appear as they come; a state, once built, is kept while there is
room, and later states of the same disk are continued from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread

from asrfs.errors import NotFoundError
from asrfs.fuse.tree import TreeDirectory, TreeEntry, TreeFile
from asrfs.model.machine import DiskRecord
from replica_store.points.builder import Cut, build_states, cut_at, disks_of, resolve
from replica_store.points.history import History, Machine
from replica_store.points.map_maker import leave_runs
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from replica_store.points.selector import AtPoint, parse_selector
from replica_store.points.shared_cache import SharedCache

STATE_CACHE_BYTES = 256 << 20
IMAGE_SUFFIX = ".img"

_UNLISTED = ("lsn:", "time:")


def point_tree(history: History, frames: FrameCache, state_bytes_max: int = STATE_CACHE_BYTES) -> TreeDirectory:
    """The root of the tree."""
    return _RootDirectory(_Opener(history, frames, state_bytes_max))


class _Opener:
    """Makes disks, many at once, keeping the states of those used last."""

    def __init__(self, history: History, frames: FrameCache, state_bytes_max: int) -> None:
        self.history = history
        self._frames = frames
        self._states: SharedCache[tuple[str, int, int], DiskState] = SharedCache(
            state_bytes_max, lambda state: state.nbytes
        )

    def open(self, cut: Cut, disk: DiskRecord) -> PointDisk:
        key = (cut.machine.id, disk.slot, cut.lsn)
        return PointDisk(self._states.get(key, lambda: self._build(cut, disk)), self._frames)

    def _build(self, cut: Cut, disk: DiskRecord) -> DiskState:
        earlier = self._states.peek(lambda key: key[:2] == (cut.machine.id, disk.slot) and key[2] < cut.lsn)
        base = max((state for _, state in earlier), key=lambda state: state.lsn, default=None)
        state = build_states(
            self.history, cut.machine.id, cut.lsn, [disk], base={disk.slot: base} if base is not None else None
        )[disk.slot]
        # Beside whoever waits for the disk; given up with the process, as all that it leaves can be made again.
        leave = partial(leave_runs, self.history, cut.machine.id, disk.slot, state.runs)
        Thread(target=leave, name="leave-maps", daemon=True).start()
        return state


@dataclass(frozen=True, slots=True)
class _RootDirectory:
    opener: _Opener
    time_ns: int = 0

    @property
    def key(self) -> Hashable:
        return "root"

    def entries(self) -> Sequence[TreeEntry]:
        return [self._entry(machine) for machine in self.opener.history.machines()]

    def lookup(self, name: str) -> TreeEntry:
        return self._entry(self.opener.history.machine(name))

    def _entry(self, machine: Machine) -> TreeEntry:
        return TreeEntry(machine.name, _MachineDirectory(self.opener, machine))


@dataclass(frozen=True, slots=True)
class _MachineDirectory:
    opener: _Opener
    machine: Machine
    time_ns: int = 0

    @property
    def key(self) -> Hashable:
        return "machine", self.machine.id

    def entries(self) -> Sequence[TreeEntry]:
        points = sorted(self.opener.history.points(self.machine.id), key=lambda point: point.lsn)
        # Ids are entered last, so that nobody's name can hide one.
        newest = {point.name: point for point in points if point.name is not None}
        newest |= {point.id: point for point in points}
        listed = [
            self._entry(name, cut_at(self.machine, point), lasting=name == point.id)
            for name, point in newest.items()
            if isinstance(parse_selector(name), AtPoint)
        ]
        tails = {point.name for point in self.opener.history.tail_points(self.machine.id) if point.name is not None}
        return [entry for entry in listed if entry.name not in tails] + [self.lookup(name) for name in sorted(tails)]

    def lookup(self, name: str) -> TreeEntry:
        text = name[max(0, *(name.rfind(word) for word in _UNLISTED)) :]
        cut = resolve(self.opener.history, self.machine.name, text)
        lasting = text.startswith("lsn:") or (cut.point is not None and cut.point.id == text)
        return self._entry(name, cut, lasting)

    def _entry(self, name: str, cut: Cut, lasting: bool) -> TreeEntry:
        return TreeEntry(name, _PointDirectory(self.opener, cut), lasting)


@dataclass(frozen=True, slots=True)
class _PointDirectory:
    opener: _Opener
    cut: Cut

    @property
    def key(self) -> Hashable:
        return "point", self.cut.machine.id, self.cut.lsn

    @property
    def time_ns(self) -> int:
        return self.cut.time_ns

    def entries(self) -> Sequence[TreeEntry]:
        return [self._entry(disk) for disk in disks_of(self.opener.history, self.cut)]

    def lookup(self, name: str) -> TreeEntry:
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise NotFoundError(f"machine {self.cut.machine.name} has no disk image {name!r} at LSN {self.cut.lsn}")

    def _entry(self, disk: DiskRecord) -> TreeEntry:
        key = ("disk", self.cut.machine.id, disk.slot, self.cut.lsn)
        file = TreeFile(key, disk.size_bytes, self.cut.time_ns, lambda: self.opener.open(self.cut, disk))
        return TreeEntry(disk.name + IMAGE_SUFFIX, file, lasting=True)
