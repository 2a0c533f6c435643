"""How far this machine's history is known to have come, for all tasks of the agent, and a way to wait for more.

Belongs to the event loop: only tasks use it, so no lock is needed and nothing changes between two awaits.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from asrfs.errors import IntegrityError
from asrfs.format.segment import POSITION_SHIFT, SEGMENT_HEADER_BYTES
from asrfs.model.positions import Cursor, Positions


class Progress:
    """`is_known` becomes true when the disk server has said for the first time where its history stands."""

    def __init__(self, positions: Positions) -> None:
        self.epoch = positions.epoch
        self.applied = positions.applied
        self.acknowledged = positions.acknowledged
        self.durable = max(positions.applied, positions.acknowledged, key=lambda cursor: cursor.lsn)
        self.appended_lsn = self.durable.lsn
        self.is_known = False
        self._change = trio.Event()

    def note_host(self, *, appended_lsn: int, durable: Cursor, epoch: int) -> None:
        """The disk server's word. Raises IntegrityError if it is behind what is already folded or shipped."""
        least = max(self.applied.lsn, self.acknowledged.lsn)
        if appended_lsn < least:
            raise IntegrityError(
                f"the journal ends at LSN {appended_lsn}, but LSN {least} was already applied or acknowledged: "
                "records are missing from it"
            )
        if durable.lsn > self.durable.lsn:
            self.durable = durable
        self.appended_lsn = max(appended_lsn, self.durable.lsn)
        self.epoch = epoch
        self.is_known = True
        self.wake()

    def note_applied(self, cursor: Cursor) -> None:
        self.applied = cursor
        self.wake()

    def note_acknowledged(self, cursor: Cursor) -> None:
        self.acknowledged = cursor
        self.wake()

    def wake(self) -> None:
        """Let everything that waits look again."""
        self._change.set()
        self._change = trio.Event()

    async def change(self) -> None:
        """Wait for the next change of anything here."""
        await self._change.wait()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._change.wait()

    @property
    def lag_bytes(self) -> int:
        """Journal bytes that are durable and not acknowledged."""
        return bytes_between(self.acknowledged, self.durable)


def bytes_between(start: Cursor, end: Cursor) -> int:
    """Journal bytes from one cursor to a later one, headers of records and unused segment ends included."""
    if end.lsn <= start.lsn:
        return 0
    if start.segment == 0:  # the beginning of the history
        start = Cursor(segment=1, offset=SEGMENT_HEADER_BYTES)
    return max(0, (end.segment - start.segment << POSITION_SHIFT) + end.offset - start.offset)
