"""What lies in the way of directories that are to go: mounts, and loop devices over files of them.

The tools of util-linux do the work, each call bounded, because whatever is behind a mount may be dead. One that cannot
even be killed, since the kernel waits for that, is left to end by itself: with who serves the disks, at the latest.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from asrfs.errors import NotFoundError, TemporaryError
from asrfs.storage.kernel_text import kernel_lines, kernel_text

_TOOL_S_MAX = 20.0
"""What a machine wrote is given up when it is taken away: nobody waits long for that to be flushed."""
_BLOCK = Path("/sys/block")
_DELETED = " (deleted)"
_undying: set[subprocess.Popen[bytes]] = set()
"""Tools that could not be waited for. Each is held until it has ended: one that is dropped before warns of a leak."""


class Mounted(NamedTuple):
    """One line of mountinfo."""

    target: str
    source: str


def mounted() -> list[Mounted]:
    """What this process sees mounted, oldest first."""
    return [_parse(line) for line in kernel_lines("/proc/self/mountinfo")]


def is_mount_point(path: str) -> bool:
    """Whether something is mounted exactly there; it is not asked anything."""
    return any(each.target == path for each in mounted())


def loops_below(directory: str) -> list[str]:
    """Loop devices over files that lie there."""
    found = []
    for entry in sorted(_BLOCK.glob("loop*/loop/backing_file")):
        try:
            backing_file = kernel_text(entry).removesuffix(_DELETED)
        except OSError:  # detached meanwhile
            continue
        if backing_file.startswith(f"{directory}/"):
            found.append(f"/dev/{entry.parts[3]}")
    return found


def release_loops(directory: str) -> None:
    """Unmount what is mounted from loop devices over files that lie there, by force if need be, and detach these."""
    for device in loops_below(directory):
        for each in reversed([mount.target for mount in mounted() if mount.source == device]):
            if _run("umount", each) != 0:
                _run("umount", "--lazy", each)
        if device in loops_below(directory):  # it may have gone with its last user
            _run("losetup", "--detach", device)


def take_away(directory: str) -> None:
    """Unmount all that is mounted there or below, whoever uses it. Raises TemporaryError if anything stays."""
    for each in reversed([mount.target for mount in mounted() if _is_in(mount.target, directory)]):
        if _run("umount", "--no-canonicalize", each) != 0:
            _run("umount", "--lazy", "--no-canonicalize", each)
    if left := [mount.target for mount in mounted() if _is_in(mount.target, directory)]:
        raise TemporaryError(f"{left[0]} cannot be unmounted: end whoever uses it and try again")


def _is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _run(*words: str) -> int:
    """Exit code, that of a death by signal if it did not end in time."""
    for each in tuple(_undying):
        if each.poll() is not None:
            _undying.discard(each)
    try:
        tool = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise NotFoundError(f"the program {words[0]} is not installed") from None
    try:
        return tool.wait(_TOOL_S_MAX)
    except subprocess.TimeoutExpired:
        tool.kill()
        _undying.add(tool)
        return -signal.SIGKILL


def _parse(line: str) -> Mounted:
    left, _, right = line.partition(" - ")
    return Mounted(_unescape(left.split(" ")[4]), _unescape(right.split(" ")[1]))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def allocated_bytes(directory: str) -> int:
    """What the files below a directory take on their filesystem; other filesystems mounted there do not count. Nothing
    where there is none: who died may not have come to making it."""
    try:
        device = os.lstat(directory).st_dev
    except FileNotFoundError:
        return 0
    total = 0
    for root, names, files in os.walk(directory):
        names[:] = [name for name in names if not os.path.ismount(os.path.join(root, name))]
        for name in files:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:  # gone meanwhile
                continue
            if status.st_dev == device:
                total += status.st_blocks * 512
    return total
