"""A vault whose catalog is a file on a `CrashStorage`, so that making it again can lose power at each of its steps.

SQLite's part is taken for granted: what it was told to commit is in its file and durable when the file is closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

from asrfs.storage.interface import read_whole
from replica_store.vault import rebuild as rebuild_room
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import CATALOG_FILE
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.vault_world import VaultWorld

Tables = dict[str, list[tuple[object, ...]]]
_WAL_FILE = f"{CATALOG_FILE}-wal"
OLD_LOG = b"what the old catalog has not taken over yet"


@dataclass(frozen=True)
class RebuildLook:
    kind: str
    name: str
    files: CrashStorage
    objects: CrashStorage


class FileCatalog(MemoryCatalog):
    """A new catalog that is in its file once it is closed."""

    files: CrashStorage
    name: str

    def close(self) -> None:
        file = self.files.create(self.name)
        file.write_at([self.content()], 0)
        file.datasync()
        file.close()
        super().close()


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


def rebuild(world: VaultWorld, files: CrashStorage, objects: CrashStorage, looks: list[RebuildLook] | None) -> None:
    """`replica-store rebuild`, looked at after each of its operations."""

    def create(path: str) -> FileCatalog:
        catalog = FileCatalog()
        catalog.files, catalog.name = files, path
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


def check_rebuilt(world: VaultWorld, look: RebuildLook, files: CrashStorage, objects: CrashStorage) -> None:
    """The old catalog with its log, or the new one without, or none; making it again gives all of it, as before."""
    old, expected = world.catalogs[-1], tables_of(MemoryCatalog(world.catalogs[-1]))
    if files.exists(CATALOG_FILE):
        content = read_whole(files, CATALOG_FILE)
        if content == old:
            assert files.exists(_WAL_FILE), "the old catalog has lost its log"
        else:
            assert not files.exists(_WAL_FILE), "the new catalog lies beside the log of the old one"
            assert tables_of(MemoryCatalog(content)) == expected, "I3: the new catalog is not whole"
    for _ in range(2):
        rebuild(world, files, objects, None)
        assert tables_of(MemoryCatalog(read_whole(files, CATALOG_FILE))) == expected, "I3: made again, it differs"
        assert files.names("") == [CATALOG_FILE]


def tables_of(catalog: MemoryCatalog) -> Tables:
    return {name: catalog.table(name) for name in REBUILDABLE}
