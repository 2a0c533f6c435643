"""Backoff: full jitter below a doubling limit, up to a ceiling, and short again after a success."""

from __future__ import annotations

import random

from asrfs.transport.backoff import BASE_S, CEILING_S, Backoff


def test_waits_lie_below_a_doubling_limit_and_a_ceiling(rng: random.Random) -> None:
    for _ in range(50):
        backoff = Backoff(rng)
        for tries in range(200):
            assert backoff.tries == tries
            assert 0 <= backoff.next_delay() <= min(CEILING_S, BASE_S * 2.0 ** min(tries, 60))


def test_waits_are_spread(rng: random.Random) -> None:
    """Many hosts that lost the same store do not come back in step."""
    backoffs = [Backoff(rng) for _ in range(300)]
    for backoff in backoffs:
        for _ in range(12):
            backoff.next_delay()
    waits = sorted(backoff.next_delay() for backoff in backoffs)
    assert waits[30] < CEILING_S * 0.25
    assert waits[-30] > CEILING_S * 0.75


def test_a_success_makes_the_next_wait_short(rng: random.Random) -> None:
    backoff = Backoff(rng)
    for _ in range(20):
        backoff.next_delay()
    backoff.reset()
    assert backoff.next_delay() <= BASE_S
