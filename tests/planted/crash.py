"""Bugs that lose or forge bytes when power is lost or a disk fails: an order changed, a sync left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from asrfs.daemon.state import StateDirectory
from asrfs.format.record import CARRIES_EXTENT_BYTES, RecordHeader
from asrfs.journal import recovery
from asrfs.journal.next_segment import NextSegment
from asrfs.journal.writer import Journal
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.positions import Cursor
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from asrfs.replication import trimmer
from asrfs.replication.applier import Applier
from asrfs.replication.applier_round import DiskRound
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import File, Storage
from replica_store.ingest import ingester as ingester_room
from replica_store.ingest.ingester import Ingester, Taken
from replica_store.vault import rebuild
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.rows import Entry
from tests.fakes.applied_world import AppliedWorld
from tests.planted import Plant

_CASES = 3_500


def skip_the_fsync(patch: pytest.MonkeyPatch) -> None:
    def commit(self: Journal) -> None:
        with self.lock:
            self._unsynced.clear()
            self.durable_lsn = self.appended_lsn

    patch.setattr(Journal, "_commit", commit)


def sealed_segments_not_synced(patch: pytest.MonkeyPatch) -> None:
    sound = Journal._commit

    def commit(self: Journal) -> OSError | None:
        self._unsynced.clear()
        return sound(self)

    patch.setattr(Journal, "_commit", commit)


def segment_name_not_synced(patch: pytest.MonkeyPatch) -> None:
    def make(self: NextSegment, number: int) -> File:
        return self._rename_spare(number) or self._create(number)

    patch.setattr(NextSegment, "_make", make)


def recovery_does_not_sync(patch: pytest.MonkeyPatch) -> None:
    def finish(self: recovery._Recovery) -> None:
        for number in self._torn:
            self._set_free(number)

    patch.setattr(recovery._Recovery, "_finish", finish)


def recovery_does_not_write_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery._Recovery, "_write_again", lambda self, file, segment: None)


def corruption_is_cut(patch: pytest.MonkeyPatch) -> None:
    sound = recovery._Recovery.run

    def run(self: recovery._Recovery) -> recovery.Recovered:
        self._claim = 0
        return sound(self)

    patch.setattr(recovery._Recovery, "_believe", lambda self, durable_lsn, number: None)
    patch.setattr(recovery._Recovery, "run", run)


def failed_fsync_tried_again(patch: pytest.MonkeyPatch) -> None:
    """The second try says yes: the kernel has marked the pages clean."""

    def commit(self: Journal) -> None:
        with self.lock:
            target, files = self.appended_lsn, [*self._unsynced, (self._number, self._files[self._number])]
        for _, file in files:
            try:
                file.datasync()
            except (OSError, AssertionError):
                continue
        with self.lock:
            del self._unsynced[: len(files) - 1]
            self.durable_lsn = target

    patch.setattr(Journal, "_commit", commit)


def refused_write_left(patch: pytest.MonkeyPatch) -> None:
    def take_back(self: Journal, at: int) -> None:
        self._write_at = self._files[self._number].write_at

    patch.setattr(Journal, "_take_back", take_back)


def applier_steals(patch: pytest.MonkeyPatch) -> None:
    sound = AppliedWorld.apply_once
    patch.setattr(AppliedWorld, "apply_once", lambda self: sound(self, steal=True))
    patch.setattr("tests.fakes.journal_world.JournalWorld.sync", lambda self: None)


def applied_out_of_order(patch: pytest.MonkeyPatch) -> None:
    """Of two records of a block the older one wins."""
    sound = DiskRound.note

    def note(self: DiskRound, header: RecordHeader, payload: memoryview) -> None:
        older = dict(self.blocks)
        sound(self, header, payload)
        if header.kind in CARRIES_EXTENT_BYTES:
            first = header.offset // BLOCK_BYTES
            for block in range(first, first + -(-header.length // BLOCK_BYTES)):
                if block in older:
                    self.blocks[block] = older[block]

    patch.setattr(DiskRound, "note", note)


def position_before_image(patch: pytest.MonkeyPatch) -> None:
    def apply_span(self: Applier, durable_lsn: int) -> Cursor:
        cursor = self._positions.current.applied
        touched: set[int] = set()
        while cursor.lsn < durable_lsn:
            cursor = self._apply_round(cursor, durable_lsn, touched)
        self._positions.change(applied=cursor)
        self._positions.save()
        for slot in touched:
            image = self._images.image(slot)
            assert image is not None
            image.file.datasync()
        return cursor

    patch.setattr(Applier, "apply_span", apply_span)


def trim_before_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    def freeable(positions: PositionsFile, dropped: trimmer.Limit) -> trimmer.Limit:
        applied = positions.saved.applied
        return trimmer.Limit(min(dropped.lsn, applied.lsn), min(dropped.segment, applied.segment - 1))

    patch.setattr(trimmer, "freeable", freeable)


def found_names_not_settled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateDirectory, "settle", lambda self: None)


def acknowledged_before_durable(patch: pytest.MonkeyPatch) -> None:
    """Each batch is stored when the next one comes."""
    sound = Ingester.take

    def take(self: Ingester, batch: Sequence[ObjectReceived]) -> Taken:
        waiting: list[Sequence[ObjectReceived]] = self.__dict__.setdefault("waiting", [])
        if waiting:
            sound(self, waiting.pop())
        waiting.append(batch)
        return Taken([Acknowledge(lsn=each.begin.last_lsn, digest=each.content[-32:].hex()) for each in batch], None)

    patch.setattr(Ingester, "take", take)


def row_before_the_object(patch: pytest.MonkeyPatch) -> None:
    put, catalogue = DirectoryObjects.put, Ingester._catalogue
    waiting: list[tuple[Any, ...]] = []

    def put_later(self: DirectoryObjects, name: str, pieces: Sequence[bytes]) -> None:
        if "/log/" in name:
            waiting.append((self, name, pieces))
        else:
            put(self, name, pieces)

    def catalogue_first(self: Ingester, entries: Sequence[Entry]) -> None:
        catalogue(self, entries)
        while waiting:
            put(*waiting.pop(0))

    patch.setattr(DirectoryObjects, "put", put_later)
    patch.setattr(Ingester, "_catalogue", catalogue_first)


def object_name_not_synced(patch: pytest.MonkeyPatch) -> None:
    sound = DirectoryObjects.put

    def put(self: DirectoryObjects, name: str, pieces: Sequence[bytes]) -> None:
        with pytest.MonkeyPatch.context() as lazy:
            lazy.setattr(self._storage, "sync_directory", lambda directory: None)
            sound(self, name, pieces)

    patch.setattr(DirectoryObjects, "put", put)


def adopts_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ingester_room, "adopt", lambda vault, machine: [])


def log_removed_with_the_catalog(patch: pytest.MonkeyPatch) -> None:
    """Both names go before the directory is synced: the old catalog may come back without its log."""

    def remove(storage: Storage, name: str) -> None:
        for beside in rebuild._BESIDE:
            if storage.exists(name + beside):
                storage.unlink(name + beside)
        storage.sync_directory("")

    patch.setattr(rebuild, "_remove", remove)


PLANTS: tuple[Plant, ...] = (
    Plant("skip-fsync", "fsync is answered without a sync", "crash", _CASES, skip_the_fsync),
    Plant("sealed-not-synced", "fsync syncs the open segment only", "crash", _CASES, sealed_segments_not_synced),
    Plant("segment-name", "a segment is used before its name is durable", "crash", _CASES, segment_name_not_synced),
    Plant("recovery-sync", "recovery does not sync what it found", "crash", _CASES, recovery_does_not_sync),
    Plant("recovery-rewrite", "recovery trusts a sync alone", "errors", _CASES, recovery_does_not_write_again),
    Plant("cut-corruption", "corruption is cut as if it were torn", "crash", _CASES, corruption_is_cut),
    Plant("retry-fsync", "a failed fsync is tried again and believed", "errors", _CASES, failed_fsync_tried_again),
    Plant("refused-write", "a refused write is found by recovery", "errors", _CASES, refused_write_left),
    Plant("steal", "records reach an image before they are durable", "crash", _CASES, applier_steals),
    Plant("apply-order", "records are applied out of order", "crash", _CASES, applied_out_of_order),
    Plant("early-position", "applied is saved before the images are synced", "crash", _CASES, position_before_image),
    Plant("early-trim", "segments are freed before they were shipped", "crash", _CASES, trim_before_acknowledgement),
    Plant("unsettled", "a start relies on names that are not durable", "crash", _CASES, found_names_not_settled),
    Plant("early-ack", "the store acknowledges before it stores", "crash", _CASES, acknowledged_before_durable),
    Plant("row-first", "the catalog's row comes before the object", "crash", _CASES, row_before_the_object),
    Plant("object-name", "an object's name is not synced", "crash", _CASES, object_name_not_synced),
    Plant("no-adoption", "objects without a row are left out", "crash", _CASES, adopts_nothing),
    Plant("catalog-log", "the old catalog is found without its log", "crash", _CASES, log_removed_with_the_catalog),
)
