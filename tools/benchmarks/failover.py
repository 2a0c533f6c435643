"""`failover`: from the command of a test failover to disks that are served and fsck-clean, whatever their size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asrfs.errors import TemporaryError
from asrfs.model.quantities import format_size

from . import failover_writers
from .benchmark import Run
from .own_peers import ShippingPeer
from .results import Turn, Workload
from .workbench import Workbench

SIZES, SIZES_TINY = (1 << 30, 1 << 35, 1 << 40), (1 << 27,)
SHARE_MAX = 4
"""Written is at most a quarter of a disk."""
FILE_BYTES = 64 << 20
KEY = "asrfs-shipping"
NOTES = (
    "A disk with ext4 and files of random bytes; a point while it is frozen, and one as a crash leaves it, whose "
    "journal is replayed on a copy before fsck. The time is from the start of the command to the end of fsck; stores "
    "and protected machines of all sizes run beside it.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    options = bench.options
    run = Run(bench, name, command, {"written at most": format_size(options.size_bytes), "turns": options.turns})
    run.facts(KEY, "asrfs")
    run.outcome.notes += NOTES
    with bench.stack() as stack:
        steps: list[tuple[ShippingPeer, str, Workload]] = []
        for size_bytes in SIZES_TINY if options.tiny else SIZES:
            written = min(options.size_bytes, size_bytes // SHARE_MAX)
            peer = ShippingPeer(bench, size_bytes)
            peer.start(stack)
            run.facts(KEY).version = peer.version()
            _write(peer, written)
            for point, how in (("frozen", "filesystem point"), ("crashed", "crash point")):
                steps.append((peer, point, _workload(point, how, size_bytes, written)))
            bench.say(f"a disk of {format_size(size_bytes)} is there, {format_size(written)} of it written")
        run.outcome.workloads += [workload for _, _, workload in steps]
        for turn in range(options.turns):
            for peer, point, workload in steps:
                workload.add(KEY, _try(peer, point))
            bench.say(f"turn {turn + 1} of {options.turns} of all sizes done")
    failover_writers.measure(run)
    return run


def _workload(point: str, how: str, size_bytes: int, written: int) -> Workload:
    size = format_size(size_bytes).replace(".0 ", "").removesuffix("iB")
    what = f"test failover of a disk of {format_size(size_bytes)}, {format_size(written)} written, {how}"
    return Workload(f"{point}-{size}", what, "s", less_is_better=True)


def _write(peer: ShippingPeer, count: int) -> None:
    """A filesystem with so many bytes of files, and two points of it."""
    mounted = peer.bench.directory("mounted")
    peer.lab.attach("bench", "--format", "ext4", "--on", mounted)
    for number, begin in enumerate(range(0, count, FILE_BYTES)):
        _fill(mounted / f"file-{number}", min(FILE_BYTES, count - begin))
    for key, consistency in (("frozen", "filesystem"), ("crashed", "crash")):
        _fill(mounted / key, 1 << 20)
        words = ("--consistency", consistency, "--name", key, "--wait", "--timeout", "900s")
        peer.lab.asrfs("point", "create", *words)
    peer.settle()


def _fill(path: Path, count: int) -> None:
    with path.open("wb") as file:
        file.write(os.urandom(count))
        os.fsync(file.fileno())


def _try(peer: ShippingPeer, point: str) -> Turn:
    peer.bench.flush_everything()
    done: dict[str, Any] = peer.lab.replica_store("failover", "test", peer.machine, "--point", point)
    peer.lab.replica_store("failover", "cleanup", done["id"])
    (disk,) = done["disks"]
    if disk["fsck"] != "clean" or (point == "crashed") != disk["journal_replayed"]:
        raise TemporaryError(f"fsck of the recovered disk: {disk}")
    steps = {step["name"]: step["seconds"] for step in done["steps"]}
    return Turn(done["rto_seconds"], {"served_s": done["rto_seconds"] - steps["fsck"], "fsck_s": steps["fsck"]})
