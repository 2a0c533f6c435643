"""The catalog: what the vault holds, in SQLite (WAL, synchronous=FULL). The only SQL of the project is in this room.

It is an index of the objects, durable before anything in it is acknowledged (I3) or listed (I5). `serve` writes; the
other commands open their own connections beside it. One connection may be used by several threads: a lock keeps their
statements apart, and no statement is left open when a method returns.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from asrfs.errors import AsrfsError, IntegrityError, NoSpaceError, NotFoundError, RefusedError, TemporaryError
from asrfs.model.machine import DiskRecord
from asrfs.model.marker import completed, encode_marker
from replica_store.vault.point_columns import POINT_COLUMNS, columns_of, point_of
from replica_store.vault.row_checks import (
    checked_disk,
    checked_link,
    checked_lsn,
    checked_machine,
    checked_object,
)
from replica_store.vault.rows import DiskRow, Entry, LinkRow, MachineRow, ObjectRow, PointRow
from replica_store.vault.schema import TABLES, UPGRADES, VERSION

BUSY_S = 15.0

_MACHINE = "id, name, epoch, serial, revoked, enrolled_ns, generation, sealed_keys"
_OBJECT = "machine_id, epoch, first_lsn, last_lsn, first_time_ns, last_time_ns, digest, length, nonce, is_stretch"
_DISK = "slot, id, name, size_bytes, removed, gap, boot"


class Catalog:
    """An open catalog file. Errors of SQLite leave this class in our own words."""

    def __init__(self, path: str, *, writable: bool) -> None:
        """Open an existing catalog. Raises IntegrityError if there is none or it is damaged."""
        self.path = path
        self._lock = threading.RLock()
        if not os.path.exists(path):
            raise IntegrityError(f"{path}: the vault has no catalog: make it again with `replica-store rebuild`")
        with self._errors():
            _upgrade(path)
            self._connection = _connect(path, "rw" if writable else "ro")
            if writable:
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA foreign_keys = ON")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            self.close()
            raise RefusedError(f"{path}: catalog version {version} is not known to this program: use the one it is of")

    @classmethod
    def create(cls, path: str) -> Catalog:
        """A new empty catalog. `path` must not exist."""
        if os.path.exists(path):
            raise RefusedError(f"{path}: there is a catalog already")
        try:
            connection = _connect(path, "rwc")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(f"BEGIN; {TABLES}; PRAGMA user_version = {VERSION}; COMMIT;")
            connection.close()
            os.chmod(path, 0o600)
        except sqlite3.Error as error:
            raise _translated(path, error) from None
        return cls(path, writable=True)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def fold(self) -> None:
        """Put all of SQLite's write-ahead log into the file, durably, so that the file alone is the whole catalog.

        Closing does that, too, but says nothing when it fails. Raises TemporaryError while somebody reads an older
        state.
        """
        ((is_busy, _, _),) = self.select("PRAGMA wal_checkpoint(TRUNCATE)")
        if is_busy:
            raise TemporaryError(f"{self.path}: somebody reads the catalog that is being made: try again")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written inside is durable when this ends, or, when anything is raised, is not there."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside is of one moment, whatever others write meanwhile. Not inside `transaction`."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def select(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows. For this room's modules only."""
        with self._lock, self._errors():
            return self._connection.execute(statement, parameters).fetchall()

    def change(self, statement: str, parameters: Sequence[Any] = ()) -> int:
        """Rows changed. For this room's modules only, inside `transaction`."""
        with self._lock, self._errors():
            assert self._connection.in_transaction, "changes belong into a transaction"
            return self._connection.execute(statement, parameters).rowcount

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: SQLite's words about a file of junk
            raise _translated(self.path, error) from None

    def check(self) -> list[str]:
        """What SQLite itself finds wrong with the file; empty if nothing."""
        found = [str(row[0]) for row in self.select("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def check_whole(self) -> None:
        """Raise IntegrityError if SQLite finds anything wrong: before writing, so that damage does not spread."""
        if found := self.check():
            raise IntegrityError(
                f"{self.path}: the catalog is damaged ({found[0]}): make it again with `replica-store rebuild`"
            )

    # ---- when points came -----------------------------------------------------------------------------------

    def note_appeared(self, points: Iterable[PointRow], now_ns: int) -> None:
        """These have just come. Inside the transaction that appends them."""
        newest = {point.consistency: point for point in sorted(points, key=lambda point: point.lsn)}
        for kind, point in newest.items():
            self.change(
                "INSERT OR REPLACE INTO appeared (machine_id, consistency, lsn, seen_ns) VALUES (?, ?, ?, ?)",
                (point.machine_id, kind, point.lsn, now_ns),
            )

    def appeared(self, machine_id: str) -> dict[int, int]:
        """When the newest point of each kind came, store's clock, by the point's LSN."""
        rows = self.select("SELECT lsn, seen_ns FROM appeared WHERE machine_id = ?", (machine_id,))
        return {lsn: seen_ns for lsn, seen_ns in rows if isinstance(lsn, int) and isinstance(seen_ns, int)}

    # ---- what hosts are told --------------------------------------------------------------------------------

    def configuration_generation(self) -> int:
        """A number that is higher after each change of what hosts are told; cheap to ask."""
        rows = self.select("SELECT number FROM generations WHERE what = 'configuration'")
        number = rows[0][0] if rows else 0
        if not isinstance(number, int) or number < 0:
            raise IntegrityError(f"{self.path}: the generation {number!r} cannot be")
        return number

    def raise_configuration_generation(self, least: int = 0) -> int:
        """The next one, above `least`, too. Inside the transaction that changes what hosts are told."""
        number = max(self.configuration_generation(), least) + 1
        self.change("INSERT OR REPLACE INTO generations VALUES ('configuration', ?)", (number,))
        return number

    def table(self, name: str) -> list[tuple[Any, ...]]:
        """A whole table in an order of its own, for comparing catalogs."""
        assert name.isidentifier()
        return sorted(self.select(f"SELECT * FROM {name}"), key=repr)  # noqa: S608 - a name of ours

    # ---- machines -------------------------------------------------------------------------------------------

    def machines(self) -> list[MachineRow]:
        """By name."""
        return [_machine(row) for row in self.select(f"SELECT {_MACHINE} FROM machines ORDER BY name")]  # noqa: S608

    def machine(self, name: str) -> MachineRow:
        """Raises NotFoundError."""
        for row in self.select(f"SELECT {_MACHINE} FROM machines WHERE name = ?", (name,)):  # noqa: S608
            return _machine(row)
        raise NotFoundError(f"the store knows no machine {name!r}: see `replica-store machine list`")

    def machine_by_id(self, machine_id: str) -> MachineRow | None:
        rows = self.select(f"SELECT {_MACHINE} FROM machines WHERE id = ?", (machine_id,))  # noqa: S608
        return _machine(rows[0]) if rows else None

    def put_machine(self, row: MachineRow) -> None:
        """Make it or replace it. Inside a transaction."""
        values = (row.id, row.name, row.epoch, row.serial, row.revoked, row.enrolled_ns, row.generation)
        self.change(
            f"INSERT INTO machines ({_MACHINE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "  # noqa: S608
            "name = excluded.name, epoch = excluded.epoch, serial = excluded.serial, revoked = excluded.revoked, "
            "enrolled_ns = excluded.enrolled_ns, generation = excluded.generation, sealed_keys = excluded.sealed_keys",
            (*values, row.sealed_keys),
        )

    # ---- history --------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> None:
        """Add log objects to histories, each directly after what is there. Inside a transaction."""
        for entry in entries:
            row = entry.row
            last = self.last_object(row.machine_id)
            assert row.first_lsn == (last.last_lsn if last else 0) + 1, "I3: a history has no gap"
            self.change(
                f"INSERT INTO objects ({_OBJECT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                (
                    *(row.machine_id, row.epoch, row.first_lsn, row.last_lsn, row.first_time_ns, row.last_time_ns),
                    *(row.digest, row.length, row.nonce, row.is_stretch),
                ),
            )
            for disk in entry.disks:
                self._append_disk(disk)
            for point in entry.points:
                self._append_point(point)
            for last_word in entry.completions:
                self._complete_point(last_word)
            for confirming in entry.confirmations:
                self.change(
                    "INSERT INTO confirmations (machine_id, lsn, group_point, marker) VALUES (?, ?, ?, ?)",
                    (
                        *(confirming.machine_id, confirming.lsn, confirming.marker.group_point),
                        encode_marker(confirming.marker),
                    ),
                )

    def _append_disk(self, disk: DiskRow) -> None:
        record = disk.record
        newest = self.select(
            f"SELECT {_DISK} FROM disks WHERE machine_id = ? AND slot = ? ORDER BY lsn DESC LIMIT 1",  # noqa: S608
            (disk.machine_id, record.slot),
        )
        if newest and _disk_record(newest[0]) == record:
            return
        self.change(
            f"INSERT INTO disks (machine_id, lsn, {_DISK}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                *(disk.machine_id, disk.lsn, record.slot, record.id, record.name),
                *(record.size_bytes, record.removed, record.gap, record.boot),
            ),
        )

    def _append_point(self, point: PointRow) -> None:
        values = columns_of(point)
        places = ", ".join("?" * len(values))
        self.change(f"INSERT INTO points ({POINT_COLUMNS}) VALUES ({places})", values)  # noqa: S608

    def _complete_point(self, last_word: PointRow) -> None:
        """Once, and only a point that said it was unfinished."""
        statement = f"SELECT {POINT_COLUMNS} FROM points WHERE machine_id = ? AND lsn = ?"  # noqa: S608
        for row in self.select(statement, (last_word.machine_id, last_word.marker.completes)):
            point = point_of(row)
            if point.marker.unfinished and point.id == last_word.id:
                self.change("DELETE FROM points WHERE machine_id = ? AND lsn = ?", (point.machine_id, point.lsn))
                self._append_point(replace(point, marker=completed(point.marker, last_word.marker)))

    def last_object(self, machine_id: str) -> ObjectRow | None:
        """The newest log object of a machine."""
        rows = self.select(
            f"SELECT {_OBJECT} FROM objects WHERE machine_id = ? ORDER BY first_lsn DESC LIMIT 1",  # noqa: S608
            (machine_id,),
        )
        return checked_object(ObjectRow(*rows[0])) if rows else None

    def object_with(self, machine_id: str, lsn: int) -> ObjectRow | None:
        """The log object that holds record `lsn`, or stands for it."""
        rows = self.select(
            f"SELECT {_OBJECT} FROM objects WHERE machine_id = ? AND first_lsn <= ? "  # noqa: S608
            "ORDER BY first_lsn DESC LIMIT 1",
            (machine_id, _bounded(lsn)),
        )
        row = checked_object(ObjectRow(*rows[0])) if rows else None
        return row if row is not None and row.last_lsn >= lsn else None

    def objects_of(self, machine_id: str, up_to_lsn: int, after_lsn: int = 0) -> list[ObjectRow]:
        """Log objects with a record behind `after_lsn` and at or below `up_to_lsn`, in LSN order."""
        rows = self.select(
            f"SELECT {_OBJECT} FROM objects WHERE machine_id = ? AND first_lsn <= ? AND last_lsn > ? "  # noqa: S608
            "ORDER BY first_lsn",
            (machine_id, _bounded(up_to_lsn), _bounded(after_lsn)),
        )
        return [checked_object(ObjectRow(*row)) for row in rows]

    def space(self, machine_id: str) -> tuple[int, int]:
        """`(log objects, their bytes)` of a machine."""
        ((count, length),) = self.select(
            "SELECT COUNT(*), COALESCE(SUM(length), 0) FROM objects WHERE machine_id = ?", (machine_id,)
        )
        return count, length

    def disk_rows(self, machine_id: str) -> list[DiskRow]:
        """All changes of a machine's disks, in LSN order."""
        rows = self.select(
            f"SELECT lsn, {_DISK} FROM disks WHERE machine_id = ? ORDER BY lsn, slot",  # noqa: S608
            (machine_id,),
        )
        return [DiskRow(machine_id, checked_lsn(lsn), _disk_record(tuple(disk))) for lsn, *disk in rows]

    def points(self, machine_id: str) -> list[PointRow]:
        """All points received, listed or not, in LSN order."""
        statement = f"SELECT {POINT_COLUMNS} FROM points WHERE machine_id = ? ORDER BY lsn"  # noqa: S608
        return [point_of(row) for row in self.select(statement, (machine_id,))]

    # ---- links ----------------------------------------------------------------------------------------------

    def put_links(self, links: Sequence[LinkRow]) -> None:
        """Replace what is known of these hosts, in a transaction of its own."""
        with self.transaction():
            for link in links:
                self.change(
                    "INSERT OR REPLACE INTO links VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        *(link.machine_id, link.heard_ns, link.connected),
                        *(link.appended_lsn, link.durable_lsn, link.durable_time_ns),
                    ),
                )

    def link(self, machine_id: str) -> LinkRow | None:
        rows = self.select(
            "SELECT machine_id, heard_ns, connected, appended_lsn, durable_lsn, durable_time_ns "
            "FROM links WHERE machine_id = ?",
            (machine_id,),
        )
        return checked_link(LinkRow(rows[0][0], rows[0][1], bool(rows[0][2]), *rows[0][3:])) if rows else None


def _connect(path: str, mode: str) -> sqlite3.Connection:
    quoted = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(
        f"file:{quoted}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )


def _upgrade(path: str) -> None:
    """Bring an older catalog to this version, also for one who only reads. One of a later version is left alone."""
    connection = _connect(path, "ro")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    finally:
        connection.close()
    if version not in UPGRADES:
        return
    connection = _connect(path, "rw")
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()  # somebody else may have been first
        while version in UPGRADES:
            for statement in filter(str.strip, _without_comments(UPGRADES[version]).split(";")):
                connection.execute(statement)
            version += 1
        connection.execute(f"PRAGMA user_version = {version:d}")
        connection.execute("COMMIT")
    finally:
        connection.close()


def _without_comments(statements: str) -> str:
    return "\n".join(line.partition("--")[0] for line in statements.splitlines())


def _translated(path: str, error: Exception) -> AsrfsError:
    """An error of SQLite in our words: full, busy, or damaged."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return NoSpaceError(f"{path}: no space left: the catalog takes nothing more until there is")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return TemporaryError(f"{path}: the catalog was busy for {BUSY_S:g} s")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return IntegrityError(f"{path}: the catalog is damaged ({error}): make it again with `replica-store rebuild`")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return TemporaryError(f"{path}: {error}")
    return IntegrityError(f"{path}: {error}: make the catalog again with `replica-store rebuild`")


def _bounded(lsn: int) -> int:
    return min(lsn, (1 << 63) - 1)


def _machine(row: tuple[Any, ...]) -> MachineRow:
    machine_id, name, epoch, serial, revoked, *rest = row
    return checked_machine(MachineRow(machine_id, name, epoch, serial, bool(revoked), *rest))


def _disk_record(row: tuple[Any, ...]) -> DiskRecord:
    slot, disk_id, name, size_bytes, *flags, boot = row
    removed, gap = map(bool, flags)
    record = DiskRecord(slot=slot, id=disk_id, name=name, size_bytes=size_bytes, removed=removed, gap=gap, boot=boot)
    return checked_disk(record)
