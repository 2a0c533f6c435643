"""PURE: results as people read them: lines for the terminal, a page in Markdown for a repository."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .figures import judge
from .results import COLUMNS, Outcome, Workload, also, columns_of, number, ratio, spread_of

MIB = 1 << 20
CHART = "results.svg"


def lines_of(outcome: Outcome) -> list[str]:
    """A run for the terminal."""
    settings = ", ".join(f"{name} {value}" for name, value in outcome.settings.items())
    lines = [f"{outcome.benchmark}: {settings}", *(f"{name}: {value}" for name, value in outcome.machine.items())]
    for workload in outcome.workloads:
        lines += ["", workload.title, *(f"  {row}" for row in _aligned(_table(outcome, workload)))]
    lines += ["", *_unavailable(outcome), *_resident(outcome)]
    judged = judge([outcome])
    if judged:
        rows = [[each.what, each.wanted, each.measured, _word(each.reached)] for each in judged]
        lines += ["", *_aligned([["figure", "wanted", "measured", ""], *rows])]
    return lines


def page(outcomes: Sequence[Outcome]) -> str:
    """All that is known, as Markdown."""
    names = ", ".join(outcome.benchmark for outcome in outcomes)
    lines = ["# Benchmarks", "", f"Made by `tools/bench --output`, not by hand: {names}.", "", f"![Chart]({CHART})", ""]
    lines += ["Peers run in turns on one machine; a value is the median of the turns, with their range behind it."]
    judged = judge(outcomes)
    if judged:
        rows = [[each.what, each.wanted, each.measured, _word(each.reached)] for each in judged]
        lines += ["", "## Figures", "", *_markdown([["figure", "wanted", "measured", ""], *rows])]
    for outcome in outcomes:
        lines += ["", *_section(outcome)]
    return "\n".join(lines) + "\n"


def _section(outcome: Outcome) -> list[str]:
    lines = [f"## {outcome.benchmark}", "", "Repeat it with:", "", f"    {outcome.command}", ""]
    settings = ", ".join(f"{name} {value}" for name, value in outcome.settings.items())
    lines += [f"{outcome.when}. {settings}.", "", *(f"- {name}: {value}" for name, value in outcome.machine.items())]
    lines += [f"- {facts.title}: {facts.version}" for facts in outcome.peers.values() if facts.version]
    for workload in outcome.workloads:
        lines += ["", f"### {workload.title}", "", *_markdown(_table(outcome, workload))]
    lines += ["", *(f"- {line}" for line in (*_unavailable(outcome), *_resident(outcome), *outcome.notes))]
    return lines


def _table(outcome: Outcome, workload: Workload) -> list[list[str]]:
    """Head and rows: one row a peer."""
    titles = {peer: facts.title for peer, facts in outcome.peers.items()}
    beside = columns_of(workload)
    has_ratio = len(workload.turns) > 1 and workload.reference in workload.turns
    head = ["", workload.unit, "range", *(COLUMNS[name].title for name in beside)]
    if has_ratio:
        head.insert(3, f"× {titles.get(workload.reference, workload.reference)}")
    rows = [head]
    for peer in workload.turns:
        own = spread_of(workload, peer)
        if own is None:
            continue
        row = [titles.get(peer, peer), number(own.median), f"{number(own.low)} to {number(own.high)}"]
        if has_ratio:
            row.append(_optional(ratio(workload, peer, workload.reference), 2))
        rows.append(row + [_optional(also(workload, peer, name), COLUMNS[name].decimals) for name in beside])
    return rows


def _optional(value: float | None, decimals: int) -> str:
    return "" if value is None else number(value, decimals)


def _word(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _unavailable(outcome: Outcome) -> list[str]:
    peers = outcome.peers.values()
    return [f"{facts.title}: not available: {facts.unavailable}" for facts in peers if facts.unavailable]


def _resident(outcome: Outcome) -> list[str]:
    found = []
    for facts in outcome.peers.values():
        if facts.resident_bytes_max:
            parts = ", ".join(f"{role} {most / MIB:.0f} MiB" for role, most in facts.resident_bytes_max.items())
            found.append(f"{facts.title}: resident at most: {parts}")
    return found


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i else cell.ljust(width)


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    ruler = ["---", *(["---:"] * (len(head) - 1))]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, ruler, *body)]
