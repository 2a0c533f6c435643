"""PURE: what asrfs wants to reach, and whether a run reached it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .results import Outcome, number, ratio, spread_of

MIB = 1 << 20


class Figure(NamedTuple):
    """A bound for the median of `peer`, as a ratio to the peer `against` if one is named. `workload` is a key."""

    benchmark: str
    workload: str
    peer: str
    against: str
    bound: float
    at_most: bool = False


class Judgement(NamedTuple):
    """A figure beside what was measured."""

    what: str
    wanted: str
    measured: str
    reached: bool


FIGURES = (
    Figure("write", "random-write", "asrfs-shipping", "qemu", 1.5),
    Figure("write", "random-write", "asrfs-shipping", "passthrough", 0.8),
    Figure("write", "random-write", "asrfs", "passthrough", 0.9),
    Figure("write", "sequential-write", "asrfs-shipping", "passthrough", 0.8),
    Figure("read", "random-read", "asrfs-shipping", "passthrough", 0.8),
    Figure("read", "sequential-read", "asrfs-shipping", "passthrough", 0.9),
    Figure("mixed", "mixed", "asrfs-shipping", "passthrough", 0.8),
    Figure("fsync", "fsync-1", "asrfs-shipping", "raw", 1.0),
    Figure("fsync", "fsync-8", "asrfs-shipping", "raw", 1.0),
    Figure("database", "pgbench", "asrfs-shipping", "raw", 0.9),
    Figure("replicate", "rate", "asrfs-shipping", "", 300.0),
    Figure("replicate", "rpo-median", "asrfs-shipping", "", 0.5, at_most=True),
    Figure("replicate", "rpo-p99", "asrfs-shipping", "", 1.0, at_most=True),
    Figure("recover", "restart", "asrfs", "", 1.0, at_most=True),
    Figure("recover", "takeover", "asrfs", "", 1.0, at_most=True),
    Figure("recover", "map-memory", "asrfs", "", 64.0, at_most=True),
    Figure("barrier", "hold-16", "asrfs", "", 10.0, at_most=True),
    Figure("barrier", "hold-64", "asrfs", "", 50.0, at_most=True),
    Figure("resync", "scan-host-compressible", "asrfs", "", 1.5),
    Figure("resync", "scan-host-incompressible", "asrfs", "", 1.5),
    Figure("resync", "scan-store-compressible", "asrfs", "", 1.5),
    Figure("resync", "scan-store-incompressible", "asrfs", "", 1.5),
    Figure("resync", "resync-1", "asrfs", "rsync", 5.0),
    Figure("resync", "wire-0", "asrfs", "", 0.01, at_most=True),
    Figure("resync", "map-read", "asrfs", "", 1.1, at_most=True),
    Figure("resync", "writers-ratio", "asrfs", "", 1.5, at_most=True),
    Figure("failover", "frozen-1T", "asrfs-shipping", "", 5.0, at_most=True),
    Figure("failover", "crashed-1T", "asrfs-shipping", "", 5.0, at_most=True),
    Figure("failover", "writers-sites-noise", "asrfs-shipping", "", 1.0, at_most=True),
    Figure("failover", "rpo-sites-noise", "asrfs-shipping", "", 1.0, at_most=True),
    Figure("export", "first-byte-10M", "replica-store-export", "", 2.0, at_most=True),
    Figure("export", "first-byte-10M", "replica-store-mount", "", 2.0, at_most=True),
    Figure("export", "memory-10M", "replica-store-export", "", 1024.0, at_most=True),
    Figure("export", "memory-10M", "replica-store-mount", "", 1024.0, at_most=True),
)

RESIDENT_MIB_MAX = {"disk server": 150, "agent": 300}


def judge(outcomes: Iterable[Outcome]) -> list[Judgement]:
    """Every figure that something was measured for."""
    by_name = {outcome.benchmark: outcome for outcome in outcomes}
    found = [judged for figure in FIGURES if (judged := _judge(figure, by_name)) is not None]
    return found + _judge_memory(by_name)


def _judge(figure: Figure, outcomes: Mapping[str, Outcome]) -> Judgement | None:
    outcome = outcomes.get(figure.benchmark)
    workload = outcome.workload(figure.workload) if outcome else None
    if outcome is None or workload is None:
        return None
    title = outcome.peers[figure.peer].title if figure.peer in outcome.peers else figure.peer
    reached = operator.le if figure.at_most else operator.ge
    sign = "≤" if figure.at_most else "≥"
    if figure.against:
        measured = ratio(workload, figure.peer, figure.against)
        other = outcome.peers[figure.against].title if figure.against in outcome.peers else figure.against
        unit = f" × {other}"
    else:
        own = spread_of(workload, figure.peer)
        measured, unit = (own.median if own else None), f" {workload.unit}"
    if measured is None:
        return None
    what = f"{workload.title}: {title}"
    return Judgement(what, f"{sign} {figure.bound:g}{unit}", number(measured), reached(measured, figure.bound))


def _judge_memory(outcomes: Mapping[str, Outcome]) -> list[Judgement]:
    """The most that any benchmark saw a process of asrfs have resident."""
    peaks: dict[str, int] = {}
    for outcome in outcomes.values():
        for facts in outcome.peers.values():
            for role, most in facts.resident_bytes_max.items():
                peaks[role] = max(most, peaks.get(role, 0))
    return [
        Judgement(f"resident at most: {role}", f"≤ {bound} MiB", number(peaks[role] / MIB), peaks[role] <= bound * MIB)
        for role, bound in RESIDENT_MIB_MAX.items()
        if role in peaks
    ]
