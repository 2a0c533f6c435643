"""What the agent looks after beside the history: spares for the journal, and space, announced before it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from asrfs.daemon.agent_status import journal_bytes, provisioned_bytes, space_of
from asrfs.daemon.health import quota_alarms, space_alarms
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError
from asrfs.replication.alarms import Alarms
from asrfs.replication.progress import Progress
from asrfs.replication.quota import Quota
from asrfs.replication.trimmer import Trimmer

SPARES_INTERVAL_S = 0.5
SPACE_INTERVAL_S = 2.0
SPARE_ROOM_BYTES = 256 << 20
"""No spare is made when less than this would be left: the journal's next segment comes first."""


@dataclass(slots=True)
class Housekeeping:
    """`settings` gives those in force; `quota` is told how much that is here and now."""

    state: StateDirectory
    trimmer: Trimmer
    progress: Progress
    alarms: Alarms
    threads: trio.CapacityLimiter
    settings: Callable[[], Settings]
    quota: Quota
    oldest_segment: int = 0

    def __post_init__(self) -> None:
        self.quota.look = self.look  # what was allowed or cut a moment ago counts before anything is given up

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
                await trio.to_thread.run_sync(self.look, limiter=self.threads)
                self.progress.wake()
            except (AsrfsError, OSError) as error:
                self.alarms.set("space", "warning", f"the space of {self.state.root} cannot be seen: {error}")
            await trio.sleep(SPACE_INTERVAL_S)

    def _prepare_spare(self) -> bool:
        _, free_bytes = space_of(self.state.journal)
        if free_bytes < SPARE_ROOM_BYTES:
            return False
        return self.trimmer.prepare(time.monotonic())

    def look(self) -> None:
        """See what room there is and what the journal takes of it. Blocks; raises AsrfsError, OSError."""
        self.oldest_segment = self.trimmer.look()
        total_bytes, free_bytes = space_of(self.state.journal)
        used = journal_bytes(self.oldest_segment, self.progress.durable) - self.trimmer.cut_bytes(0)
        provisioned = provisioned_bytes(self.state.load_machine())
        self.quota.quota_bytes = self.settings().quota_bytes(provisioned, used + free_bytes)
        self.alarms.hold("journal-over-quota", quota_alarms(used, self.quota.quota_bytes))
        self.alarms.hold("space", space_alarms(self.state.root, total_bytes, free_bytes))
