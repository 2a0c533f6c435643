"""Plays levels in processes of their own, which they may spoil: several at a time, or one in several parts."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tests.proof.level import Context, Level, Notes
from tests.proof.registry import BY_NAME
from tests.proof.run import WHOLE, Found, Outcome, Part, Violation, run_level

SAY_EVERY_S = 15.0


class Asked(NamedTuple):
    """Of each level, by the command. None: the level's own number or time. `base`: a directory for all of it."""

    base: Path
    seed: int
    only: str | None
    cases: int | None
    minutes: float | None
    is_release: bool

    def limits(self, level: Level) -> tuple[int | None, float | None]:
        """How many cases, or how many seconds at most; one of them is not None."""
        own_minutes = level.release_minutes if self.is_release else level.submission_minutes
        own_cases = level.release if self.is_release else level.submission
        minutes = self.minutes if self.minutes is not None else own_minutes
        wanted = self.cases if self.cases is not None else None if minutes is not None else own_cases
        return wanted, None if minutes is None else minutes * 60


def play(levels: Sequence[Level], asked: Asked, jobs: int) -> list[Outcome]:
    """What each level found, in their order, by `jobs` processes at a time. One process alone is this one."""
    parts = jobs if len(levels) == 1 and levels[0].is_divisible and asked.only is None else 1
    if len(levels) == 1 and parts == 1:
        return [_outcome(levels[0], asked, [_play(levels[0].name, asked, WHOLE)])]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        try:
            playing = {
                pool.submit(_play, level.name, asked, Part(number, parts)): level
                for level in levels
                for number in range(parts)
            }
            found: dict[str, list[Found]] = {level.name: [] for level in levels}
            outcomes: dict[str, Outcome] = {}
            for each in as_completed(playing):
                level = playing[each]
                found[level.name].append(_found(each))
                if len(found[level.name]) == parts:
                    outcomes[level.name] = _outcome(level, asked, found[level.name])
            return [outcomes[level.name] for level in levels]
        except BaseException:  # told to stop: the levels are, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _play(name: str, asked: Asked, part: Part) -> Found:
    """In the process that plays."""
    level = BY_NAME[name]
    scratch = asked.base / f"{name}-{part.number}"
    scratch.mkdir()
    wanted, seconds_max = asked.limits(level)
    said_at = time.monotonic()

    def progress(found: Found) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SAY_EVERY_S:
            said_at = time.monotonic()
            which = f"{name}, part {part.number + 1}" if part.parts > 1 else name
            print(f"{which}: {found.notes.cases:,} {level.unit} in {found.seconds:.0f} s", flush=True)

    return run_level(
        level,
        Context(asked.seed, scratch),
        wanted=None if wanted is None else -(-wanted // part.parts),
        seconds_max=seconds_max,
        only=asked.only,
        part=part,
        progress=progress,
    )


def _found(playing: Future[Found]) -> Found:
    if (error := playing.exception()) is not None:
        why = f"its process ended: {type(error).__name__}: {error}"
        return Found(violations=[Violation("the whole of it", why, "")])
    return playing.result()


def _outcome(level: Level, asked: Asked, found: Sequence[Found]) -> Outcome:
    """All parts of a level together, and a line about it."""
    notes = Notes()
    for each in found:
        notes.add(each.notes)
    wanted, _ = asked.limits(level)
    violations = [violation for each in found for violation in each.violations]
    seconds = max(each.seconds for each in found)
    outcome = Outcome(level, asked.seed, wanted, notes, violations, seconds, is_whole=asked.only is None)
    verdict = "FAILED" if outcome.failures else "ok"
    print(f"{level.name}: {verdict}: {notes.cases:,} {level.unit} in {seconds:.0f} s", flush=True)
    for violation in violations:
        print(f"  {violation.label}: {violation.text}", flush=True)
    return outcome
