"""A store's vault whose objects lie on a `CrashStorage`, fed by the real ingester, with the host's history for a model.

The catalog is real SQLite on a real disk: what power loss means for it is that it stays as it was after its last
transaction, is set back to an older copy, or is gone and made again from the objects. Copies are kept for that.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from asrfs.errors import AsrfsError
from asrfs.format.log_object import NO_DIGEST, SALT_BYTES
from asrfs.format.record import Kind
from asrfs.model.machine import decode_disk
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.ingest.ingester import Ingester, Position
from replica_store.points.builder import cut_at, disks_of, open_disks
from replica_store.points.point_disk import FrameCache
from replica_store.vault import rebuild as rebuild_room
from replica_store.vault.catalog import Catalog
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.vault import CATALOG_FILE, Vault
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.scripted_host import BLOCK, HostHistory

MACHINE_ID = "0123456789abcdef" * 2
BLOCKS = 48


@dataclass(frozen=True)
class StoreLook:
    """The store's disk after one of its operations. `acknowledged`: what hosts had been told by then."""

    kind: str
    name: str
    storage: CrashStorage
    acknowledged: int
    catalogs: tuple[Path, ...]


@dataclass
class VaultWorld:
    """One life of a store. `looks` None: nobody looks."""

    root: Path
    vault: Vault
    storage: CrashStorage
    history: HostHistory
    looks: list[StoreLook] | None = None
    acknowledged: int = 0
    catalogs: list[Path] = field(default_factory=list)
    _kept_lsn: int = 0

    @classmethod
    def new(cls, root: Path, seed: int) -> VaultWorld:
        vault = Vault.create(str(root), "site-b", SystemClock())
        storage = CrashStorage()
        vault.objects = DirectoryObjects(storage, "objects")
        secret = encode_base64url(decode_token(make_token(vault, "web1", SystemClock())).secret)
        _, request = make_key_and_request("web1", MACHINE_ID)
        wanted = EnrolRequest(secret=secret, machine="web1", machine_id=MACHINE_ID, csr=request.decode())
        enrol(vault, wanted, SystemClock(), 9443)
        history = HostHistory(MACHINE_ID, vault.machine_keys(vault.machine("web1")), "web1", seed=seed)
        world = cls(root, vault, storage, history)
        world.keep_catalog()
        return world

    def next_start(self, root: Path, storage: CrashStorage, catalog: Path | None) -> VaultWorld:
        """The store that starts on what a crash left, with this copy of the catalog or with one made from objects."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        shutil.copy(self.root / "vault.json", root)
        shutil.copytree(self.root / "keys", root / "keys")
        objects = DirectoryObjects(storage, "objects")
        if catalog is None:
            with mock.patch.object(rebuild_room, "open_objects", return_value=objects):
                rebuilt = rebuild_room.rebuild(str(root))
            assert rebuilt.damages == [], rebuilt.damages
        else:
            shutil.copy(catalog, root / CATALOG_FILE)
        vault = Vault.open(str(root), writable=True)
        objects.sweep()
        vault.objects = objects
        return VaultWorld(root, vault, storage, self.history)

    # ---- what happens to a store ----

    def look_at_everything(self) -> list[StoreLook]:
        """From now on every operation of the storage is looked at."""
        self.looks = []
        self.storage.after_operation = self._look
        return self.looks

    def begin(self) -> tuple[Ingester, Position, bytes]:
        """A first session: what a crash left out of the catalog is taken in; the position is a promise."""
        number = random.SystemRandom()
        ingester = Ingester(self.vault, MACHINE_ID, lambda: f"{number.getrandbits(32):08x}")
        salt = number.randbytes(SALT_BYTES)
        position = ingester.begin_session(self.vault.machine("web1"), salt)
        self.acknowledged = max(self.acknowledged, position.lsn)
        return ingester, position, salt

    def ingest(self, rng: random.Random) -> list[AsrfsError]:
        """Everything the store has not got, in batches of a few objects; errors that ended it."""
        ingester, position, salt = self.begin()
        lsn, digest = position.lsn, position.digest or NO_DIGEST
        while lsn < self.history.last_lsn:
            batch = []
            for _ in range(rng.randint(1, 3)):
                if lsn < self.history.last_lsn:
                    last = min(lsn + rng.randint(1, 4), self.history.last_lsn)
                    built = self.history.build(lsn + 1, last, salt, digest)
                    batch.append(ObjectReceived(built.begin, built.content))
                    lsn, digest = last, built.digest
            taken = ingester.take(batch)
            self.note(taken.acknowledged)
            self.keep_catalog()
            if taken.error is not None:
                return [taken.error]
        return []

    def note(self, acknowledged: list[Acknowledge]) -> None:
        self.acknowledged = max([self.acknowledged, *(each.lsn for each in acknowledged)])

    def keep_catalog(self) -> None:
        copy = self.root.parent / f"{self.root.name}-catalog-{len(self.catalogs)}"
        source = sqlite3.connect(self.vault.catalog.path)
        target = sqlite3.connect(copy)
        source.backup(target)
        target.close()
        source.close()
        self.catalogs.append(copy)
        self._kept_lsn = self._committed_lsn()

    def _committed_lsn(self) -> int:
        """What another process would find in the catalog now."""
        with contextlib.closing(Catalog(self.vault.catalog.path, writable=False)) as catalog:
            last = catalog.last_object(MACHINE_ID)
            return last.last_lsn if last else 0

    def _look(self, kind: str, name: str) -> None:
        assert self.looks is not None
        if self._committed_lsn() != self._kept_lsn:
            self.keep_catalog()
        self.looks.append(StoreLook(kind, name, self.storage.killed(), self.acknowledged, tuple(self.catalogs)))

    # ---- what must hold ----

    def check(self, rng: random.Random, objects: CrashStorage | None = None) -> None:
        """I3, I5, I9: all that was acknowledged is there; listed are the points the model has; each one is exact."""
        present = self.vault.objects
        if objects is not None:
            self.vault.objects = DirectoryObjects(objects, "objects")
        received = self.vault.received_lsn(MACHINE_ID)
        assert received >= self.acknowledged, f"I3: LSN {self.acknowledged} was acknowledged, {received} is here"
        assert received <= self.history.last_lsn
        points = self.vault.points(MACHINE_ID)
        assert [point.lsn for point in points] == listed(self.history, received), "I5"
        cuts = [cut_at(self.vault.machine("web1"), point) for point in points]
        frames = FrameCache(self.vault)
        for cut in rng.sample(cuts, min(2, len(cuts))) + cuts[-1:]:
            disks = disks_of(self.vault, cut)
            opened = open_disks(self.vault, cut, [disk.name for disk in disks], frames)
            state = state_at(self.history, cut.lsn)
            assert sorted(state) == [disk.slot for disk in disks]
            for disk in disks:
                content = opened[disk.name].read(0, disk.size_bytes)
                assert content == state[disk.slot], f"I9: disk {disk.name} at LSN {cut.lsn}"
        for row in self.vault.objects_of(MACHINE_ID, received):
            assert self.vault.objects.size(row.name) == row.length
        self.vault.objects = present


def make_history(history: HostHistory, rng: random.Random) -> None:
    """Two disks, one of them with a gap that is filled, points before, within and behind it."""
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


def listed(history: HostHistory, received: int) -> list[int]:
    """LSNs of the points that may be shown when so much is here: those outside every gap."""
    found = []
    gaps: set[int] = set()
    for lsn, record in enumerate(history.records[:received], 1):
        if record.kind == Kind.DISK:
            disk = decode_disk(record.payload)
            (gaps.add if disk.gap else gaps.discard)(disk.slot)
        if record.kind == Kind.MARKER and not gaps:
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
