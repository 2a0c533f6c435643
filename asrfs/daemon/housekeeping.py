"""What the agent looks after beside the history: spares for the journal, and space, announced before it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from asrfs.daemon.agent_status import journal_bytes, provisioned_bytes
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError
from asrfs.model.quantities import format_size
from asrfs.replication.alarms import Alarms
from asrfs.replication.progress import Progress
from asrfs.replication.trimmer import Trimmer

SPARES_INTERVAL_S = 0.5
SPACE_INTERVAL_S = 2.0
SPACE_WARNING = 0.80
SPACE_CRITICAL = 0.95
SPARE_ROOM_BYTES = 256 << 20
"""No spare is made when less than this would be left: the journal's next segment comes first."""


@dataclass(slots=True)
class Housekeeping:
    """`settings` gives those in force."""

    state: StateDirectory
    trimmer: Trimmer
    progress: Progress
    alarms: Alarms
    threads: trio.CapacityLimiter
    settings: Callable[[], Settings]
    oldest_segment: int = 0

    async def keep_spares(self) -> None:
        """Have spares ready before they are needed, for ever."""
        while True:
            try:
                made = await trio.to_thread.run_sync(self._prepare_spare, limiter=self.threads)
            except (AsrfsError, OSError):
                made = False  # no room: the space alarm says so
            if not made:
                await trio.sleep(SPARES_INTERVAL_S)

    async def watch_space(self) -> None:
        """Raise and clear the alarms of quota and space, for ever."""
        while True:
            try:
                await trio.to_thread.run_sync(self._look, limiter=self.threads)
            except (AsrfsError, OSError) as error:
                self.alarms.set("space", "warning", f"the space of {self.state.root} cannot be seen: {error}")
            await trio.sleep(SPACE_INTERVAL_S)

    def _prepare_spare(self) -> bool:
        status = os.statvfs(self.state.journal)
        if status.f_bavail * status.f_frsize < SPARE_ROOM_BYTES:
            return False
        return self.trimmer.prepare(time.monotonic())

    def _look(self) -> None:
        self.oldest_segment = self.trimmer.oldest_segment()
        self._check_quota()
        self._check_space()

    def _check_quota(self) -> None:
        used = journal_bytes(self.oldest_segment, self.progress.durable)
        quota = self.settings().quota_bytes(provisioned_bytes(self.state.load_machine()))
        if used <= quota:
            self.alarms.clear("journal-over-quota")
            return
        behind = self.progress.durable.lsn - self.progress.acknowledged.lsn
        self.alarms.set(
            "journal-over-quota",
            "warning",
            f"the journal holds {format_size(used)}, its quota is {format_size(quota)}: "
            f"{behind} records wait for the store and are kept",
        )

    def _check_space(self) -> None:
        status = os.statvfs(self.state.journal)
        total = (status.f_blocks - status.f_bfree + status.f_bavail) * status.f_frsize
        free = status.f_bavail * status.f_frsize
        used = 1 - free / total if total else 1.0
        if used < SPACE_WARNING:
            self.alarms.clear("space")
            return
        self.alarms.set(
            "space",
            "critical" if used >= SPACE_CRITICAL else "warning",
            f"the filesystem of {self.state.root} is {used:.0%} full, {format_size(free)} are left: "
            "when it is full, writes fail with ENOSPC",
        )
