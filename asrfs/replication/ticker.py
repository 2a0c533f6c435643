"""Keeps `Progress` true: asks the disk server where its history stands, and has it made durable when nobody else does.

Without this a history nobody fsyncs would never be shipped; with it, durable is never more than an object's age
behind appended. While the disk server is away nothing is known anew, and it is asked again at once when it answers.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from asrfs.errors import AsrfsError, IntegrityError, TemporaryError
from asrfs.replication.alarms import Alarms
from asrfs.replication.disk_server import DiskServer, HostPositions
from asrfs.replication.progress import Progress

RETRY_S = 0.2
AWAY_ALARM_S = 10.0


class Ticker:
    """`age_s` says how long records may stay only appended."""

    def __init__(self, server: DiskServer, progress: Progress, alarms: Alarms, age_s: Callable[[], float]) -> None:
        self._server = server
        self._progress = progress
        self._alarms = alarms
        self._age_s = age_s
        self._poked = trio.Event()

    def poke(self) -> None:
        """Somebody waits: ask now."""
        self._poked.set()

    async def run(self) -> None:
        away_since: float | None = None
        while True:
            self._poked = trio.Event()
            try:
                await self.tick()
            except TemporaryError as error:
                away_since = away_since or trio.current_time()
                if trio.current_time() - away_since >= AWAY_ALARM_S:
                    self._alarms.set("disk-server", "critical", str(error))
                await trio.sleep(RETRY_S)
                continue
            except AsrfsError as error:
                self._alarms.set("journal", "critical", str(error))
            else:
                self._alarms.clear("disk-server")
                if away_since is not None:
                    self._alarms.clear("journal")
            away_since = None
            with trio.move_on_after(self._age_s()):
                await self._poked.wait()

    async def look(self) -> HostPositions:
        """Where the history stands now. Raises AsrfsError."""
        positions = await self._server.positions()
        self._note(positions)
        return positions

    async def tick(self) -> HostPositions:
        """One look, and a sync if something is not durable. Raises AsrfsError."""
        positions = await self.look()
        if positions.appended_lsn > positions.durable.lsn and positions.failed is None:
            positions = await self._server.sync()
            self._note(positions)
        return positions

    def _note(self, positions: HostPositions) -> None:
        if positions.failed is not None:
            self._alarms.set("journal", "critical", f"the journal failed and takes no more writes: {positions.failed}")
        try:
            self._progress.note_host(
                appended_lsn=positions.appended_lsn, durable=positions.durable, epoch=positions.epoch
            )
        except IntegrityError as error:
            self._alarms.set("journal", "critical", str(error))
            raise
