"""Tells sessions what promotions want of their hosts: one look at the catalog twice a second for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import structlog
import trio

from asrfs.errors import AsrfsError, RefusedError
from asrfs.model.clock import Clock
from asrfs.protocol.messages import Fetch, Fetched, Promote, Promoted
from replica_store.ingest.handovers import InThread
from replica_store.vault.promoting import begin_attempt, note_answer, promotions_wanted
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 0.5
"""Commands of other processes ask for it."""
AGAIN_S = 20.0
"""What is wanted is said again: a host takes back what nobody asks for any more."""
_TOO_OLD = "the host is of before promotion: update asrfs there"


class Fetching(Protocol):
    """Gives back what disks were. Failures are answers, too."""

    async def fetch(self, machine_id: str, wanted: Fetch) -> Fetched: ...


class NoFetching:
    """Of a store that gives nothing back."""

    async def fetch(self, machine_id: str, wanted: Fetch) -> Fetched:
        return Fetched(number=wanted.number, exit_code=RefusedError.exit_code, text="this store gives nothing back")


class Promotions:
    """Belongs to the event loop."""

    def __init__(self, vault: Vault, clock: Clock, in_thread: InThread) -> None:
        self._vault = vault
        self._clock = clock
        self._in_thread = in_thread
        self._wanted: dict[str, Promote] = {}
        self._changed = trio.Event()
        self._log = structlog.get_logger("replica_store.promotions")

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await trio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        try:
            wanted = await self._in_thread(promotions_wanted, self._vault, self._clock.time_ns())
        except AsrfsError as error:
            self._log.warning("what promotions want of hosts cannot be seen", reason=str(error))
            return
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()
            self._changed = trio.Event()

    def of(self, machine_id: str) -> Promote | None:
        """What this machine's host is to be told now."""
        return self._wanted.get(machine_id)

    async def change(self) -> None:
        """Wait for the next change of anything here, or until it is time to say it again."""
        with trio.move_on_after(AGAIN_S):
            await self._changed.wait()

    async def tell(self, machine_id: str, send: Callable[[Promote], Awaitable[None]], *, takes_promotion: bool) -> None:
        """Say in a session, for ever, what a promotion wants of its host, and again now and then."""
        while True:
            wanted = self.of(machine_id)
            if wanted is not None and takes_promotion:
                if wanted.wanted != "write":
                    await send(wanted)
                elif (attempt := await self._begin_attempt(machine_id, wanted)) is not None:
                    await send(msgspec.structs.replace(wanted, attempt=attempt))
            elif wanted is not None:
                await self.answered(machine_id, Promoted(id=wanted.id, outcome="failed", exit_code=4, error=_TOO_OLD))
            await self.change()

    async def _begin_attempt(self, machine_id: str, wanted: Promote) -> int | None:
        try:
            return await self._in_thread(begin_attempt, self._vault, machine_id, wanted.id)
        except AsrfsError as error:
            self._log.warning("a host is not told to write now", promotion=wanted.id, reason=str(error))
            return None

    async def answered(self, machine_id: str, word: Promoted) -> None:
        """Write a host's answer down. Raises AsrfsError: it is to be asked again."""
        self._log.info("a host answered", promotion=word.id, outcome=word.outcome, lsn=word.lsn, error=word.error)
        await self._in_thread(note_answer, self._vault, machine_id, word, self._clock.time_ns())

    def check_asked(self, machine_id: str, wanted: Fetch) -> None:
        """Raise RefusedError for who asks for what no promotion brings back just now: it has no need of it."""
        word = self._wanted.get(machine_id)
        if word is None or word.wanted != "write" or word.lsn != wanted.lsn:
            raise RefusedError(f"no promotion brings this machine back to LSN {wanted.lsn}")
