"""How long to wait before trying again. PURE: randomness is handed in, and whoever uses this sleeps by itself."""

from __future__ import annotations

from random import Random

BASE_S = 0.1
CEILING_S = 5.0
"""A store that answers again is met within so long; a try that finds nobody costs one connection."""


class Backoff:
    """Full jitter: the n-th wait is uniform in `[0, min(ceiling, base × 2^n)]`, so that many hosts do not come in step.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, random: Random, *, base_s: float = BASE_S, ceiling_s: float = CEILING_S) -> None:
        self._random = random
        self._base_s = base_s
        self._ceiling_s = ceiling_s
        self._tries = 0

    @property
    def tries(self) -> int:
        """Failures since the last success."""
        return self._tries

    def next_delay(self) -> float:
        """Count a failure; seconds to wait before the next try."""
        limit = min(self._ceiling_s, self._base_s * 2.0 ** min(self._tries, 64))
        self._tries += 1
        return self._random.uniform(0.0, limit)

    def reset(self) -> None:
        """It worked: the next failure waits shortly again."""
        self._tries = 0
