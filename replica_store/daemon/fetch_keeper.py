"""Gives hosts back what their disks were, while a vault is served: each machine's requests in turn, in threads."""

from __future__ import annotations

import trio

from asrfs.protocol.messages import Fetch, Fetched
from replica_store.points.changed_since import Fetcher
from replica_store.vault.vault import Vault

THREADS = 2
"""Of all hosts together: receiving goes first."""


class FetchKeeper:
    """`replica_store.ingest.promoting.Fetching` of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._fetcher = Fetcher(vault)
        self._threads = trio.CapacityLimiter(THREADS)

    async def fetch(self, machine_id: str, wanted: Fetch) -> Fetched:
        return await trio.to_thread.run_sync(self._fetcher.answer, machine_id, wanted, limiter=self._threads)
