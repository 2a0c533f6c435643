"""The fuzz level's own measure: a leak and a greedy input are seen, garbage in cycles is not counted."""

from __future__ import annotations

import gc

import pytest

from tests.proof.fuzzing.target import Gauge

MiB = 1 << 20


@pytest.fixture
def gauge() -> Gauge:
    gauge = Gauge()
    gauge.begin()
    return gauge


def test_inputs_that_leave_something_behind_are_seen(gauge: Gauge) -> None:
    kept = []
    with pytest.raises(AssertionError, match="memory grew by"):
        for _ in range(80):
            with gauge.input():
                kept.append(b"x" * MiB)
    assert 60 <= len(kept) <= 70


def test_an_input_that_takes_much_for_a_moment_is_seen(gauge: Gauge) -> None:
    with pytest.raises(AssertionError, match="with one input"), gauge.input():
        len(b"x" * (70 * MiB))


def test_garbage_in_cycles_is_collected_before_it_counts(gauge: Gauge) -> None:
    gc.disable()
    try:
        for _ in range(100):
            with gauge.input():
                cycle: list[object] = [b"x" * MiB]
                cycle.append(cycle)
                del cycle
    finally:
        gc.enable()
