"""Has map checkpoints made while a vault is served: looks at how far histories have grown, and starts `map_worker`.

A process of its own, at the lowest priority: what it does takes processor time and memory that receiving must not wait
for. One at a time; when `serve` ends, whichever way, it ends, too, and leaves nothing that is half.
"""

from __future__ import annotations

import os
import sys

import structlog
import trio

from asrfs.errors import AsrfsError
from replica_store.daemon.map_worker import KEPT
from replica_store.points.map_maker import is_due
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 20.0
AFTER_FAILURE_S = 3600.0


class MapKeeper:
    """One for each vault that is served. `threads`: for what blocks."""

    def __init__(self, vault: Vault, threads: trio.CapacityLimiter) -> None:
        self._vault = vault
        self._threads = threads
        self._not_before: dict[str, float] = {}
        self._log = structlog.get_logger("replica_store.maps")

    async def run(self) -> None:
        """For ever."""
        while True:
            for machine_id in await trio.to_thread.run_sync(self._due, trio.current_time(), limiter=self._threads):
                await self._make(machine_id)
            await trio.sleep(LOOK_EVERY_S)

    def _due(self, now: float) -> list[str]:
        try:
            ids = [machine.id for machine in self._vault.machines()]
        except AsrfsError as error:  # the catalog is busy, or damaged: others say so with more right
            self._log.warning("no map checkpoint made", reason=str(error))
            return []
        due = []
        for machine_id in ids:
            if self._not_before.get(machine_id, now) <= now:
                try:
                    if is_due(self._vault, machine_id):
                        due.append(machine_id)
                except (AsrfsError, OSError) as error:
                    self._failed(machine_id, now, str(error))
        return due

    async def _make(self, machine_id: str) -> None:
        words = [sys.executable, "-m", "replica_store.daemon.map_worker", self._vault.root, machine_id, KEPT]
        ours = theirs = -1
        try:
            theirs, ours = os.pipe()  # closed by the kernel where this process is killed
            done = await trio.run_process(words, stdin=theirs, capture_stdout=True, capture_stderr=True, check=False)
        except OSError as error:
            self._failed(machine_id, trio.current_time(), str(error))
            return
        finally:
            for end in (theirs, ours):
                if end >= 0:
                    os.close(end)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").split()
            self._failed(machine_id, trio.current_time(), " ".join(said)[-300:])

    def _failed(self, machine_id: str, now: float, reason: str) -> None:
        self._not_before[machine_id] = now + AFTER_FAILURE_S
        self._log.warning("no map checkpoint made", machine=machine_id, reason=reason)
