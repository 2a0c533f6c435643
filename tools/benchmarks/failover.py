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
    "journal is replayed on a copy before fsck. The time is from the start of the command to the end of fsck; the "
    "store and the protected machine run beside it.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    options = bench.options
    run = Run(bench, name, command, {"written": format_size(options.size_bytes), "turns": options.turns})
    run.facts(KEY, "asrfs")
    run.outcome.notes += NOTES
    for size_bytes in SIZES_TINY if options.tiny else SIZES:
        size = format_size(size_bytes).replace(".0 ", "").removesuffix("iB")
        written = min(options.size_bytes, size_bytes // SHARE_MAX)
        what = f"test failover of a disk of {format_size(size_bytes)}, {format_size(written)} written"
        frozen, crashed = (
            Workload(f"{key}-{size}", f"{what}, {how}", "s", "", True)
            for key, how in (("frozen", "filesystem point"), ("crashed", "crash point"))
        )
        run.outcome.workloads += [frozen, crashed]
        with bench.stack() as stack:
            peer = ShippingPeer(bench, size_bytes)
            peer.start(stack)
            run.facts(KEY).version = peer.version()
            _write(peer, written)
            for turn in range(options.turns):
                for workload in (frozen, crashed):
                    workload.add(KEY, _try(peer, workload.key.partition("-")[0]))
                bench.say(f"{size}: turn {turn + 1} of {options.turns} done")
    failover_writers.measure(run)
    return run


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
