"""Filesystems that freeze in memory: what happens to them, in order, and what may go wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asrfs.consistency.filesystems import Mount, MountedFilesystem
from asrfs.consistency.freezing import FrozenTogether, OpenFilesystem
from asrfs.consistency.procedure import Held
from asrfs.errors import RefusedError, TemporaryError
from asrfs.model.marker import MarkerRecord


class HandClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@dataclass
class FrozenWorld:
    """`Freezer`, `Place` and `Watch` in one. `levels`: of each filesystem that is mounted.

    `at` is called before each step with its name: to fail, to let time pass, to meddle.
    """

    levels: Sequence[int] = (0,)
    clock: HandClock = field(default_factory=HandClock)
    steps: list[str] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)
    open_fds: dict[int, str] = field(default_factory=dict)
    markers: list[MarkerRecord] = field(default_factory=list)
    frozen_at_markers: list[frozenset[str]] = field(default_factory=list)
    at: Callable[[str], None] = lambda step: None
    watched: bool = False

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.at(name)

    def names(self) -> frozenset[str]:
        return frozenset(self.open_fds[fd] for fd in self.frozen)

    # ---- freezer --------------------------------------------------------------------------------------------------

    def sync(self, fd: int) -> None:
        self.step(f"sync {self.open_fds[fd]}")

    def freeze(self, fd: int) -> None:
        assert self.watched, "nothing is frozen unless somebody watches"
        self.step(f"freeze {self.open_fds[fd]}")
        if fd in self.frozen:
            raise OSError(errno.EBUSY, "busy")
        self.frozen.add(fd)

    def thaw(self, fd: int) -> None:
        self.step(f"thaw {self.open_fds[fd]}")
        if fd not in self.frozen:
            raise OSError(errno.EINVAL, "not frozen")
        self.frozen.remove(fd)

    # ---- place ----------------------------------------------------------------------------------------------------

    def open_filesystems(self) -> list[OpenFilesystem]:
        self.step("open")
        opened = []
        for number, level in enumerate(self.levels):
            mount = Mount(number, f"7:{number}", "ext4", f"/dev/loop{number}", f"/fs{number}")
            fd = os.open("/", os.O_PATH)
            self.open_fds[fd] = f"fs{number}"
            opened.append(OpenFilesystem(MountedFilesystem(mount.device, "ext4", level, [mount]), fd))
        return opened

    def together(self, filesystems: Sequence[OpenFilesystem]) -> FrozenTogether:
        return FrozenTogether(filesystems, self, self.clock)

    def watch(self, filesystems: Sequence[OpenFilesystem]) -> FrozenWorld:
        self.step("watch")
        self.watched = True
        return self

    def mark(self, payload: MarkerRecord, not_after: float | None) -> tuple[int, int]:
        self.step(f"mark {payload.consistency}" if payload.completes is None else "last word")
        if not_after is not None and self.clock.now >= not_after:
            raise RefusedError("the marker came after its deadline")
        self.markers.append(payload)
        self.frozen_at_markers.append(self.names())
        return len(self.markers), self.clock.time_ns()

    def wait_external(self, held: Held) -> bool:
        self.step("external")
        self.frozen_at_markers.append(self.names())
        return True

    # ---- watch ----------------------------------------------------------------------------------------------------

    def freezing(self, deadline: float) -> None:
        self.step("watch freezing")

    def thawed(self) -> None:
        self.step("watch thawed")
        assert not self.frozen, "the watchdog is let go while something is frozen"
        self.watched = False


def failing(step: str, error: Exception | None = None) -> Callable[[str], None]:
    """An `at` that fails one step."""

    def at(name: str) -> None:
        if name == step:
            raise error or TemporaryError(f"{step} failed")

    return at
