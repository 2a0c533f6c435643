"""The journal between the threads of disk server and agent: reads stay right while segments are dropped and reused, and
nothing that was promised is lost with the power."""

from __future__ import annotations

import random

from tests.fakes.journal_race import EVENTS, race


def test_i2_i9_reads_and_promises_while_segments_are_applied_dropped_and_used_again(rng: random.Random) -> None:
    events = race(rng)
    for _ in range(4):  # whose turn it is, the machine says: what did not happen yet may in another race
        if all(events[each] for each in EVENTS):
            break
        events += race(rng)
    assert all(events[each] for each in EVENTS), events
