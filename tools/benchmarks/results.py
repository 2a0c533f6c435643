"""PURE: what measurements say: medians, spreads, ratios, and the document they are kept as."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec


class Turn(msgspec.Struct, frozen=True):
    """One measurement: `value` in its workload's unit; `also`, by name, what was measured beside it (see `COLUMNS`)."""

    value: float
    also: dict[str, float] = {}


class Column(NamedTuple):
    """How a figure that was measured beside the value is shown."""

    title: str
    decimals: int


COLUMNS = {
    "mib_per_s": Column("MiB/s", 1),
    "p50_ms": Column("p50 ms", 2),
    "max_ms": Column("max ms", 2),
    "cut_ms": Column("whole point p50 ms", 2),
    "void": Column("void", 0),
    "points": Column("points", 0),
    "p50_us": Column("p50 µs", 0),
    "p99_us": Column("p99 µs", 0),
    "max_us": Column("max µs", 0),
    "cpu_ms": Column("CPU ms / 1,000", 1),
    "store_cpu_ms": Column("store's CPU ms / 1,000", 1),
    "latency_ms": Column("latency ms", 2),
    "written": Column("written", 1),
    "rpo_median_s": Column("median s", 2),
    "final_rpo_s": Column("RPO at the end s", 2),
    "agent_rpo_s": Column("the agent's own word s", 2),
    "drain_s": Column("to drain s", 2),
    "seconds": Column("s", 2),
    "wire_kib": Column("KiB", 0),
    "dirty_mib": Column("dirty MiB", 1),
    "resident_mib": Column("resident MiB", 0),
    "records": Column("records", 0),
    "tests": Column("test failovers", 0),
    "served_s": Column("disks served after s", 2),
    "fsck_s": Column("fsck s", 2),
    "per_million": Column("for a million records", 3),
}


class PeerFacts(msgspec.Struct):
    """What is known of a peer. `unavailable` says why there are no measurements, or why they ended."""

    title: str
    version: str = ""
    unavailable: str = ""
    resident_bytes_max: dict[str, int] = {}


class Workload(msgspec.Struct):
    """What every peer was asked to do. `reference` is the peer that ratios are of, `turns` what each peer reached."""

    key: str
    title: str
    unit: str
    reference: str = ""
    less_is_better: bool = False
    turns: dict[str, list[Turn]] = {}

    def add(self, peer: str, turn: Turn) -> None:
        self.turns.setdefault(peer, []).append(turn)


class Outcome(msgspec.Struct):
    """One run of one benchmark."""

    benchmark: str
    when: str
    command: str
    machine: dict[str, str]
    settings: dict[str, str]
    peers: dict[str, PeerFacts] = {}
    workloads: list[Workload] = []
    notes: list[str] = []

    def workload(self, key: str) -> Workload | None:
        return next((each for each in self.workloads if each.key == key), None)


class Spread(NamedTuple):
    """Median and range of the turns of one peer."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """`values` has at least one."""
    return Spread(statistics.median(values), min(values), max(values))


def spread_of(workload: Workload, peer: str) -> Spread | None:
    """None where the peer was not measured."""
    turns = workload.turns.get(peer)
    return spread([turn.value for turn in turns]) if turns else None


def ratio(workload: Workload, peer: str, against: str) -> float | None:
    """The peer's median over the other's; None where either was not measured or there is nothing to divide by."""
    own, other = spread_of(workload, peer), spread_of(workload, against)
    return own.median / other.median if own and other and other.median else None


def also(workload: Workload, peer: str, name: str) -> float | None:
    """Median over the turns of something measured beside the value."""
    values = [turn.also[name] for turn in workload.turns.get(peer, []) if name in turn.also]
    return statistics.median(values) if values else None


def columns_of(workload: Workload) -> list[str]:
    """What was measured beside the value of any peer, in the order of `COLUMNS`."""
    found = {name for turns in workload.turns.values() for turn in turns for name in turn.also}
    return [name for name in COLUMNS if name in found]


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` of a hundred of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def number(value: float, decimals: int | None = None) -> str:
    """For people: about three digits, thousands apart."""
    if decimals is None:
        decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}"


def document(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON has it, with the medians, ranges and ratios that follow from it."""
    found: dict[str, Any] = msgspec.to_builtins(outcome)
    for workload, shown in zip(outcome.workloads, found["workloads"], strict=True):
        shown["summary"] = {}
        for peer in workload.turns:
            own = spread_of(workload, peer)
            if own is not None:
                against = {other: ratio(workload, peer, other) for other in workload.turns if other != peer}
                shown["summary"][peer] = {**own._asdict(), "ratio_to": against}
    return found


def outcome_of(found: Any) -> Outcome:
    """An outcome from its document. Raises msgspec.ValidationError."""
    return msgspec.convert(found, Outcome)
