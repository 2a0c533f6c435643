"""Tells sessions when what hosts are told has changed: one look at the catalog each second for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.model.configuration import HostConfiguration
from replica_store.vault.configuration import configuration_of
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 0.5
"""Commands of other processes change the catalog; a host is told within a second."""
AGAIN_S = 60.0
"""Until it is tried again when the catalog cannot say what a host is told."""

T = TypeVar("T")


class InThread(Protocol):
    """Runs what blocks."""

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


class Configurations:
    """Belongs to the event loop."""

    def __init__(self, vault: Vault, in_thread: InThread) -> None:
        self._vault = vault
        self._in_thread = in_thread
        self.generation = 0
        """Of the last look."""
        self._changed = trio.Event()
        self._log = structlog.get_logger("replica_store.configurations")

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                generation = await self._in_thread(self._vault.catalog.configuration_generation)
            except AsrfsError as error:
                self._log.warning("what hosts are told cannot be seen", reason=str(error))
            else:
                self._note(generation)
            await trio.sleep(LOOK_EVERY_S)

    async def of(self, machine_id: str) -> HostConfiguration | None:
        """What this machine is told now; None if the catalog cannot say: a host goes on with what it has."""
        try:
            return await self._in_thread(configuration_of, self._vault.catalog, machine_id)
        except AsrfsError as error:
            self._log.warning("a host is not told what to do", machine=machine_id, reason=str(error))
            return None

    async def newer_than(self, generation: int) -> None:
        """Wait until there has been a change since that one."""
        while self.generation <= generation:
            await self._changed.wait()

    def _note(self, generation: int) -> None:
        if generation != self.generation:
            self.generation = generation
            self._changed.set()
            self._changed = trio.Event()
