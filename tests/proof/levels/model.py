"""Random histories against models that are too simple to be wrong: disk, store, protocol, and threads of a journal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import get_state_machine_test

from tests.fakes.disk_machine import DiskAgainstBytes
from tests.fakes.history_steps import FRAME_BYTES, STEPS, check_every_lsn
from tests.fakes.journal_race import race
from tests.fakes.session_exchange import random_exchange
from tests.proof.level import Case, Context, Level, Notes

STEPS_A_HISTORY = 50
BATCH = 20
"""Histories of the disk's state machine that one case plays: starting hypothesis costs as much as several."""
STORE_BATCH = 6
"""Histories of the store for each such batch: every LSN of each is read back, which is most of the work."""


def cases(context: Context) -> Iterator[Case]:
    for number in count():
        yield Case(f"disk-{number}", lambda notes, n=number: _disk(context, n, notes))  # type: ignore[misc]
        for each in range(STORE_BATCH):
            label = f"store-{number}-{each}"
            yield Case(label, lambda notes, label=label: _store(context, label, notes))  # type: ignore[misc]
        label = f"pair-{number}"
        yield Case(label, lambda notes, label=label: _pair(context, label, notes))  # type: ignore[misc]
        label = f"threads-{number}"
        yield Case(label, lambda notes, label=label: _threads(context, label, notes))  # type: ignore[misc]


def _disk(context: Context, number: int, notes: Notes) -> None:
    """The disk's state machine with power losses, restarts, requests past the end."""
    wanted = settings(
        max_examples=BATCH,
        stateful_step_count=STEPS_A_HISTORY,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    play = get_state_machine_test(DiskAgainstBytes, settings=wanted)  # type: ignore[arg-type]
    play._hypothesis_internal_use_seed = context.rng(f"disk-{number}").getrandbits(64)  # type: ignore[attr-defined]
    play()
    notes.count(BATCH)
    notes.fired("disk", BATCH)


def _store(context: Context, label: str, notes: Notes) -> None:
    """A history of 50 steps, every LSN of it read back."""
    rng = context.rng(label)
    check_every_lsn(rng.choices(STEPS, k=STEPS_A_HISTORY), rng.getrandbits(32), rng.choice(FRAME_BYTES))
    notes.count()
    notes.fired("store")


def _pair(context: Context, label: str, notes: Notes) -> None:
    rng = context.rng(label)
    random_exchange(rng, STEPS_A_HISTORY, rng.randrange(200))
    notes.count()
    notes.fired("cut wire")


def _threads(context: Context, label: str, notes: Notes) -> None:
    """Overlapping reads and writes while another thread applies, drops and frees."""
    race(context.rng(label), steps=600, lives=2)
    notes.count()
    notes.fired("concurrent applier")


LEVEL = Level(
    name="model",
    unit="histories of 50 steps",
    submission=2_000,
    release=100_000,
    faults=("disk", "store", "cut wire", "concurrent applier"),
    cases=cases,
    is_divisible=True,
)
