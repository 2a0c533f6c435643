"""Has disks digested while a vault is served: a few `digest_worker`s, there while hosts ask.

Processes of their own, at the lowest priority: what they do takes processor time and memory that receiving must not
wait for. A worker that is asked about the disk of its last request goes on from what it knows. Starting one costs as
much as digesting a GiB by what is kept, so another one is started only when those that there are have been asked more
than they can answer for a while.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import structlog
import trio

from asrfs.errors import AsrfsError
from asrfs.protocol.frames import FrameType
from asrfs.protocol.messages import Compare, Compared, decode_message, encode_message
from asrfs.transport.worker import Worker
from replica_store.daemon.digest_worker import MACHINE_ID_CHARACTERS

AT_ONCE = 16
"""Requests of one host that may be unanswered: so many that it need not wait while a worker starts."""
PATIENCE_S = 0.5
WORKERS_MAX = 4
IDLE_S_MAX = 30.0
_LOOK_EVERY_S = 5.0
_MODULE = "replica_store.daemon.digest_worker"


@dataclass(slots=True)
class _Kept:
    """A worker that nobody asks now. `disk`: machine and slot of its last request; `since`: by trio's clock."""

    worker: Worker
    disk: tuple[str, int]
    since: float


class DigestKeeper:
    """`replica_store.ingest.session.Comparing` of the vault at `root`."""

    at_once = AT_ONCE

    def __init__(self, root: str) -> None:
        self._root = root
        self._turns = trio.Semaphore(min(WORKERS_MAX, os.cpu_count() or 1))
        self._idle: list[_Kept] = []
        self._busy = 0
        self._waiting = 0
        self._pressed_since: float | None = None
        self._freed = trio.Event()
        self._log = structlog.get_logger("replica_store.digests")

    async def run(self) -> None:
        """For ever: end workers that nobody needs; all of them when this is cancelled."""
        try:
            while True:
                await trio.sleep(_LOOK_EVERY_S)
                long_ago = trio.current_time() - IDLE_S_MAX
                for kept in [kept for kept in self._idle if kept.since < long_ago]:
                    self._idle.remove(kept)
                    await kept.worker.close()
        finally:
            while self._idle:
                await self._idle.pop().worker.close()

    async def compare(self, machine_id: str, wanted: Compare) -> Compared:
        """What differs; a failure is an answer, too."""
        assert len(machine_id) == MACHINE_ID_CHARACTERS
        try:
            async with self._turns:
                content = await self._ask((machine_id, wanted.slot), machine_id.encode() + encode_message(wanted))
            answer = decode_message(FrameType.COMPARED, content)
            assert isinstance(answer, Compared)
        except AsrfsError as error:
            self._log.warning("disk not compared", machine=machine_id, reason=str(error))
            return Compared(number=wanted.number, exit_code=error.exit_code, text=str(error)[:500])
        return answer

    async def _ask(self, disk: tuple[str, int], request: bytes) -> bytes:
        await self._wait_for_idle()
        self._busy += 1
        try:
            worker = await self._take(disk)
            try:
                return await worker.ask(request)
            finally:
                if worker.is_good:
                    self._idle.append(_Kept(worker, disk, trio.current_time()))
                else:
                    await worker.close()
        finally:
            self._busy -= 1
            if not self._waiting:
                self._pressed_since = None
            self._freed.set()
            self._freed = trio.Event()

    async def _wait_for_idle(self) -> None:
        """Until a worker is idle, or it is time for another one."""
        while self._busy and not self._idle:
            if self._pressed_since is None:
                self._pressed_since = trio.current_time()
            deadline = self._pressed_since + PATIENCE_S
            if trio.current_time() >= deadline:
                return
            self._waiting += 1
            try:
                with trio.move_on_at(deadline):
                    await self._freed.wait()
            finally:
                self._waiting -= 1

    async def _take(self, disk: tuple[str, int]) -> Worker:
        """One that knows this disk, else any, else a new one."""
        for kept in [*(kept for kept in self._idle if kept.disk == disk), *self._idle]:
            self._idle.remove(kept)
            return kept.worker
        return await Worker.start(_MODULE, [self._root])
