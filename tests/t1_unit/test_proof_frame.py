"""What a run of proofs may call a success: everything was tried, every fault struck, nothing was violated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from tests.planted import Plant
from tests.planted.catalogue import NAMED, PLANTS
from tests.proof.level import Case, Context, Level, Notes
from tests.proof.registry import BY_NAME
from tests.proof.report import document, markdown
from tests.proof.run import WHOLE, Found, Outcome, Part, run_level

CASES = 10
LABELS = 1000


def level(run: Callable[[int, Notes], None]) -> Level:
    def cases(context: Context) -> Iterator[Case]:
        for number in range(CASES):
            yield Case(f"case {number}", lambda notes, number=number: run(number, notes))  # type: ignore[misc]

    return Level("level", "cases", CASES, CASES, ("fault",), cases)


def outcome_of(played: Level, found: Found, wanted: int | None = CASES, *, is_whole: bool = True) -> Outcome:
    return Outcome(played, 7, wanted, found.notes, found.violations, found.seconds, is_whole)


def strikes(number: int, notes: Notes) -> None:
    notes.count()
    notes.fired("fault")


def strikes_not(number: int, notes: Notes) -> None:
    notes.count()


def breaks_at_three(number: int, notes: Notes) -> None:
    strikes(number, notes)
    if number == 3:
        raise AssertionError("three")


@pytest.mark.parametrize(
    ("run", "wanted", "failure"),
    [
        (strikes, CASES, None),
        (strikes, CASES + 1, "only 10 of 11 cases in the time given"),
        (strikes_not, CASES, "fault 'fault' never fired"),
        (breaks_at_three, CASES, "case 3: AssertionError: three"),
        (lambda number, notes: notes.fired("fault"), None, "nothing was tried"),
    ],
)
def test_what_a_run_fails_for(
    run: Callable[[int, Notes], None], wanted: int | None, failure: str | None, scratch: Path
) -> None:
    played = level(run)
    found = run_level(played, Context(7, scratch), wanted=wanted, seconds_max=None)
    outcome = outcome_of(played, found, wanted)
    assert [text.splitlines()[0] for text in outcome.failures] == ([failure] if failure else [])
    report = document([outcome], {"version": "1"})
    assert report["passed"] is (failure is None)
    assert ("**FAILED**" in markdown(report)) is (failure is not None)


def test_a_level_that_did_not_end_is_named_and_nothing_is_proved(scratch: Path) -> None:
    played = level(strikes)
    found = run_level(played, Context(7, scratch), wanted=CASES, seconds_max=None)
    report = document([outcome_of(played, found)], {"version": "1"}, ["fuzz", "sim"])
    assert report["passed"] is False and "Did not end: fuzz, sim." in markdown(report)


def test_what_is_interrupted_is_no_violation(scratch: Path) -> None:
    def interrupted(number: int, notes: Notes) -> None:
        raise BaseExceptionGroup("of a nursery", [KeyboardInterrupt()])

    with pytest.raises(KeyboardInterrupt):
        run_level(level(interrupted), Context(7, scratch), wanted=CASES, seconds_max=None)


@pytest.mark.parametrize("plant", PLANTS, ids=[plant.name for plant in PLANTS])
def test_a_planted_bug_names_what_must_find_it(plant: Plant, scratch: Path) -> None:
    assert plant.shows, "what must be shown, so that an accident of the patch is not taken for a catch"
    if plant.is_for_a_test:
        path, _, name = plant.level.partition("::")
        assert f"def {name.partition('[')[0]}(" in Path(__file__).parents[2].joinpath(path).read_text()
    else:
        labels = (case.label for case in islice(BY_NAME[plant.level].cases(Context(7, scratch)), LABELS))
        assert not plant.only or any(label.startswith(plant.only) for label in labels), "no case is called so"


def test_names_of_planted_bugs_are_used_once_and_stand_for_the_named_ones() -> None:
    names = {plant.name for plant in PLANTS}
    assert len(names) == len(PLANTS)
    assert len(NAMED) == 24 and names.issuperset(name for standing in NAMED.values() for name in standing)


def test_one_case_alone_need_not_fire_every_fault(scratch: Path) -> None:
    played = level(strikes_not)
    found = run_level(played, Context(7, scratch), wanted=CASES, seconds_max=None, only="case 2")
    assert found.notes.cases == 1
    assert not outcome_of(played, found, is_whole=False).failures


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_try_every_case_once(parts: int, scratch: Path) -> None:
    tried: list[int] = []
    notes = Notes()
    for number in range(parts):
        part = Part(number, parts)
        assert part == WHOLE or parts > 1
        notes.add(
            run_level(
                level(lambda case, notes: (tried.append(case), strikes(case, notes))[1]),
                Context(7, scratch),
                wanted=None,
                seconds_max=None,
                part=part,
            ).notes
        )
    assert sorted(tried) == list(range(CASES))
    assert notes.cases == notes.faults["fault"] == CASES


def test_it_stops_when_too_much_is_broken(scratch: Path) -> None:
    def breaks(number: int, notes: Notes) -> None:
        raise ValueError(number)

    found = run_level(level(breaks), Context(7, scratch), wanted=CASES, seconds_max=None, violations_max=2)
    assert [each.label for each in found.violations] == ["case 0", "case 1"]


@pytest.mark.parametrize(
    ("wanted", "parts", "played"),
    [(CASES, 1, CASES), (CASES - 1, 1, 3), (CASES, 2, CASES), (CASES + 5, 1, CASES)],
    ids=["a round, though enough sooner", "a shorter run", "in two parts", "more than there are"],
)
def test_a_round_is_played_to_its_end(wanted: int, parts: int, played: int, scratch: Path) -> None:
    """Each case is worth three, so four are enough, but not to have come to each of them."""

    def counts_three(number: int, notes: Notes) -> None:
        notes.count(3)
        notes.fired(f"case {number}")

    whole = replace(level(counts_three), round=CASES)
    context = Context(7, scratch)
    found = [
        run_level(whole, context, wanted=-(-wanted // parts), seconds_max=None, part=Part(number, parts))
        for number in range(parts)
    ]
    assert sum(len(each.notes.faults) for each in found) == played
