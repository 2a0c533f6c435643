"""Sees to it, while a vault is served, that test failovers end when their time or space is up, and notes when a machine
that is being reprotected is whole at its other store.

Looking costs one question to the catalog, or the sizes of a few files; what is due is done by `failover_worker`, a
process of its own, because ending a recovered machine takes seconds and waits for others.
"""

from __future__ import annotations

import sys

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.model.clock import Clock
from replica_store.failover.actions import Failovers
from replica_store.failover.reprotect import reprotecting
from replica_store.vault.vault import Vault

LOOK_EVERY_S = 2.0
ASK_EVERY_S = 30.0
"""How often a recovered machine is asked how far it is: that starts a program."""
AFTER_FAILURE_S = 10.0


class FailoverKeeper:
    """One for each vault that is served. `threads`: for what blocks."""

    def __init__(self, vault: Vault, clock: Clock, threads: trio.CapacityLimiter) -> None:
        self._root = vault.root
        self._failovers = Failovers(vault.root, clock)
        self._threads = threads
        self._clock = clock
        self._ask_at = clock.monotonic() + ASK_EVERY_S
        self._log = structlog.get_logger("replica_store.failovers")

    async def run(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(LOOK_EVERY_S)
            try:
                due = await trio.to_thread.run_sync(self._failovers.is_anything_due, limiter=self._threads)
                asks = await trio.to_thread.run_sync(self._asks_now, limiter=self._threads)
                ended = (await self._sweep() if due or asks else True) or not due
            except (AsrfsError, OSError) as error:  # others say of a damaged catalog with more right that it is one
                self._log.warning("failovers are looked at later", reason=str(error))
                ended = False
            if not ended:
                await trio.sleep(AFTER_FAILURE_S)

    def _asks_now(self) -> bool:
        """Whether it is time to ask machines that are being reprotected. Blocks."""
        now = self._clock.monotonic()
        if now < self._ask_at:
            return False
        self._ask_at = now + ASK_EVERY_S
        return bool(reprotecting(self._root))

    async def _sweep(self) -> bool:
        """Whether something came of it: what resists is not tried all the time."""
        words = [sys.executable, "-m", "replica_store.daemon.failover_worker", self._root]
        done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
        lines = done.stdout.decode(errors="replace").splitlines()
        for line in lines:
            operation_id, _, cause = line.partition(" ")
            self._log.info("failover", id=operation_id, cause=cause)
        if done.returncode != 0:
            self._log.warning("failovers are looked at later", reason=done.stderr.decode(errors="replace")[-300:])
        return bool(lines)
