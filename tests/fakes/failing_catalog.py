"""A catalog in memory whose statements fail as SQLite says that they may: SQLITE_IOERR and SQLITE_FULL.

After such an error SQLite may have ended the transaction by itself, or have left that to the caller. A COMMIT that
failed with an I/O error is in doubt: this process goes on as if it had never been, and the next start may find it
(`in_doubt`), because its frames may have reached the write-ahead log.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, cast

from tests.fakes.memory_catalog import MemoryCatalog, open_catalog

_TEXTS = {sqlite3.SQLITE_IOERR: "disk I/O error", sqlite3.SQLITE_FULL: "database or disk is full"}
_ASKING = ("SELECT", "PRAGMA", "BEGIN")


@dataclass
class CatalogFault:
    """The `at`-th (from 0) statement that can fail so, or it and all later ones. Only what writes finds no room."""

    at: int
    error: int
    for_ever: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    seen: int = 0
    fired: int = 0
    goes_on = False
    in_doubt: bytes | None = None
    """The catalog, if the last transaction was done that was said to have failed."""

    def strikes(self, statement: str) -> bool:
        if statement == "ROLLBACK" or (self.error == sqlite3.SQLITE_FULL and statement.startswith(_ASKING)):
            return False
        number, self.seen = self.seen, self.seen + 1
        strikes = number == self.at or (self.for_ever and number > self.at)
        self.fired += strikes
        return strikes


class FailingConnection:
    """Stands for the connection of a catalog."""

    def __init__(self, catalog: MemoryCatalog, fault: CatalogFault) -> None:
        self._catalog = catalog
        self._connection = catalog._connection
        self._fault = fault
        self._statements: list[tuple[str, Sequence[Any]]] = []
        """Those done of the transaction that is open."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        if self._fault.strikes(statement):
            self._end_transaction(statement)
            raise sqlite_error(self._fault.error)
        if statement == "COMMIT":
            self._fault.in_doubt = None
        if not self._connection.in_transaction:
            self._statements.clear()
        cursor = self._connection.execute(statement, parameters)
        self._statements.append((statement, parameters))
        return cursor

    def _end_transaction(self, statement: str) -> None:
        """What the error leaves of it."""
        if statement == "COMMIT" and self._fault.error == sqlite3.SQLITE_IOERR:
            self._fault.in_doubt = self._as_if_committed()
            self._connection.execute("ROLLBACK")
        elif self._connection.in_transaction and self._fault.rng.random() < 0.5:
            self._connection.execute("ROLLBACK")

    def _as_if_committed(self) -> bytes:
        """The catalog with this transaction, played again on a copy: the connection that goes on cannot be set back."""
        with closing(open_catalog(self._catalog.commits[-1])) as copy:
            for statement, parameters in [*self._statements, ("COMMIT", ())]:
                copy.execute(statement, parameters)
            return copy.serialize()


def fail(catalog: MemoryCatalog, fault: CatalogFault) -> CatalogFault:
    """From now on."""
    catalog._connection = cast(sqlite3.Connection, FailingConnection(catalog, fault))
    return fault


def sqlite_error(code: int) -> sqlite3.OperationalError:
    """As the module raises it."""
    error = sqlite3.OperationalError(_TEXTS[code])
    error.sqlite_errorcode = code
    return error
