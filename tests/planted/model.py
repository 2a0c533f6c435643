"""Bugs for the model level: what threads do to each other, and what a broken connection does to an exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from asrfs.disk.interface import check_extent
from asrfs.format import map_checkpoint
from asrfs.format.log_object import ObjectHeader, decode_object_header
from asrfs.format.map_checkpoint import MapHeader, SealedMap
from asrfs.format.object_index import Index
from asrfs.format.record import WriteFrame
from asrfs.journal.block_map import BlockMap
from asrfs.journal.columns import Table
from asrfs.journal.disk import JournaledDisk
from asrfs.journal.writer import Journal
from asrfs.model.extents import BLOCK_BYTES, widen_to_blocks
from asrfs.protocol.session import ObjectReceived
from asrfs.replication import folding, stretch_reader
from asrfs.storage.interface import Bytes
from replica_store.ingest import ingester as ingester_room
from replica_store.ingest.ingester import Checked, Ingester, Position
from replica_store.points import builder, kept_maps, map_maker
from replica_store.points.extent_map import without_zeros
from replica_store.points.history import History, LogObject
from replica_store.points.run import Run
from replica_store.vault import scrub, survey
from replica_store.vault.contents import entry_of
from replica_store.vault.map_files import MapName
from replica_store.vault.rows import Entry
from tests.planted import Plant
from tests.planted.crash import promises_what_came_meanwhile

_CASES = 1_000


def edges_read_without_the_lock(patch: pytest.MonkeyPatch) -> None:
    """What lies beside an unaligned write is read first and written back later."""

    def write_slowly(self: JournaledDisk, offset: int, payload: Bytes) -> None:
        check_extent(offset, len(payload), self.size_bytes)
        start, length = widen_to_blocks(offset, len(payload), self.size_bytes)
        content = self.read(start, length)
        content[offset - start : offset - start + len(payload)] = payload
        with self._lock:
            self._write_locked(start, content)

    patch.setattr(JournaledDisk, "_write_slowly", write_slowly)


def maps_dropped_too_early(patch: pytest.MonkeyPatch) -> None:
    """A segment more than is applied leaves the maps: its blocks are read from the image."""

    sound = Journal.drop_through

    def drop_through(self: Journal, segment: int, maps: Iterable[BlockMap]) -> None:
        sound(self, segment + 1, maps)

    patch.setattr(Journal, "drop_through", drop_through)


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

    def check(self: Ingester, received: ObjectReceived, position: Position) -> Checked | None:
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


def writes_together_noted_in_another_order(patch: pytest.MonkeyPatch) -> None:
    """A turn of writes is journaled in another order than its blocks are noted."""
    sound = Journal.append_framed_locked

    def append(self: Journal, writes: Sequence[tuple[int, int, WriteFrame]]) -> int | None:
        return sound(self, writes[::-1])

    patch.setattr(Journal, "append_framed_locked", append)


def checkpoint_of_another_history(patch: pytest.MonkeyPatch) -> None:
    """A map checkpoint is believed whatever history it was made of."""
    for room in (kept_maps, map_maker):
        patch.setattr(room, "is_of_history", lambda history, machine_id, lsn, digest: True)


def checkpoint_with_a_broken_seal(patch: pytest.MonkeyPatch) -> None:
    """What a map checkpoint's seals hold is believed although they are broken."""

    def make(self: SealedMap, header: MapHeader, head: bytes, key: bytes, where: str) -> None:
        sound(self, header, head, key, where)
        keys[self] = key

    def open_part(self: SealedMap, i: int, sealed: bytes) -> bytes:
        counter = map_checkpoint._nonce(i) + (2).to_bytes(4, "big")  # as GCM counts, without its tag
        return Cipher(AES(keys[self]), CTR(counter)).decryptor().update(sealed[:-16])

    keys: dict[SealedMap, bytes] = {}
    sound = SealedMap.__init__
    patch.setattr(SealedMap, "__init__", make)
    patch.setattr(SealedMap, "_open", open_part)


def checkpoints_need_not_follow(patch: pytest.MonkeyPatch) -> None:
    """A disk is read through checkpoints between which records are missing."""

    def following(names: Iterable[MapName], lsn: int) -> list[MapName]:
        return sorted((name for name in names if lsn <= name.after_lsn), key=lambda name: -name.lsn)

    patch.setattr(kept_maps, "following", following)


def checkpoint_forgets_discards(patch: pytest.MonkeyPatch) -> None:
    """A run over older ones is kept without its zeros."""
    sound = kept_maps.keep_run

    def keep(history: History, machine_id: str, slot: int, run: Run) -> MapName:
        return sound(history, machine_id, slot, replace(run, extents=without_zeros(run.extents)))

    patch.setattr(map_maker, "keep_run", keep)


def _plant(apply: Callable[[pytest.MonkeyPatch], None], part: str, shows: str) -> Plant:
    text = (apply.__doc__ or "").strip()
    return Plant(f"model-{apply.__name__.replace('_', '-')}", text, "model", _CASES, apply, shows=shows, only=(part,))


def _plant_for(test: str, apply: Callable[[pytest.MonkeyPatch], None], shows: str) -> Plant:
    return Plant(apply.__name__.replace("_", "-"), (apply.__doc__ or "").strip(), test, 1, apply, shows=shows)


_FOLDED = "tests/t3_model/test_folded_backlog.py::test_i5_i9_a_folded_backlog_is_exact_wherever_there_is_a_state"
_NOT_EXACT = "I9: slot|does not have the log object"


def cut_inside_a_stretch(patch: pytest.MonkeyPatch) -> None:
    """A stretch is read like any other object: up to the record that is asked for."""
    sound = builder.check_whole

    def check(rows: Sequence[LogObject], after_lsn: int, lsn: int) -> None:
        sound(rows, after_lsn, max(lsn, rows[-1].last_lsn) if rows else lsn)

    def records(index: Index, after_lsn: int, lsn: int) -> slice:
        return slice(int(np.searchsorted(index.lsn, after_lsn + 1)), int(np.searchsorted(index.lsn, lsn + 1)))

    patch.setattr(builder, "check_exists", lambda lsn, found: None)
    patch.setattr(builder, "check_whole", check)
    patch.setattr(builder, "_records_of", records)


def gap_object_opens_no_gap(patch: pytest.MonkeyPatch) -> None:
    """What a stretch says of disks is taken for what the catalog knows already."""

    def entry(header: ObjectHeader, *arguments: Any) -> Entry:
        made = entry_of(header, *arguments)
        return replace(made, disks=()) if header.is_stretch and not header.frame_count else made

    for room in (ingester_room, survey, scrub):
        patch.setattr(room, "entry_of", entry)


def folds_through_points(patch: pytest.MonkeyPatch) -> None:
    """A stretch goes on behind a marker."""
    patch.setattr(stretch_reader, "_up_to_marker", lambda part: (part.headers, False))


def folds_without_skipping(patch: pytest.MonkeyPatch) -> None:
    """A record whose first blocks are left out is sent with the bytes of these."""

    def fold(headers: Table) -> folding.Kept:
        kept = folding.fold(headers)
        return kept._replace(skipped=np.zeros_like(kept.skipped))

    patch.setattr(stretch_reader, "fold", fold)


PLANTS = (
    _plant(checkpoint_of_another_history, "maps", _NOT_EXACT),
    _plant(checkpoint_with_a_broken_seal, "maps", _NOT_EXACT),
    _plant(checkpoints_need_not_follow, "maps", _NOT_EXACT),
    _plant(checkpoint_forgets_discards, "maps", _NOT_EXACT),
    _plant(edges_read_without_the_lock, "threads", "is not what was asked for|was read as it was at no LSN"),
    _plant(maps_dropped_too_early, "threads", "is not what was asked for|was read as it was at no LSN"),
    _plant(writes_together_noted_in_another_order, "threads", "was read as it was at no LSN|is not what was asked for"),
    _plant(discard_leaves_its_edges, "threads", "were journaled"),
    _plant(promises_what_came_meanwhile, "threads", "was durable|was promised|is missing or damaged"),
    _plant(session_of_an_object_not_compared, "pair", "an old object was acknowledged"),
    _plant(cut_inside_a_stretch, "store", "no state that may be shown"),
    _plant(gap_object_opens_no_gap, "pair", "I5"),
    _plant_for(_FOLDED, folds_through_points, "cannot be those of a stretch|points never vanish"),
    _plant_for(_FOLDED, folds_without_skipping, "I9: disk"),
    _plant(acknowledges_without_a_row, "pair", "what was acknowledged is not there|refused although"),
)
