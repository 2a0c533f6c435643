"""Who uses the disks of a mount: loop devices over them, and processes that have their files open."""

from __future__ import annotations

import os
from collections.abc import Iterator

from asrfs.daemon import loop_devices


def users_of(mount: str) -> list[str]:
    """A line for each. A process that ends meanwhile is none; those of others can be seen by root only."""
    found = []
    for loop in loop_devices.loop_devices_below(mount):
        name = os.path.basename(loop.backing_file).removesuffix(".img")
        where = f", mounted on {', '.join(loop.mounted_on)}" if loop.mounted_on else ""
        found.append(f"disk {name} is attached as {loop.device}{where} (`asrfs detach {name}`)")
    prefix = os.path.realpath(mount) + "/"
    for process, path in _open_files():
        if path.startswith(prefix):
            found.append(f"process {process} has {path} open")
    return found


def _open_files() -> Iterator[tuple[str, str]]:
    for process in filter(str.isdigit, os.listdir("/proc")):
        directory = f"/proc/{process}/fd"
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        seen = set()
        for name in names:
            try:
                path = os.readlink(f"{directory}/{name}")
            except OSError:
                continue
            if path not in seen:
                seen.add(path)
                yield process, path
