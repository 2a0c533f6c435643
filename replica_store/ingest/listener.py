"""The data port's side of the store: which session a connection becomes, one at a time for each machine (I6)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.format.log_object import SALT_BYTES
from asrfs.model.clock import Clock
from asrfs.transport.stream import ByteStream
from asrfs.transport.tls import machine_identity
from replica_store.ingest.budget import Budget
from replica_store.ingest.configurations import Configurations
from replica_store.ingest.handovers import Handovers
from replica_store.ingest.ingester import Ingester
from replica_store.ingest.links import Links
from replica_store.ingest.promoting import Fetching, NoFetching, Promotions
from replica_store.ingest.session import Comparing, NoComparing, StoreSession
from replica_store.vault.vault import Vault

LINKS_SAVED_EVERY_S = 5.0
THREADS = 16
_NONCE_BYTES = 4

T = TypeVar("T")


class Listener:
    """Turns authenticated connections into sessions. One for each vault, in the process that holds its lock."""

    def __init__(
        self, vault: Vault, clock: Clock, comparing: Comparing | None = None, fetching: Fetching | None = None
    ) -> None:
        self.vault = vault
        self.comparing: Comparing = comparing or NoComparing()
        self.fetching: Fetching = fetching or NoFetching()
        self._clock = clock
        self.links = Links(vault, clock)
        self.budget = Budget()
        self.configurations = Configurations(vault, self.in_thread)
        self.handovers = Handovers(vault, clock, self.in_thread)
        self.promotions = Promotions(vault, clock, self.in_thread)
        self.threads = trio.CapacityLimiter(THREADS)
        self._ingesters: dict[str, Ingester] = {}
        self._sessions: dict[str, StoreSession] = {}
        self._log = structlog.get_logger("replica_store.listener")

    @property
    def connected(self) -> tuple[str, ...]:
        """Ids of the machines that have a session now."""
        return tuple(self._sessions)

    async def handle(self, stream: ByteStream, certificate: bytes, address: str, host: str = "") -> None:
        """Serve one connection whose certificate (DER) TLS has verified, until it ends. Raises nothing.

        `host`: where it comes from, and so where others of its groups reach that machine if it says nothing else.
        """
        try:
            identity = machine_identity(certificate)
        except AsrfsError as error:
            self._log.warning("connection refused", address=address, reason=str(error))
            return
        session = StoreSession(stream, identity, self, host)
        try:
            await session.run()
        except Exception:  # a fault of ours in one session must not end the others
            self._log.exception("session failed", machine=identity.name)
        finally:
            if self._sessions.get(identity.machine_id) is session:
                del self._sessions[identity.machine_id]

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what blocks, never abandoned: what it stores is stored to its end."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)

    def refused(self, reason: str) -> None:
        """A connection that did not get through its handshake."""
        self._log.warning("connection refused", reason=reason)

    def now_ns(self) -> int:
        return self._clock.time_ns()

    def make_salt(self) -> bytes:
        return os.urandom(SALT_BYTES)

    async def take_turn(self, machine_id: str, session: StoreSession) -> Ingester:
        while (other := self._sessions.get(machine_id)) is not None:
            other.scope.cancel()
            await other.finished.wait()
            if self._sessions.get(machine_id) is other:
                del self._sessions[machine_id]
        self._sessions[machine_id] = session
        if machine_id not in self._ingesters:
            self._ingesters[machine_id] = Ingester(
                self.vault, machine_id, lambda: secrets.token_hex(_NONCE_BYTES), self._clock.time_ns
            )
        return self._ingesters[machine_id]

    async def save_links(self) -> None:
        """For ever: write down what hosts say of themselves, so that other processes see it."""
        try:
            while True:
                await trio.sleep(LINKS_SAVED_EVERY_S)
                await self._save_links()
        finally:
            with trio.CancelScope(shield=True):
                await self._save_links()

    async def _save_links(self) -> None:
        rows = self.links.changed()
        try:
            await self.in_thread(self.links.save, rows)
        except AsrfsError as error:
            self._log.warning("link states not saved", reason=str(error))
