"""PURE: in which order a recovered machine's filesystems are mounted and its work begun, and how each step is undone.

    attach disk or partition (a loop device) and mount it, one filesystem after the other  →  commands  →  services

In a test everything lies below a directory of that test and services are left alone: they know production's paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from asrfs.errors import NotFoundError
from asrfs.model.boot import Filesystem, MountBoot


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do. `subject`: the disk, the path or the service it is about; `words`: of a command.

    A disk is a file, `source`, of which `partition` is attached or mounted (0: the whole disk), with `type` and
    `options`.
    """

    kind: Literal["attach", "mount", "start", "service"]
    subject: str
    source: str = ""
    partition: int = 0
    type: str = ""
    options: str = ""
    words: tuple[str, ...] = ()


def mount_steps(boot: MountBoot, disks: Mapping[str, str], root: str, *, is_test: bool) -> list[Step]:
    """What to do, in order. `disks`: by name, the files they are. `root`: what all paths lie below, empty for none.

    Raises NotFoundError for a disk that is not there.
    """
    for name in dict.fromkeys(each.disk for each in boot.filesystems):
        if name not in disks:
            raise NotFoundError(f"the boot settings name disk {name!r}: the machine has {', '.join(disks) or 'none'}")
    steps: list[Step] = []
    for each in boot.filesystems:
        source, partition = disks[each.disk], each.partition or 0
        attach = Step(kind="attach", subject=each.disk, source=source, partition=partition)
        if attach not in steps:
            steps.append(attach)
        steps.append(_mount(each, source, root))
    steps += [Step(kind="start", subject=words[0], words=words) for words in boot.start]
    if not is_test:
        steps += [Step(kind="service", subject=name) for name in boot.services]
    return steps


def _mount(each: Filesystem, source: str, root: str) -> Step:
    return Step(
        kind="mount",
        subject=root.rstrip("/") + "/" + each.path.strip("/"),
        source=source,
        partition=each.partition or 0,
        type=each.type or "",
        options=each.options,
    )
