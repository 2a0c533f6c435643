"""A catalog in memory that remembers its state after every transaction, each of which a crash can set it back to.

SQLite is the real one, with the real tables. What power loss means for it is that it stays as it was after its last
transaction, is set back to an older state, or is gone and made again from the objects.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replica_store.vault.catalog import Catalog
from replica_store.vault.schema import TABLES, VERSION


class MemoryCatalog(Catalog):
    """`content` None makes a new one. `on_commit` is called when a transaction has become durable."""

    def __init__(self, content: bytes | None = None) -> None:
        self.path = "catalog in memory"
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        if content is None:
            self._connection.executescript(f"BEGIN; {TABLES}; PRAGMA user_version = {VERSION}; COMMIT;")
        else:
            self._connection.deserialize(content)
        self._connection.execute("PRAGMA foreign_keys = ON")
        self.commits = [self.content()]
        self.on_commit: Callable[[], None] | None = None

    def content(self) -> bytes:
        return self._connection.serialize()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
        self.commits.append(self.content())
        if self.on_commit is not None:
            self.on_commit()
