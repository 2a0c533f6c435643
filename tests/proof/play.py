"""Plays levels in processes of their own, which they may spoil: several at a time, or one in several parts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tests.proof.level import Context, Level, Notes
from tests.proof.registry import BY_NAME
from tests.proof.run import WHOLE, Found, Outcome, Part, Violation, run_level

SAY_EVERY_S = 15.0
END_S_MAX = 10.0


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


def play(levels: Sequence[Level], asked: Asked, jobs: int) -> Iterator[Outcome]:
    """What each level found, as they end, by `jobs` processes at a time. One process alone is this one.

    Whoever is interrupted here or closes this has ended the processes by then.
    """
    parts = jobs if len(levels) == 1 and levels[0].is_divisible and asked.only is None else 1
    if len(levels) == 1 and parts == 1:
        yield _outcome(levels[0], asked, [_play(levels[0].name, asked, WHOLE)])
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_end_when_told, max_tasks_per_child=1) as pool:
        try:
            playing = {
                pool.submit(_play_here, level.name, asked, Part(number, parts)): level
                for level in levels
                for number in range(parts)
            }
            found: dict[str, list[Found]] = {level.name: [] for level in levels}
            for each in as_completed(playing):
                level = playing[each]
                found[level.name].append(_found(each))
                if len(found[level.name]) == parts:
                    yield _outcome(level, asked, found[level.name])
        except BaseException:  # told to stop: the levels are, too
            _end(multiprocessing.active_children())
            raise


_told_to_end = threading.Event()


def _end_when_told() -> None:
    """In the process that plays: told to stop, by its parent or a Ctrl-C, it is interrupted once and tidies up.

    Where an exception is swallowed, as in a callback of the garbage collector, the end of the case will do.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _told_to_end.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, interrupt)


def _play_here(name: str, asked: Asked, part: Part) -> Found:
    """In the process that plays. Interrupted, it ends at once, and with it the pool: nothing else is begun."""
    try:
        return _play(name, asked, part)
    except KeyboardInterrupt:
        os._exit(1)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_S_MAX
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def _play(name: str, asked: Asked, part: Part) -> Found:
    level = BY_NAME[name]
    scratch = asked.base / f"{name}-{part.number}"
    scratch.mkdir()
    wanted, seconds_max = asked.limits(level)
    said_at = time.monotonic()

    def progress(found: Found) -> None:
        nonlocal said_at
        if _told_to_end.is_set():
            raise KeyboardInterrupt
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
