"""Removes seeds that have served: of disks that are here as a whole, or that are gone."""

from __future__ import annotations

import structlog
import trio

from asrfs.errors import AsrfsError
from replica_store.vault.seed_need import is_over
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 5.0


class SeedKeeper:
    """One for each vault, in the process that serves it."""

    def __init__(self, vault: Vault, threads: trio.CapacityLimiter) -> None:
        self._vault = vault
        self._threads = threads
        self._log = structlog.get_logger("replica_store.seeds")

    async def run(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(LOOK_EVERY_S)
            await trio.to_thread.run_sync(self.sweep, limiter=self._threads)

    def sweep(self) -> None:
        """Remove what is over. Blocks. What cannot be removed now is tried again."""
        vault = self._vault
        for machine_id in vault.seeds.machines():
            try:
                rows = vault.catalog.disk_rows(machine_id)
                for disk in vault.seeds.disks(machine_id):
                    if is_over(disk, rows):
                        with vault.seeds.lock(machine_id):
                            vault.seeds.remove(machine_id, disk)
                        self._log.info("seed removed", machine=machine_id, disk=disk)
            except (AsrfsError, OSError) as error:
                self._log.info("seed not removed", machine=machine_id, reason=str(error))
