"""`replicate`: how fast writes may come so that the store is never far behind, and how far behind it is at a rate."""

from __future__ import annotations

import time
from typing import NamedTuple

from lab import wait_until

from asrfs.model.quantities import format_size

from .benchmark import Run
from .measuring import MIB, fio, lasting, resident_peak
from .own_peers import ShippingPeer
from .results import Turn, Workload
from .rpo import AchievedRpo, RpoSampler
from .workbench import Workbench

RATES = (25, 50, 75, 100, 125, 150, 200, 250, 300, 400)
"""MB/s (10^6) that are tried one after the other."""
RATES_TINY = (5, 10)
SECONDS = 60
RPO_S_MAX = 2.0
KEPT_UP = 0.95
"""The share of the wanted rate that must have been written, else the disk itself was too slow."""
WRITES_PER_S, WRITES_PER_S_TINY = 10_000, 500
QUOTA_BYTES = 1 << 40

_COMPRESSIBLE = ("--buffer_compress_percentage=50", "--refill_buffers")
_BULK = ("--rw=randwrite", "--bs=64k", "--iodepth=16", *_COMPRESSIBLE)
_SMALL = ("--rw=randwrite", "--bs=4k", "--iodepth=16", *_COMPRESSIBLE)
NOTES = (
    "Writes of 64 KiB (4 KiB where they are counted), at random places, at depth 16, half of each compressible, come "
    "at a fixed rate for the whole time. A rate is reached if it was written and if, when the last write was made, the "
    "store had all but the last 2 s. Each rate begins with a new machine and vault; the journal's quota is no bound.",
    "The achieved RPO is the age of the newest record in the store's catalog, sampled 20 times a second while writes "
    "go on.",
    "Compression, sealing, checking and storing share this machine with the writes.",
)


class Reached(NamedTuple):
    """What came of a rate. `per_s`: bytes, or writes where they are counted."""

    per_s: float
    rpo: AchievedRpo
    drain_s: float


def run(bench: Workbench, name: str, command: str) -> Run:
    tiny = bench.options.tiny
    seconds = bench.seconds(SECONDS)
    rates = bench.options.rates or (RATES_TINY if tiny else RATES)
    settings = {"disk": format_size(bench.options.size_bytes), "turns": bench.options.turns, "seconds": seconds}
    run = Run(bench, name, command, settings)
    run.use_fio()
    run.outcome.notes += NOTES
    writes_per_s = WRITES_PER_S_TINY if tiny else WRITES_PER_S
    _small(run, writes_per_s, seconds)
    _search(run, rates, seconds)
    return run


def _search(run: Run, rates: tuple[int, ...], seconds: float) -> None:
    """Go up until a rate is not reached, then repeat the highest that was, and go down if it was luck."""
    highest = Workload("rate", f"highest rate with an achieved RPO of at most {RPO_S_MAX:g} s at the end", "MB/s")
    tried: list[tuple[int, Turn]] = []
    for rate in rates:
        turn, is_reached = _try(run, rate, seconds)
        if not is_reached:
            break
        tried.append((rate, turn))
    while tried:
        rate, first = tried.pop()
        more = [_try(run, rate, seconds) for _ in range(run.bench.options.turns - 1)]
        reached = 1 + sum(is_reached for _, is_reached in more)
        if 2 * reached > 1 + len(more):
            highest.turns[ShippingPeer.key] = [first, *(turn for turn, _ in more)]
            break
    if not highest.turns:
        highest.add(ShippingPeer.key, Turn(0.0))
    run.outcome.workloads.append(highest)


def _try(run: Run, rate: int, seconds: float) -> tuple[Turn, bool]:
    """One turn at a rate in MB/s, put into the outcome, and whether it was reached."""
    bytes_per_s = rate * 1_000_000
    key = f"at-{rate}"
    workload = run.outcome.workload(key)
    if workload is None:
        workload = Workload(key, f"achieved RPO, {rate} MB/s, median", "s", less_is_better=True)
        run.outcome.workloads.append(workload)
    reached = _write(run, (*_BULK, f"--rate={bytes_per_s}"), seconds)
    turn = Turn(reached.per_s / 1_000_000, _beside(reached))
    workload.add(ShippingPeer.key, Turn(reached.rpo.median_s, {"written": turn.value, **turn.also}))
    ok = reached.per_s >= KEPT_UP * bytes_per_s and reached.rpo.final_s <= RPO_S_MAX
    run.bench.say(
        f"{rate} MB/s: written {turn.value:.0f} MB/s, RPO at the end {reached.rpo.final_s:.2f} s, "
        f"{'reached' if ok else 'not reached'}"
    )
    return turn, ok


def _small(run: Run, writes_per_s: int, seconds: float) -> None:
    """Median and 99th percentile at a rate of small writes."""
    what = f"achieved RPO at {writes_per_s:,} writes of 4 KiB a second"
    middle = Workload("rpo-median", f"{what}, median", "s", less_is_better=True)
    worst = Workload("rpo-p99", f"{what}, 99th percentile", "s", less_is_better=True)
    run.outcome.workloads += [middle, worst]
    for turn in range(run.bench.options.turns):
        reached = _write(run, (*_SMALL, f"--rate_iops={writes_per_s}"), seconds, counted=True)
        also = {"written": reached.per_s, **_beside(reached)}
        middle.add(ShippingPeer.key, Turn(reached.rpo.median_s, also))
        worst.add(ShippingPeer.key, Turn(reached.rpo.p99_s, also))
        run.bench.say(f"turn {turn + 1} of {run.bench.options.turns} of small writes done")


def _beside(reached: Reached) -> dict[str, float]:
    return {
        "final_rpo_s": reached.rpo.final_s,
        "agent_rpo_s": reached.rpo.agent_s,
        "drain_s": reached.drain_s,
    }


def _write(run: Run, words: tuple[str, ...], seconds: float, *, counted: bool = False) -> Reached:
    """Writes on a new machine with a new store, sampled."""
    bench = run.bench
    facts = run.facts(ShippingPeer.key)
    with bench.stack() as stack:
        peer = ShippingPeer(bench, bench.options.size_bytes)
        device = run.begin(peer, stack, filled=True)
        facts.version = peer.version()
        before = peer.lab.status()["journal"]["quota_bytes"]
        peer.lab.asrfs("set", f"journal_quota={QUOTA_BYTES // MIB}M")  # as much of it as there is room for
        wait_until(lambda: peer.lab.status()["journal"]["quota_bytes"] > before, "the new quota")
        sampler = RpoSampler(peer)
        stack.callback(sampler.close)
        with sampler:
            load = fio(bench, [device], (*words, *lasting(seconds)), seconds + 120)
        begin = time.monotonic()
        peer.agent("drain")
        drain_s = time.monotonic() - begin
        for role, pid in peer.processes().items():
            facts.resident_bytes_max[role] = max(resident_peak(pid), facts.resident_bytes_max.get(role, 0))
        return Reached(load.iops if counted else load.bytes_per_s, sampler.result(), drain_s)
