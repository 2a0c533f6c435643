"""Comparing disks without processes: both sides' digests in the task that asks, of files and histories in memory."""

from __future__ import annotations

import trio

from asrfs.protocol.messages import Compare, Compared, Fetch, Fetched
from replica_store.points.changed_since import Fetcher
from replica_store.points.digests import Comparer
from replica_store.points.history import History


class InlineFetching:
    """`replica_store.ingest.promoting.Fetching` over a history; `seconds`: of virtual time that reading takes."""

    def __init__(self, history: History, seconds: float = 0.0) -> None:
        self._fetcher = Fetcher(history)
        self._seconds = seconds

    async def fetch(self, machine_id: str, wanted: Fetch) -> Fetched:
        await trio.sleep(self._seconds)  # sleep: virtual
        return self._fetcher.answer(machine_id, wanted)


class InlineComparing:
    """`replica_store.ingest.session.Comparing` over a history."""

    at_once = 4

    def __init__(self, history: History) -> None:
        self._comparer = Comparer(history)

    async def compare(self, machine_id: str, wanted: Compare) -> Compared:
        await trio.lowlevel.checkpoint()
        return self._comparer.answer(machine_id, wanted)
