"""I9 with kept digests: whatever is kept, of this history or of another one, what is compared is what the disk is."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.history_steps import FRAME_BYTES, STEPS
from tests.fakes.kept_histories import EVENTS, check_kept


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    frame_bytes=st.sampled_from(FRAME_BYTES),
)
def test_i9_kept_digests_are_those_of_the_disk_at_every_lsn(steps: list[str], seed: int, frame_bytes: int) -> None:
    check_kept(steps, seed, frame_bytes)


def test_kept_digests_are_used_and_strange_ones_are_there(rng: random.Random) -> None:
    events: Counter[str] = Counter()
    for _ in range(20):
        events += check_kept(rng.choices(STEPS, k=40), rng.getrandbits(32), rng.choice(FRAME_BYTES))
    assert all(events[event] > 20 for event in EVENTS), events
