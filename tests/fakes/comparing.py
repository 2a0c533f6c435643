"""Comparing disks without processes: both sides' digests in the task that asks, of files and histories in memory."""

from __future__ import annotations

import trio

from asrfs.protocol.messages import Compare, Compared
from replica_store.points.digests import Comparer
from replica_store.points.history import History


class InlineComparing:
    """`replica_store.ingest.session.Comparing` over a history."""

    at_once = 4

    def __init__(self, history: History) -> None:
        self._comparer = Comparer(history)

    async def compare(self, machine_id: str, wanted: Compare) -> Compared:
        await trio.lowlevel.checkpoint()
        return self._comparer.answer(machine_id, wanted)
