"""Inputs nobody should have made, to every place that reads bytes, rows, documents or texts.

Each input is a valid one, broken. Only typed errors leave, memory grows by 64 MiB at most with an input and over the
whole run, no input takes more than a second. Where more can be said it is: what was broken and not sealed again is
refused, what is accepted is what was sent.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import structlog

from tests.proof.fuzzing import catalog, control, files, groups, journal, leaves, maps, nbd, objects, tails, texts, wire
from tests.proof.fuzzing.mutations import KINDS
from tests.proof.fuzzing.target import Gauge, Target, Trial
from tests.proof.level import Case, Context, Level, Notes

TARGETS: tuple[Target, ...] = (
    *wire.TARGETS,
    *tails.TARGETS,
    *journal.TARGETS,
    *objects.TARGETS,
    *catalog.TARGETS,
    *files.TARGETS,
    *control.TARGETS,
    *texts.TARGETS,
    *groups.TARGETS,
    *nbd.TARGETS,
    *maps.TARGETS,
    *leaves.TARGETS,
)


class _Places:
    """The targets, opened when first used; what that takes is no input's."""

    def __init__(self, scratch: Path, stack: ExitStack, gauge: Gauge) -> None:
        self._scratch = scratch
        self._stack = stack
        self._gauge = gauge
        self._trials: dict[str, Trial] = {}

    def trial(self, target: Target) -> Trial:
        if target.name not in self._trials:
            path = self._scratch / target.name.replace(" ", "-")
            path.mkdir(exist_ok=True)
            self._trials[target.name] = self._stack.enter_context(target.open(path))
            self._gauge.begin()
        return self._trials[target.name]


def cases(context: Context) -> Iterator[Case]:
    """For ever, each target as often as its weight says."""
    numbers = dict.fromkeys((target.name for target in TARGETS), 0)
    turns = [target for at in range(max(t.weight for t in TARGETS)) for target in TARGETS if target.weight > at]
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        gauge = Gauge()
        places = _Places(context.scratch, stack, gauge)
        stack.enter_context(gauge.running())
        while True:
            for target in turns:
                numbers[target.name] += 1
                label = f"{target.name} {numbers[target.name]}"
                yield Case(label, partial(_try, context, label, target, places, gauge))


def _try(context: Context, label: str, target: Target, places: _Places, gauge: Gauge, notes: Notes) -> None:
    trial = places.trial(target)
    with gauge.input():
        trial(context.rng(label), lambda kind: notes.fired(f"mutation {kind}"))
    notes.fired(f"target {target.name}")
    notes.count()


@contextmanager
def _quiet() -> Iterator[None]:
    """What is logged of refused input is not of interest a hundred thousand times."""
    structured, disabled = structlog.get_config(), logging.root.manager.disable
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library's opinion of a certificate is not a refusal
            yield
    finally:
        structlog.configure(**structured)
        logging.disable(disabled)


LEVEL = Level(
    name="fuzz",
    unit="inputs",
    submission=200_000,
    release=100_000_000,
    faults=(*(f"mutation {kind}" for kind in KINDS), *(f"target {target.name}" for target in TARGETS)),
    cases=cases,
    is_divisible=True,
)
