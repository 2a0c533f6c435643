"""A catalog in memory that remembers its state after every transaction, each of which a crash can set it back to.

SQLite is the real one, with the real tables. What power loss means for it is that it stays as it was after its last
transaction, is set back to an older state, or is gone and made again from the objects.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache

from replica_store.vault.catalog import Catalog
from replica_store.vault.schema import TABLES, VERSION


def open_catalog(content: bytes) -> sqlite3.Connection:
    """A new connection to a catalog with this content.

    One that has been used is never given another content: SQLite frees its tables then, but does not expire the
    statements that were prepared for them. The module keeps such statements, and their next run reads freed memory:
    it checks types by another table's columns, or ends the process.
    """
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.deserialize(content)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class MemoryCatalog(Catalog):
    """`content` None makes a new one. `on_commit` is called when a transaction has become durable."""

    def __init__(self, content: bytes | None = None) -> None:
        self.path = "catalog in memory"
        self._lock = threading.RLock()
        self._connection = open_catalog(_empty() if content is None else content)
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


@cache
def _empty() -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(f"BEGIN; {TABLES}; PRAGMA user_version = {VERSION}; COMMIT;")
        return connection.serialize()
