"""A bound on the bytes of received objects that wait to be stored, over all sessions."""

from __future__ import annotations

import trio

BYTES_MAX = 256 << 20


class Budget:
    """Whoever finds it used up waits, and TCP holds its host back. One object always fits, however large it is."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._used = 0
        self._freed = trio.Event()

    @property
    def used(self) -> int:
        """Bytes taken and not given back."""
        return self._used

    async def take(self, count: int) -> None:
        """Wait until there is room for `count` bytes."""
        while self._used and self._used + count > self._bytes_max:
            await self._freed.wait()
        self._used += count

    def give_back(self, count: int) -> None:
        assert count <= self._used
        self._used -= count
        self._freed.set()
        self._freed = trio.Event()
