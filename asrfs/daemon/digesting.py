"""The agent's end of the process that digests disk images: `replication.comparer.Digester` for tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from asrfs.daemon.digest_process import Order, Reply
from asrfs.daemon.processes import child_environment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.digest_tree import Region
from asrfs.model.machine import DiskConfig
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.comparer import Comparer
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.shipper import Shipper
from asrfs.transport.worker import Worker

_MODULE = "asrfs.daemon.digest_process"


RATE_BESIDE_USE = 400 << 20
THREADS_MAX = 2
"""That digest at once while nobody uses the disks."""
USE_S = 1.0
"""For so long disks count as used after a request."""


class ScanRate:
    """Bytes a second that may be read of images now, 0 for no limit: what was chosen, else (None) by whether guests use
    their disks. Comparing is the last to get processor and disk, but what it reads is not there for others to read."""

    def __init__(self, server: DiskServer, chosen: Callable[[], int | None]) -> None:
        self._server = server
        self._chosen = chosen
        self._served_s = 0.0
        self._used_until = 0.0

    async def begin(self) -> None:
        """From here on it is looked at whether disks are used."""
        await self._look()
        self._used_until = 0.0

    async def now(self) -> int:
        chosen = self._chosen()
        if chosen is not None:
            return chosen
        await self._look()
        return RATE_BESIDE_USE if trio.current_time() < self._used_until else 0

    async def is_free(self) -> bool:
        """Whether nothing was chosen, and no guest uses its disks."""
        return self._chosen() is None and not await self.now()

    async def _look(self) -> None:
        """A disk server that cannot be asked, or is another one, counts as used."""
        before = self._served_s
        with contextlib.suppress(AsrfsError):
            self._served_s = (await self._server.positions()).served_s
            if self._served_s == before:
                return
        self._used_until = trio.current_time() + USE_S


class DigestProcess:
    """One process, which lives as long as it is used in a `with`: by one comparison at a time, the next one waits."""

    def __init__(self, state: StateDirectory, rate: ScanRate) -> None:
        self._state = state
        self._rate = rate
        self._worker: Worker | None = None
        self._not_before = 0.0
        self._threads = min(THREADS_MAX, len(os.sched_getaffinity(0)))
        self._turn = trio.Lock()

    async def __aenter__(self) -> DigestProcess:
        await self._turn.acquire()
        try:
            await self._rate.begin()
        except BaseException:
            self._turn.release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._close()
        finally:
            self._turn.release()

    async def pace(self) -> None:
        """Wait until more may be read."""
        await trio.sleep_until(self._not_before)

    async def digest(self, disk: DiskConfig, region: Region) -> bytes:
        """Digests of the region's leaves. Raises TemporaryError."""
        place = (region.size_bytes, region.first, region.nodes)
        threads = self._threads if await self._rate.is_free() else 1
        order = Order(self._state.image_path(disk), *place, base=disk.base or "", threads=threads)
        started = trio.current_time()
        try:
            if self._worker is None:
                self._worker = await Worker.start(_MODULE, [self._state.root], child_environment())
            content = await self._worker.ask(msgspec.msgpack.encode(order))
        except BaseException:
            await self._close()
            raise
        reply = msgspec.msgpack.decode(content, type=Reply)
        if reply.failed:
            raise TemporaryError(reply.failed)
        if rate := await self._rate.now():
            self._not_before = max(self._not_before, started) + reply.bytes_read / rate
        return reply.leaves

    async def _close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()


@asynccontextmanager
async def comparing(
    digester: DigestProcess, server: DiskServer, shipper: Shipper, applier: ApplierTask
) -> AsyncIterator[Comparer]:
    """A comparer, and its process for as long as this lasts."""
    async with digester:
        yield Comparer(
            outlet=shipper.source.outlet,
            digester=digester,
            server=server,
            progress=shipper.source.progress,
            images=applier.exact,
            hurry_applied=applier.hurry,
            hurry_shipped=shipper.hurry,
        )
