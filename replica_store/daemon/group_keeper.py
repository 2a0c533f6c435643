"""Sees to it that every group has a coordinator that is connected, while `serve` runs.

Who is away for a moment keeps its place: a group is given another coordinator only when that of now has been away for a
while, because each change ends the point that is just being cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.model.clock import Clock
from replica_store.vault.group_changes import choose_coordinators, lacks_coordinator
from replica_store.vault.groups import read_groups
from replica_store.vault.vault import Vault, lock_descriptions

LOOK_EVERY_S = 1.0
AWAY_S_MAX = 3.0


class GroupKeeper:
    """`connected`: ids of the machines that have a session now."""

    def __init__(
        self, vault: Vault, connected: Callable[[], Collection[str]], clock: Clock, threads: trio.CapacityLimiter
    ) -> None:
        self._vault = vault
        self._connected = connected
        self._monotonic = clock.monotonic
        self._threads = threads
        self._seen: dict[str, float] = {}
        self._log = structlog.get_logger("replica_store.groups")

    async def run(self) -> None:
        """For ever."""
        # At the start nobody has had the time to connect: who has a place is only away for a moment.
        placed = await trio.to_thread.run_sync(self._coordinators, limiter=self._threads)
        self._seen = dict.fromkeys(placed, self._monotonic())
        while True:
            await trio.sleep(LOOK_EVERY_S)
            try:
                await trio.to_thread.run_sync(self._look, self._present(), limiter=self._threads)
            except AsrfsError as error:
                self._log.info("coordinators are looked at later", reason=str(error))

    def _coordinators(self) -> list[str]:
        """Of now. Blocks."""
        try:
            return [group.coordinator for group in read_groups(self._vault.catalog).groups]
        except AsrfsError as error:
            self._log.info("coordinators are not known", reason=str(error))
            return []

    def _present(self) -> set[str]:
        """Who is connected, or was a moment ago."""
        now = self._monotonic()
        self._seen |= dict.fromkeys(self._connected(), now)
        self._seen = {machine: at for machine, at in self._seen.items() if now - at <= AWAY_S_MAX}
        return set(self._seen)

    def _look(self, present: set[str]) -> None:
        """Blocks. The lock is taken only where something is to be changed: others try it once."""
        if not lacks_coordinator(self._vault, present):
            return
        with lock_descriptions(self._vault.root, LOOK_EVERY_S):
            for group in choose_coordinators(self._vault, present):
                self._log.info("coordinator chosen", group=group.name, coordinator=group.coordinator)
