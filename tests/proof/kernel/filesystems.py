"""Filesystems on disks, on exports and on devices cut at an LSN: made, checked, mounted for a look."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.proof.kernel.world import World
from tests.t5_system.machine import run_tool


def open_filesystem(made: World, disk: str, kind: str, where: Path) -> str:
    """Make and mount a filesystem on a loop device over the disk; the device."""
    return str(made.asrfs("attach", disk, "--format", kind, "--on", where)["device"])


def check_filesystem(device: Path | str, kind: str) -> None:
    """fsck of a filesystem that was unmounted, changing nothing."""
    run_tool(*(("e2fsck", "-fn", device) if kind == "ext4" else ("xfs_repair", "-n", "-f", device)), seconds_max=60)


@contextlib.contextmanager
def mounted_copy(image: Path, where: Path, kind: str, options: str = "noatime") -> Iterator[Path]:
    """The filesystem in a file, mounted within the block: its journal is replayed first.

    XFS wants the option `nouuid` while the filesystem it is a copy of is mounted.
    """
    where.mkdir(exist_ok=True)
    device = run_tool("losetup", "--find", "--show", "--direct-io=on", image).strip()
    try:
        run_tool("mount", "-t", kind, "-o", options, device, where)
        try:
            yield where
        finally:
            run_tool("umount", where)
    finally:
        run_tool("losetup", "--detach", device)
