"""Bugs that lose or forge bytes when power is lost or a disk fails: an order changed, a sync left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from asrfs.daemon.state import StateDirectory
from asrfs.errors import IntegrityError
from asrfs.format.record import WriteFrame
from asrfs.journal import recovery
from asrfs.journal.next_segment import NextSegment
from asrfs.journal.writer import Journal
from asrfs.model.dirty_map import GivenUp
from asrfs.model.positions import Cursor
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from asrfs.replication import applier_round, trimmer
from asrfs.replication.applier import Applier
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import File, Storage
from replica_store.ingest import ingester as ingester_room
from replica_store.ingest.ingester import Ingester, Position, Taken
from replica_store.vault import adoption, enrolment, rebuild
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.keys import MachineKeys
from replica_store.vault.rows import Entry, MachineRow, log_prefix
from replica_store.vault.vault import Vault
from tests.planted import Plant

_CASES = 20_000
_LOST = "I2:|is missing or damaged"


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


def promises_what_came_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """A sync answers for what was appended while it ran, too."""
    sound = Journal._commit

    def commit(self: Journal) -> OSError | None:
        error = sound(self)
        if error is None:
            with self.lock:
                self.durable_lsn = self.appended_lsn
        return error

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
    patch.setattr(Journal, "_take_back", lambda journal: journal._refused.clear())


def only_the_first_of_a_turn_taken_back(patch: pytest.MonkeyPatch) -> None:
    sound = Journal.append_framed_locked

    def append(self: Journal, writes: Sequence[tuple[int, int, WriteFrame]]) -> int | None:
        position = sound(self, writes)
        self._refused = set(sorted(self._refused)[:1])
        return position

    patch.setattr(Journal, "append_framed_locked", append)


def applier_steals(patch: pytest.MonkeyPatch) -> None:
    """Whatever can be read of the journal is applied, durable or not."""
    sound = Applier.apply_span

    def apply_span(self: Applier, durable_lsn: int) -> Cursor:
        applied, following = None, sound(self, durable_lsn)
        while following != applied:
            applied = following
            try:
                following = sound(self, applied.lsn + 1)
            except IntegrityError:  # nothing more can be read
                break
        return following

    patch.setattr(Applier, "apply_span", apply_span)


def applied_out_of_order(patch: pytest.MonkeyPatch) -> None:
    """Of two records of a block the older one wins."""

    def is_first_of_its_block(numbers: applier_round.Integers) -> npt.NDArray[np.bool_]:
        return np.insert(numbers[1:] != numbers[:-1], 0, True)

    patch.setattr(applier_round, "_is_last_of_its_block", is_first_of_its_block)


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
    def freeable(positions: PositionsFile, given_up: GivenUp, dropped: trimmer.Limit) -> trimmer.Limit:
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


def adopts_before_it_settles(patch: pytest.MonkeyPatch) -> None:
    """The rows of adopted objects are durable before the objects' names are: it takes a crash in between to tell."""
    settle, begin_session = DirectoryObjects.settle, Ingester.begin_session

    def begin_and_settle(self: Ingester, machine: MachineRow, session_salt: bytes) -> Position:
        position = begin_session(self, machine, session_salt)
        settle(cast(DirectoryObjects, self._vault.objects), log_prefix(machine.id))
        return position

    patch.setattr(DirectoryObjects, "settle", lambda self, prefix: None)
    patch.setattr(Ingester, "begin_session", begin_and_settle)


def adopts_one_at_a_start(patch: pytest.MonkeyPatch) -> None:
    """What it left this time it takes in the next time."""
    sound = adoption.chain_of
    patch.setattr(adoption, "chain_of", lambda surveyed, last: sound(surveyed, last)[:1])


def generation_given_twice(patch: pytest.MonkeyPatch) -> None:
    """A description that a crash kept from being used is not counted: the next one is as new as that."""
    sound = enrolment._next_generation

    def next_generation(vault: Vault, *said: Any) -> tuple[MachineRow, MachineKeys]:
        row, keys = sound(vault, *said)
        known = vault.catalog.machine_by_id(row.id)
        return replace(row, generation=known.generation + 1 if known else 1), keys

    patch.setattr(enrolment, "_next_generation", next_generation)


def log_removed_with_the_catalog(patch: pytest.MonkeyPatch) -> None:
    """Both names go before the directory is synced: the old catalog may come back without its log."""

    def remove(storage: Storage, name: str) -> None:
        for beside in rebuild._BESIDE:
            if storage.exists(name + beside):
                storage.unlink(name + beside)
        storage.sync_directory("")

    patch.setattr(rebuild, "_remove", remove)


def rebuild_lets_revoked_back(patch: pytest.MonkeyPatch) -> None:
    """Whoever was shut out may come back after the catalog was made again."""
    sound = rebuild._machine_row
    patch.setattr(rebuild, "_machine_row", lambda description, epoch: replace(sound(description, epoch), revoked=False))


def rebuild_lets_superseded_back(patch: pytest.MonkeyPatch) -> None:
    """The epoch is what the description says, which is older than the newest object's."""
    sound = rebuild._machine_row
    patch.setattr(rebuild, "_machine_row", lambda description, epoch: sound(description, description.epoch))


def _plant(
    name: str,
    text: str,
    apply: Callable[[pytest.MonkeyPatch], None],
    shows: str,
    part: str = "",
    *,
    level: str = "crash",
    cases: int = _CASES,
) -> Plant:
    """`part`: the scenario that is enough to find it."""
    return Plant(name, text, level, cases, apply, shows, (part,) if part else ())


_SHIP, _REBUILD = "ship_and_acknowledge", "rebuild"
PLANTS: tuple[Plant, ...] = (
    _plant("skip-fsync", "fsync is answered without a sync", skip_the_fsync, _LOST),
    _plant(
        "sealed-not-synced",
        "fsync syncs the open segment only",
        sealed_segments_not_synced,
        _LOST,
        "many_segments_one_sync",
    ),
    _plant(
        "late-promise",
        "fsync answers for later writes",
        promises_what_came_meanwhile,
        "is missing or damaged|I9: disk|I2",
        "written_while_syncing",
    ),
    _plant("segment-name", "a segment is used before its name is durable", segment_name_not_synced, _LOST),
    _plant("recovery-sync", "recovery does not sync what it found", recovery_does_not_sync, "finds something else"),
    _plant("recovery-rewrite", "recovery trusts a sync alone", recovery_does_not_write_again, _LOST, level="errors"),
    _plant(
        "cut-corruption", "corruption is cut as if it were torn", corruption_is_cut, "DID NOT RAISE", "damaged_records"
    ),
    _plant(
        "retry-fsync", "a failed fsync is tried again and believed", failed_fsync_tried_again, _LOST, level="errors"
    ),
    _plant(
        "refused-write",
        "a refused write is found by recovery",
        refused_write_left,
        "begins with LSN",
        "blocks_that_end_in_zeros",
        level="errors",
    ),
    _plant(
        "refused-turn",
        "of writes refused together only the first is taken back",
        only_the_first_of_a_turn_taken_back,
        "was found",
        "a_turn_refused",
    ),
    _plant("steal", "records reach an image before they are durable", applier_steals, "I1:", level="sim", cases=5_000),
    _plant("apply-order", "records are applied out of order", applied_out_of_order, "I9:", _SHIP),
    _plant(
        "early-position",
        "applied is saved before the images are synced",
        position_before_image,
        "I9:|else in images",
        _SHIP,
    ),
    _plant(
        "early-trim",
        "segments are freed before they were shipped",
        trim_before_acknowledgement,
        "begins with LSN",
        _SHIP,
    ),
    _plant(
        "unsettled",
        "a start relies on names that are not durable",
        found_names_not_settled,
        "is durable|is not durable",
        "disks_added_and_removed",
    ),
    _plant("early-ack", "the store acknowledges before it stores", acknowledged_before_durable, "I3:", _SHIP),
    _plant("row-first", "the catalog's row comes before the object", row_before_the_object, "no such object", _SHIP),
    _plant("object-name", "an object's name is not synced", object_name_not_synced, "no such object|I3:", _SHIP),
    _plant("no-adoption", "objects without a row are left out", adopts_nothing, "I3:|two states", _SHIP),
    _plant(
        "adopted-early", "rows come before the names they are of", adopts_before_it_settles, "no such object", "ingest"
    ),
    _plant("adopted-late", "a start takes in some of what it found", adopts_one_at_a_start, "I3:|two states"),
    _plant(
        "generation-twice",
        "an unused description counts like a used one",
        generation_given_twice,
        "finds another enrolment",
        "enrolment",
    ),
    _plant(
        "catalog-log",
        "the old catalog is found without its log",
        log_removed_with_the_catalog,
        "has lost its log",
        _REBUILD,
    ),
    _plant(
        "rebuild-revoked",
        "a rebuild forgets who was revoked",
        rebuild_lets_revoked_back,
        "a revoked machine may come back",
        _REBUILD,
    ),
    _plant(
        "rebuild-epoch",
        "a rebuild forgets the second epoch",
        rebuild_lets_superseded_back,
        "a superseded side may write again",
        _REBUILD,
    ),
)
