"""Loads above the disks: each keeps account of what was acknowledged, and an error of any request is a violation."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until

PAUSE_S = 0.004
"""Between two bursts of stamped writes: there is more on this machine than the load."""


class StampLoad:
    """Stamped writes in a thread, an fsync after every so many; `on_synced` is told the last operation it covered."""

    def __init__(
        self,
        stamper: Stamper,
        paths: Sequence[Path],
        *,
        fsync_every: int = 16,
        on_synced: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.stamper = stamper
        self.writer = StampWriter(stamper, paths)
        self._paths = paths
        self._fsync_every = fsync_every
        self._on_synced = on_synced
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, count: int, what: str, seconds_max: float = 30.0) -> None:
        """Wait until `count` more writes are done."""
        goal = self.writer.done + count
        wait_until(lambda: self.writer.done >= goal or self._error, seconds_max, what)
        self.check_alive()

    def check_alive(self) -> None:
        assert self._error is None, f"I2/I8: a write failed above: {self._error!r}"

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No write is under way within the block."""
        with self._turn:
            yield
        self.check_alive()

    def check(self) -> int:
        """The disks as they can be read now are exactly what was written; how many operations that are."""
        with self.quiet():
            return self.stamper.check(self._paths, exactly=self.writer.done)

    def stop(self) -> int:
        """End the writing; the number of the last operation, all of them durable."""
        self._stop.set()
        self._thread.join()
        self.check_alive()
        self.writer.fsync()
        self.writer.close()
        return self.writer.done

    def abandon(self) -> None:
        """End the writing whatever it comes to: the disks may be gone."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.writer.close()

    def _run(self) -> None:
        try:
            while not self._stop.wait(PAUSE_S):
                with self._turn:
                    done = self.writer.write(self._fsync_every)
                    self.writer.fsync()
                    self._on_synced(done)
        except BaseException as error:
            self._error = error


class SqliteLoad:
    """Rows 1, 2, 3, … in a table, each in a transaction of its own, in a thread. `acknowledged`: the last one."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self.mode = mode
        self.acknowledged = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, count: int, what: str, seconds_max: float = 30.0) -> None:
        """Wait until `count` more rows are there."""
        goal = self.acknowledged + count
        wait_until(lambda: self.acknowledged >= goal or self._error, seconds_max, what)
        assert self._error is None, f"I2/I8: a transaction failed: {self._error!r}"

    def stop(self) -> int:
        """End the writing; the last row that was acknowledged."""
        self.abandon()
        assert self._error is None, f"I2/I8: a transaction failed: {self._error!r}"
        return self.acknowledged

    def abandon(self) -> None:
        """End the writing whatever it comes to."""
        self._stop.set()
        self._thread.join()

    @staticmethod
    def row(number: int) -> bytes:
        return number.to_bytes(8, "big") * (1 + number % 97)

    @classmethod
    def check(cls, path: Path, at_least: int) -> int:
        """The database is whole and holds rows 1 to some n that is not below `at_least`; n."""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            said = connection.execute("PRAGMA integrity_check").fetchall()
            assert said == [("ok",)], f"SQLite: {said}"
            rows = connection.execute("SELECT number, content FROM rows ORDER BY number").fetchall()
        assert len(rows) >= at_least, f"I2: row {at_least} was acknowledged, {len(rows)} are there"
        for expected, (number, content) in enumerate(rows, 1):
            assert (number, content) == (expected, cls.row(expected)), f"row {expected} is row {number}"
        return len(rows)

    def _run(self) -> None:
        try:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.execute(f"PRAGMA journal_mode={self.mode}")
                # FULL does not sync the directory behind the unlink of a rollback journal, which commits there.
                connection.execute("PRAGMA synchronous=EXTRA")
                connection.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, content BLOB)")
                number = self.acknowledged
                while not self._stop.is_set():
                    number += 1
                    connection.execute("INSERT INTO rows VALUES (?, ?)", (number, self.row(number)))
                    self.acknowledged = number
        except BaseException as error:
            self._error = error
