"""Bugs on purpose inside processes of their own: a level's process names one, every process it starts has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from threading import current_thread
from typing import Any

from asrfs.journal.next_segment import NextSegment
from asrfs.journal.writer import Journal
from asrfs.storage import directory
from asrfs.storage.interface import Bytes, File

PLANT = "ASRFS_PROOF_PLANT"
HELD_MAX = 64


def answer_before_append() -> None:
    """Records are written when there are many, or somebody reads or syncs: a kill loses answered writes."""
    roll, commit, close = Journal._roll, Journal._commit, Journal.close
    read_locked, read_into_locked = Journal.read_locked, Journal.read_into_locked

    def flush(journal: Any) -> None:
        held, journal.held = getattr(journal, "held", []), []
        for write_at, buffers, at in held:
            write_at(buffers, at)

    def roll_lazily(journal: Any) -> None:
        flush(journal)
        roll(journal)
        write_at = journal._write_at

        def hold(buffers: Sequence[Bytes], at: int) -> None:
            if len(journal.held) >= HELD_MAX:
                flush(journal)
            journal.held.append((write_at, tuple(map(bytes, buffers)), at))

        journal._write_at = hold

    def flush_before(method: Callable[..., Any], takes_lock: bool) -> Callable[..., Any]:
        def wrapped(journal: Any, *arguments: Any) -> Any:
            if takes_lock:
                with journal.lock:
                    flush(journal)
            else:
                flush(journal)
            return method(journal, *arguments)

        return wrapped

    Journal._roll = roll_lazily  # type: ignore[method-assign]
    Journal.read_locked = flush_before(read_locked, False)  # type: ignore[method-assign]
    Journal.read_into_locked = flush_before(read_into_locked, False)  # type: ignore[method-assign]
    Journal._commit = flush_before(commit, True)  # type: ignore[method-assign]
    Journal.close = flush_before(close, True)  # type: ignore[method-assign]


def never_sync() -> None:
    """fdatasync of a file does nothing: only a power cut shows it."""
    directory.OpenFile.datasync = lambda file: None  # type: ignore[method-assign]


def names_never_sync() -> None:
    """fsync of a directory does nothing, in every process."""
    directory.DirectoryStorage.sync_directory = lambda storage, name: None  # type: ignore[method-assign]


def name_of_next_segment_never_syncs() -> None:
    """The thread that makes the next segment's file ahead does not make its name durable."""
    make = NextSegment._make

    class WithoutSync(directory.DirectoryStorage):
        def sync_directory(self, directory: str) -> None:
            """Nothing."""

    def make_unsynced(self: Any, number: int) -> File:
        if current_thread().name != "journal-next":
            return make(self, number)
        storage, self._storage = self._storage, WithoutSync(self._storage.root)
        try:
            return make(self, number)
        finally:
            self._storage = storage

    NextSegment._make = make_unsynced  # type: ignore[method-assign]


def catalog_never_syncs() -> None:
    """SQLite is told not to sync."""
    from replica_store.vault.catalog import Catalog  # hosts' processes do not have it

    opened = Catalog.__init__

    def open_unsynced(self: Any, path: str, *, writable: bool) -> None:
        opened(self, path, writable=writable)
        self._connection.execute("PRAGMA synchronous = OFF")

    Catalog.__init__ = open_unsynced  # type: ignore[method-assign]


def acknowledge_before_object_is_synced() -> None:
    """An object is linked, catalogued and acknowledged while its bytes are in memory."""
    from replica_store.vault.directory_objects import DirectoryObjects

    def write_new(self: Any, temporary: str, pieces: Sequence[Bytes]) -> None:
        file = self._storage.create(temporary)
        file.write_at(pieces, 0)
        file.close()

    DirectoryObjects._write_new = write_new  # type: ignore[method-assign]


PLANTS: Mapping[str, Callable[[], None]] = {
    "answer-before-append": answer_before_append,
    "never-sync": never_sync,
    "names-never-sync": names_never_sync,
    "name-of-next-segment-never-syncs": name_of_next_segment_never_syncs,
    "catalog-never-syncs": catalog_never_syncs,
    "acknowledge-before-object-is-synced": acknowledge_before_object_is_synced,
}


def apply_named() -> None:
    """Change the product in this process as the environment says."""
    name = os.environ.get(PLANT)
    if name:
        PLANTS[name]()
