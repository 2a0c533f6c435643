"""Moments at which the disk images are exactly what the history says at one LSN.

Between two spans of the applier they are, unless a span was broken off: by an error, or by the death of an agent. Then
blocks of records up to where it was going to are in some images already, until that much is applied again. So whoever
wants an exact moment names an LSN that was durable when it began to want it, and waits until that is applied.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress


class ExactImages:
    """Keeps spans and moments apart. Nothing is lost by holding a moment: records wait in the journal."""

    def __init__(self, positions: PositionsFile, progress: Progress) -> None:
        self._positions = positions
        self._progress = progress
        self._turn = trio.Lock()
        self._broken_lsn = 0

    @asynccontextmanager
    async def applying(self, until_lsn: int) -> AsyncIterator[None]:
        """A span that writes nothing of records above `until_lsn`."""
        async with self._turn:
            try:
                yield
            except BaseException:
                self._broken_lsn = max(self._broken_lsn, until_lsn)
                raise

    @asynccontextmanager
    async def hydrating(self) -> AsyncIterator[None]:
        """A turn of the hydrator, which writes what is no record's: no span and no exact moment meanwhile."""
        async with self._turn:
            yield

    @asynccontextmanager
    async def held(self, lsn: int) -> AsyncIterator[int]:
        """The LSN at which every image is, as long as this lasts: at least `lsn`, which was durable at the call."""
        while True:
            least = max(lsn, self._broken_lsn)
            await self._progress.wait_until(lambda least=least: self._progress.applied.lsn >= least)  # type: ignore[misc]
            async with self._turn:
                exact = self._positions.current.applied.lsn
                if exact >= max(lsn, self._broken_lsn):
                    yield exact
                    return
