"""`write`, `read`, `mixed`, `fsync`: fio on the loop device of each peer. Several of them share the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from asrfs.model.quantities import format_size

from .benchmark import BULK, PEERS, Run
from .measuring import Load, fio, lasting
from .peers import Peer
from .results import Workload
from .workbench import Workbench

SECONDS = 5
SETTLE_SECONDS_MAX = 120


class Job(NamedTuple):
    """A workload in fio's words. `bulk`: what counts is bytes, not operations."""

    key: str
    title: str
    words: tuple[str, ...]
    reference: str = "passthrough"
    bulk: bool = False


# 4 KiB blocks get new random bytes each time, else every frame that is shipped would repeat itself and pack well.
_RANDOM = ("--bs=4k", "--refill_buffers")
RANDOM_WRITE = Job("random-write", "4 KiB random write, depth 16", ("--rw=randwrite", "--iodepth=16", *_RANDOM))
FSYNC_1 = Job(
    *("fsync-1", "4 KiB random write + fsync, depth 1"),
    ("--rw=randwrite", "--iodepth=1", "--fsync=1", *_RANDOM),
    reference="raw",
)
FSYNC_8 = Job(
    *("fsync-8", "4 KiB random write + fsync, 8 writers"),
    ("--rw=randwrite", "--iodepth=1", "--fsync=1", "--numjobs=8", *_RANDOM),
    reference="raw",
)
SEQUENTIAL_WRITE = Job(
    *("sequential-write", "1 MiB sequential write, depth 4", ("--rw=write", "--bs=1M", "--iodepth=4")), bulk=True
)
RANDOM_READ = Job("random-read", "4 KiB random read, depth 16", ("--rw=randread", "--bs=4k", "--iodepth=16"))
SEQUENTIAL_READ = Job(
    *("sequential-read", "1 MiB sequential read, depth 4", ("--rw=read", "--bs=1M", "--iodepth=4")), bulk=True
)
MIXED = Job("mixed", "4 KiB random, half reads, depth 16", ("--rw=randrw", "--rwmixread=50", "--iodepth=16", *_RANDOM))

JOBS = {
    "write": (RANDOM_WRITE, FSYNC_1, SEQUENTIAL_WRITE),
    "read": (RANDOM_READ, SEQUENTIAL_READ),
    "mixed": (MIXED,),
    "fsync": (FSYNC_1, FSYNC_8),
}

NOTES = (
    "Every peer is a loop device with direct I/O over the peer's file. The raw file is so read and written past the "
    "page cache; behind the other peers is the page cache of this machine, as each has it by default, so they can be "
    "faster than the raw file wherever nothing asks for durability.",
    "What the disks hold was written once through the peer before, with bytes that do not compress. Before reads all "
    "of it is in the images (drained and applied) and is read once, so the page cache is warm for all peers alike.",
    "s3backer answers an fsync from its cache and makes nothing durable.",
    "After each turn everything it caused is waited for: shipped, applied, mirrored, written back. The processor time "
    "is that of the peer's processes until then, without the kernel's; a store or mirror target is counted apart. It "
    "runs at the lowest priority, since in earnest it is another computer.",
)


def runs(bench: Workbench, commands: Mapping[str, str]) -> Iterator[Run]:
    """One after the other the benchmarks of `JOBS` that are named, each with the command that repeats it."""
    seconds = bench.seconds(SECONDS)
    size_bytes = bench.options.size_bytes
    settings = {"disk": format_size(size_bytes), "turns": bench.options.turns, "seconds a turn": seconds}
    all_runs = [Run(bench, name, command, settings) for name, command in commands.items()]
    first = all_runs[0]
    with first.serving(PEERS, size_bytes):
        for run in all_runs:
            run.use_fio()
            if run is not first:
                run.share_peers(first)
            _take_turns(run, seconds)
            yield run


def _take_turns(run: Run, seconds: float) -> None:
    bench, name = run.bench, run.outcome.benchmark
    run.outcome.notes += NOTES
    if name in ("read", "mixed"):
        for key, (_, device) in list(run.served.items()):
            with run.or_gone(key):
                _read_once(bench, device)
    steps = []
    for job in JOBS[name]:
        unit = BULK if job.bulk else "operations/s"
        workload = Workload(job.key, job.title, unit, job.reference)
        run.outcome.workloads.append(workload)
        steps.append((workload, _step(bench, job, seconds)))
    run.take_turns(steps)


def _step(bench: Workbench, job: Job, seconds: float) -> Callable[[Peer, str], Load]:
    words = (*job.words, *lasting(seconds))
    return lambda peer, device: fio(bench, [device], words, seconds + SETTLE_SECONDS_MAX)


def _read_once(bench: Workbench, device: str) -> None:
    fio(bench, [device], ("--rw=read", "--bs=1M", "--iodepth=4"), 900)
