"""How much went by lately. Pure; times are monotonic seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 2.0


class Pace:
    """Bytes per second over the last `window_s`."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._noted: deque[tuple[float, int]] = deque()
        self._sum = 0

    def note(self, count: int, now_s: float) -> None:
        """So many bytes just now."""
        self._noted.append((now_s, count))
        self._sum += count

    def bytes_per_s(self, now_s: float) -> float:
        while self._noted and now_s - self._noted[0][0] > self._window_s:
            self._sum -= self._noted.popleft()[1]
        return self._sum / self._window_s
