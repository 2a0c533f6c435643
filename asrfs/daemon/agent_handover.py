"""What an agent does for a planned failover: composition of `handing_over.py`, and the instant behind which it writes
no more.

    filesystems frozen ─▶ fence ─▶ marker, unfinished ─▶ thaw ─▶ last word

The fence lies before the marker, so nothing of a guest is behind it. What thaws meets the fence: a filesystem that is
still mounted here finds its disk read-only. Whoever wants it to go on after a cancelled failover unmounts it first.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import msgspec
import structlog
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest
from asrfs.daemon.agent_verbs import through_a_restart
from asrfs.daemon.handing_over import Fencing, HandingOver
from asrfs.daemon.handover_hooks import HandoverHooks
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, RefusedError, foreign_line
from asrfs.model.marker import FAILED_CHARACTERS_MAX, MarkerRecord, encode_marker
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.comparer import Comparer, Comparison
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.progress import Progress
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.shipper import Shipper


class FencedInstant:
    """`HandingOver.fence_and_mark` with the machine's own maker of points."""

    def __init__(self, maker: PointMaker, is_fenced: Callable[[], bool]) -> None:
        self._maker = maker
        self._is_fenced = is_fenced

    async def __call__(self, failover: str, fence: Fencing) -> int:
        """The marker's LSN. Raises AsrfsError, OSError."""
        name = f"handover-{failover[:12]}"
        crash = MarkerRecord(id=uuid.uuid4().hex, name=name, hold_ms=0.0)
        if self._is_fenced():  # before somebody died: nothing was written since
            await fence()
            return (await self._maker.mark(encode_marker(crash)))[0]
        lsn, claim, said = 0, crash, crash
        try:
            request = PointRequest(consistency="filesystem", name=name, on_failure="none")
            async with self._maker.quiesced(request) as quiet:
                await fence()
                if quiet.held is not None:
                    claim = msgspec.structs.replace(quiet.held.marker, unfinished=True)
                lsn, _ = await self._maker.mark(encode_marker(claim))
                quiet.marked()
            if quiet.held is not None and quiet.outcome is not None:
                said = msgspec.structs.replace(quiet.outcome.marker, unfinished=False, completes=lsn)
        except AsrfsError as error:
            if not lsn:
                raise
            why = foreign_line(str(error))[:FAILED_CHARACTERS_MAX]
            said = msgspec.structs.replace(
                claim, consistency="crash", wanted="filesystem", failed=why, unfinished=False, completes=lsn
            )
        if claim.unfinished:
            await self._say_last(said)
        return lsn

    async def _say_last(self, word: MarkerRecord) -> None:
        try:
            await self._maker.mark(encode_marker(word))
        except AsrfsError as error:  # it stays a point of which nothing is claimed
            structlog.get_logger("asrfs.handover").warning("the last word on its point is missing", reason=str(error))


def make_handing_over(
    state: StateDirectory,
    *,
    rejoiner: Rejoiner,
    shipper: Shipper,
    server: DiskServer,
    progress: Progress,
    applier: ApplierTask,
    dirty: DirtyMapFile,
    maker: PointMaker,
    settled: Callable[[int], Awaitable[None]],
    comparing: Callable[[], AbstractAsyncContextManager[Comparer]],
    threads: trio.CapacityLimiter,
) -> HandingOver:
    """`settled` returns when the store has an LSN."""

    def check() -> None:
        if state.is_promoting():
            raise RefusedError("a point is being copied back over the disks of this machine: wait until that is over")
        if dirty.map.slots() or dirty.given_up.is_open:
            raise RefusedError("the replica is not whole: `asrfs status` says what is missing, heal it first")

    async def drain() -> None:
        await settled((await through_a_restart(server.sync)).durable.lsn)

    async def settle(lsn: int) -> None:
        await settled(lsn)
        applier.hurry(lsn)
        await progress.wait_until(lambda: progress.applied.lsn >= lsn)

    async def compare() -> Comparison:
        machine = await trio.to_thread.run_sync(state.load_machine, limiter=threads)
        disks = machine.live_disks()
        async with comparing() as comparer:
            return await comparer.settle(disks, await comparer.compare(disks))

    return HandingOver(
        rejoiner=rejoiner,
        outlet=shipper.source.outlet,
        check=check,
        hooks=HandoverHooks(state, threads),
        drain=drain,
        fence_and_mark=FencedInstant(maker, lambda: rejoiner.fence is not None),
        settle=settle,
        compare=compare,
    )
