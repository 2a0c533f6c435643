"""Tells sessions what planned failovers want of their hosts: one look at the catalog twice a second for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.model.clock import Clock
from asrfs.protocol.messages import HandedOver, Handover
from replica_store.vault.handovers import handovers_wanted, note_answer
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 0.5
"""Commands of other processes ask for it."""

_TOO_OLD = "the host is of before planned failover: update asrfs there"

T = TypeVar("T")


class InThread(Protocol):
    """Runs what blocks."""

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


class Handovers:
    """Belongs to the event loop."""

    def __init__(self, vault: Vault, clock: Clock, in_thread: InThread) -> None:
        self._vault = vault
        self._clock = clock
        self._in_thread = in_thread
        self._wanted: dict[str, Handover] = {}
        self._changed = trio.Event()
        self._log = structlog.get_logger("replica_store.handovers")

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                wanted = await self._in_thread(handovers_wanted, self._vault, self._clock.time_ns())
            except AsrfsError as error:
                self._log.warning("what failovers want of hosts cannot be seen", reason=str(error))
            else:
                self._note(wanted)
            await trio.sleep(LOOK_EVERY_S)

    def of(self, machine_id: str) -> Handover | None:
        """What this machine's host is to be told now."""
        return self._wanted.get(machine_id)

    async def change(self) -> None:
        """Wait for the next change of anything here."""
        await self._changed.wait()

    async def tell(self, machine_id: str, send: Callable[[Handover], Awaitable[None]], *, takes_handover: bool) -> None:
        """Say in a session, for ever, what a planned failover wants of its host, once for each thing."""
        said = None
        while True:
            wanted = self.of(machine_id)
            if wanted is not None and wanted != said:
                if takes_handover:
                    await send(wanted)
                else:
                    await self.answered(machine_id, HandedOver(id=wanted.id, outcome="failed", error=_TOO_OLD))
            said = wanted
            await self.change()

    async def answered(self, machine_id: str, word: HandedOver) -> None:
        """Write a host's answer down. Raises AsrfsError: it is to be asked again."""
        self._log.info("a host answered", failover=word.id, outcome=word.outcome, lsn=word.lsn, error=word.error)
        await self._in_thread(note_answer, self._vault, machine_id, word, self._clock.time_ns())

    def _note(self, wanted: dict[str, Handover]) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()
            self._changed = trio.Event()
