"""The clock's interface. Pure rooms never read one; everything else is handed one, so that tests own time."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Wall time for people and for `time:` selectors, monotonic time for intervals."""

    def time_ns(self) -> int:
        """Nanoseconds since 1970 UTC; may jump in either direction."""

    def monotonic(self) -> float:
        """Seconds since some instant; never goes back."""
