"""What a proof is made of: a level yields cases, a case breaks something and checks what must hold.

A level is a function of its seed: the same seed yields the same cases under the same labels, so a violation is
played again with `--seed` and `--case`. A case raises when an invariant does not hold; what it raises is the violation.
It notes each fault that really struck, because a fault that never fired proves nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Notes:
    """What happened while a level ran. `cases` counts in the level's own unit."""

    cases: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def count(self, cases: int = 1) -> None:
        """So many more units were tried and held."""
        self.cases += cases

    def fired(self, fault: str, times: int = 1) -> None:
        """The fault of this name struck."""
        self.faults[fault] += times

    def add(self, other: Notes) -> None:
        """What another process noted, too."""
        self.cases += other.cases
        self.faults += other.faults


@dataclass(frozen=True)
class Case:
    """`run` breaks something, counts what it tried, and raises AssertionError or whatever left the product instead."""

    label: str
    run: Callable[[Notes], None]


@dataclass(frozen=True)
class Context:
    """What a level may use. `scratch` is a directory of its own, removed afterwards."""

    seed: int
    scratch: Path

    def rng(self, label: str) -> random.Random:
        """Randomness of one case, whatever ran before it."""
        return random.Random(f"{self.seed} {label}")


@dataclass(frozen=True)
class Level:
    """`submission` and `release`: units a run of that size tries. `faults`: each must strike in every such run.

    `minutes`, where given, bounds a level that has no natural number of cases; `cases` may then yield for ever.
    `is_divisible`: its cases need nothing of each other and of the machine, so that several processes can share them.
    `round`: a run of that size plays so many cases at the least, however soon they are enough units.
    """

    name: str
    unit: str
    submission: int
    release: int
    faults: tuple[str, ...]
    cases: Callable[[Context], Iterator[Case]]
    submission_minutes: float | None = None
    release_minutes: float | None = None
    is_divisible: bool = False
    round: int = 0
