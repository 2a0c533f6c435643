"""The agent: `python -m asrfs.daemon.agent --state DIR [--apply-only]`, started by the supervisor. Composition only.

    ticker      asks the disk server where the history stands        ─▶ Progress
    applier     durable records ─▶ images ─▶ positions ─▶ maps dropped ─▶ segments freed
    shipper     durable records ─▶ log objects ─▶ store ─▶ positions
    filler      adopted content ─▶ FILL records
    housekeeping, control socket

It runs at lower priority than the disk server and may die at any instant: everything it knows is in `positions.json`
and in the journal. Its event loop never blocks; files, checksums and ciphers belong to a few threads. Told to stop, it
applies everything durable first, and if the disk server has ended by then, the whole journal.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import trio

from asrfs.consistency.points import PointLog
from asrfs.daemon.agent_images import StateImages
from asrfs.daemon.agent_log import start_agent_log
from asrfs.daemon.agent_status import (
    Facts,
    images_of,
    oldest_unacknowledged_ns,
    provisioned_bytes,
    status,
)
from asrfs.daemon.agent_verbs import AgentVerbs
from asrfs.daemon.control_trio import serve_control
from asrfs.daemon.disk_server_client import DiskServerClient
from asrfs.daemon.enrolment import Enrolment, certificate_of, load_enrolment, store_access
from asrfs.daemon.final_apply import apply_everything
from asrfs.daemon.hardening import ignore_terminal, raise_file_limit
from asrfs.daemon.health import process_alarms
from asrfs.daemon.housekeeping import Housekeeping
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import POINTS_FILE, StateDirectory
from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.format.record import RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.names import id_bytes
from asrfs.replication.alarms import Alarms, in_order
from asrfs.replication.applier import Applier
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.filler import Filler
from asrfs.replication.link import Link
from asrfs.replication.object_builder import ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.shipping_session import ShippingSettings, Source
from asrfs.replication.ticker import Ticker
from asrfs.replication.trimmer import Trimmer
from asrfs.storage.directory import DirectoryStorage, OpenFile, open_path
from asrfs.storage.interface import write_atomically
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.backoff import Backoff

NICE = 10
THREADS = 5
"""Applying, building, saving, filling and looking may go on at once; each is one thread's."""
FINAL_S_MAX = 600.0
PAUSED_FILE = "run/paused"

log = logging.getLogger("asrfs.agent")


class Agent:
    """One life of an agent whose lock is held. Must be made inside the event loop."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._files = DirectoryStorage(state.root)
        self._machine = state.load_machine()
        self._settings = state.load_settings()
        self._enrolment: tuple[Enrolment | None, bytes] = (None, b"")
        self._stop = trio.Event()
        self._status_turn = trio.Lock()
        self._change_turn = trio.Lock()
        self._threads = trio.CapacityLimiter(THREADS)
        journal_turn = trio.Lock()
        journal = DirectoryStorage(state.journal)
        machine_id = id_bytes(self._machine.id)
        self._positions = PositionsFile(state.load_positions(), state.save_positions)
        self._progress = Progress(self._positions.current)
        self._alarms = Alarms()
        self._link = Link()
        self._points = PointLog(self._files, POINTS_FILE)
        self._images = StateImages(state)
        self._server = DiskServerClient(state.socket_path("disk_server"))
        self._readers = [JournalReader(journal, machine_id) for _ in range(4)]
        trimmer = Trimmer(journal, machine_id)
        self._ticker = Ticker(self._server, self._progress, self._alarms, lambda: self._settings.object_age)
        self._applier = ApplierTask(
            Applier(self._readers[0], self._positions, self._images, self._on_marker),
            trimmer,
            self._server,
            self._positions,
            self._progress,
            self._alarms,
            self._threads,
            journal_turn,
        )
        source = Source(
            machine_id=machine_id,
            machine_name=self._machine.name,
            journal=journal,
            reader=self._readers[1],
            builder=ObjectBuilder(self._readers[2]),
            positions=self._positions,
            progress=self._progress,
            settings=shipping_settings(self._settings),
            threads=self._threads,
            journal_turn=journal_turn,
        )
        backoff = Backoff(random.Random())
        is_paused = self._files.exists(PAUSED_FILE)
        self._shipper = Shipper(source, self._store(), self._alarms, self._link, backoff, paused=is_paused)
        self._note_pause()
        self._filler = self._make_filler()
        self._housekeeping = Housekeeping(
            state, trimmer, self._progress, self._alarms, self._threads, lambda: self._settings
        )
        self._first_unacknowledged: tuple[int, int | None] = (-1, None)

    async def run(self) -> int:
        """Work until told to stop; the exit code."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, signals)
                for task in (
                    self._ticker.run,
                    self._applier.run,
                    self._applier.run_trimming,
                    self._shipper.run,
                    self._filler.run,
                    self._housekeeping.keep_spares,
                    self._housekeeping.watch_space,
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
            link=self._link,
            points=self._points,
            threads=self._threads,
            status=self._status,
            set_paused=self._set_paused,
            reload=self._reload,
            stop=self._stop.set,
        )

    def _make_filler(self) -> Filler:
        def disks() -> tuple[DiskConfig, ...]:
            return self._state.load_machine().live_disks()

        def open_image(disk: DiskConfig) -> OpenFile:
            return open_path(self._state.image_path(disk))

        def close_gap(slot: int) -> None:
            self._state.edit_machine(lambda machine: without_gap(machine, slot))

        return Filler(
            self._server,
            self._progress,
            self._positions,
            self._threads,
            disks,
            close_gap,
            open_image,
            lambda: self._shipper.is_enrolled,
        )

    def _store(self) -> StoreAccess | None:
        """The way to the store, if the machine is enrolled and its keys can be read."""
        try:
            enrolment = load_enrolment(self._state)
            self._alarms.clear("enrolment")
            if enrolment is None:
                return None
            self._enrolment = (enrolment, certificate_of(self._state))
            return store_access(self._state, enrolment)
        except AsrfsError as error:
            self._alarms.set("enrolment", "critical", str(error))
            return None

    # ---- verbs ------------------------------------------------------------------------------------------------

    async def _set_paused(self, paused: bool) -> None:
        """Pause or go on; an agent that starts later finds it so."""

        def write_down() -> None:
            if paused:
                write_atomically(self._files, PAUSED_FILE, b"")
            elif self._files.exists(PAUSED_FILE):
                self._files.unlink(PAUSED_FILE)

        async with self._change_turn:
            await trio.to_thread.run_sync(write_down, limiter=self._threads)
            if paused:
                self._shipper.pause()
            else:
                self._shipper.resume()
            self._note_pause()

    def _note_pause(self) -> None:
        if self._shipper.paused:
            self._alarms.set("paused", "warning", "shipping to the store is paused: go on with `asrfs resume`")
        else:
            self._alarms.clear("paused")

    async def _reload(self) -> None:
        """Take over settings and enrolment; another enrolment or certificate begins another session."""
        async with self._change_turn:
            self._settings = await trio.to_thread.run_sync(self._state.load_settings, limiter=self._threads)
            self._shipper.source.settings = shipping_settings(self._settings)
            before = self._enrolment
            store = await trio.to_thread.run_sync(self._store, limiter=self._threads)
            if store is not None and (self._enrolment != before or self._link.state == "refused"):
                self._shipper.enrolled(store)
            self._progress.wake()

    async def _status(self) -> dict[str, Any]:
        async with self._status_turn:
            facts = await trio.to_thread.run_sync(self._facts, limiter=self._threads)
        return status(facts)

    def _facts(self) -> Facts:
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
            first_unacknowledged_ns=self._oldest_unacknowledged_ns(),
            oldest_segment=self._housekeeping.oldest_segment,
            quota_bytes=self._settings.quota_bytes(provisioned_bytes(machine)),
            link=self._link.state,
            link_reason=self._link.reason,
            processes=processes,
            alarms=in_order(alarms),
        )

    def _oldest_unacknowledged_ns(self) -> int | None:
        """As `agent_status.oldest_unacknowledged_ns`, without reading the same record again and again."""
        cursor = self._progress.acknowledged
        lsn, time_ns = self._first_unacknowledged
        if lsn != cursor.lsn or time_ns is None:
            time_ns = oldest_unacknowledged_ns(self._readers[3], cursor, self._progress.durable)
            self._first_unacknowledged = (cursor.lsn, time_ns)
        return time_ns


def shipping_settings(settings: Settings) -> ShippingSettings:
    return ShippingSettings(settings.object_size, settings.object_age, settings.compression, settings.bandwidth_limit)


def without_gap(machine: MachineConfig, slot: int) -> MachineConfig:
    """The machine with the gap of a disk closed."""
    disks = tuple(msgspec.structs.replace(disk, gap=False) if disk.slot == slot else disk for disk in machine.disks)
    return msgspec.structs.replace(machine, disks=disks)


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
    os.nice(NICE)
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
