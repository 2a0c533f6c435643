"""When to apply, and what follows: the disk server drops its maps, then segments are freed. The doing is elsewhere.

durable moved ─▶ enough, or old enough ─▶ Applier.apply_span (thread) ─▶ verb `applied` ─▶ Trimmer (thread)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from asrfs.errors import AsrfsError, IntegrityError, TemporaryError
from asrfs.model.dirty_map import GivenUp
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier import Applier
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.exact_images import ExactImages
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress, bytes_between
from asrfs.replication.trimmer import Limit, Trimmer, freeable

APPLY_BYTES = 64 << 20
APPLY_AGE_S = 1.0
"""Records are folded in when so many bytes wait, or the first has waited so long: fewer datasyncs of the image."""
RETRY_S = 1.0
CORRUPT_RETRY_S = 60.0
TRIM_INTERVAL_S = 0.5

T = TypeVar("T")


class ApplierTask:
    """`journal_turn` is shared with the shipper, which may go back to segments that are not freed yet. `given_up`: by
    the dirty map that is saved."""

    def __init__(
        self,
        applier: Applier,
        trimmer: Trimmer,
        server: DiskServer,
        positions: PositionsFile,
        progress: Progress,
        alarms: Alarms,
        threads: trio.CapacityLimiter,
        journal_turn: trio.Lock,
        given_up: Callable[[], GivenUp] = GivenUp,
    ) -> None:
        self._applier = applier
        self._trimmer = trimmer
        self._server = server
        self._positions = positions
        self._progress = progress
        self._alarms = alarms
        self._threads = threads
        self._journal_turn = journal_turn
        self.exact = ExactImages(positions, progress)
        self._given_up = given_up
        self._hurry_lsn = 0
        self._dropped = Limit(0, -1)
        self._trimmed = Limit(0, 0)

    def hurry(self, lsn: int) -> None:
        """Somebody waits for this LSN to be in the images."""
        self._hurry_lsn = max(self._hurry_lsn, lsn)
        self._progress.wake()

    async def run(self) -> None:
        """Apply for ever."""
        while True:
            await self._wait_until_due()
            try:
                durable_lsn = self._progress.durable.lsn
                async with self.exact.applying(durable_lsn):
                    cursor = await self._in_thread(self._applier.apply_span, durable_lsn)
            except IntegrityError as error:
                self._alarms.set("apply", "critical", f"the journal cannot be applied: {error}")
                await trio.sleep(CORRUPT_RETRY_S)
            except (AsrfsError, OSError) as error:
                self._alarms.set("apply", "critical", f"the images cannot be written: {error}")
                await trio.sleep(RETRY_S)
            else:
                self._alarms.clear("apply")
                self._progress.note_applied(cursor)

    async def run_trimming(self) -> None:
        """Tell the disk server what is applied and free what nobody needs, for ever."""
        while True:
            await self._progress.change()
            try:
                await self._drop_maps()
                await self._trim()
            except TemporaryError:
                pass  # the disk server is away; its successor starts from the saved position
            except (AsrfsError, OSError) as error:
                self._alarms.set("trim", "warning", f"journal segments cannot be freed: {error}")
            else:
                self._alarms.clear("trim")
            await trio.sleep(TRIM_INTERVAL_S)

    async def _wait_until_due(self) -> None:
        progress = self._progress
        await progress.wait_until(lambda: progress.durable.lsn > progress.applied.lsn)

        def is_enough() -> bool:
            return (
                progress.applied.lsn < self._hurry_lsn
                or bytes_between(progress.applied, progress.durable) >= APPLY_BYTES
            )

        with trio.move_on_after(APPLY_AGE_S):
            await progress.wait_until(is_enough)

    async def _drop_maps(self) -> None:
        applied = self._positions.saved.applied
        if applied.lsn > self._dropped.lsn:
            dropped = Limit(applied.lsn, applied.segment - 1)
            await self._server.applied(dropped.lsn, dropped.segment)
            self._dropped = dropped

    async def _trim(self) -> None:
        limit = freeable(self._positions, self._given_up(), self._dropped)
        if limit.segment <= self._trimmed.segment or limit.lsn <= 0:
            return
        async with self._journal_turn:
            limit = freeable(self._positions, self._given_up(), self._dropped)
            await self._in_thread(self._trimmer.trim, limit, time.monotonic())
        self._trimmed = limit

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)
