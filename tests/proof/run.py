"""Runs a level: cases until there are enough, time is up, or too much is broken."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.proof.level import Case, Context, Level, Notes

VIOLATIONS_MAX = 10


@dataclass(frozen=True)
class Violation:
    """`label` plays it again; `text` is one line; `trace` is where it was raised."""

    label: str
    text: str
    trace: str


@dataclass
class Outcome:
    """What a run of one level found. `wanted` None: it ran for a time, not for a number."""

    level: Level
    seed: int
    wanted: int | None
    notes: Notes = field(default_factory=Notes)
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0
    is_whole: bool = True
    """False for a run of chosen cases: it need not fire every fault."""

    @property
    def silent_faults(self) -> list[str]:
        """Faults that should have struck and did not."""
        return [fault for fault in self.level.faults if not self.notes.faults[fault]] if self.is_whole else []

    @property
    def failures(self) -> list[str]:
        """Why this is no proof, a line each; empty when it is one."""
        failures = [f"{each.label}: {each.text}" for each in self.violations]
        failures += [f"fault {fault!r} never fired" for fault in self.silent_faults]
        if self.is_whole and not self.violations:
            if self.wanted is not None and self.notes.cases < self.wanted:
                failures.append(f"only {self.notes.cases} of {self.wanted} {self.level.unit} in the time given")
            elif not self.notes.cases:
                failures.append("nothing was tried")
        return failures


def run_level(
    level: Level,
    context: Context,
    *,
    wanted: int | None,
    seconds_max: float | None,
    only: str | None = None,
    violations_max: int = VIOLATIONS_MAX,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run `wanted` cases, or as many as fit in the time, or the case labelled `only`."""
    outcome = Outcome(level, context.seed, wanted, is_whole=only is None)
    started = time.monotonic()
    for case in level.cases(context):
        if only is not None and case.label != only:
            continue
        _run_case(case, outcome)
        outcome.seconds = time.monotonic() - started
        progress(outcome)
        if only is not None or len(outcome.violations) >= violations_max:
            break
        if wanted is not None and outcome.notes.cases >= wanted:
            break
        if seconds_max is not None and outcome.seconds >= seconds_max:
            break
    return outcome


def _run_case(case: Case, outcome: Outcome) -> None:
    try:
        case.run(outcome.notes)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever leaves a case is what it found, exception groups and Trio's included
        text = " ".join(f"{type(error).__name__}: {error}".split())
        outcome.violations.append(Violation(case.label, text[:500], "".join(traceback.format_exception(error))))
