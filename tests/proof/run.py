"""Runs a level: cases until there are enough, time is up, or too much is broken."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from tests.proof.level import Case, Context, Level, Notes

VIOLATIONS_MAX = 10
TEXT_MAX = 1000


@dataclass(frozen=True)
class Violation:
    """`label` plays it again; `text` is one line; `trace` is where it was raised."""

    label: str
    text: str
    trace: str


class Part(NamedTuple):
    """Every `parts`-th case of a level, from the `number`-th on."""

    number: int
    parts: int


WHOLE = Part(0, 1)


@dataclass
class Found:
    """What one process found of a level."""

    notes: Notes = field(default_factory=Notes)
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a run of one level found. `wanted` None: it ran for a time, not for a number.

    `is_whole`: not a run of a chosen case, which need not fire every fault.
    """

    level: Level
    seed: int
    wanted: int | None
    notes: Notes
    violations: list[Violation]
    seconds: float
    is_whole: bool

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
    part: Part = WHOLE,
    violations_max: int = VIOLATIONS_MAX,
    is_enough: Callable[[Violation], bool] = lambda violation: False,
    progress: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Run `wanted` cases, or as many as fit in the time, or the case labelled `only`; no more after a violation that is
    enough."""
    found = Found()
    started = time.monotonic()
    round_end = level.round if wanted is not None and wanted * part.parts >= level.submission else 0
    for number, case in islice(enumerate(level.cases(context)), part.number, None, part.parts):
        if only is not None and case.label != only:
            continue
        _run_case(case, found)
        found.seconds = time.monotonic() - started
        progress(found)
        if only is not None or len(found.violations) >= violations_max:
            break
        if found.violations and is_enough(found.violations[-1]):
            break
        if wanted is not None and found.notes.cases >= wanted and number + part.parts >= round_end:
            break
        if seconds_max is not None and found.seconds >= seconds_max:
            break
    return found


def _run_case(case: Case, found: Found) -> None:
    try:
        case.run(found.notes)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever leaves a case is what it found, exception groups and Trio's included
        if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt):
            raise KeyboardInterrupt from None
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if len(text) > TEXT_MAX:
            text = f"{text[: TEXT_MAX // 2]} … {text[-TEXT_MAX // 2 :]}"
        found.violations.append(Violation(case.label, text, "".join(traceback.format_exception(error))))
