"""One life of a disk server: the real journal, recovery and disks over a storage, without FUSE and sockets.

It opens as `asrfs.daemon.served_machine` does: images, recover, maps, journal, DISK records. The journal tells the
model of each record before its first byte is written, and syncs in the caller's place instead of a thread.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

from asrfs.format.record import PAYLOAD_BYTES_MAX, Kind
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, rebuild_maps
from asrfs.journal.epochs import EpochJournal
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.writer import SyncCallback
from asrfs.model.clock import Clock
from asrfs.model.machine import NO_SLOT, DiskRecord, MachineConfig, encode_disk
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.disk_server import HostPositions
from asrfs.storage.interface import Bytes
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import ModelRecord
from tests.proof.sim.machine_model import MachineModel

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ToldJournal(EpochJournal):
    """Tells the model, and has no thread."""

    def __init__(
        self, storage: CrashStorage, machine_id: bytes, recovered: Recovered, clock: Clock, model: MachineModel,
        rng: random.Random, segment_bytes: int,
    ) -> None:  # fmt: skip
        self._model = model
        super().__init__(
            storage.below("journal"),
            machine_id,
            recovered,
            clock,
            make_salt=lambda: rng.getrandbits(64),
            segment_bytes=segment_bytes,
            prepare_ahead=False,
        )

    def append_locked(self, kind: int, slot: int, offset: int, length: int, payload: Bytes = b"") -> int:
        if self.failed is not None:  # nothing is written any more: what failed first may still be found
            return super().append_locked(kind, slot, offset, length, payload)
        self._model.tell(ModelRecord(kind, slot, offset, length, bytes(payload)))
        try:
            position = super().append_locked(kind, slot, offset, length, payload)
        except OSError:
            self._model.take_back()
            raise
        self._model.draw()
        return position

    def request_sync(self, callback: SyncCallback) -> None:
        super().request_sync(callback)
        closing, self._closing = self._closing, True
        try:
            self._sync_forever()  # serves who waits, and ends because the journal is said to close
        finally:
            self._closing = closing
        self._model.note_durable(self.durable_lsn)

    def _roll(self, epoch: int | None = None, after_lsn: int | None = None) -> None:
        super()._roll(epoch, after_lsn)
        self._model.segments[self.segment] = self.appended_lsn + 1


class DiskServerLife:
    """Opened by the constructor. `load_machine` reads `machine.json` as it is now."""

    def __init__(
        self,
        storage: CrashStorage,
        machine_id: bytes,
        positions: Positions,
        load_machine: Callable[[], MachineConfig],
        clock: Clock,
        model: MachineModel,
        rng: random.Random,
        segment_bytes: int,
    ) -> None:
        self._storage = storage
        self._load_machine = load_machine
        self.is_fenced = storage.exists("fenced.json")
        self._announced: dict[int, DiskRecord] = {}
        machine = load_machine()
        images = {disk.slot: storage.open(f"images/{disk.slot}") for disk in machine.disks}
        journal = storage.below("journal")
        recovered = recover(journal, positions, machine_id, segment_bytes=segment_bytes, by_indexes=True)
        model.recovered(recovered.last_lsn)
        self.recovered_lsn = recovered.last_lsn
        maps = {slot: BlockMap() for slot in images}
        rebuild_maps(recovered, maps, journal)
        self.journal = ToldJournal(storage, machine_id, recovered, clock, model, rng, segment_bytes)
        MapKeeper(self.journal, journal, maps, recovered, ahead=False, layers_kept=1)
        self.disks = [
            JournaledDisk(disk.slot, disk.size_bytes, images[disk.slot], self.journal, maps[disk.slot])
            for disk in machine.disks
        ]
        try:
            self.announce()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise

    def announce(self) -> None:
        """Have every disk's DISK record in the history. Raises OSError."""
        for disk in self._load_machine().disks:
            record = DiskRecord.of(disk)
            if self._announced.get(disk.slot) != record:
                self.journal.append(Kind.DISK, disk.slot, 0, 0, encode_disk(record))
                self._announced[disk.slot] = record

    # ---- verbs ----

    def new_epoch(self, epoch: int, after_lsn: int) -> HostPositions:
        if self.journal.epoch < epoch:
            assert after_lsn <= self.journal.appended_lsn, "a host of this simulation is never behind its store"
            self.journal.begin_epoch(epoch, after_lsn)
            self._announced.clear()
        self.announce()
        return self.sync()

    def reread_fence(self) -> None:
        self.is_fenced = self._storage.exists("fenced.json")

    def positions(self) -> HostPositions:
        journal = self.journal
        durable = Cursor(
            lsn=journal.durable_lsn, segment=journal.segment, offset=journal.offset, time_ns=journal.last_time_ns
        )
        return HostPositions(journal.appended_lsn, durable, journal.epoch, journal.failed)

    def sync(self) -> HostPositions:
        self.journal.sync()
        return self.positions()

    def marker(self, payload: bytes) -> tuple[int, int]:
        self.announce()
        self.journal.append(Kind.MARKER, NO_SLOT, 0, 0, payload)
        place = self.journal.appended_lsn, self.journal.last_time_ns
        self.journal.sync()
        return place

    def applied(self, lsn: int, segment: int) -> None:
        self.journal.drop_through(segment, [disk.map for disk in self.disks])

    def fill(self, slot: int, offset: int, length: int) -> int:
        assert 0 < length <= 16 * PAYLOAD_BYTES_MAX
        self.announce()
        return self.disks[slot].fill(offset, length)
