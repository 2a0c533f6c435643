"""Loop devices over the disks of a mount, and the filesystems on them.

Always with direct I/O: a buffered loop device splits every request into 4 KiB writes and caches twice. Its queue is set
for what is behind it, and filesystems are made with blocks and sectors of 4 KiB, because that is what is journaled: a
shorter write costs a read and a whole block. The tools of util-linux do the work; each call is bounded, because a
device over a dead mount can block for ever.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from asrfs.errors import NotFoundError, RefusedError, TemporaryError
from asrfs.fuse import mount as fuse_mount
from asrfs.storage.kernel_text import kernel_text

log = logging.getLogger(__name__)

_TOOL_SECONDS_MAX = 120.0
_SIZE_SECONDS_MAX = 10.0
_SIZE_INTERVAL_S = 0.1
_BLOCK = Path("/sys/block")
QUEUE = {
    "scheduler": "none",  # the order of requests is of no use to a journal
    "max_sectors_kb": "1024",  # what one FUSE request carries; a longer one would be cut into a whole and a rest
    "read_ahead_kb": "2048",  # two of them, so that one is read while the other is used
    "wbt_lat_usec": "0",  # no throttling of writeback: nothing seeks, and the journal takes what comes
    "rotational": "0",
}
"""Of an attached device. Discards are on without a word of ours: the loop driver takes granularity (4 KiB, a block) and
limit from what STATFS and the file say. How many requests it may have is the kernel's 128, and so is `max_background`
of FUSE."""


class LoopDevice(NamedTuple):
    """A loop device and the file behind it; `mounted_on` lists where its filesystem is mounted."""

    device: str
    backing_file: str
    mounted_on: tuple[str, ...]


def loop_devices_below(mount: str) -> list[LoopDevice]:
    """Loop devices whose file lies in `mount`."""
    prefix = os.path.realpath(mount) + "/"
    devices = [f"/dev/{entry.parent.parent.name}" for entry in sorted(_BLOCK.glob("loop*/loop/backing_file"))]
    return [loop for loop in map(look, devices) if loop is not None and loop.backing_file.startswith(prefix)]


def look(device: str) -> LoopDevice | None:
    """What a loop device stands for; None if nothing. The file behind it is not asked anything."""
    entry = _BLOCK / os.path.basename(device)
    try:
        backing_file = kernel_text(entry / "loop" / "backing_file")
        number = (entry / "dev").read_text().strip()
    except OSError:
        return None
    return LoopDevice(device, backing_file, _mounts_of(number))


def sequence_of(device: str) -> int:
    """The kernel's number of what is attached to a device now, another one each time; -1 if there is none."""
    try:
        return int((_BLOCK / os.path.basename(device) / "diskseq").read_text())
    except OSError:
        return -1


def attach(path: str) -> str:
    """Attach a file; the device's path. Raises NotFoundError, RefusedError if it is attached already."""
    if not os.path.exists(path):
        raise NotFoundError(f"{path} does not exist: is the machine being served?")
    for loop in loop_devices_below(os.path.dirname(path)):
        if loop.backing_file == os.path.realpath(path):
            raise RefusedError(f"{path} is already attached as {loop.device}")
    device = run_tool("losetup", "--find", "--show", "--direct-io=on", path).strip()
    _set_queue(device)
    return device


def wait_for_size(path: str, size_bytes: int) -> None:
    """Until the kernel knows that a disk in a mount has grown: it asks again once its answer is a second old.

    Raises TemporaryError.
    """
    deadline = time.monotonic() + _SIZE_SECONDS_MAX
    while os.stat(path).st_size < size_bytes:
        if time.monotonic() > deadline:
            raise TemporaryError(
                f"the kernel still takes {path} for shorter than it is: `losetup -c` its loop device later"
            )
        time.sleep(_SIZE_INTERVAL_S)


def take_size(device: str) -> None:
    """Let a loop device have the size its file has now."""
    run_tool("losetup", "--set-capacity", device)


def detach(device: str) -> None:
    """Detach a loop device; it must not be mounted."""
    run_tool("losetup", "--detach", device)


def make_filesystem(device: str, kind: str) -> None:
    """Format a device as ext4 or xfs. Discards go through, so that the image stays sparse."""
    arguments = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", device],
        "xfs": ["mkfs.xfs", "-q", "-f", "-s", "size=4096", device],
    }[kind]
    run_tool(*arguments)


def content_of(device: str) -> str:
    """What kind of filesystem or partition table a device bears; empty for none."""
    return " ".join(_run("blkid", "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", device).stdout.split())


def check_mount_point(directory: str) -> str:
    """The directory without links. Raises NotFoundError, and RefusedError if it has content or is a mount point."""
    if not os.path.isdir(directory):
        raise NotFoundError(f"{directory} is not a directory: make it first")
    directory = fuse_mount.real_path(directory)
    fuse_mount.prepare_directory(directory)
    return directory


def mount(device: str, directory: str) -> None:
    run_tool("mount", device, directory)


def unmount(directory: str) -> None:
    """Unmount a filesystem; everything it holds back is written first. RefusedError while it is busy."""
    run_tool("umount", directory)


def let_go(loop: LoopDevice) -> None:
    """Take away a device that gives I/O errors only: what it held back is lost already."""
    for directory in loop.mounted_on:
        run_tool("umount", "--lazy", directory)
    if look(loop.device) is not None:  # it may have gone with its last user
        detach(loop.device)


def run_tool(*arguments: str) -> str:
    """Run a tool of the system; its output. RefusedError with its own words if it fails."""
    done = _run(*arguments)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        words = " ".join(lines[0].split()) if lines else ""
        raise RefusedError(f"{' '.join(arguments)} failed: {words or f'exit code {done.returncode}'}")
    return done.stdout


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a tool says has words of the caller's language and names of files in it: any bytes."""
    try:
        return subprocess.run(
            arguments,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TOOL_SECONDS_MAX,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError:
        raise NotFoundError(f"the program {arguments[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise TemporaryError(f"{' '.join(arguments)} did not end within {_TOOL_SECONDS_MAX:.0f} s") from None


def _set_queue(device: str) -> None:
    """What this kernel does not have or allow stays as it is: all of it is about speed only."""
    queue = _BLOCK / os.path.basename(device) / "queue"
    for name, value in QUEUE.items():
        try:
            (queue / name).write_text(value)
        except OSError as error:
            log.info("%s: %s stays as it is: %s", device, name, error.strerror)


def _mounts_of(device_number: str) -> tuple[str, ...]:
    """Where the filesystem on a device (major:minor) is mounted in our namespace, innermost last mount first."""
    found = [each.target for each in fuse_mount.mounted_filesystems() if each.device == device_number]
    return tuple(reversed(found))
