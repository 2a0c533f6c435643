"""A vault whose catalog is a file on a `CrashStorage`, so that making it again can lose power at each of its steps.

Beside the machine with a history it holds one that was revoked and one that was given a second epoch: neither may be
forgotten. SQLite's part is taken for granted: what it was told to commit is in its file and durable when the file is
closed.
"""

from __future__ import annotations

import errno
import random
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from asrfs.errors import AsrfsError
from asrfs.format.log_object import NO_DIGEST, SALT_BYTES
from asrfs.protocol.session import ObjectReceived
from asrfs.storage.interface import read_whole
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.ingest.ingester import Ingester
from replica_store.vault import rebuild as rebuild_room
from replica_store.vault.catalog import Catalog, _translated
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.enrolment import enrol, make_token, revoke
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import CATALOG_FILE, Vault
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.failing_catalog import CatalogFault, fail, sqlite_error
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.scripted_host import BLOCK, HostHistory
from tests.fakes.store_power_loss import new_world
from tests.fakes.vault_world import VaultWorld

Tables = dict[str, list[tuple[object, ...]]]
_WAL_FILE = f"{CATALOG_FILE}-wal"
OLD_LOG = b"what the old catalog has not taken over yet"
REVOKED, SUPERSEDED = "revoked", "superseded"


@dataclass(frozen=True)
class RebuildLook:
    kind: str
    name: str
    files: CrashStorage
    objects: CrashStorage


def new_rebuild_world(scratch: Path, rng: random.Random) -> VaultWorld:
    """Everything ingested, and two more machines."""
    world = new_world(scratch, rng)
    assert world.ingest(rng) == []
    add_restricted_machines(world.vault, rng)
    return world


def add_restricted_machines(vault: Vault, rng: random.Random) -> None:
    """One that is revoked, and one whose first side was superseded; what its second epoch is, only its objects say."""
    clock = SystemClock()
    for number, name in enumerate((REVOKED, SUPERSEDED), 0xB1):
        machine_id = f"{number:032x}"
        secret = encode_base64url(decode_token(make_token(vault, name, clock)).secret)
        _, request = make_key_and_request(name, machine_id)
        wanted = EnrolRequest(secret=secret, machine=name, machine_id=machine_id, csr=request.decode())
        enrol(vault, wanted, clock, 9443)
        history = HostHistory(machine_id, vault.machine_keys(vault.machine(name)), name, seed=rng.getrandbits(30))
        history.disk(0, size_bytes=4 * BLOCK)
        digest = _take_in(vault, history, 1, NO_DIGEST, rng)
        if name == SUPERSEDED:
            history.epoch = 2
            with vault.catalog.transaction():
                vault.catalog.put_machine(replace(vault.machine(name), epoch=2))
            history.marker("second-side")
            _take_in(vault, history, 2, digest, rng)
    revoke(vault, REVOKED, clock)


def _take_in(vault: Vault, history: HostHistory, first_lsn: int, previous: bytes, rng: random.Random) -> bytes:
    """The history from there on, in one object; its digest."""
    ingester = Ingester(vault, history.machine_id, lambda: f"{rng.getrandbits(32):08x}")
    salt = rng.randbytes(SALT_BYTES)
    ingester.begin_session(vault.machine(history.name), salt)
    built = history.build(first_lsn, history.last_lsn, salt, previous)
    taken = ingester.take([ObjectReceived(built.begin, built.content)])
    assert taken.error is None, taken.error
    return built.digest


class FileCatalog(MemoryCatalog):
    """A new catalog that is in its file once it is folded, or closed, which never says that it failed."""

    files: CrashStorage
    name: str
    is_folded = False

    def fold(self) -> None:
        super().fold()
        try:
            self._put()
        except OSError as error:
            code = sqlite3.SQLITE_FULL if error.errno == errno.ENOSPC else sqlite3.SQLITE_IOERR
            raise _translated(self.name, sqlite_error(code)) from None

    def close(self) -> None:
        if not self.is_folded:
            with suppress(OSError):
                self._put()
        super().close()

    def _put(self) -> None:
        with closing(self.files.open(self.name, write=True)) as file:
            file.write_at([self.content()], 0)
            file.datasync()
        self.is_folded = True


def put_catalog(content: bytes) -> CrashStorage:
    """The files of a vault that was served and then killed: the catalog and its log."""
    files = CrashStorage()
    for name, each in ((CATALOG_FILE, content), (_WAL_FILE, OLD_LOG)):
        file = files.create(name)
        file.write_at([each], 0)
        file.datasync()
        file.close()
    files.sync_directory("")
    return files


def rebuild(
    world: VaultWorld,
    files: CrashStorage,
    objects: CrashStorage,
    looks: list[RebuildLook] | None,
    fault: CatalogFault | None = None,
) -> None:
    """`replica-store rebuild`, looked at after each of its operations. `fault`: of the new catalog's statements."""

    def create(path: str) -> FileCatalog:
        catalog = FileCatalog()
        catalog.files, catalog.name = files, path
        files.create(path).close()
        if fault is not None:
            fail(catalog, fault)
        return catalog

    def look(kind: str, name: str) -> None:
        if looks is not None:
            looks.append(RebuildLook(kind, name, files.killed(), objects.killed()))

    files.after_operation = objects.after_operation = look
    with (
        mock.patch.object(rebuild_room, "DirectoryStorage", return_value=files),
        mock.patch.object(CrashStorage, "path", lambda self, name: name, create=True),
        mock.patch.object(rebuild_room.Catalog, "create", create),
        mock.patch.object(rebuild_room, "open_objects", return_value=DirectoryObjects(objects, "objects")),
    ):
        try:
            rebuild_room.rebuild(str(world.root))
        finally:
            files.after_operation = objects.after_operation = None


def check_rebuilt(
    world: VaultWorld,
    look: RebuildLook,
    files: CrashStorage,
    objects: CrashStorage,
    looks: list[RebuildLook] | None = None,
) -> None:
    """The old catalog with its log, or the new one without, or none; making it again gives all of it, as before.

    `looks`: at the first time that it is made again."""
    old, expected = world.catalogs[-1], tables_of(MemoryCatalog(world.catalogs[-1]))
    if files.exists(CATALOG_FILE):
        content = read_whole(files, CATALOG_FILE)
        if content == old:
            assert files.exists(_WAL_FILE), "the old catalog has lost its log"
        else:
            assert not files.exists(_WAL_FILE), "the new catalog lies beside the log of the old one"
            assert _tables_in(content) == expected, "I3: the new catalog is not whole"
    for watched in (looks, None):
        rebuild(world, files, objects, watched)
        made = MemoryCatalog(read_whole(files, CATALOG_FILE))
        check_restrictions(made)
        assert tables_of(made) == expected, "I3: made again, it differs"
        assert files.names("") == [CATALOG_FILE]


def _tables_in(content: bytes) -> Tables | None:
    """None if that is no catalog; SQLite calls an empty one a lack of memory."""
    try:
        return tables_of(MemoryCatalog(content))
    except (AsrfsError, sqlite3.Error, MemoryError):
        return None


def check_restrictions(catalog: Catalog) -> None:
    """I6: who was shut out stays out."""
    assert catalog.machine(REVOKED).revoked, "I6: a revoked machine may come back"
    assert catalog.machine(SUPERSEDED).epoch == 2, "I6: a superseded side may write again"


def tables_of(catalog: MemoryCatalog) -> Tables:
    return {name: catalog.table(name) for name in REBUILDABLE}
