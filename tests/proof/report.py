"""The report of a run: one page of Markdown, and the same as JSON. PURE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.proof.run import Outcome


def document(outcomes: Sequence[Outcome], about: Mapping[str, str], unended: Sequence[str] = ()) -> dict[str, Any]:
    """Everything a later run or a person wants to know. `about`: version, kernel, when, how big, how long.

    `unended`: levels that have not ended, so that nothing is proved.
    """
    return {
        "about": dict(about),
        "passed": not unended and not any(outcome.failures for outcome in outcomes),
        "unended": list(unended),
        "levels": [
            {
                "level": outcome.level.name,
                "unit": outcome.level.unit,
                "seed": outcome.seed,
                "cases": outcome.notes.cases,
                "wanted": outcome.wanted,
                "seconds": round(outcome.seconds, 1),
                "faults": dict(sorted(outcome.notes.faults.items())),
                "violations": [
                    {"case": each.label, "text": each.text, "trace": each.trace} for each in outcome.violations
                ],
                "failures": outcome.failures,
            }
            for outcome in outcomes
        ],
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    lines = ["# Proof", ""]
    lines += [f"- {name}: {value}" for name, value in report["about"].items()]
    lines += [
        f"- result: {'no violation' if report['passed'] else '**FAILED**'}",
        "",
        "| level | cases | seconds | faults fired | violations | seed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for level in report["levels"]:
        fired = sum(level["faults"].values())
        lines.append(
            f"| {level['level']} | {level['cases']:,} {level['unit']} | {level['seconds']:.0f} | {fired:,} "
            f"| {len(level['violations'])} | {level['seed']} |"
        )
    lines += ["", "| level | fault | times |", "|---|---|---:|"]
    for level in report["levels"]:
        lines += [f"| {level['level']} | {fault} | {times:,} |" for fault, times in level["faults"].items()]
    failed = [(level, failure) for level in report["levels"] for failure in level["failures"]]
    if report["unended"]:
        lines += ["", f"Did not end: {', '.join(report['unended'])}."]
    if failed:
        lines += ["", "## What failed", ""]
        for level, failure in failed:
            lines.append(f"- **{level['level']}** (seed {level['seed']}): {failure}")
        lines += ["", "Play one again: `tools/prove LEVEL --seed SEED --case 'LABEL'`."]
    return "\n".join(lines) + "\n"


def as_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1) + "\n"
