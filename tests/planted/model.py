"""Bugs for the model level: what threads do to each other, and what a broken connection does to an exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest

from asrfs.disk.interface import check_extent
from asrfs.format.log_object import decode_object_header
from asrfs.journal.disk import JournaledDisk
from asrfs.journal.writer import Journal
from asrfs.model.extents import BLOCK_BYTES, widen_to_blocks
from asrfs.protocol.session import ObjectReceived
from asrfs.storage.interface import Bytes
from replica_store.ingest.ingester import Ingester, Position
from replica_store.vault.rows import Entry
from tests.fakes import journal_race
from tests.planted import Plant
from tests.planted.crash import promises_what_came_meanwhile


def edges_read_without_the_lock(patch: pytest.MonkeyPatch) -> None:
    """What lies beside an unaligned write is read first and written back later."""

    def write_slowly(self: JournaledDisk, offset: int, payload: Bytes) -> None:
        check_extent(offset, len(payload), self.size_bytes)
        start, length = widen_to_blocks(offset, len(payload), self.size_bytes)
        content = bytearray(b"".join(bytes(piece) for piece in self.read(start, length)))
        content[offset - start : offset - start + len(payload)] = payload
        with self._lock:
            self._write_locked(start, content)

    patch.setattr(JournaledDisk, "_write_slowly", write_slowly)


def maps_dropped_too_early(patch: pytest.MonkeyPatch) -> None:
    """A segment more than is applied leaves the maps: its blocks are read from the image."""

    def drop_applied(journal: Journal, disks: Iterable[JournaledDisk], segment: int) -> None:
        journal.drop_through(segment + 1, [disk.map for disk in disks])

    patch.setattr(journal_race, "drop_applied", drop_applied)


def discard_leaves_its_edges(patch: pytest.MonkeyPatch) -> None:
    """Only the whole blocks of an unaligned discard become zeros."""
    sound = JournaledDisk._zeros

    def zeros(self: JournaledDisk, kind: int, offset: int, length: int) -> None:
        first = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
        last = (offset + length) // BLOCK_BYTES * BLOCK_BYTES
        if first < last:
            sound(self, kind, first, last - first)

    patch.setattr(JournaledDisk, "_zeros", zeros)


def session_of_an_object_not_compared(patch: pytest.MonkeyPatch) -> None:
    """What was sealed for a connection before this one is taken if it fits."""
    sound = Ingester._check

    def check(self: Ingester, received: ObjectReceived, position: Position) -> Entry | None:
        mine, self._salt = self._salt, decode_object_header(received.content, "received").session_salt
        try:
            return sound(self, received, position)
        finally:
            self._salt = mine

    patch.setattr(Ingester, "_check", check)


def acknowledges_without_a_row(patch: pytest.MonkeyPatch) -> None:
    """The catalog learns of a batch when the next one comes."""
    sound = Ingester._catalogue
    waiting: dict[int, list[Entry]] = {}

    def catalogue(self: Ingester, entries: Sequence[Entry]) -> None:
        before = waiting.pop(id(self), [])
        waiting[id(self)] = list(entries)
        if before:
            sound(self, before)

    patch.setattr(Ingester, "_catalogue", catalogue)


def _plant(apply: Callable[[pytest.MonkeyPatch], None], part: str, cases: int, shows: str) -> Plant:
    text = (apply.__doc__ or "").strip()
    return Plant(f"model-{apply.__name__.replace('_', '-')}", text, "model", cases, apply, shows=shows, only=(part,))


PLANTS = (
    _plant(edges_read_without_the_lock, "threads", 40, "is not what was asked for|was read as it was at no LSN"),
    _plant(maps_dropped_too_early, "threads", 10, "is not what was asked for|was read as it was at no LSN"),
    _plant(discard_leaves_its_edges, "threads", 10, "were journaled"),
    _plant(promises_what_came_meanwhile, "threads", 30, "was durable|was promised|is missing or damaged"),
    _plant(session_of_an_object_not_compared, "pair", 60, "an old object was acknowledged"),
    _plant(acknowledges_without_a_row, "pair", 10, "what was acknowledged is not there|refused although"),
)
