"""The store of the simulation: real listener, sessions, ingester, vault and catalog; objects that can be lost.

The catalog is real SQLite in memory. A process that dies leaves what was committed: that is SQLite's promise with
`synchronous=FULL`, which the real kernel's levels put to the test.
"""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from asrfs.errors import AsrfsError
from asrfs.model.clock import Clock
from replica_store.ingest.listener import Listener
from replica_store.vault.catalog import Catalog
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.keys import MachineKeys, Sealer
from replica_store.vault.leaf_files import LeafFiles
from replica_store.vault.rows import MachineRow
from replica_store.vault.schema import TABLES, VERSION
from replica_store.vault.vault import Vault, VaultFile
from tests.fakes.comparing import InlineComparing
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.memory_catalog import open_catalog
from tests.fakes.wire import Wire, WireEnd
from tests.proof.sim.determinism import seeded_bytes
from tests.proof.sim.processes import CURRENT, Guard, Process
from tests.proof.sim.watch import Watch

MASTER_KEY = bytes(range(32))
TEMPLATE_SEED = 1


class MemoryCatalog(Catalog):
    """A catalog on a connection that outlives the process that uses it."""

    def __init__(self, connection: sqlite3.Connection, process: Process) -> None:
        self.path = "catalog.sqlite3"
        self._lock = threading.RLock()
        self._connection = connection
        self._process = process

    @contextmanager
    def transaction(self) -> Iterator[None]:
        process = CURRENT.get()
        if process is None:  # somebody at the store, not the process under test
            with super().transaction():
                yield
            return
        process.check()
        with super().transaction():
            yield
            process.step()  # dies before the commit
        process.step()  # or behind it

    def close(self) -> None:
        pass


def template_catalog(machines: list[tuple[str, str, str, MachineKeys]]) -> bytes:
    """A catalog that knows these machines: id, name, serial, keys."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(f"BEGIN; {TABLES}; PRAGMA user_version = {VERSION}; COMMIT;")
    catalog = MemoryCatalog(connection, Process("store", "template"))
    with seeded_bytes(random.Random(TEMPLATE_SEED)), catalog.transaction():
        for id, name, serial, keys in machines:
            sealed = Sealer(MASTER_KEY).seal_keys(id, keys)
            catalog.put_machine(MachineRow(id, name, 1, serial, False, 0, 1, sealed))
    return connection.serialize()


class Store:
    """`root` holds the master key. `run` keeps the process alive."""

    def __init__(self, root: Path, catalog: bytes, clock: Clock, rng: random.Random, watch: Watch) -> None:
        self._root = root
        self._clock = clock
        self._rng = rng
        self._watch = watch
        self.connection = open_catalog(catalog)
        self.storage = CrashStorage()
        self.process = Process("store", "store")
        self.listener: Listener | None = None
        self.vault: Vault
        self._nursery: trio.Nursery | None = None
        self.wires: list[WireEnd] = []
        self._old_catalog: bytes | None = None
        self._next_catalog: bytes | None = None
        self._vault_copy: tuple[bytes, CrashStorage] | None = None
        self._next_vault: tuple[bytes, CrashStorage] | None = None
        self.setbacks = 0
        """How often a backup has taken the place of catalog and objects."""
        self.in_doubt: set[str] = set()
        """Machines whose catalog is older than their objects until their next session."""
        self.is_short_of_space = False
        self.starts = 0
        self._adopt(self.storage)
        self.vault = self._open()

    def _adopt(self, storage: CrashStorage) -> None:
        self.storage = storage
        storage.inject(Guard())
        storage.after_operation = self._after_operation
        self._watch.count_lack_of_space(storage, "store full")

    def _after_operation(self, kind: str, name: str) -> None:
        self._watch.note("store", kind, name)
        process = CURRENT.get()
        if process is not None:
            process.step()

    def _open(self) -> Vault:
        objects = DirectoryObjects(self.storage, "objects")
        objects.sweep()
        catalog = MemoryCatalog(self.connection, self.process)
        vault = Vault(str(self._root), VaultFile(id="5" * 32, name="site-b"), objects, catalog)
        vault.leaves = LeafFiles(self.storage)
        return vault

    # ---- lives ----

    async def run(self) -> None:
        while True:
            self.process = Process("store", "store")
            await self.process.live(self._life)
            self.listener = self._nursery = None
            if self._next_vault is not None:
                self._begin_with_copy(*self._next_vault)
            if self._next_catalog is not None:
                self.connection = open_catalog(self._next_catalog)
                self.in_doubt = {machine.id for machine in self.vault.machines()}
                self._next_catalog = None
                self._watch.fired("catalog set back")
            await trio.sleep(self._rng.choice((0.0, 0.5, 3.0)))  # sleep: virtual, until it is started again

    def _begin_with_copy(self, catalog: bytes, objects: CrashStorage) -> None:
        self._next_vault = self._next_catalog = self._old_catalog = None
        self.connection = open_catalog(catalog)
        self.is_short_of_space, objects.capacity = False, None
        self._adopt(objects)
        self.vault = self._open()
        self.in_doubt = {machine.id for machine in self.vault.machines()}
        self.setbacks += 1
        self._watch.fired("vault set back")

    async def _life(self) -> None:
        self.starts += 1
        try:
            self.vault = self._open()
        except AsrfsError as error:
            self._watch.note("store", "cannot start", str(error))
            return
        self.listener = Listener(self.vault, self._clock)
        self.listener.comparing = InlineComparing(self.vault)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.listener.save_links)
            nursery.start_soon(self.listener.configurations.run)
            await trio.sleep_forever()

    @property
    def is_up(self) -> bool:
        return self.listener is not None and self._nursery is not None and not self.process.is_dead

    @property
    def changes(self) -> tuple[int, int]:
        """Something else whenever the catalog may be another one than before."""
        return self.starts, self.connection.total_changes

    def accept(self, wire: Wire, certificate: bytes) -> None:
        """A connection whose certificate was verified."""
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, wire.store, certificate)

    async def _serve(self, end: WireEnd, certificate: bytes) -> None:
        process, listener = self.process, self.listener
        assert listener is not None
        self.wires.append(end)
        with process.acting():
            try:
                await listener.handle(end, certificate, "memory")
            finally:
                end.close()
                self.wires.remove(end)

    def kill(self) -> None:
        """Its peers see the connections reset."""
        self.process.kill()
        for end in self.wires:
            end.wire.cut(lose=self._rng.random() < 0.5)

    def lose_power(self, fate: Fate, rng: random.Random) -> None:
        """Its peers see nothing."""
        after = self.storage.crash(fate, rng)
        after.capacity = None
        self.is_short_of_space = False
        self.process.kill()
        for end in self.wires:
            end.vanish()
        self._adopt(after)

    # ---- what an administrator may do ----

    @property
    def has_copy(self) -> bool:
        return self._old_catalog is not None

    def copy_catalog(self) -> None:
        """As a backup does."""
        self._old_catalog = self.connection.serialize()

    def set_catalog_back(self) -> None:
        """The next start finds the copy in the catalog's place. Objects stay as they are."""
        if self._old_catalog is not None:
            self._next_catalog, self._old_catalog = self._old_catalog, None
            self.kill()

    @property
    def has_vault_copy(self) -> bool:
        return self._vault_copy is not None

    def copy_vault(self) -> None:
        """A backup of all of it."""
        self._vault_copy = self.connection.serialize(), self.storage.crash(Fate.KEPT, self._rng)

    def set_vault_back(self) -> None:
        """The next start finds the backup: catalog and objects as they were."""
        if self._vault_copy is not None:
            self._next_vault, self._vault_copy = self._vault_copy, None
            self.kill()

    def raise_epoch(self, machine_id: str) -> None:
        """As a failover's commit does."""
        raise_epoch(self.vault, machine_id)
        self._old_catalog = self._next_catalog = None  # one from before would take the epoch back
        self._vault_copy = self._next_vault = None

    def is_settled(self, machine_id: str) -> bool:
        """Whether a session has taken in what the catalog did not know."""
        ingester = self.listener._ingesters.get(machine_id) if self.listener is not None else None
        return ingester is not None and ingester._settled
