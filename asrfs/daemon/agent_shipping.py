"""How an agent reaches its store: composition of the shipper, who the store is, whether shipping is paused."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from asrfs.daemon.enrolment import Enrolment, certificate_of, load_enrolment, store_access
from asrfs.daemon.settings_in_force import SettingsInForce
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError
from asrfs.journal.reader import JournalReader
from asrfs.model.machine import MachineConfig
from asrfs.model.names import id_bytes
from asrfs.replication.alarms import Alarms
from asrfs.replication.configuration_keeper import ConfigurationKeeper
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.link import Link
from asrfs.replication.object_builder import ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.seeding import Seeds
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.source import Source
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from asrfs.transport.backoff import Backoff

PAUSED_FILE = "run/paused"


class AgentShipping:
    """`settings` is the agent's, `dirty` its map, `threads` and `journal_turn` are shared with who else uses them."""

    def __init__(
        self,
        state: StateDirectory,
        machine: MachineConfig,
        settings: SettingsInForce,
        *,
        positions: PositionsFile,
        progress: Progress,
        alarms: Alarms,
        dirty: DirtyMapFile,
        configuration: ConfigurationKeeper,
        threads: trio.CapacityLimiter,
        journal_turn: trio.Lock,
        reader: Callable[[], JournalReader],
    ) -> None:
        self._state = state
        self._files = DirectoryStorage(state.root)
        self._settings = settings
        self._alarms = alarms
        self._threads = threads
        self._enrolment: tuple[Enrolment | None, bytes] = (None, b"")
        self._change_turn = trio.Lock()
        self.link = Link()
        source = Source(
            machine_id=id_bytes(machine.id),
            machine_name=machine.name,
            journal=DirectoryStorage(state.journal),
            reader=reader(),
            builder=ObjectBuilder(reader()),
            positions=positions,
            progress=progress,
            settings=settings.shipping(),
            threads=threads,
            journal_turn=journal_turn,
            configured=configuration.offer,
            given_up=lambda: dirty.given_up,
            group_port=settings.current.group_port,
            group_address=settings.current.group_address,
            seeds=Seeds(lambda: {disk.slot: disk.name for disk in state.load_machine().disks}),
        )
        is_paused = self._files.exists(PAUSED_FILE)
        backoff = Backoff(random.Random())
        self.shipper = Shipper(source, self._store(), alarms, self.link, backoff, paused=is_paused)
        self._note_pause()

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

    async def set_paused(self, paused: bool) -> None:
        """Pause or go on; an agent that starts later finds it so."""

        def write_down() -> None:
            if paused:
                write_atomically(self._files, PAUSED_FILE, b"")
            elif self._files.exists(PAUSED_FILE):
                self._files.unlink(PAUSED_FILE)

        async with self._change_turn:
            await trio.to_thread.run_sync(write_down, limiter=self._threads)
            if paused:
                self.shipper.pause()
            else:
                self.shipper.resume()
            self._note_pause()

    def _note_pause(self) -> None:
        if self.shipper.paused:
            self._alarms.set("paused", "warning", "shipping to the store is paused: go on with `asrfs resume`")
        else:
            self._alarms.clear("paused")

    async def reload(self) -> None:
        """Take over settings and enrolment; another enrolment or certificate begins another session."""
        async with self._change_turn:
            source = self.shipper.source
            before = (self._enrolment, source.group_port, source.group_address)
            await self._settings.reload(self._threads)
            settings = self._settings.current
            source.group_port, source.group_address = settings.group_port, settings.group_address
            store = await trio.to_thread.run_sync(self._store, limiter=self._threads)
            after = (self._enrolment, source.group_port, source.group_address)
            if store is not None and (after != before or self.link.state == "refused"):
                self.shipper.enrolled(store)
