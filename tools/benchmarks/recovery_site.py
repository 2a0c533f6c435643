"""A recovery site beside production on one machine, as two machines are: with a filesystem and processors of its own.

What both have in common otherwise is the journal of one filesystem, in which each waits for what the other has synced,
and every processor. Neither is what a drill costs the machines it is a drill for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from lab import run

from .workbench import Workbench

_MEMORY = Path("/dev/shm")
_BYTES_MAX = 12 << 30
"""Of the filesystem, which takes what is written there of the machine's memory."""


class RecoverySite(NamedTuple):
    """`directory`: on its filesystem. `words`: what stands before its commands."""

    directory: Path
    words: Sequence[str]


@contextmanager
def recovery_site(bench: Workbench) -> Iterator[RecoverySite]:
    """One, and inside the block this process, with what it begins, keeps to the processors of production: the first
    half, the second is the site's. Where there is only one, both have it."""
    before = os.sched_getaffinity(0)
    ordered = sorted(before)
    own, theirs = ordered[: (len(ordered) + 1) // 2], ordered[len(ordered) // 2 :]
    with ExitStack() as stack:
        directory = _filesystem(bench, stack)
        os.sched_setaffinity(0, own)
        stack.callback(os.sched_setaffinity, 0, before)
        yield RecoverySite(directory, ("taskset", "--cpu-list", ",".join(map(str, theirs))))


def _filesystem(bench: Workbench, stack: ExitStack) -> Path:
    image = _MEMORY / f"{bench.root.name}.img"
    stack.callback(image.unlink, missing_ok=True)
    with image.open("wb") as file:
        file.truncate(_BYTES_MAX)
    run(["mkfs.ext4", "-q", str(image)])
    directory = bench.directory("site")
    bench.unmount_at_end(stack, directory)
    run(["mount", "-o", "loop", str(image), str(directory)])
    return directory
