"""Every planted bug must turn its level red, or its test: what stays green is a hole in the tests.

Red alone does not count: what is shown must be what the plant says, else the patch itself has failed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.planted import Plant
from tests.planted.catalogue import PLANTS
from tests.planted.plugin import PLANTED
from tests.proof.level import Case, Context, Level, Notes
from tests.proof.run import run_level

ROOT = Path(__file__).parents[3]
_TEST_S_MAX = 120.0
_VIOLATIONS_MAX = 60
"""Of every three some bugs show themselves in another way twice; so many in a row do not."""
_TESTS_FAILED = 1
"""Exit code of pytest."""


def level(levels: tuple[Level, ...]) -> Level:
    """The level that plants bugs into the others."""
    by_name = {each.name: each for each in levels}

    def cases(context: Context) -> Iterator[Case]:
        for plant in PLANTS:
            yield Case(plant.name, partial(_check_caught, plant, by_name, context))

    return Level(
        name="planted",
        unit="planted bugs",
        submission=len(PLANTS),
        release=len(PLANTS),
        faults=tuple(plant.name for plant in PLANTS),
        cases=cases,
    )


def _check_caught(plant: Plant, by_name: dict[str, Level], context: Context, notes: Notes) -> None:
    shown = _shown_by_test(plant, context) if plant.is_for_a_test else _shown_by_level(plant, by_name, context)
    assert re.search(plant.shows, shown), f"{plant.text}: {plant.level} shows something else: {shown[-400:]}"
    notes.fired(plant.name)
    notes.count()


def _shown_by_level(plant: Plant, by_name: dict[str, Level], context: Context) -> str:
    """The violations that the level finds up to the first that is what the plant shows, a line each."""
    scratch = context.scratch / plant.name
    scratch.mkdir()
    level = part_of(by_name[plant.level], plant.only)
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant.apply(monkeypatch)
        found = run_level(
            level,
            Context(context.seed, scratch),
            wanted=plant.cases,
            seconds_max=None,
            violations_max=_VIOLATIONS_MAX,
            is_enough=lambda violation: re.search(plant.shows, violation.text) is not None,
        )
    assert found.violations, f"{plant.text}: {found.notes.cases} {level.unit} of level {level.name} stay green"
    return "\n".join(violation.text for violation in found.violations)


def part_of(level: Level, only: tuple[str, ...]) -> Level:
    """The level with those of its cases whose label begins with one of these; all of them when there are none."""
    if not only:
        return level

    def cases(context: Context) -> Iterator[Case]:
        return (case for case in level.cases(context) if case.label.startswith(only))

    return replace(level, cases=cases)


def _shown_by_test(plant: Plant, context: Context) -> str:
    """What pytest says of the test, run in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.planted.plugin", "-p", "no:cacheprovider", "-q", "-x"]
    process = subprocess.Popen(
        [*command, "--seed", str(context.seed), plant.level],
        cwd=ROOT,
        env={**os.environ, PLANTED: plant.name},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=_TEST_S_MAX)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it removes what its test has started
            process.communicate()
    assert process.returncode == _TESTS_FAILED, f"{plant.text}: {plant.level} is not red: {said[-400:]}"
    return said
