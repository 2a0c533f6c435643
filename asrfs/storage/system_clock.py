"""The clock of this host."""

from __future__ import annotations

import time


class SystemClock:
    """`model.clock.Clock` from the kernel's clocks."""

    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()
