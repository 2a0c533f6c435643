"""What production feels of test failovers: latency of its writers and the achieved RPO, with and without, in turns.

Measured twice: with a recovery site that has processors and a filesystem of its own, as another machine has, and with
one that shares those of production, which is the worst that can be.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lab import LabError

from .benchmark import Run
from .measuring import MIB, fio, lasting
from .own_peers import ShippingPeer
from .recovery_site import RecoverySite, recovery_site
from .results import Turn, Workload, spread
from .rpo import RpoSampler

KEY = ShippingPeer.key
SECONDS = 15.0
WRITES_PER_S = 1000
DISK_BYTES = 1 << 30
FILES, FILES_TINY = 256 * MIB, 16 * MIB
KINDS = ("without", "with")
_WRITES = ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--refill_buffers", f"--rate_iops={WRITES_PER_S}")

NOTES = (
    f"Writers: 4 KiB at random places, depth 1, {WRITES_PER_S} a second, through the loop device of one disk; with: "
    "test failovers one after the other meanwhile, each made, examined by fsck and cleaned up, of the machine that is "
    "written to, whose other disk has a filesystem. The RPO is that of the store's catalog, sampled 20 times a second; "
    "two sites: the recovery site has half of the processors, production the other half, and a filesystem of its own, "
    "in memory; one machine: it has the processors and the filesystem of production. Above noise: the median of the "
    "turns with by the highest turn without.",
)


def measure(run: Run) -> None:
    """Adds the workloads to the run."""
    with recovery_site(run.bench) as site:
        _measure(run, "sites", "two sites", site)
    _measure(run, "shared", "one machine", None)
    run.outcome.notes += NOTES


def _measure(run: Run, key: str, where: str, site: RecoverySite | None) -> None:
    latency = _workloads(run, f"writers-{key}", f"{where}: write of 4 KiB {{}} test failovers, p99", "µs")
    rpo = _workloads(run, f"rpo-{key}", f"{where}: achieved RPO {{}} test failovers, 99th percentile", "s")
    bench = run.bench
    with bench.stack() as stack:
        peer = ShippingPeer(bench, FILES_TINY * 4 if bench.options.tiny else DISK_BYTES)
        peer.site = site
        device = peer.serve(stack)
        _add_files(peer)
        peer.settle()
        for turn in range(bench.options.turns):
            for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
                bench.flush_everything()
                written, achieved = _write(run, peer, device, with_tests=kind == "with")
                latency[kind].add(KEY, written)
                rpo[kind].add(KEY, achieved)
            bench.say(f"turn {turn + 1} of {bench.options.turns} of writers beside test failovers done, {where}")
    for name, title, found in (("writers", "p99 of writes", latency), ("rpo", "achieved RPO", rpo)):
        values = {kind: spread([turn.value for turn in found[kind].turns[KEY]]) for kind in KINDS}
        title = f"{where}: {title} with test failovers"
        above = Workload(f"{name}-{key}-noise", title, "× highest without", less_is_better=True)
        above.add(KEY, Turn(values["with"].median / values["without"].high))
        run.outcome.workloads.append(above)


def _workloads(run: Run, name: str, title: str, unit: str) -> dict[str, Workload]:
    found = {kind: Workload(f"{name}-{kind}", title.format(kind), unit, less_is_better=True) for kind in KINDS}
    run.outcome.workloads += found.values()
    return found


def _add_files(peer: ShippingPeer) -> None:
    """A second disk, with a filesystem that a test failover has to examine."""
    count = FILES_TINY if peer.bench.options.tiny else FILES
    peer.lab.asrfs("disk", "add", "files", "--size", str(4 * count))
    mounted = peer.bench.directory("files")
    peer.lab.attach("files", "--format", "ext4", "--on", mounted)
    with (mounted / "file").open("wb") as file:
        for _ in range(count // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def _write(run: Run, peer: ShippingPeer, device: str, *, with_tests: bool) -> tuple[Turn, Turn]:
    """One turn of writers: 99th percentiles of their latency, and of the achieved RPO meanwhile."""
    seconds = run.bench.seconds(SECONDS)
    sampler = RpoSampler(peer)
    tests: list[float] = []
    try:
        with sampler:
            if with_tests:
                with _testing(peer, tests):
                    load = fio(run.bench, [device], (*_WRITES, *lasting(seconds)), seconds + 120)
            else:
                load = fio(run.bench, [device], (*_WRITES, *lasting(seconds)), seconds + 120)
        peer.settle()
        achieved = sampler.result()
    finally:
        sampler.close()
    also = {"tests": float(len(tests)), "seconds": spread(tests).median} if tests else {}
    return (
        Turn(load.p99_us, {"p50_us": load.p50_us, "written": load.iops, **also}),
        Turn(achieved.p99_s, {"rpo_median_s": achieved.median_s, "agent_rpo_s": achieved.agent_s}),
    )


@contextmanager
def _testing(peer: ShippingPeer, took: list[float]) -> Iterator[None]:
    """Test failovers one after the other until the block ends; `took` grows by the RTO of each."""
    stop, failed = threading.Event(), list[LabError]()

    def go_on() -> None:
        try:
            while not stop.is_set():
                done = peer.lab.replica_store("failover", "test", peer.machine, "--point", "latest")
                took.append(done["rto_seconds"])
                peer.lab.replica_store("failover", "cleanup", done["id"])
        except LabError as error:
            failed.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
