"""Random histories against models that are too simple to be wrong: disk, store, protocol, and threads of a journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import get_state_machine_test

from tests.fakes import broken_exchange, disk_machine, history_steps, journal_race, map_histories
from tests.fakes.broken_exchange import exchange_over_broken_connections
from tests.fakes.disk_machine import DiskAgainstBytes
from tests.fakes.history_steps import FRAME_BYTES, STEPS, check_every_lsn
from tests.fakes.journal_race import race
from tests.fakes.vault_world import VaultWorld, make_history
from tests.proof.level import Case, Context, Level, Notes

STEPS_A_HISTORY = 50
BATCH = 20
"""Histories of the disk's state machine that one case plays: starting hypothesis costs as much as several."""
STORE_BATCH = 6
"""Histories of the store for each such batch: every LSN of each is read back, which is most of the work."""
MAPS_BATCH = 2
"""Pairs of histories that share a place of map checkpoints; every LSN of each is read back twice."""
PAIR_BATCH = 8
THREADS_BATCH = 2
GUEST_STEPS = 60
"""Of each of the threads in each of three lives."""


def cases(context: Context) -> Iterator[Case]:
    for number in count():
        yield Case(f"disk-{number}", lambda notes, n=number: _disk(context, n, notes))  # type: ignore[misc]
        for each in range(STORE_BATCH):
            label = f"store-{number}-{each}"
            yield Case(label, lambda notes, label=label: _store(context, label, notes))  # type: ignore[misc]
        for each in range(MAPS_BATCH):
            label = f"maps-{number}-{each}"
            yield Case(label, lambda notes, label=label: _maps(context, label, notes))  # type: ignore[misc]
        for each in range(PAIR_BATCH):
            label = f"pair-{number}-{each}"
            yield Case(label, lambda notes, label=label: _pair(context, label, notes))  # type: ignore[misc]
        for each in range(THREADS_BATCH):
            label = f"threads-{number}-{each}"
            yield Case(label, lambda notes, label=label: _threads(context, label, notes))  # type: ignore[misc]


def _note(notes: Notes, events: Counter[str]) -> None:
    for event, times in events.items():
        notes.fired(event, times)


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
    before = Counter(DiskAgainstBytes.events)
    play()
    notes.count(BATCH)
    _note(notes, DiskAgainstBytes.events - before)


def _store(context: Context, label: str, notes: Notes) -> None:
    """A history of 50 steps, every LSN of it read back."""
    rng = context.rng(label)
    events = check_every_lsn(rng.choices(STEPS, k=STEPS_A_HISTORY), rng.getrandbits(32), rng.choice(FRAME_BYTES))
    notes.count()
    _note(notes, events)


def _maps(context: Context, label: str, notes: Notes) -> None:
    """Two histories of 50 steps that go apart, every LSN of both read back with checkpoints of both lying about."""
    rng = context.rng(label)
    steps = rng.choices(STEPS, k=STEPS_A_HISTORY)
    events = map_histories.check_with_maps(steps, rng.getrandbits(32), rng.choice(FRAME_BYTES))
    notes.count(2)
    _note(notes, events)


def _pair(context: Context, label: str, notes: Notes) -> None:
    """Host and store over connections that break, until all of a history is acknowledged."""
    rng = context.rng(label)
    world = VaultWorld.new(context.scratch / label, rng.getrandbits(30))
    make_history(world.history, rng)
    events = exchange_over_broken_connections(world, rng)
    notes.count()
    _note(notes, events)


def _threads(context: Context, label: str, notes: Notes) -> None:
    """Overlapping reads and writes of several threads while another applies, drops and frees, and power is lost."""
    events = race(context.rng(label), GUEST_STEPS, lives=3)
    notes.count()
    _note(notes, events)


LEVEL = Level(
    name="model",
    unit="histories of 50 steps",
    submission=2_000,
    release=100_000,
    faults=(
        *disk_machine.EVENTS,
        *history_steps.EVENTS,
        *map_histories.EVENTS,
        *broken_exchange.EVENTS,
        *journal_race.EVENTS,
    ),
    cases=cases,
    is_divisible=True,
)
