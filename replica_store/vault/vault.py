"""A vault: its directory, its objects, its catalog, its keys, and reading a history from them.

    VAULT/vault.json  keys/  catalog.sqlite3  objects/  maps/  leaves/  seeds/  lock

`vault.json` is written last, so a vault that is there is whole. Reading needs nobody's leave: objects never change,
and the catalog is read beside the process that writes it. Writing history is the holder of the lock alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from asrfs.errors import IntegrityError, NotFoundError, RefusedError
from asrfs.format.kept_leaves import derive_leaves_key
from asrfs.format.log_object import (
    FrameTable,
    ObjectHeader,
    ObjectKeys,
    decode_object_header,
    derive_keys,
)
from asrfs.model.boot import NO_BOOT, BootSettings, decode_boot
from asrfs.model.clock import Clock
from asrfs.model.machine import DiskRecord
from asrfs.model.names import check_name, is_id, is_name
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically
from replica_store.vault.catalog import Catalog
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.gaps import Gap, gap_at, gaps_of
from replica_store.vault.keys import KeyFiles, MachineKeys, Sealer
from replica_store.vault.leaf_files import LEAVES_DIRECTORY, LeafFiles
from replica_store.vault.listing import listed_points
from replica_store.vault.lock import VaultLock
from replica_store.vault.map_files import MAPS_DIRECTORY, MAPS_LOCK_FILE, MapFiles
from replica_store.vault.objects import ObjectMissingError, Objects
from replica_store.vault.rows import DiskRow, MachineRow, ObjectRow, PointRow
from replica_store.vault.seed_files import SEEDS_DIRECTORY, SeedFiles
from replica_store.vault.tails import TailMachine, TailRows, machine_of, point_of_tail, tail_point, tail_with_id, tails

if TYPE_CHECKING:
    from asrfs.format.object_index import Index

VAULT_FILE = "vault.json"
CATALOG_FILE = "catalog.sqlite3"
LOCK_FILE = "lock"
DESCRIPTIONS_LOCK_FILE = "descriptions.lock"
_HEAD_BYTES = 64 << 10
_LOCK_TRY_INTERVAL_S = 0.02
_SESSION_KEYS_KEPT = 1024
_ENTRIES = frozenset(
    (
        VAULT_FILE,
        "keys",
        "objects",
        MAPS_DIRECTORY,
        LEAVES_DIRECTORY,
        SEEDS_DIRECTORY,
        LOCK_FILE,
        DESCRIPTIONS_LOCK_FILE,
        CATALOG_FILE,
        f"{CATALOG_FILE}-wal",
        f"{CATALOG_FILE}-shm",
    )
)


class VaultFile(msgspec.Struct, frozen=True, kw_only=True):
    """vault.json."""

    format: int = 1
    id: str
    name: str


class Vault:
    """An open vault. Methods block and may be called from several threads."""

    def __init__(self, root: str, description: VaultFile, objects: Objects, catalog: Catalog) -> None:
        self.root = root
        self.id = description.id
        self.name = description.name
        self.objects = objects
        self.catalog = catalog
        self.maps = MapFiles(DirectoryStorage(root), lambda: lock_maps(root))
        self.leaves = LeafFiles(DirectoryStorage(root))
        self.seeds = SeedFiles(DirectoryStorage(root))
        self.keys = KeyFiles(os.path.join(root, "keys"))
        self.sealer: Sealer = self.keys.sealer()
        self._session_keys = lru_cache(_SESSION_KEYS_KEPT)(self._derive)

    @property
    def server_name(self) -> str:
        """The name in the server's certificate."""
        from asrfs.transport.tls import server_name_of  # see keys.py

        return server_name_of(self.id)

    # ---- opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, root: str, name: str, clock: Clock) -> Vault:
        """Make a vault in a new or empty directory. Raises BadInputError, RefusedError."""
        from asrfs.transport.tls import server_name_of

        root = os.path.abspath(root)
        check_name(name, "vault")
        if os.path.lexists(os.path.join(root, VAULT_FILE)):
            raise RefusedError(f"{root} is already a vault")
        if os.path.lexists(root) and not os.path.isdir(root):
            raise RefusedError(f"{root} is not a directory")
        if os.path.isdir(root) and set(os.listdir(root)) - _ENTRIES:
            raise RefusedError(f"{root} is not empty: choose another directory for the vault")
        storage = DirectoryStorage(root)
        os.chmod(root, 0o700)
        for left in _ENTRIES & set(os.listdir(root)):  # by an `init` that died: nothing was ever in it
            path = storage.path(left)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        description = VaultFile(id=secrets.token_hex(16), name=name)
        KeyFiles.create(storage.path("keys"), name, server_name_of(description.id), clock.time_ns())
        Catalog.create(storage.path(CATALOG_FILE)).close()
        storage.make_directory("objects")
        write_atomically(storage, VAULT_FILE, msgspec.json.encode(description) + b"\n")
        return cls.open(root, writable=True)

    @classmethod
    def open(cls, root: str, *, writable: bool = False) -> Vault:
        """Open beside whoever serves it, for reading or, `writable`, for writing to its catalog.

        Raises NotFoundError, IntegrityError.
        """
        root = os.path.abspath(root)
        description = describe(root)
        catalog = Catalog(os.path.join(root, CATALOG_FILE), writable=writable)
        return cls(root, description, open_objects(root), catalog)

    def close(self) -> None:
        self.catalog.close()

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- machines and their history -------------------------------------------------------------------------

    def machines(self) -> list[MachineRow]:
        return self.catalog.machines()

    def machine(self, name: str) -> MachineRow:
        """Raises NotFoundError; BadInputError for what cannot be a name."""
        return self.catalog.machine(check_name(name, "machine"))

    def tail(self, machine_id: str, label: str) -> tuple[TailMachine, PointRow] | None:
        """The point of a tail of the machine that has this name or id, and the machine as which its past is read."""
        found = tail_point(self.catalog, machine_id, label)
        machine = self.catalog.machine_by_id(machine_id)
        if found is None or machine is None:
            return None
        return TailMachine(found[0].id, machine.name, found[0].epoch), found[1]

    def tail_points(self, machine_id: str) -> list[PointRow]:
        """What sides that were superseded wrote last and the history does not have, by epoch (I7)."""
        found = [point_of_tail(self.catalog, tail) for tail in tails(self.catalog, machine_id)]
        return [point for point in found if point is not None]

    def _rows(self, machine_id: str) -> Catalog | TailRows:
        """Where the history is looked up of a machine, or of one of its tails. Raises NotFoundError."""
        if machine_of(machine_id) == machine_id:
            return self.catalog
        tail = tail_with_id(self.catalog, machine_id)
        if tail is None:
            raise NotFoundError(f"the store knows no tail {machine_id}")
        return TailRows(self.catalog, tail)

    def received_lsn(self, machine_id: str) -> int:
        """Up to here everything is durable in this vault; 0 if nothing came yet."""
        last = self._rows(machine_id).last_object(machine_id)
        return last.last_lsn if last else 0

    def objects_of(self, machine_id: str, up_to_lsn: int, after_lsn: int = 0) -> list[ObjectRow]:
        """In LSN order, all log objects with a record behind `after_lsn` and at or below `up_to_lsn`."""
        return self._rows(machine_id).objects_of(machine_id, up_to_lsn, after_lsn)

    def object_with(self, machine_id: str, lsn: int) -> ObjectRow | None:
        """The log object that holds record `lsn`."""
        return self._rows(machine_id).object_with(machine_id, lsn)

    def disks_at(self, machine_id: str, lsn: int) -> list[DiskRecord]:
        """What holds for each slot at this LSN, removed disks too, by slot."""
        newest: dict[int, DiskRow] = {}
        for row in self._rows(machine_id).disk_rows(machine_id):
            if row.lsn <= lsn:
                newest[row.record.slot] = row
        return [newest[slot].record for slot in sorted(newest)]

    def boot_at(self, machine_id: str, lsn: int) -> BootSettings:
        """How the machine is started in its state at this LSN. Raises FormatError for settings of a newer host."""
        rows = [row for row in self._rows(machine_id).disk_rows(machine_id) if row.lsn <= lsn]
        return decode_boot(max(rows, key=lambda row: row.lsn).record.boot) if rows else NO_BOOT

    def gap_at(self, machine_id: str, lsn: int) -> Gap | None:
        """The gap that lies open at this LSN: there is no point there (I5)."""
        return gap_at(gaps_of(self._rows(machine_id).disk_rows(machine_id)), lsn)

    def points(self, machine_id: str) -> list[PointRow]:
        """Listed points, in LSN order: their whole prefix is here and no gap lies under them (I5)."""
        return listed_points(self.catalog, machine_id)

    def machine_keys(self, machine: MachineRow) -> MachineKeys:
        """Raises IntegrityError."""
        return self.sealer.open_keys(machine.id, machine.sealed_keys)

    def session_keys(self, machine_id: str, epoch: int, session_salt: bytes) -> ObjectKeys:
        """Keys of the log objects that one session shipped."""
        return self._session_keys(machine_id, epoch, session_salt)

    def _derive(self, machine_id: str, epoch: int, session_salt: bytes) -> ObjectKeys:
        keys = self.keys_of(machine_id)
        return derive_keys(keys.index_key, keys.payload_key, bytes.fromhex(machine_id), epoch, session_salt)

    def keys_of(self, machine_id: str) -> MachineKeys:
        """Raises NotFoundError, IntegrityError."""
        machine = self.catalog.machine_by_id(machine_of(machine_id))
        if machine is None:
            raise NotFoundError(f"the store knows no machine with id {machine_id}")
        return self.machine_keys(machine)

    def map_key(self, machine_id: str, salt: bytes) -> bytes:
        """What seals a map checkpoint of this machine with this salt."""
        from asrfs.format.map_checkpoint import derive_map_key  # as in `_index`

        return derive_map_key(self.keys_of(machine_id).index_key, bytes.fromhex(machine_of(machine_id)), salt)

    def leaves_key(self, machine_id: str, salt: bytes) -> bytes:
        """What seals kept leaves of this machine with this salt."""
        return derive_leaves_key(self.keys_of(machine_id).payload_key, bytes.fromhex(machine_of(machine_id)), salt)

    # ---- log objects ----------------------------------------------------------------------------------------

    def where(self, row: ObjectRow) -> str:
        """The file of a log object, for people."""
        return self.objects.where(row.name)

    def object_head(self, row: ObjectRow) -> tuple[ObjectHeader, Index, FrameTable]:
        """Header, index and frame table of a log object. Raises IntegrityError naming file and LSN."""
        header, head, where = self._head(row)
        return header, self._index(row, header, head, where), FrameTable(header, head, where)

    def object_index(self, row: ObjectRow) -> tuple[ObjectHeader, Index]:
        """Header and index of a log object. Raises IntegrityError naming file and LSN."""
        header, head, where = self._head(row)
        return header, self._index(row, header, head, where)

    def _head(self, row: ObjectRow) -> tuple[ObjectHeader, bytes, str]:
        where = self.where(row)
        head = self._read_range(row, 0, _HEAD_BYTES)
        header = decode_object_header(head, where)
        check_header(header, row, where)
        if header.frames_offset > len(head):
            head = self._read_range(row, 0, header.frames_offset)
        if len(head) < header.frames_offset:
            raise IntegrityError(f"{where}: log object of LSN {row.first_lsn}..{row.last_lsn} is cut short")
        return header, head, where

    def _index(self, row: ObjectRow, header: ObjectHeader, head: bytes, where: str) -> Index:
        from asrfs.format.object_index import decode_index  # brings numpy, which takes as long to load as a verb runs

        return decode_index(header, head, self.session_keys(row.machine_id, row.epoch, header.session_salt), where)

    def read_frame(self, row: ObjectRow, header: ObjectHeader, table: FrameTable, i: int) -> bytes:
        """Raw bytes of frame i. Raises IntegrityError naming file and LSN."""
        keys = self.session_keys(row.machine_id, row.epoch, header.session_salt)
        return table.open_frame(i, self._read_range(row, *table.extent(i)), keys.payload)

    def _read_range(self, row: ObjectRow, offset: int, length: int) -> bytes:
        try:
            return self.objects.read_range(row.name, offset, length)
        except ObjectMissingError:
            raise IntegrityError(
                f"{self.where(row)}: the log object of LSN {row.first_lsn}..{row.last_lsn} is missing"
            ) from None


def describe(root: str) -> VaultFile:
    """vault.json of the vault at `root`. Raises NotFoundError, IntegrityError, RefusedError."""
    path = os.path.join(root, VAULT_FILE)
    if not os.path.isfile(path):
        raise NotFoundError(f"{root} is not a vault: make one with `replica-store init`")
    try:
        description = msgspec.json.decode(read_whole(DirectoryStorage(root), VAULT_FILE), type=VaultFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    if description.format != 1:
        raise RefusedError(f"{path}: vault format {description.format} is not known to this program: upgrade it")
    if not is_id(description.id) or not is_name(description.name):
        raise IntegrityError(f"{path}: a vault cannot have the id {description.id[:40]!r} or that name")
    return description


def open_objects(root: str) -> DirectoryObjects:
    """The objects of the vault at `root`."""
    path = os.path.join(root, "objects")
    return DirectoryObjects(DirectoryStorage(path), path)


def lock(root: str) -> VaultLock:
    """Become the one process that writes history. Raises RefusedError when another is."""
    return VaultLock(os.path.join(root, LOCK_FILE))


def lock_descriptions(root: str, seconds_max: float = 0.0) -> VaultLock:
    """Keep rebuilding apart from changes of what only descriptions know. Raises RefusedError after `seconds_max`."""
    path = os.path.join(root, DESCRIPTIONS_LOCK_FILE)
    deadline = time.monotonic() + seconds_max
    while True:
        try:
            return VaultLock(path, "being rebuilt, or its machines or policies changed,", "try again when that is done")
        except RefusedError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOCK_TRY_INTERVAL_S)


def lock_maps(root: str) -> VaultLock:
    """Become the one that writes and removes map checkpoints. Raises RefusedError, OSError."""
    DirectoryStorage(root).make_directory(MAPS_DIRECTORY)
    return VaultLock(os.path.join(root, MAPS_LOCK_FILE), "having its map checkpoints written", "try again later")


def check_header(header: ObjectHeader, row: ObjectRow, where: str) -> None:
    """Raise IntegrityError unless this is the object the catalog means."""
    found = (header.machine_id.hex(), header.epoch, header.first_lsn, header.last_lsn, header.object_length)
    is_it = found == (row.machine_id, row.epoch, row.first_lsn, row.last_lsn, row.length)
    is_it = is_it and header.is_stretch == row.is_stretch
    if not is_it or (header.first_time_ns, header.last_time_ns) != (row.first_time_ns, row.last_time_ns):
        raise IntegrityError(
            f"{where}: holds LSN {header.first_lsn}..{header.last_lsn} of machine {header.machine_id.hex()}, "
            f"but the catalog has LSN {row.first_lsn}..{row.last_lsn} of machine {row.machine_id} there"
        )
