"""Simulation: real host and store code in one process, one seed, virtual time, faults, invariants after each step."""

from __future__ import annotations

from collections.abc import Iterator

from tests.proof.level import Case, Context, Level, Notes
from tests.proof.sim.steps import FAULTS
from tests.proof.sim.watch import Watch
from tests.proof.sim.world import play, prepare


def history(context: Context, label: str, notes: Notes, *, is_recording: bool = False) -> Watch:
    """One history; raises what did not hold. Its digest is the same whenever it is played."""
    watch = Watch(is_recording=is_recording)
    play(context.rng(label), context.scratch, watch)
    for fault, times in watch.faults.items():
        notes.fired(fault, times)
    notes.count()
    return watch


def cases(context: Context) -> Iterator[Case]:
    """For ever."""
    prepare(context.scratch)
    number = 0
    while True:
        label = f"history {number}"

        def run(notes: Notes, label: str = label) -> None:
            history(context, label, notes)

        yield Case(label, run)
        number += 1


LEVEL = Level(
    name="sim",
    unit="histories",
    submission=4000,
    release=1_000_000,
    faults=FAULTS,
    cases=cases,
    submission_minutes=5.0,
    is_divisible=True,
)
