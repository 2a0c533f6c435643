"""I9 with map checkpoints: whatever lies about, made of this history or of another one, every LSN is exact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.history_steps import FRAME_BYTES, STEPS
from tests.fakes.map_histories import DAMAGED, EVENTS, FOREIGN, USED, check_with_maps

Plant = Callable[[pytest.MonkeyPatch], None]


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    frame_bytes=st.sampled_from(FRAME_BYTES),
)
def test_i9_every_lsn_is_exact_with_checkpoints_of_two_histories(steps: list[str], seed: int, frame_bytes: int) -> None:
    check_with_maps(steps, seed, frame_bytes)


def play(rng: random.Random, histories: int) -> Counter[str]:
    events: Counter[str] = Counter()
    for _ in range(histories):
        events += check_with_maps(rng.choices(STEPS, k=40), rng.getrandbits(32), rng.choice(FRAME_BYTES))
    return events


def test_checkpoints_are_used_and_strange_ones_are_there(rng: random.Random) -> None:
    events = play(rng, 20)
    assert all(events[event] > 20 for event in EVENTS), events
    assert {USED, FOREIGN, DAMAGED} == set(EVENTS)
