"""One life of an agent, composed as `asrfs.daemon.agent` composes it, of the same parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from asrfs.consistency.points import PointLog
from asrfs.daemon.control import raise_if_refused, refusal
from asrfs.errors import AsrfsError, TemporaryError
from asrfs.format.record import RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.model.calendar import ALWAYS
from asrfs.model.dirty_map import Reason
from asrfs.model.machine import DiskConfig
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Positions
from asrfs.model.rejoining import By
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier import Applier, Image
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.filler import Filler
from asrfs.replication.link import Link
from asrfs.replication.lost_map import open_dirty_map
from asrfs.replication.object_builder import ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.quota import Quota
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.resyncer import HealingRules, Resyncer
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.source import Source
from asrfs.replication.ticker import Ticker
from asrfs.replication.trimmer import Trimmer
from asrfs.storage.interface import File
from asrfs.transport.backoff import Backoff
from tests.fakes.crash_storage import CrashFile, CrashStorage
from tests.proof.sim.comparing import ImageDigester, WatchedComparer
from tests.proof.sim.disk_server import DiskServerLife
from tests.proof.sim.processes import Killed

if TYPE_CHECKING:
    from tests.proof.sim.host import Host

AGENT_THREADS = 5
SPARES_INTERVAL_S = 8.0
T = TypeVar("T")


class Images:
    """`asrfs.replication.applier.Images` of a machine whose disks all stay."""

    def __init__(self, storage: CrashStorage, sizes: list[int]) -> None:
        self._storage = storage
        self._sizes = sizes
        self._open: dict[int, CrashFile] = {}

    def image(self, slot: int) -> Image:
        if slot not in self._open:
            self._open[slot] = self._storage.open(f"images/{slot}", write=True)
        return Image(self._open[slot], self._sizes[slot])

    def settle(self) -> None:
        """Nothing is hydrated."""

    def drop(self, slot: int) -> None:
        if slot in self._open:
            self._open.pop(slot).close()


class ToldPositions(PositionsFile):
    """Tells the host's oracle what the host has heard of the store's position."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.load_positions(), host.save_positions)
        self._host = host

    def change(self, **fields: Any) -> Positions:
        changed = super().change(**fields)
        if "acknowledged" in fields:
            self._host.note_told(changed.acknowledged.lsn)
        return changed


class DiskServerLine:
    """`asrfs.replication.disk_server.DiskServer`: the control socket of whatever disk server runs now."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._process = host.agent_process

    async def positions(self) -> HostPositions:
        return await self._call(DiskServerLife.positions)

    async def sync(self) -> HostPositions:
        return await self._call(DiskServerLife.sync)

    async def marker(self, payload: bytes) -> tuple[int, int]:
        return await self._call(lambda server: server.marker(payload))

    async def applied(self, lsn: int, segment: int) -> None:
        if self._host.holds_maps:
            self._host.watch.fired("maps held")
            raise TemporaryError("the disk server did not answer in time")
        await self._call(lambda server: server.applied(lsn, segment))

    async def fill(self, slot: int, offset: int, length: int) -> int:
        return await self._call(lambda server: server.fill(slot, offset, length))

    async def new_epoch(self, epoch: int, after_lsn: int) -> HostPositions:
        return await self._call(lambda server: server.new_epoch(epoch, after_lsn))

    async def reread_fence(self) -> None:
        await self._call(DiskServerLife.reread_fence)

    async def reread_disks(self) -> None:
        await self._call(DiskServerLife.announce)

    async def _call(self, verb: Callable[[DiskServerLife], T]) -> T:
        host = self._host
        await trio.lowlevel.checkpoint()
        server, process = host.server, host.server_process
        if server is None or process.is_dead:
            raise TemporaryError("the disk server is away")
        try:
            with process.acting():
                answer = verb(server)
        except Killed:
            self._process.check()
            raise TemporaryError("the disk server died") from None
        except OSError as error:
            raise_if_refused(refusal(error))
            raise
        if host.loses_answers and host.rng.random() < host.loses_answers:
            host.watch.fired("answer of a verb lost")
            raise TemporaryError("the disk server's answer did not come")
        return answer


class ToldQuota(Quota):
    """Says when it has given up."""

    told: Host

    async def give_up(self) -> bool:
        is_given_up = await super().give_up()
        if is_given_up:
            self.told.watch.fired("records given up")
        return is_given_up


class ToldRejoiner(Rejoiner):
    """Says when it is asked to rejoin, which it has no reason to be of a store that never went back."""

    told: Host

    async def ask(self, by: By, why: str) -> None:
        with self.told.watch.checking():
            assert self.told.store.setbacks, f"I4: {self.told.name} takes a store for lost that has all: {why}"
        await super().ask(by, why)
        self.told.watch.fired("store lost what was freed")


class Agent:
    """One life of an agent. Made inside the event loop."""

    def __init__(self, host: Host) -> None:
        self._host = host
        server = self._server = DiskServerLine(host)
        self._threads = trio.CapacityLimiter(AGENT_THREADS)
        storage = host.storage
        journal = storage.below("journal")
        journal_turn = trio.Lock()
        seeded = random.Random(host.rng.getrandbits(64))
        sizes = [len(content) for content in host.model.initial]
        self.positions = ToldPositions(host)
        self.progress = Progress(self.positions.current)
        self.alarms = Alarms()
        self.dirty = open_dirty_map(storage, "dirty.map", journal, host.load_machine(), self.positions.current)
        self.points = PointLog(storage, "points.jsonl")
        self._readers = [JournalReader(journal, host.machine_id) for _ in range(3)]
        self._trimmer = Trimmer(journal, host.machine_id)
        self.ticker = Ticker(server, self.progress, self.alarms, lambda: host.settings.object_age)
        self.applier = ApplierTask(
            Applier(self._readers[0], self.positions, Images(storage, sizes), self._on_marker, round_bytes_max=20_000),
            self._trimmer,
            server,
            self.positions,
            self.progress,
            self.alarms,
            self._threads,
            journal_turn,
            lambda: self.dirty.given_up,
        )
        source = Source(
            machine_id=host.machine_id,
            machine_name=host.name,
            journal=journal,
            reader=self._readers[1],
            builder=ObjectBuilder(self._readers[2]),
            positions=self.positions,
            progress=self.progress,
            settings=host.settings,
            threads=self._threads,
            journal_turn=journal_turn,
            given_up=lambda: self.dirty.given_up,
        )
        store = StoreAccess(host.connect, host.keys)
        self.shipper = Shipper(source, store, self.alarms, Link(), Backoff(seeded))
        self._quota = ToldQuota(
            server,
            self.progress,
            self.positions,
            self.dirty,
            JournalReader(journal, host.machine_id, check_payloads=False),
            self.alarms,
            self._threads,
            host.load_machine,
            host.set_gaps,
            host.quota_bytes,
        )
        self._quota.told = host
        filler = Filler(
            server,
            self.progress,
            self.dirty,
            self._threads,
            host.load_machine,
            host.set_gaps,
            self._open_image,
            self._make_point,
            lambda: 0,
            self._compare,
            self.ticker.poke,
        )
        self._comparing = trio.Lock()
        self._ordered = trio.Event()
        self._comparer = WatchedComparer(
            host,
            source.outlet,
            ImageDigester(storage, self._threads, lambda: (self.progress.applied.lsn, host.model.durable_lsn)),
            server,
            self.progress,
            self.applier.exact,
            self.applier.hurry,
            self.shipper.hurry,
        )
        self.rejoiner = ToldRejoiner(
            storage,
            journal,
            host.machine_id,
            JournalReader(journal, host.machine_id, check_payloads=False),
            server,
            self.progress,
            self.positions,
            self.dirty,
            self.alarms,
            self._threads,
            host.load_machine,
            host.edit_machine,
            host.clock.time_ns,
        )
        self.rejoiner.told = host
        source.rejoiner = self.rejoiner
        rules = HealingRules(ALWAYS, 900.0, host.quota_bytes)
        self.resyncer = Resyncer(filler, self.progress, self.alarms, self._may_heal, lambda: rules, lambda: 0)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for task in (
                self.ticker.run,
                self.applier.run,
                self.applier.run_trimming,
                self.shipper.run,
                self.rejoiner.run,
                self._keep_spares,
                self._quota.run,
                self.resyncer.run,
                self._verify_when_ordered,
            ):
                nursery.start_soon(task)

    def _may_heal(self) -> bool:
        return self.rejoiner.order is None and self.rejoiner.fence is None

    async def _make_point(self, note: str) -> int:
        payload = encode_marker(MarkerRecord(id=f"{self._host.rng.getrandbits(128):032x}", note=note))
        lsn, _ = await self._server.marker(payload)
        self.shipper.hurry(lsn)
        return lsn

    def verify(self) -> None:
        """Compare all disks, as `asrfs verify` does."""
        self._ordered.set()

    async def _verify_when_ordered(self) -> None:
        while True:
            await self._ordered.wait()
            self._ordered = trio.Event()
            disks = self._host.load_machine().live_disks()
            try:
                async with self._comparing:
                    found = await self._comparer.compare(disks)
                    settled = await self._comparer.settle(disks, found)
            except AsrfsError as error:
                self._host.watch.note(self._host.name, "cannot compare", str(error))
                continue
            self._host.watch.fired("disks compared")
            self._host.watch.fired("difference found", settled.chunks_different)

    async def _compare(self, disks: Sequence[DiskConfig]) -> Mapping[int, Sequence[int]]:
        """As `AgentHealing` does."""
        await trio.to_thread.run_sync(self.positions.save, limiter=self._threads)
        have_parted = any(Reason.REJOINED in self.dirty.map.reasons(disk.slot) for disk in disks)
        async with self._comparing:
            await self._comparer.catch_up()
            found = await self._comparer.compare(disks, by_kept=not have_parted)
            settled = await self._comparer.settle(disks, found)
        if have_parted:
            self._host.watch.fired("rejoined disk compared")
        return settled.different

    def _on_marker(self, header: RecordHeader, payload: bytes) -> None:
        self.points.add_marker(header, payload, self.progress.epoch)

    def _open_image(self, disk: DiskConfig) -> File:
        return self._host.storage.open(f"images/{disk.slot}")

    async def _keep_spares(self) -> None:
        """As `asrfs.daemon.housekeeping` does."""
        while True:
            try:
                await trio.to_thread.run_sync(self._trimmer.prepare, trio.current_time(), limiter=self._threads)
            except OSError:
                pass
            await trio.sleep(SPARES_INTERVAL_S)  # sleep: virtual, its interval
