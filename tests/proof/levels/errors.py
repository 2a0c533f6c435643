"""Every operation of every scenario fails: EIO, ENOSPC, once or for ever, reads too, and statements of the catalog.

A case is one scenario with one kind of failure, played anew for each operation that fails. What a caller is told is
an OSError of that number or a typed error worth another try. Where the failure was not final the same process goes on
to the end; in every case what it leaves is killed or loses power, starts while its disk still fails, starts again, and
holds what was promised. Only these are counted: each reached the product.

Beside them the calls of the real filesystem below `DirectoryStorage` come short or are interrupted, and nobody is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, zip_longest
from pathlib import Path

from tests.fakes.host_scenarios import IN_MEMORY_ONLY, SCENARIOS
from tests.fakes.pair_scenarios import PAIR_SCENARIOS
from tests.proof.failing.host import fail_host, fail_system
from tests.proof.failing.kinds import CATALOG, DISK, FAULTS, MODES, SYSTEM, Failure
from tests.proof.failing.small_files import fail_edits, fail_enrolment
from tests.proof.failing.store import fail_ingest, fail_pair, fail_rebuild
from tests.proof.level import Case, Context, Level, Notes

Fail = Callable[[Failure, str, Path, random.Random, Notes], None]
HOSTS: list[tuple[str, Fail]] = [(each.__name__, partial(fail_host, each)) for each in SCENARIOS]
PAIRS: list[tuple[str, Fail]] = [(each.__name__, partial(fail_pair, each)) for each in PAIR_SCENARIOS]
SMALL: list[tuple[str, Fail]] = [
    ("ingest", fail_ingest),
    ("rebuild", fail_rebuild),
    ("enrolment", fail_enrolment),
    ("disks_added_and_removed", fail_edits),
]
BELOW: list[tuple[str, Fail]] = [
    (f"{each.__name__} below", partial(fail_system, each)) for each in SCENARIOS if each not in IN_MEMORY_ONLY
]
PLAYS = [play for plays in zip_longest(HOSTS, SMALL, PAIRS, BELOW) for play in plays if play is not None]
CATALOGUED = ("ingest", "rebuild", "enrolment")


def failures_of(name: str) -> tuple[Failure, ...]:
    """What can happen to a scenario."""
    if name.endswith(" below"):
        return SYSTEM
    return (*DISK, *CATALOG) if name in CATALOGUED else DISK


def cases(context: Context) -> Iterator[Case]:
    for number in count():
        for name, play in PLAYS:
            for failure in failures_of(name):
                for mode in MODES:
                    label = f"{name} {failure.name} {mode} {number}"
                    yield Case(label, partial(_play, context, label, name, play, failure, mode))


def _play(context: Context, label: str, name: str, play: Fail, failure: Failure, mode: str, notes: Notes) -> None:
    scratch = context.scratch / label.replace(" ", "-")
    scratch.mkdir()
    play(failure, mode, scratch, context.rng(label), notes)
    notes.fired(f"scenario {name}")


LEVEL = Level(
    name="errors",
    unit="I/O errors",
    submission=4_800,
    release=100_000,
    faults=(*FAULTS, *(f"scenario {name}" for name, _ in PLAYS)),
    cases=cases,
    round=sum(len(failures_of(name)) * len(MODES) for name, _ in PLAYS),
    is_divisible=True,
)
