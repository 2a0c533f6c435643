"""Which mounted filesystems lie on a machine's disks, as the kernel says it in /sys and /proc; nothing is opened here.

    files of the mount ─▶ loop devices ─▶ partitions, holders (dm, md) ─▶ mounts ─▶ loop devices over their files ─▶ …

A filesystem in a file of another one has the deeper level: it is frozen before, and thawed after, what it lies on.
Mounts of other mount namespaces (containers) count as well: a filesystem has one state, wherever it is seen.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asrfs.storage.kernel_text import kernel_lines, kernel_text


@dataclass(frozen=True, slots=True)
class Mount:
    """One place where a filesystem is seen. `root`: what leads to the mount namespace it is seen in.

    `id` names it for the kernel; `device` is major:minor of the filesystem, `source` what was mounted.
    """

    id: int
    device: str
    kind: str
    source: str
    directory: str
    root: str = ""

    @property
    def path(self) -> str:
        """Where this process finds it."""
        return self.root + self.directory


@dataclass(slots=True)
class MountedFilesystem:
    """A filesystem on a machine's disks. `level` 0 lies on them directly."""

    device: str
    kind: str
    level: int
    mounts: list[Mount] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.mounts[0].directory} ({self.kind})"


class Kernel:
    """What the kernel shows below `sys` and `proc`."""

    def __init__(self, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        self._block = sys / "block"
        self._btrfs = sys / "fs/btrfs"
        self.proc = proc

    def filesystems_on(self, mount: str) -> list[MountedFilesystem]:
        """Mounted filesystems on the disks that are files of `mount`, deepest level first. Raises OSError."""
        return sorted(self._look(mount)[1].values(), key=lambda each: -each.level)

    def devices_on(self, mount: str) -> set[str]:
        """`major:minor` of all that stands on those disks: block devices, and filesystems on them. Raises OSError."""
        levels, filesystems = self._look(mount)
        return {*levels, *filesystems}

    def _look(self, mount: str) -> tuple[dict[str, int], dict[str, MountedFilesystem]]:
        """The level of each block device, and the filesystems by their devices."""
        prefix = os.path.join(os.path.realpath(mount), "")
        loops = self._loop_files()
        levels: dict[str, int] = {}
        self._add([name for name, path in loops.items() if path.startswith(prefix)], 0, levels)
        mounts = list(self.mounts())
        found: dict[str, MountedFilesystem] = {}
        while fresh := [each for each in mounts if each.device not in found and self._level_of(each, levels) >= 0]:
            for each in fresh:
                if each.device not in found:
                    found[each.device] = MountedFilesystem(each.device, each.kind, self._level_of(each, levels))
            for filesystem in {each.device: found[each.device] for each in fresh}.values():
                filesystem.mounts = [each for each in mounts if each.device == filesystem.device]
                over = [name for name, path in loops.items() if _mount_of(path, mounts) == filesystem.device]
                self._add(over, filesystem.level + 1, levels)
        return levels, found

    def mounts(self) -> Iterator[Mount]:
        """Of every mount namespace, our own first. A process that ends while we look is passed over."""
        seen: set[str] = set()
        for process in ("self", *sorted(each.name for each in self.proc.iterdir() if each.name.isdigit())):
            try:
                namespace = os.readlink(self.proc / process / "ns/mnt")
                if namespace in seen:
                    continue
                lines = kernel_lines(self.proc / process / "mountinfo")
            except OSError:
                continue
            seen.add(namespace)
            root = "" if process == "self" else str(self.proc / process / "root")
            yield from (parse_mount(line, root) for line in lines)

    def mount_id_of(self, process: str, descriptor: str) -> int | None:
        """The mount through which a descriptor was opened; None if it is gone."""
        try:
            text = (self.proc / process / "fdinfo" / descriptor).read_text()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:")), None)

    def _loop_files(self) -> dict[str, str]:
        """Files by the loop device that stands for them."""
        files = {}
        for entry in sorted(self._block.glob("loop*/loop/backing_file")):
            try:
                files[entry.parent.parent.name] = kernel_text(entry)
            except OSError:
                continue  # detached meanwhile
        return files

    def _add(self, names: list[str], level: int, levels: dict[str, int]) -> None:
        """Note block devices, their partitions, and whatever is made of either."""
        for name in names:
            for entry in (self._block / name, *sorted((self._block / name).glob(f"{name}*"))):
                try:
                    device = (entry / "dev").read_text().strip()
                except OSError:
                    continue
                if level > levels.get(device, -1):
                    levels[device] = level
                    holders = entry / "holders"
                    self._add(sorted(os.listdir(holders)) if holders.is_dir() else [], level, levels)

    def _level_of(self, mount: Mount, levels: dict[str, int]) -> int:
        """-1: it lies elsewhere. A filesystem without a device of its own (btrfs) lies on its members."""
        if not mount.device.startswith("0:"):
            return levels.get(mount.device, -1)
        if mount.kind != "btrfs":
            return -1
        return max((levels.get(device, -1) for device in self._btrfs_members(device_of(mount.source))), default=-1)

    def _btrfs_members(self, device: str) -> list[str]:
        for filesystem in sorted(self._btrfs.glob("*/devices")) if self._btrfs.is_dir() else []:
            members = [
                (entry / "dev").read_text().strip() for entry in filesystem.iterdir() if (entry / "dev").exists()
            ]
            if device in members:
                return members
        return [device]


def parse_mount(line: str, root: str = "") -> Mount:
    """A line of /proc/PID/mountinfo."""
    left, _, right = line.partition(" - ")
    mount_id, _, device, _, directory, *_ = left.split(" ")
    kind, source, *_ = right.split(" ")
    return Mount(int(mount_id), device, kind, _unescaped(source), _unescaped(directory), root)


def device_of(path: str) -> str:
    """major:minor of a block device, empty for what is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if stat.S_ISBLK(found.st_mode) else ""


def _mount_of(path: str, mounts: list[Mount]) -> str | None:
    """The filesystem on which a path of our own namespace lies: of the mounts that lead there, the deepest and last."""
    best: Mount | None = None
    for each in mounts:
        inside = path == each.directory or path.startswith(os.path.join(each.directory, ""))
        if not each.root and inside and (best is None or len(each.directory) >= len(best.directory)):
            best = each
    return best.device if best is not None else None


def _unescaped(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
