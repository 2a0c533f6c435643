"""The agent: `python -m asrfs.daemon.agent --state DIR [--apply-only]`, started by the supervisor. Composition only.

    ticker      asks the disk server where the history stands        ─▶ Progress
    applier     durable records ─▶ images ─▶ positions ─▶ maps dropped ─▶ segments freed
    hydrator    bases ─▶ images
    shipper     durable records ─▶ log objects ─▶ store ─▶ positions
    quota       records that are too many ─▶ dirty map
    resyncer    dirty map, adopted content ─▶ FILL records
    housekeeping, control socket

It runs at lower priority than the disk server and may die at any instant: all it knows is in `positions.json`,
`dirty.map` and the journal. Its event loop never blocks; files, checksums and ciphers belong to a few threads. Told to
stop, it applies everything durable first, and if the disk server has ended by then, the whole journal.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import msgspec
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest
from asrfs.consistency.points import Point, PointLog
from asrfs.consistency.scheduler import Scheduler
from asrfs.daemon.agent_groups import AgentGroups
from asrfs.daemon.agent_handover import make_handing_over
from asrfs.daemon.agent_healing import AgentHealing, open_map
from asrfs.daemon.agent_hydration import AgentHydration
from asrfs.daemon.agent_images import StateImages
from asrfs.daemon.agent_log import start_agent_log
from asrfs.daemon.agent_promoting import make_promoter
from asrfs.daemon.agent_shipping import AgentShipping
from asrfs.daemon.agent_status import Facts, OldestUnacknowledged, images_of, status
from asrfs.daemon.agent_verbs import AgentVerbs, check_is_kept, through_a_restart
from asrfs.daemon.control_trio import serve_control
from asrfs.daemon.digesting import DigestProcess, ScanRate, comparing
from asrfs.daemon.disk_server_client import DiskServerClient
from asrfs.daemon.final_apply import apply_everything
from asrfs.daemon.handing_over import HandingOver
from asrfs.daemon.hardening import ignore_terminal, raise_file_limit
from asrfs.daemon.health import process_alarms
from asrfs.daemon.housekeeping import Housekeeping
from asrfs.daemon.point_processes import PointProcesses
from asrfs.daemon.promoting import Promoter
from asrfs.daemon.settings_in_force import SettingsInForce
from asrfs.daemon.state import CONFIGURATION_FILE, POINTS_FILE, StateDirectory
from asrfs.daemon.verification import Verification
from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.format.record import RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.model.marker import Consistency
from asrfs.model.names import id_bytes
from asrfs.replication.alarms import Alarms, in_order
from asrfs.replication.applier import Applier
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.comparer import Comparer
from asrfs.replication.configuration_keeper import ConfigurationKeeper
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.ticker import Ticker
from asrfs.replication.trimmer import Trimmer
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.priority import stand_back
from asrfs.storage.system_clock import SystemClock

NICE = 10
THREADS = 6
"""Applying, building, saving, giving up, filling and looking may go on at once; each is one thread's."""
FINAL_S_MAX = 600.0

log = logging.getLogger("asrfs.agent")


class Agent:
    """One life of an agent whose lock is held. Must be made inside the event loop."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._files = DirectoryStorage(state.root)
        self._machine = state.load_machine()
        self._stop = trio.Event()
        self._status_turn = trio.Lock()
        self._threads = trio.CapacityLimiter(THREADS)
        journal_turn = trio.Lock()
        self._positions = PositionsFile(state.load_positions(), state.save_positions)
        self._progress = Progress(self._positions.current)
        self._alarms = Alarms()
        self._settings = SettingsInForce(state, self._alarms)
        self._configuration = ConfigurationKeeper(self._files, CONFIGURATION_FILE, self._alarms, self._threads)
        self._points = PointLog(self._files, POINTS_FILE)
        self._images = StateImages(state, self._positions, beside_server=True)
        self._server = DiskServerClient(state.socket_path("disk_server"))
        self._readers: list[JournalReader] = []
        self._oldest = OldestUnacknowledged(self._reader())
        self._trimmer = trimmer = Trimmer(DirectoryStorage(state.journal), id_bytes(self._machine.id))
        self._dirty = dirty = open_map(state, self._positions.current)
        self._ticker = Ticker(self._server, self._progress, self._alarms, lambda: self._settings.current.object_age)
        self._applier = ApplierTask(
            Applier(self._reader(), self._positions, self._images, self._on_marker),
            trimmer,
            self._server,
            self._positions,
            self._progress,
            self._alarms,
            self._threads,
            journal_turn,
            lambda: dirty.given_up,
        )
        agent = (self._server, self._progress, self._alarms, self._threads)
        self._hydration = AgentHydration(state, self._images, self._applier, lambda: self._settings.current, agent)
        self._shipping = self._make_shipping(journal_turn)
        self._shipper = self._shipping.shipper
        digester = DigestProcess(state, ScanRate(self._server, lambda: self._settings.current.scan_rate))
        compare = partial(comparing, digester, self._server, self._shipper, self._applier)
        self._verification = Verification(state, compare, self._threads)
        self._point_processes = PointProcesses(state)
        self._maker = self._make_maker()
        self._healing = AgentHealing(
            state,
            dirty,
            server=self._server,
            progress=self._progress,
            positions=self._positions,
            alarms=self._alarms,
            settings=lambda: self._settings.current,
            maker=self._maker,
            shipper=self._shipper,
            comparing=compare,
            hurry_durable=self._ticker.poke,
            threads=self._threads,
            trimmer=trimmer,
            hurry_applied=self._applier.hurry,
        )
        self._handing_over = self._make_handing_over(compare)
        self._promoter = self._make_promoter()
        self._groups = self._make_groups()
        self._scheduler = Scheduler(
            self._machine.id,
            lambda: self._settings.current.policy,
            self._make_scheduled,
            self._points,
            self._alarms,
            SystemClock(),
        )
        self._settings.follow(self._shipper.source, self._scheduler.policy_changed)
        self._configuration.follow(self._settings.told)
        self._configuration.follow(self._groups.follow)
        self._housekeeping = Housekeeping(
            state,
            trimmer,
            self._progress,
            self._alarms,
            self._threads,
            lambda: self._settings.current,
            self._healing.quota,
        )

    async def run(self) -> int:
        """Work until told to stop; the exit code."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, signals)
                for task in (
                    self._ticker.run,
                    self._applier.run,
                    self._applier.run_trimming,
                    self._hydration.run,
                    self._shipper.run,
                    self._healing.rejoiner.run,
                    self._handing_over.run,
                    self._promoter.run,
                    self._healing.quota.run,
                    self._healing.resyncer.run,
                    self._verification.run,
                    self._configuration.run,
                    self._groups.run,
                    self._settings.watch_calendar,
                    self._scheduler.run,
                    self._housekeeping.keep_spares,
                    self._housekeeping.watch_space,
                    self._point_processes.settle_interrupted,
                ):
                    nursery.start_soon(task)
                await nursery.start(serve_control, self._state.socket_path("agent"), self._verbs().table())
                log.info("agent of machine %s: LSN %d applied", self._machine.name, self._progress.applied.lsn)
                await self._stop.wait()
                await self._apply_durable()
                nursery.cancel_scope.cancel()
        self._close()
        if self._state.lock_holder("disk_server") is None:
            lsn = await trio.to_thread.run_sync(apply_everything, self._state)
            log.info("everything applied: LSN %d", lsn)
        log.info("agent ends")
        return 0

    async def _apply_durable(self) -> None:
        """Have everything that is durable now in the images, if the disk server can still be asked what that is."""
        try:
            with trio.move_on_after(FINAL_S_MAX):
                await self._ticker.tick()
                target = self._progress.durable.lsn
                self._applier.hurry(target)
                await self._progress.wait_until(lambda: self._progress.applied.lsn >= target)
        except AsrfsError as error:
            log.info("stopping without the disk server: %s", error)

    def _close(self) -> None:
        self._server.close()
        self._images.close()
        self._healing.close()
        for reader in self._readers:
            reader.close()

    async def _stop_on_signal(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self._stop.set()

    def _on_marker(self, header: RecordHeader, payload: bytes) -> None:
        self._points.add_marker(header, payload, self._progress.epoch)

    # ---- parts ------------------------------------------------------------------------------------------------

    def _verbs(self) -> AgentVerbs:
        return AgentVerbs(
            machine_name=self._machine.name,
            server=self._server,
            progress=self._progress,
            ticker=self._ticker,
            applier=self._applier,
            shipper=self._shipper,
            link=self._shipping.link,
            points=self._points,
            maker=self._maker,
            groups=self._groups,
            verification=self._verification,
            on_failure=lambda: self._settings.current.policy.on_failure,
            threads=self._threads,
            dirty=self._dirty,
            resync=self._healing.on_resync,
            status=self._status,
            set_paused=self._shipping.set_paused,
            reload=self._reload,
            stop=self._stop.set,
        )

    async def _make_scheduled(self, consistency: Consistency) -> Point:
        on_failure = self._settings.current.policy.on_failure
        point, _ = await self._maker.make(PointRequest(consistency=consistency, on_failure=on_failure))
        return point

    def _reader(self) -> JournalReader:
        """One more, for one user."""
        self._readers.append(JournalReader(DirectoryStorage(self._state.journal), id_bytes(self._machine.id)))
        return self._readers[-1]

    def _make_shipping(self, journal_turn: trio.Lock) -> AgentShipping:
        return AgentShipping(
            self._state,
            self._machine,
            self._settings,
            positions=self._positions,
            progress=self._progress,
            alarms=self._alarms,
            dirty=self._dirty,
            configuration=self._configuration,
            threads=self._threads,
            journal_turn=journal_turn,
            reader=self._reader,
        )

    def _make_maker(self) -> PointMaker:
        async def mark(payload: bytes) -> tuple[int, int]:
            return await through_a_restart(lambda: self._server.marker(payload))

        async def note(point: Point) -> None:
            await trio.to_thread.run_sync(self._points.add, point, limiter=self._threads)

        return PointMaker(
            machine_name=self._machine.name,
            quiescer=self._point_processes,
            mark=mark,
            note=note,
            epoch=lambda: self._progress.epoch,
            deadline_s=lambda: self._settings.current.freeze_deadline,
        )

    def _make_groups(self) -> AgentGroups:
        return AgentGroups(
            self._state,
            machine_id=self._machine.id,
            server=self._server,
            maker=self._maker,
            alarms=self._alarms,
            settings=lambda: self._settings.current,
            settled=self._settled,
            threads=self._threads,
            points=self._points,
        )

    def _make_handing_over(self, compare: Callable[[], AbstractAsyncContextManager[Comparer]]) -> HandingOver:
        made = make_handing_over(
            self._state,
            rejoiner=self._healing.rejoiner,
            shipper=self._shipper,
            server=self._server,
            progress=self._progress,
            applier=self._applier,
            dirty=self._dirty,
            maker=self._maker,
            settled=self._settled,
            comparing=compare,
            threads=self._threads,
        )
        self._shipper.source.handover = made.heard
        return made

    def _make_promoter(self) -> Promoter:
        made = make_promoter(
            self._state,
            rejoiner=self._healing.rejoiner,
            shipper=self._shipper,
            server=self._server,
            progress=self._progress,
            alarms=self._alarms,
            dirty=self._dirty,
            maker=self._maker,
            settled=self._settled,
            threads=self._threads,
        )
        self._shipper.source.promotion = made.heard
        self._healing.is_held_back = made.holds_healing_back
        return made

    async def _settled(self, lsn: int) -> None:
        self._shipper.hurry(lsn)
        self._ticker.poke()
        await self._progress.wait_until(
            lambda: self._progress.acknowledged.lsn >= lsn or self._dirty.given_up.is_lost(lsn)
        )
        check_is_kept(self._dirty.given_up, lsn)

    # ---- verbs ------------------------------------------------------------------------------------------------

    async def _reload(self) -> None:
        """Take over settings and enrolment, and what was ordered with that."""
        await self._healing.rejoiner.reread()
        await self._shipping.reload()
        self._groups.changed()
        self._progress.wake()

    async def _status(self) -> dict[str, Any]:
        async with self._status_turn:
            facts = await trio.to_thread.run_sync(self._facts, self._healing.bytes_per_s(), limiter=self._threads)
        return status(facts)

    def _facts(self, filled_per_s: float) -> Facts:
        progress = self._progress
        machine = self._state.load_machine()
        positions = self._positions.current
        processes = self._state.processes()
        alarms = [*self._alarms.now(), *process_alarms(processes, has_mount=True, agent_answers=True)]
        return Facts(
            machine=machine,
            images=images_of(self._state, machine),
            is_enrolled=self._shipper.is_enrolled,
            positions=msgspec.structs.replace(positions, applied=progress.applied),
            appended_lsn=progress.appended_lsn,
            durable=progress.durable,
            epoch=progress.epoch,
            now_ns=SystemClock().time_ns(),
            first_unacknowledged_ns=self._oldest.time_ns(progress.acknowledged, progress.durable),
            oldest_segment=self._housekeeping.oldest_segment,
            cut_bytes=self._trimmer.cut_bytes(0),
            lag_cut_bytes=self._trimmer.cut_bytes(positions.acknowledged.segment),
            quota_bytes=self._healing.quota.quota_bytes,
            healing=self._healing.standing(machine, filled_per_s),
            fence=self._healing.rejoiner.fence,
            promoting=self._promoter.now,
            policy=self._settings.current.policy,
            link=self._shipping.link.state,
            link_reason=self._shipping.link.reason,
            processes=processes,
            alarms=in_order(alarms),
            groups=self._groups.groups.standing(),
            recovered=self._hydration.recovered,
            hydration=self._hydration.standing(),
        )


def serve(state: StateDirectory, *, apply_only: bool) -> int:
    """Be the agent; the exit code. Raises AsrfsError."""
    lock = state.take_lock("agent")
    if lock is None:
        raise RefusedError(f"{state.root} already has an agent: process {state.lock_holder('agent')}")
    try:
        state.settle()
        if apply_only:
            log.info("everything applied: LSN %d", apply_everything(state))
            return 0

        async def main() -> int:
            return await Agent(state).run()

        return trio.run(main)
    finally:
        lock.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="asrfs.daemon.agent")
    parser.add_argument("--state", required=True)
    parser.add_argument("--apply-only", action="store_true", help="apply the whole journal to the images, then end")
    arguments = parser.parse_args()
    ignore_terminal()
    raise_file_limit()
    stand_back(NICE)
    try:
        state = StateDirectory.open(arguments.state)
        start_agent_log(state)
        return serve(state, apply_only=arguments.apply_only)
    except AsrfsError as error:
        log.error("%s", error)
        return error.exit_code
    except OSError:
        log.exception("the agent ends")
        return TemporaryError.exit_code


if __name__ == "__main__":
    sys.exit(main())
