"""A store's vault whose objects lie on a `CrashStorage`, fed by the real ingester, with the host's history for a model.

The catalog is SQLite in memory: after a power loss it is as it was after its last transaction, set back to an older
one, or gone and made again from the objects.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from unittest import mock

from asrfs.errors import AsrfsError
from asrfs.format.log_object import NO_DIGEST, SALT_BYTES, FrameTable, ObjectHeader
from asrfs.format.object_index import Index
from asrfs.format.record import Kind
from asrfs.model.machine import decode_disk
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.ingest.ingester import Ingester, Position
from replica_store.points import map_maker
from replica_store.points.builder import Cut, cut_at, disks_of, open_disks
from replica_store.points.map_maker import make_maps
from replica_store.points.point_disk import FrameCache
from replica_store.vault import rebuild as rebuild_room
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.leaf_files import LeafFiles
from replica_store.vault.map_files import MapFiles
from replica_store.vault.rows import ObjectRow
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import Vault, describe
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.folding import Dirty
from tests.fakes.journal_world import MACHINE_ID as HOST_MACHINE_ID
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.memory_leaves import MemoryLeaves
from tests.fakes.memory_maps import MemoryMaps
from tests.fakes.scripted_host import BLOCK, HostHistory

MACHINE_ID = HOST_MACHINE_ID.hex()
BLOCKS = 48


@dataclass(frozen=True)
class StoreLook:
    """The store's disk after one of its operations. `acknowledged`: what hosts had been told by then."""

    kind: str
    name: str
    storage: CrashStorage
    acknowledged: int
    catalogs: tuple[bytes, ...]


class RememberingVault(Vault):
    """Reads heads and frames of an object once for all lives, as long as its bytes are the same."""

    memory: dict[tuple[object, ...], object]

    def object_head(self, row: ObjectRow) -> tuple[ObjectHeader, Index, FrameTable]:
        try:
            key = ("head", row, self.objects.read(row.name))
        except AsrfsError:
            return super().object_head(row)
        if key not in self.memory:
            self.memory[key] = super().object_head(row)
        return cast(tuple[ObjectHeader, Index, FrameTable], self.memory[key])

    def object_index(self, row: ObjectRow) -> tuple[ObjectHeader, Index]:
        header, index, _ = self.object_head(row)
        return header, index

    def read_frame(self, row: ObjectRow, header: ObjectHeader, table: FrameTable, i: int) -> bytes:
        try:
            key = ("frame", row, i, self.objects.read(row.name))
        except AsrfsError:
            return super().read_frame(row, header, table, i)
        if key not in self.memory:
            self.memory[key] = super().read_frame(row, header, table, i)
        return cast(bytes, self.memory[key])


@dataclass
class VaultWorld:
    """One life of a store. `looks` None: nobody looks. `verified`: states whose points were compared in any life."""

    root: Path
    vault: Vault
    storage: CrashStorage
    history: HostHistory
    looks: list[StoreLook] | None = None
    acknowledged: int = 0
    verified: set[tuple[object, ...]] = field(default_factory=set)

    @classmethod
    def new(cls, root: Path, seed: int) -> VaultWorld:
        """A store that has let one machine in. Its keys lie in `root`, and all of its lives read them there."""
        make_vault(root)
        storage = CrashStorage()
        catalog = MemoryCatalog()
        vault = open_vault(root, storage, catalog)
        secret = encode_base64url(decode_token(make_token(vault, "web1", SystemClock())).secret)
        _, request = make_key_and_request("web1", MACHINE_ID)
        wanted = EnrolRequest(secret=secret, machine="web1", machine_id=MACHINE_ID, csr=request.decode())
        enrol(vault, wanted, SystemClock(), 9443)
        del catalog.commits[:-1]
        history = HostHistory(MACHINE_ID, vault.machine_keys(vault.machine("web1")), "web1", seed=seed)
        return cls(root, vault, storage, history)

    def next_start(self, storage: CrashStorage, catalog: bytes | None) -> VaultWorld:
        """The store that starts on what a crash left, with this catalog or with one made from objects."""
        if catalog is None:
            after, damages = self.rebuilt(storage)
            assert damages == [], damages
            return after
        return self._next_life(open_vault(self.root, storage, MemoryCatalog(catalog)), storage)

    def rebuilt(self, storage: CrashStorage) -> tuple[VaultWorld, list[str]]:
        """The store on a catalog made from its objects, and what that found damaged."""
        vault = open_vault(self.root, storage, MemoryCatalog())
        found = rebuild_room._fill(vault.catalog, vault.objects, vault.sealer, lambda done, total: None)
        del cast(MemoryCatalog, vault.catalog).commits[:-1]  # the old one is replaced by the whole one
        return self._next_life(vault, storage), found.damages

    def _next_life(self, vault: RememberingVault, storage: CrashStorage) -> VaultWorld:
        vault.memory = cast(RememberingVault, self.vault).memory
        vault.maps = self.vault.maps
        vault.leaves = self.vault.leaves
        cast(DirectoryObjects, vault.objects).sweep()
        return VaultWorld(self.root, vault, storage, self.history, verified=self.verified)

    @property
    def catalogs(self) -> list[bytes]:
        """The states after each transaction of this life."""
        return cast(MemoryCatalog, self.vault.catalog).commits

    # ---- what happens to a store ----

    def look_at_everything(self, looks: list[StoreLook] | None = None) -> list[StoreLook]:
        """From now on every operation of the storage is looked at."""
        self.looks = [] if looks is None else looks
        self.storage.after_operation = self._look
        cast(MemoryCatalog, self.vault.catalog).on_commit = lambda: self._look("commit", "catalog")
        return self.looks

    def look_away(self) -> None:
        self.storage.after_operation = None
        cast(MemoryCatalog, self.vault.catalog).on_commit = None

    def begin(self, rng: random.Random | None = None) -> tuple[Ingester, Position, bytes]:
        """A first session: what a crash left out of the catalog is taken in; the position is a promise."""
        number = rng or random.SystemRandom()
        ingester = Ingester(self.vault, MACHINE_ID, lambda: f"{number.getrandbits(32):08x}")
        salt = number.randbytes(SALT_BYTES)
        position = ingester.begin_session(self.vault.machine("web1"), salt)
        self.acknowledged = max(self.acknowledged, position.lsn)
        return ingester, position, salt

    def ingest(self, rng: random.Random) -> list[AsrfsError]:
        """Everything the store has not got, in batches of a few objects; errors that ended it."""
        ingester, position, salt = self.begin(rng)
        lsn, digest = position.lsn, position.digest or NO_DIGEST
        while lsn < self.history.last_lsn:
            batch = []
            for _ in range(rng.randint(1, 3)):
                if lsn < self.history.last_lsn:
                    built = self.history.next_object(lsn + 1, rng.randint(1, 4), salt, digest, rng)
                    batch.append(ObjectReceived(built.begin, built.content))
                    lsn, digest = built.begin.last_lsn, built.digest
            taken = ingester.take(batch)
            self.note(taken.acknowledged)
            if taken.error is not None:
                return [taken.error]
        return []

    def note(self, acknowledged: list[Acknowledge]) -> None:
        self.acknowledged = max([self.acknowledged, *(each.lsn for each in acknowledged)])

    def _look(self, kind: str, name: str) -> None:
        assert self.looks is not None
        self.looks.append(StoreLook(kind, name, self.storage.killed(), self.acknowledged, tuple(self.catalogs)))

    # ---- what must hold ----

    def tables(self) -> dict[str, list[tuple[object, ...]]]:
        """What can be made again of the catalog."""
        return {name: self.vault.catalog.table(name) for name in REBUILDABLE}

    def check(self, rng: random.Random, objects: CrashStorage | None = None, *, points_max: int = 3) -> None:
        """I3, I5, I9: all that was acknowledged is there; listed are the points the model has; each one is exact.

        `objects`: look at these instead of its own. Of the points' bytes the newest and a few others are compared.
        """
        present, storage = self.vault.objects, objects or self.storage
        self.vault.objects = DirectoryObjects(storage, "objects")
        received = self.vault.received_lsn(MACHINE_ID)
        assert received >= self.acknowledged, f"I3: LSN {self.acknowledged} was acknowledged, {received} is here"
        assert received <= self.history.last_lsn, f"I1: LSN {received} is here, but not at its host"
        points = self.vault.points(MACHINE_ID)
        rows = self.vault.objects_of(MACHINE_ID, received)
        stretches = [(row.first_lsn, row.last_lsn) for row in rows if row.is_stretch]
        assert [point.lsn for point in points] == listed(self.history, received, stretches), "I5"
        state = (received, *((row.name, self.vault.objects.read(row.name)) for row in rows))
        if state not in self.verified:
            if rng.random() < 0.5:  # else what another life left is found as it is
                self._make_maps(rng)
            cuts = [cut_at(self.vault.machine("web1"), point) for point in points]
            frames = FrameCache(self.vault)
            for cut in rng.sample(cuts, min(points_max - 1, len(cuts))) + cuts[-1:]:
                self._check_cut(cut, frames)
            for row in rows:
                assert self.vault.objects.size(row.name) == row.length
            self.verified.add(state)
        self.vault.objects = present

    def _make_maps(self, rng: random.Random) -> None:
        """Checkpoints of a few objects each, where all lives find them: also those whose history is another by then."""
        with mock.patch.object(map_maker, "UNIT", 1024 * rng.randint(1, 4)):
            make_maps(self.vault, MACHINE_ID)

    def _check_cut(self, cut: Cut, frames: FrameCache) -> None:
        disks = disks_of(self.vault, cut)
        opened = open_disks(self.vault, cut, [disk.name for disk in disks], frames)
        state = state_at(self.history, cut.lsn)
        assert sorted(state) == [disk.slot for disk in disks]
        for disk in disks:
            content = opened[disk.name].read(0, disk.size_bytes)
            assert content == state[disk.slot], f"I9: disk {disk.name} at LSN {cut.lsn}"


def make_vault(root: Path) -> None:
    """The directory of a vault, for its keys and its name."""
    Vault.create(str(root), "site-b", SystemClock()).close()


def open_vault(root: Path, storage: CrashStorage, catalog: MemoryCatalog) -> RememberingVault:
    """The vault at `root` with its objects in `storage`."""
    vault = RememberingVault(str(root), describe(str(root)), DirectoryObjects(storage, "objects"), catalog)
    vault.memory = {}
    vault.maps = cast(MapFiles, MemoryMaps())
    vault.leaves = cast(LeafFiles, MemoryLeaves())
    return vault


def make_history(history: HostHistory, rng: random.Random) -> None:
    """Two disks, one of them with a gap that is filled, points before, within and behind it; then records that are
    given up and healed."""
    history.disk(0, size_bytes=BLOCKS * BLOCK)
    for slot in (0, 1):
        if slot:
            history.disk(1, size_bytes=BLOCKS * BLOCK, gap=True)
            history.append(Kind.FILL, 1, 0, BLOCK, rng.randbytes(BLOCK))
            history.marker("inside")
            history.disk(1, size_bytes=BLOCKS * BLOCK)
        for number in range(8):
            history.write(rng.randint(1, 3), slot=rng.randint(0, slot), offset=rng.randrange(BLOCKS - 3) * BLOCK)
            if number % 3 == 2:
                history.append(Kind.ZERO, 0, rng.randrange(BLOCKS - 3) * BLOCK, 2 * BLOCK, b"")
                history.marker(f"point-{slot}-{number}")
    _give_up_and_heal(history, rng)


def _give_up_and_heal(history: HostHistory, rng: random.Random) -> None:
    """A few records that change both disks, lost with their point; what they changed is sent again."""
    first, dirty = history.last_lsn + 1, Dirty()
    for slot in (0, 1, 0):
        history.write(2, slot=slot, offset=rng.randrange(BLOCKS - 3) * BLOCK)
    history.append(Kind.ZERO, 1, rng.randrange(BLOCKS - 3) * BLOCK, 2 * BLOCK, b"")
    history.marker("lost")
    history.write(1, slot=1, offset=0)
    history.give_up(first)
    dirty.give_up(history.records[first - 1 :], {})
    for slot, content in state_at(history, history.last_lsn).items():
        for offset, length in dirty.take(slot, len(content)):
            history.append(Kind.FILL, slot, offset, length, content[offset : offset + length])
    history.marker("inside-too")
    for slot in (0, 1):
        history.disk(slot, size_bytes=BLOCKS * BLOCK)
        history.write(1, slot=0, offset=0)
        history.marker(f"healed-{slot}")


def listed(history: HostHistory, received: int, stretches: Sequence[tuple[int, int]] = ()) -> list[int]:
    """LSNs of the points that may be shown when so much is here: those outside every gap. `stretches`: first and last
    LSN of those that have no state inside."""
    found = []
    gaps: set[int] = set()
    for lsn, record in enumerate(history.records[:received], 1):
        if lost := [end for begin, end in history.given_up if begin <= lsn <= end]:
            if lsn == lost[0]:
                gaps = {slot for slot, disk in history.disks_at(lsn).items() if not disk.removed}
            continue
        if record.kind == Kind.DISK:
            disk = decode_disk(record.payload)
            (gaps.add if disk.gap else gaps.discard)(disk.slot)
        is_inside = any(first <= lsn < last for first, last in stretches)
        if record.kind == Kind.MARKER and not gaps and not is_inside:
            found.append(lsn)
    return found


def state_at(history: HostHistory, lsn: int) -> dict[int, bytes]:
    """The model: every disk's bytes at an LSN."""
    disks: dict[int, bytearray] = {}
    for record in history.records[:lsn]:
        if record.kind == Kind.DISK:
            disk = decode_disk(record.payload)
            disks.setdefault(disk.slot, bytearray(disk.size_bytes))
        elif record.kind != Kind.MARKER:
            disks[record.slot][record.offset : record.offset + record.length] = record.payload or bytes(record.length)
    return {slot: bytes(content) for slot, content in disks.items()}
