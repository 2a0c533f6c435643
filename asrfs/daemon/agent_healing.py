"""What an agent does about a store that lacks something: composition of quota, filler and resyncer, and the verb."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest
from asrfs.daemon.agent_images import open_whole
from asrfs.daemon.protection import Healing, standing_of
from asrfs.daemon.settings import Settings
from asrfs.daemon.settings_in_force import minute_of_day
from asrfs.daemon.state import DIRTY_MAP_FILE, StateDirectory
from asrfs.disk.overlay import WholeView
from asrfs.errors import RefusedError, TemporaryError
from asrfs.journal.reader import JournalReader
from asrfs.model.dirty_map import Reason
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.names import id_bytes
from asrfs.model.positions import Positions
from asrfs.replication.alarms import Alarms
from asrfs.replication.comparer import Comparer, Comparison
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.filler import Filler
from asrfs.replication.lost_map import ALARM as LOST_MAP_ALARM
from asrfs.replication.lost_map import lost_text, open_dirty_map, unknown_slots
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.quota import Quota
from asrfs.replication.rejoiner import HANDOVER_ALARM, Rejoiner
from asrfs.replication.resyncer import HealingRules, Resyncer
from asrfs.replication.shipper import Shipper
from asrfs.replication.trimmer import Trimmer
from asrfs.storage.directory import DirectoryStorage, OpenFile
from asrfs.storage.system_clock import SystemClock

ROOM_UNKNOWN = 1 << 62
SEPARATED = ("diverged", "fenced", HANDOVER_ALARM, "store-lost")
"""Alarms of a host that can only go on in a new epoch."""


class AgentHealing:
    """`dirty` is the agent's; `settings` gives those in force, `comparing` a comparer for as long as it is needed;
    `hurry_applied` is told of an LSN that is waited for."""

    def __init__(
        self,
        state: StateDirectory,
        dirty: DirtyMapFile,
        *,
        server: DiskServer,
        progress: Progress,
        positions: PositionsFile,
        alarms: Alarms,
        settings: Callable[[], Settings],
        maker: PointMaker,
        shipper: Shipper,
        comparing: Callable[[], AbstractAsyncContextManager[Comparer]],
        hurry_durable: Callable[[], None],
        threads: trio.CapacityLimiter,
        trimmer: Trimmer,
        hurry_applied: Callable[[int], None],
    ) -> None:
        self._state = state
        self._dirty = dirty
        self._alarms = alarms
        self._shipper = shipper
        self._scanned: Comparison | None = None
        self.is_held_back: Callable[[], bool] = lambda: False
        """Whether somebody else brings host and store together just now."""
        self._progress = progress
        self._positions = positions
        self._threads = threads
        self._comparing = comparing
        machine = state.load_machine()
        machine_id, journal = id_bytes(machine.id), DirectoryStorage(state.journal)
        self.rejoiner = self._make_rejoiner(server, positions)
        shipper.source.rejoiner = self.rejoiner
        self._reader = JournalReader(journal, machine_id, check_payloads=False)
        self.quota = Quota(
            server,
            progress,
            positions,
            dirty,
            self._reader,
            alarms,
            threads,
            state.load_machine,
            self._set_gaps,
            settings().quota_bytes(sum(disk.size_bytes for disk in machine.live_disks()), ROOM_UNKNOWN),
            cut_bytes=trimmer.cut_bytes,
        )
        self._filler = self._make_filler(server, maker, hurry_durable, hurry_applied)
        if unknown_slots(dirty.map):
            files = DirectoryStorage(state.root)
            alarms.set(LOST_MAP_ALARM, "warning", lost_text(files, DIRTY_MAP_FILE))

        def rules() -> HealingRules:
            policy = settings().policy
            return HealingRules(policy.resync_window, policy.rpo_warning_s, self.quota.quota_bytes)

        def may_heal() -> bool:
            is_one_machine = self.rejoiner.fence is None and self.rejoiner.order is None
            return shipper.is_enrolled and is_one_machine and not self.is_held_back()

        self.resyncer = Resyncer(self._filler, progress, alarms, may_heal, rules, minute_of_day)

    def _make_filler(
        self,
        server: DiskServer,
        maker: PointMaker,
        hurry_durable: Callable[[], None],
        hurry_applied: Callable[[int], None],
    ) -> Filler:
        async def make_point(note: str) -> int:
            point, _ = await maker.make(PointRequest(consistency="crash", note=note))
            self._shipper.hurry(point.lsn)
            return point.lsn

        return Filler(
            server,
            self._progress,
            self._dirty,
            self._threads,
            self._state.load_machine,
            self._set_gaps,
            self._open_image,
            make_point,
            lambda: 0,
            self._find,
            hurry_durable,
            hurry_applied,
        )

    def _make_rejoiner(self, server: DiskServer, positions: PositionsFile) -> Rejoiner:
        state = self._state
        machine_id, journal = id_bytes(state.load_machine().id), DirectoryStorage(state.journal)
        return Rejoiner(
            DirectoryStorage(state.root),
            journal,
            machine_id,
            JournalReader(journal, machine_id, check_payloads=False),
            server,
            self._progress,
            positions,
            self._dirty,
            self._alarms,
            self._threads,
            state.load_machine,
            state.edit_machine,
            SystemClock().time_ns,
        )

    def close(self) -> None:
        self._reader.close()
        self.rejoiner.reader.close()

    def bytes_per_s(self) -> float:
        """How fast it fills."""
        return self._filler.pace.bytes_per_s(trio.current_time())

    def standing(self, machine: MachineConfig, pace: float) -> Healing:
        """As of now; `pace`: bytes that are filled per second. Called from a thread, too."""
        resyncer = self.resyncer
        return standing_of(self._dirty.map, self._dirty.given_up, machine, resyncer.phase, resyncer.failure, pace)

    async def on_resync(self, request: dict[str, Any]) -> dict[str, Any]:
        """Verb `resync`: heal, with `now` whatever the time of the day, with `full_scan` what comparing finds, too.

        Returns when nothing is missing any more, or when what is left waits for its window.
        """
        if not self._shipper.is_enrolled:
            raise RefusedError("this machine is not enrolled with a store: use `asrfs enroll` first")
        timeout = request.get("timeout")
        before, started = self._filler.filled_bytes, trio.current_time()
        failed_at = self.resyncer.failures
        with trio.move_on_after(float("inf") if timeout is None else float(timeout)) as scope:
            scanned = await self._scan_or_rejoin() if request.get("full_scan") else None
            chunks = sum(self._dirty.map.dirty_chunks(slot) for slot in self._dirty.map.slots())
            await self.resyncer.order(now=bool(request.get("now")))
            failed_at = self.resyncer.failures
            await self._progress.wait_until(lambda: self._is_over(failed_at))
        if self.resyncer.failures > failed_at:
            raise TemporaryError(f"the resync failed and is tried again: {self.resyncer.failure}")
        if scope.cancelled_caught:
            raise TemporaryError(f"the resync is not over after {float(timeout or 0):g} s; it goes on")
        return {
            "chunks_compared": scanned.chunks_compared if scanned else 0,
            "chunks_different": chunks,
            "bytes_sent": self._filler.filled_bytes - before + (scanned.bytes_sent if scanned else 0),
            "seconds": round(trio.current_time() - started, 3),
            "waits_for_window": self.resyncer.phase == "window",
        }

    async def _scan(self) -> Comparison:
        """Compare all disks with the replica, and have the map say what differs."""
        machine = await trio.to_thread.run_sync(self._state.load_machine, limiter=self._threads)
        await self._filler.mark_different(await self._find(machine.live_disks()))
        assert self._scanned is not None
        return self._scanned

    async def _scan_or_rejoin(self) -> Comparison:
        """Compare; where host and store share no history any more, after this host has gone on in a new epoch.

        Raises FencedError where the store does not let it.
        """
        if self._shipper.paused:
            raise RefusedError("shipping to the store is paused: go on with `asrfs resume` first")
        rejoiner = self.rejoiner
        if rejoiner.order is None and not any(alarm in self._alarms for alarm in SEPARATED):
            return await self._scan()
        self._scanned = None
        await rejoiner.ask("person", "asrfs resync --full-scan")
        self._shipper.begin_again()
        await self._progress.wait_until(lambda: rejoiner.order is None)
        if rejoiner.refusal is not None:
            raise rejoiner.refusal
        self.resyncer.retry_now()
        await self._progress.wait_until(lambda: self._is_compared() or self.resyncer.failures > 0)
        if self._scanned is None:
            raise TemporaryError(f"the disks could not be compared, which is tried again: {self.resyncer.failure}")
        return self._scanned

    def _is_compared(self) -> bool:
        map = self._dirty.map
        return self._scanned is not None and not any(Reason.REJOINED in map.reasons(slot) for slot in map.slots())

    async def _find(self, disks: Sequence[DiskConfig]) -> Mapping[int, Sequence[int]]:
        """What of these disks differs from the replica, by slot.

        Where host and store have parted, whatever the store has is read: it was set back, replaced or damaged.
        """
        await trio.to_thread.run_sync(self._positions.save, limiter=self._threads)
        have_parted = any(Reason.REJOINED in self._dirty.map.reasons(disk.slot) for disk in disks)
        async with self._comparing() as comparer:
            await comparer.catch_up()
            found = await comparer.compare(disks, by_kept=not have_parted)
            self._scanned = found
            return found.different if await comparer.is_real(disks, found) else {}

    def _is_over(self, failed_at: int) -> bool:
        return self.resyncer.looked and (
            self.resyncer.phase in ("idle", "window") or self.resyncer.failures > failed_at
        )

    def _open_image(self, disk: DiskConfig) -> OpenFile | WholeView:
        return open_whole(self._state, disk)

    def _set_gaps(self, slots: Collection[int], gap: bool) -> MachineConfig:
        return self._state.edit_machine(lambda machine: with_gaps(machine, slots, gap))


def open_map(state: StateDirectory, positions: Positions) -> DirtyMapFile:
    """The dirty map of a machine, made anew where it is lost. Blocks."""
    files, journal = DirectoryStorage(state.root), DirectoryStorage(state.journal)
    return open_dirty_map(files, DIRTY_MAP_FILE, journal, state.load_machine(), positions)


def with_gaps(machine: MachineConfig, slots: Collection[int], gap: bool) -> MachineConfig:
    """The machine with the gap of some disks open or closed."""
    change = msgspec.structs.replace
    disks = tuple(change(disk, gap=gap) if disk.slot in slots else disk for disk in machine.disks)
    return change(machine, disks=disks)
