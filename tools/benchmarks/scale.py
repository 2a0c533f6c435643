"""`scale`: several machines with a serve process each, all written to at once."""

from __future__ import annotations

from asrfs.model.quantities import format_size

from .benchmark import PEERS, Run
from .blocks import NOTES, RANDOM_WRITE, SETTLE_SECONDS_MAX
from .measuring import fio, lasting, resident_peak
from .own_peers import ShippingPeer
from .peers import Peer
from .results import Turn, Workload
from .workbench import Workbench

MACHINES, MACHINES_TINY = (1, 2, 4), (1, 2)
KINDS = ("raw", "passthrough", "asrfs", "asrfs-shipping")
SECONDS = 5
SIZE_SHARE = 4
"""Each machine's disk is so much smaller than the size that is given."""


def run(bench: Workbench, name: str, command: str) -> Run:
    counts = bench.options.machines or (MACHINES_TINY if bench.options.tiny else MACHINES)
    size_bytes = bench.options.size_bytes // SIZE_SHARE
    seconds = bench.seconds(SECONDS)
    settings = {"disks": format_size(size_bytes), "turns": bench.options.turns, "seconds a turn": seconds}
    run = Run(bench, name, command, settings)
    run.use_fio()
    run.outcome.notes += [*NOTES, "Machines that ship have one store; depth 16 is that of each machine."]
    workloads = [
        Workload(f"machines-{count}", f"{RANDOM_WRITE.title}, machines: {count}", "operations/s", "passthrough")
        for count in counts
    ]
    run.outcome.workloads += workloads
    kinds = [PEERS[key] for key in KINDS if bench.wants(key)]
    for kind in kinds:
        run.facts(kind.key)
    for turn in range(bench.options.turns):
        for kind in kinds:
            if not run.facts(kind.key).unavailable:
                with run.or_gone(kind.key):
                    _one_turn(run, kind, counts, workloads, size_bytes, seconds)
        bench.say(f"turn {turn + 1} of {bench.options.turns} done")
    return run


def _one_turn(
    run: Run, kind: type[Peer], counts: tuple[int, ...], workloads: list[Workload], size_bytes: int, seconds: float
) -> None:
    """Serve as many as are ever needed, write to the first ones of them, stop: what only waits costs something too."""
    facts = run.facts(kind.key)
    with run.bench.stack() as stack:
        peers: list[Peer] = []
        devices = []
        for _ in range(max(counts)):
            peer = kind(run.bench, size_bytes)
            if isinstance(peer, ShippingPeer) and peers:
                _share_store(peer, peers[0], len(peers))
            peers.append(peer)
            devices.append(run.begin(peer, stack, filled=True))
        facts.version = peers[0].version()
        words = (*RANDOM_WRITE.words, *lasting(seconds))
        for count, workload in zip(counts, workloads, strict=True):
            load = fio(run.bench, devices[:count], words, seconds + SETTLE_SECONDS_MAX)
            also = {"p50_us": load.p50_us, "p99_us": load.p99_us}
            workload.add(kind.key, Turn(load.iops, also))
            for peer in peers:
                peer.settle()
            run.bench.flush_everything()
        for peer in peers:
            for role, pid in peer.processes().items():
                facts.resident_bytes_max[role] = max(resident_peak(pid), facts.resident_bytes_max.get(role, 0))


def _share_store(peer: ShippingPeer, first: Peer, number: int) -> None:
    """All machines ship to the store of the first, each under a name of its own."""
    assert isinstance(first, ShippingPeer)
    peer.host_store = first.lab
    peer.machine = f"web{number + 1}"
