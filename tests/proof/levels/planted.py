"""Every planted bug must turn its level red: what stays green is a hole in the tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.planted import Plant
from tests.planted.catalogue import PLANTS
from tests.proof.level import Case, Context, Level, Notes
from tests.proof.run import run_level


def level(levels: tuple[Level, ...]) -> Level:
    """The level that plants bugs into the others."""
    by_name = {each.name: each for each in levels}

    def cases(context: Context) -> Iterator[Case]:
        for plant in PLANTS:
            yield Case(plant.name, partial(_check_caught, plant, by_name[plant.level], context))

    return Level(
        name="planted",
        unit="planted bugs",
        submission=len(PLANTS),
        release=len(PLANTS),
        faults=tuple(plant.name for plant in PLANTS),
        cases=cases,
    )


def _check_caught(plant: Plant, found_by: Level, context: Context, notes: Notes) -> None:
    scratch = context.scratch / plant.name
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant.apply(monkeypatch)
        outcome = run_level(
            found_by, Context(context.seed, scratch), wanted=plant.cases, seconds_max=None, violations_max=1
        )
    assert outcome.violations, (
        f"{plant.text}: {outcome.notes.cases} {found_by.unit} of level {found_by.name} stay green"
    )
    notes.fired(plant.name)
    notes.count()
