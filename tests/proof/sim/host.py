"""A host of the simulation: its storage, its disk server, its agent and the guest that writes; each can die by itself.

What the guest was told is kept in the model; what the host must never do is checked at the moment it does it (I1, I4).
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import msgspec
import trio

from asrfs.daemon.agent_healing import with_gaps
from asrfs.model.machine import MachineConfig
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.lost_map import find_dirty_map
from asrfs.replication.object_builder import MachineKeys
from asrfs.replication.source import ShippingSettings
from asrfs.storage.interface import read_whole, write_atomically
from asrfs.transport.stream import ByteStream
from replica_store.points.builder import Cut, disks_of, open_disks
from replica_store.points.point_disk import FrameCache
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.healing_host import check_marked
from tests.fakes.wire import WireEnd
from tests.proof.sim.agent import Agent
from tests.proof.sim.disk_server import DiskServerLife
from tests.proof.sim.machine_model import MachineModel
from tests.proof.sim.processes import CURRENT, Guard, Killed, Process
from tests.proof.sim.store import Store
from tests.proof.sim.watch import Watch

_FREED = re.compile(r"journal/(?:spare-([0-9a-f]{16})|([0-9a-f]{16})\.segment)")
T = TypeVar("T")


class JumpingClock:
    """The host's wall clock: virtual time, and somebody who sets it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._offset_ns = 1_700_000_000_000_000_000
        self._jumped = False

    def jump(self, seconds: float) -> None:
        self._offset_ns += int(seconds * 1e9)
        self._jumped = True

    def time_ns(self) -> int:
        if self._jumped:
            self._jumped = False
            self._watch.fired("clock jumped")
        return self._offset_ns + int(trio.current_time() * 1e9)

    def monotonic(self) -> float:
        return trio.current_time()


class Host:
    """`connect` leads to the store. `run` keeps disk server and agent alive, as a supervisor does."""

    def __init__(
        self,
        name: str,
        machine: MachineConfig,
        keys: MachineKeys,
        initial: tuple[bytes, ...],
        store: Store,
        connect: Callable[[], Awaitable[ByteStream]],
        rng: random.Random,
        watch: Watch,
        *,
        segment_bytes: int,
        settings: ShippingSettings,
        quota_bytes: int,
    ) -> None:
        self.name = name
        self.machine_id = bytes.fromhex(machine.id)
        self.keys = keys
        self.rng = rng
        self.watch = watch
        self.segment_bytes = segment_bytes
        self.settings = settings
        self.quota_bytes = quota_bytes
        self.store = store
        self.connect = connect
        self.clock = JumpingClock(watch)
        self.model = MachineModel(initial)
        self.storage = CrashStorage()
        self.server: DiskServerLife | None = None
        self.server_process = Process("disk server", name)
        self.agent: Agent | None = None
        self.agent_process = Process("agent", name)
        self._started = trio.Event()
        self.loses_answers = 0.0
        self.holds_maps = False
        """The disk server is too slow with verb `applied`; until the host could not save that the store went back."""
        self.cannot_save = False
        self.freed_lsn = 0
        self._told: int | None = 0
        """How often the store had been set back when this host last heard where it stands; None: it has forgotten."""
        self.is_short_of_space = False
        self.wires: list[WireEnd] = []
        self.unanswered: list[Callable[[DiskServerLife], None]] = []
        self._adopt(self.storage)
        self.storage.make_directory("journal")
        self.storage.make_directory("images")
        self.storage.replaces_nothing_in.add("journal")
        for slot, content in enumerate(initial):
            file = self.storage.create(f"images/{slot}")
            file.write_at([content], 0)
            file.datasync()
        self.storage.sync_directory("images")
        write_atomically(self.storage, "machine.json", msgspec.json.encode(machine))

    # ---- files ----

    def load_machine(self) -> MachineConfig:
        return msgspec.json.decode(read_whole(self.storage, "machine.json"), type=MachineConfig)

    def edit_machine(self, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        machine = change(self.load_machine())
        write_atomically(self.storage, "machine.json", msgspec.json.encode(machine))
        return machine

    def set_gaps(self, slots: Collection[int], gap: bool) -> MachineConfig:
        machine = with_gaps(self.load_machine(), slots, gap)
        write_atomically(self.storage, "machine.json", msgspec.json.encode(machine))
        return machine

    def load_positions(self) -> Positions:
        if not self.storage.exists("positions.json"):
            return Positions()
        return msgspec.json.decode(read_whole(self.storage, "positions.json"), type=Positions)

    def save_positions(self, positions: Positions) -> None:
        if self.cannot_save:
            self.watch.fired("positions not saved")
            if positions.acknowledged.lsn < self.load_positions().acknowledged.lsn:
                self.holds_maps = False
            raise OSError(errno.EIO, "positions.json")
        write_atomically(self.storage, "positions.json", msgspec.json.encode(positions))

    def image(self, slot: int) -> bytes:
        return read_whole(self.storage, f"images/{slot}")

    def _adopt(self, storage: CrashStorage) -> None:
        """From now on this is the host's disk."""
        self.storage = storage
        storage.inject(Guard())
        storage.after_operation = lambda kind, name: self._after_operation(storage, kind, name)
        self.watch.count_lack_of_space(storage, f"{self.name}'s journal full")

    def _after_operation(self, storage: CrashStorage, kind: str, name: str) -> None:
        process = CURRENT.get()
        self.watch.note(self.name, kind, name)
        if process is None or storage is not self.storage:
            return
        if process.part == "agent":
            if name.startswith("images/") and kind in ("write", "punch"):
                slot = int(name.removeprefix("images/"))
                with self.watch.checking():
                    self.model.check_image(slot, self.image(slot), self.name)
            elif kind in ("rename", "unlink") and (freed := _FREED.fullmatch(name)):
                with self.watch.checking():
                    self._check_freed(int(freed[1] or freed[2], 16))
        process.step()

    def _check_freed(self, segment: int) -> None:
        """I4: all of a freed segment is applied and acknowledged, by positions that are durable, and the store has it,
        or has lost it since and this host does not know that yet. Or it is in the map that a start would find."""
        last = self.model.last_lsn_of(segment)
        assert last is not None, f"I4: {self.name} freed the segment it writes, {segment}"
        self.watch.fired("segment freed")
        saved = self.load_positions()
        assert last <= saved.applied.lsn, f"I4: segment up to LSN {last} freed, LSN {saved.applied.lsn} was applied"
        dirty, given_up, _ = find_dirty_map(
            self.storage, "dirty.map", self.storage.below("journal"), self.load_machine(), saved
        )
        needed = given_up.needed_behind(saved.acknowledged)
        assert last <= needed.lsn, (
            f"I4: segment up to LSN {last} freed, LSN {saved.acknowledged.lsn} was acknowledged, what lies behind "
            f"{given_up.since_lsn} given up through {given_up.through.lsn}"
        )
        check_marked(self.model.records, saved.acknowledged.lsn, last, dirty, given_up)
        self.freed_lsn = max(self.freed_lsn, last)
        if not self._is_in_doubt:
            there = given_up.needed_behind(Cursor(lsn=self.received_lsn())).lsn
            assert last <= there or not self.knows_store, (
                f"I4: segment up to LSN {last} freed, the store has LSN {there}, as this host knows"
            )

    # ---- what it knows of the store ----

    def received_lsn(self) -> int:
        """How much the store has, whatever anybody was told."""
        return self.store.vault.received_lsn(self.machine_id.hex())

    def at_store(self, slot: int) -> bytes:
        """A disk as the store has it now, listed or not."""
        vault, machine_id = self.store.vault, self.machine_id.hex()
        machine = vault.catalog.machine_by_id(machine_id)
        assert machine is not None
        reader: Any = vault
        cut = Cut(machine, vault.received_lsn(machine_id), 0, 1, None)
        disk = next(disk for disk in disks_of(reader, cut) if disk.slot == slot)
        opened = open_disks(reader, cut, [disk.name], FrameCache(reader))[disk.name]
        return bytes(opened.read(0, disk.size_bytes))

    @property
    def _is_in_doubt(self) -> bool:
        """Whether the store has more than its catalog says."""
        machine_id = self.machine_id.hex()
        return machine_id in self.store.in_doubt and not self.store.is_settled(machine_id)

    @property
    def knows_store(self) -> bool:
        """Whether it has heard from the store since the store was set back last."""
        return self._told == self.store.setbacks

    def note_told(self, lsn: int) -> None:
        """It holds this for acknowledged. What a store said before it was set back tells nothing."""
        if lsn <= self.received_lsn():
            self._told = self.store.setbacks

    def _remember(self) -> None:
        """An agent starts: it knows what was saved."""
        if self.store.setbacks and (self._is_in_doubt or self.load_positions().acknowledged.lsn > self.received_lsn()):
            self._told = None

    # ---- lives ----

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_disk_server)
            nursery.start_soon(self._keep_agent)

    async def _keep_disk_server(self) -> None:
        while True:
            process = self.server_process = Process("disk server", self.name)
            try:
                with process.acting(), self.watch.checking():
                    self.storage.sync_directory("")  # as `StateDirectory.settle`
                    self.server = DiskServerLife(
                        self.storage,
                        self.machine_id,
                        self.load_positions(),
                        self.load_machine,
                        self.clock,
                        self.model,
                        self.rng,
                        self.segment_bytes,
                    )
                    self.check_disks()
                self._note_start()
                self._send_again()
            except Killed:
                pass
            except OSError as error:
                self.watch.note(self.name, "disk server cannot start", str(error))
                process.kill()
            await process.died.wait()
            self.server = None
            await trio.sleep(self.rng.choice((0.0, 0.1, 1.0)))  # sleep: virtual, a supervisor's pause

    async def _keep_agent(self) -> None:
        while True:
            process = self.agent_process = Process("agent", self.name)
            await process.live(self._agent_life)
            self.agent = None
            await trio.sleep(self.rng.choice((0.0, 0.1, 1.0)))  # sleep: virtual, a supervisor's pause

    async def _agent_life(self) -> None:
        try:
            self.storage.sync_directory("")
            self._remember()
            agent = Agent(self)
        except OSError as error:
            self.watch.note(self.name, "agent cannot start", str(error))
            return
        self.agent = agent
        self._note_start()
        await agent.run()

    @property
    def is_up(self) -> bool:
        """Whether both processes run."""
        is_served = self.server is not None and not self.server_process.is_dead
        return is_served and self.agent is not None and not self.agent_process.is_dead

    async def until_up(self) -> None:
        while not self.is_up:
            await self._started.wait()

    def _note_start(self) -> None:
        self._started.set()
        self._started = trio.Event()

    def kill_disk_server(self) -> None:
        self.server_process.kill()

    def kill_agent(self) -> None:
        """The system closes its connections."""
        self.agent_process.kill()
        for end in self.wires:
            end.wire.cut(lose=False)
        self.wires.clear()

    def kill(self) -> None:
        """Both processes at once; the system lives."""
        self.kill_disk_server()
        self.kill_agent()

    def lose_power(self, fate: Fate, rng: random.Random) -> None:
        """The store hears nothing of it, and the guest's requests are gone."""
        after = self.storage.crash(fate, rng)
        after.capacity = None
        self.is_short_of_space = False
        for end in self.wires:
            end.vanish()
        self.wires.clear()
        self.kill()
        self.unanswered.clear()
        self._adopt(after)

    # ---- the guest ----

    @property
    def is_fenced(self) -> bool:
        """Whether its agent has written that down."""
        return self.storage.exists("fenced.json")

    def ask(self, operation: Callable[[DiskServerLife], T], *, changes: bool = False) -> T | None:
        """What the guest does. None when nobody answered: then it is asked again of the next disk server."""
        server, process = self.server, self.server_process
        if server is None or process.is_dead:
            return None
        try:
            with process.acting():
                if server.is_fenced and changes:
                    raise OSError(errno.EROFS, "fenced")
                return operation(server)
        except Killed:
            return None
        except OSError as error:
            if error.errno == errno.EROFS and self.is_fenced:
                self.watch.fired("write of a fenced host refused")
                return None
            if not self.is_short_of_space and server.journal.failed is None:
                raise AssertionError(f"I8: {self.name} failed a request and nothing of its own is wrong") from error
            self.watch.note(self.name, "request failed", str(error))
            return None

    def change(self, operation: Callable[[DiskServerLife], None]) -> None:
        """A write: sent again to the next disk server if this one dies with it."""
        lived = self.server is not None and not self.server_process.is_dead
        self.ask(operation, changes=True)
        if lived and self.server_process.is_dead:
            self.unanswered.append(operation)

    def _send_again(self) -> None:
        waiting, self.unanswered = self.unanswered, []
        for operation in waiting:
            self.ask(operation, changes=True)

    def check_disks(self) -> None:
        """I9: every disk reads as the model does now."""
        if self.server is None:
            return
        for disk in self.server.disks:
            content = bytes(disk.read(0, disk.size_bytes))
            assert content == self.model.disks[disk.slot], (
                f"I9: disk {disk.slot} of {self.name} at LSN {self.model.lsn}"
            )
