"""The agent's end of the process that digests disk images: `replication.comparer.Digester` for tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from asrfs.daemon.digest_process import Order, Reply
from asrfs.daemon.processes import child_environment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.digest_tree import Region
from asrfs.model.machine import DiskConfig
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.comparer import Comparer
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.shipper import Shipper
from asrfs.transport.worker import Worker

_MODULE = "asrfs.daemon.digest_process"


class DigestProcess:
    """One process, which lives as long as it is used in a `with`: by one comparison at a time, the next one waits.
    `rate`: bytes a second, 0 for no limit."""

    def __init__(self, state: StateDirectory, rate: Callable[[], int]) -> None:
        self._state = state
        self._rate = rate
        self._worker: Worker | None = None
        self._not_before = 0.0
        self._turn = trio.Lock()

    async def __aenter__(self) -> DigestProcess:
        await self._turn.acquire()
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
        order = Order(self._state.image_path(disk), *place, base=disk.base or "")
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
        if rate := self._rate():
            self._not_before = max(self._not_before, trio.current_time()) + reply.bytes_read / rate
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
