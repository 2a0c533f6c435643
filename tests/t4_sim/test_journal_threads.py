"""The journal between the threads of disk server and agent: reads stay right while segments are dropped and reused."""

from __future__ import annotations

import random

from tests.fakes.journal_race import race


def test_i9_reads_while_segments_are_applied_dropped_and_used_again(rng: random.Random) -> None:
    race(rng)
