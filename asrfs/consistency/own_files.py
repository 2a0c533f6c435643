"""What of this project lies on a filesystem that is to be frozen: then it must not be, or whoever thaws it would wait
for itself.

Looked at are the machine's own directories and images, and what every daemon of ours on this host has open: other
machines, and stores with their vaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from asrfs.consistency.filesystems import Kernel, MountedFilesystem

_PROGRAMS = frozenset(("asrfs", "replica-store"))
_PACKAGES = ("asrfs.", "replica_store.")


def file_of_ours(
    kernel: Kernel, filesystems: Sequence[MountedFilesystem], own: Iterable[tuple[str, str]]
) -> str | None:
    """Why the filesystems may not be frozen, None if they may. `own`: what it is, and its path.

    Blocks; nothing is written.
    """
    where = {mount.id: each for each in filesystems for mount in each.mounts}
    for what, path in own:
        filesystem = where.get(_mount_id(kernel, path))
        if filesystem is not None:
            return f"{filesystem} holds the {what} of this machine, {path}, and is not frozen"
    for process in sorted(each.name for each in kernel.proc.iterdir() if each.name.isdigit()):
        program = program_of_ours(kernel, process)
        descriptors = _listed(kernel, process) if program else ()
        for descriptor in descriptors:
            filesystem = where.get(kernel.mount_id_of(process, descriptor) or -1)
            if filesystem is not None:
                name = _target(kernel, process, descriptor)
                return f"{filesystem} holds {name}, which {program} (process {process}) uses, and is not frozen"
    return None


def program_of_ours(kernel: Kernel, process: str) -> str | None:
    """What a process is, if it is a daemon of ours."""
    try:
        words = (kernel.proc / process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    for word in words[:4]:
        if word.startswith(_PACKAGES) and ".daemon." in word:
            return word
        if (os.path.basename(word) in _PROGRAMS or word.startswith(_PACKAGES)) and "serve" in words:
            return f"{os.path.basename(word)} serve"
    return None


def _mount_id(kernel: Kernel, path: str) -> int:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return kernel.mount_id_of("self", str(descriptor)) or -1
    finally:
        os.close(descriptor)


def _listed(kernel: Kernel, process: str) -> list[str]:
    try:
        return os.listdir(kernel.proc / process / "fd")
    except OSError:
        return []


def _target(kernel: Kernel, process: str, descriptor: str) -> str:
    try:
        return os.readlink(kernel.proc / process / "fd" / descriptor)
    except OSError:
        return "a file"
