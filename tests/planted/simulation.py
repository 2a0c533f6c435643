"""Bugs for the simulation: each breaks one order or one check between host and store.

Some undo a check that a correct peer never needs; those come with the fault of the peer that the check is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec
import pytest
import trio

from asrfs.format.log_object import decode_object_header
from asrfs.journal.reader import JournalReader
from asrfs.journal.writer import Journal
from asrfs.model.dirty_map import GivenUp
from asrfs.model.positions import Cursor
from asrfs.protocol.messages import Welcome
from asrfs.protocol.session import ObjectReceived
from asrfs.replication import applier_task as applier_task_room
from asrfs.replication import shipping_session as shipping_session_room
from asrfs.replication.applier import Applier, Image, Images
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.shipping_session import ShippingSession
from asrfs.replication.ticker import Ticker
from asrfs.replication.trimmer import Limit
from asrfs.storage.interface import File, Storage
from replica_store.ingest import ingester as ingester_room
from replica_store.ingest.ingester import Checked, Ingester, Position
from replica_store.ingest.listener import Listener
from replica_store.ingest.session import StoreSession
from replica_store.vault import listing as listing_room
from replica_store.vault import vault as vault_room
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.objects import Bytes
from replica_store.vault.rows import Entry
from tests.planted import Plant
from tests.proof.sim.steps import Steps

LEVEL = "sim"
_CASES = 5_000


def acknowledges_before_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The object is written, and its bytes are not synced before it is acknowledged."""

    def write_new(objects: DirectoryObjects, temporary: str, pieces: Sequence[Bytes]) -> None:
        file = objects._storage.create(temporary)
        file.write_at(pieces, 0)
        file.close()

    monkeypatch.setattr(DirectoryObjects, "_write_new", write_new)


def forgets_the_objects_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The object's bytes are synced, its name is not, and nothing settles it later."""
    real = DirectoryObjects.put

    def put(objects: DirectoryObjects, name: str, pieces: Sequence[Bytes]) -> None:
        below = objects._storage
        objects._storage = _WithoutDirectorySync(below)  # type: ignore[assignment]
        try:
            real(objects, name, pieces)
        finally:
            objects._storage = below

    monkeypatch.setattr(DirectoryObjects, "put", put)


class _WithoutDirectorySync:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def sync_directory(self, directory: str) -> None:
        if not directory.endswith("/log"):
            self._storage.sync_directory(directory)


def accepts_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host leaves out a record after it has connected, and the store does not look."""
    real = Ingester._check
    _host_skips_one(monkeypatch)

    def check(ingester: Ingester, received: ObjectReceived, position: Position) -> Checked | None:
        header = decode_object_header(received.content, "received")
        if header.first_lsn > position.lsn:
            position = replace(position, lsn=header.first_lsn - 1, digest=header.previous_digest)
        return real(ingester, received, position)

    monkeypatch.setattr(Ingester, "_check", check)


def _host_skips_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShippingSession._reconcile

    async def reconcile(session: ShippingSession, welcome: Welcome) -> None:
        await real(session, welcome)
        source = session._source
        if session._cursor.lsn + 1 < source.progress.durable.lsn:
            session._cursor = source.reader.read(session._cursor, session._cursor.lsn + 1, 1).cursor

    monkeypatch.setattr(ShippingSession, "_reconcile", reconcile)


def stores_an_lsn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead store left without a row is not taken in, and comes again."""
    monkeypatch.setattr(ingester_room, "adopt", lambda vault, machine: [])


def accepts_an_old_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the epoch was raised meanwhile is not asked in the transaction."""

    def catalogue(ingester: Ingester, entries: Sequence[Entry]) -> None:
        with ingester._vault.catalog.transaction():
            ingester._vault.catalog.append(entries)

    monkeypatch.setattr(Ingester, "_catalogue", catalogue)


def lets_two_sessions_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other session is told to end, and not waited for."""

    async def take_turn(listener: Listener, machine_id: str, session: StoreSession) -> Ingester:
        if (other := listener._sessions.get(machine_id)) is not None:
            other.scope.cancel()
        await trio.lowlevel.checkpoint()
        listener._sessions[machine_id] = session
        if machine_id not in listener._ingesters:
            listener._ingesters[machine_id] = Ingester(
                listener.vault, machine_id, lambda: listener.make_salt().hex()[:8]
            )
        return listener._ingesters[machine_id]

    monkeypatch.setattr(Listener, "take_turn", take_turn)


def trims_before_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment goes as soon as it is applied."""

    def freeable(positions: PositionsFile, given_up: GivenUp, dropped: Limit) -> Limit:
        applied = positions.saved.applied
        return Limit(min(dropped.lsn, applied.lsn), min(dropped.segment, applied.segment - 1))

    monkeypatch.setattr(applier_task_room, "freeable", freeable)


def trims_on_unsaved_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment goes on the strength of what only stands in memory."""

    def freeable(positions: PositionsFile, given_up: GivenUp, dropped: Limit) -> Limit:
        cursors = (positions.current.applied, positions.current.acknowledged)
        return Limit(
            min(dropped.lsn, *(cursor.lsn for cursor in cursors)),
            min(dropped.segment, *(cursor.segment - 1 for cursor in cursors)),
        )

    monkeypatch.setattr(applier_task_room, "freeable", freeable)


def frees_what_the_store_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the store went back counts when it is saved, not when it is known. It does so often here."""

    def freeable(positions: PositionsFile, given_up: GivenUp, dropped: Limit) -> Limit:
        cursors = (positions.saved.applied, positions.saved.acknowledged)
        return Limit(
            min(dropped.lsn, *(cursor.lsn for cursor in cursors)),
            min(dropped.segment, *(cursor.segment - 1 for cursor in cursors)),
        )

    monkeypatch.setattr(applier_task_room, "freeable", freeable)
    _set_back_often(monkeypatch)


def ships_before_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it could not be saved that the store went back, shipping goes on all the same. It does so often here."""
    real = ShippingSession._reconcile

    async def reconcile(session: ShippingSession, welcome: Welcome) -> None:
        with pytest.MonkeyPatch.context() as inside:
            if welcome.acknowledged_lsn == session._source.positions.current.acknowledged.lsn:
                inside.setattr(session._source.positions, "_save", lambda positions: None)
                inside.setattr(session._source.positions, "_saved", session._source.positions.saved)
            await real(session, welcome)

    monkeypatch.setattr(ShippingSession, "_reconcile", reconcile)
    _set_back_often(monkeypatch)


def _set_back_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet in ("jump", "delay", "double", "half_open", "stall_wire", "network_away", "pause_shipping"):
        monkeypatch.setattr(Steps, quiet, Steps.set_vault_back)


def frees_what_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk server is not told before its segments go."""

    async def drop_maps(task: ApplierTask) -> None:
        applied = task._positions.saved.applied
        task._dropped = Limit(applied.lsn, applied.segment - 1)

    monkeypatch.setattr(ApplierTask, "_drop_maps", drop_maps)


def ships_what_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appended is taken for durable, and nobody asks for a sync."""
    real = Progress.note_host

    def note_host(progress: Progress, *, appended_lsn: int, durable: Cursor, epoch: int) -> None:
        durable = msgspec.structs.replace(durable, lsn=appended_lsn)
        real(progress, appended_lsn=appended_lsn, durable=durable, epoch=epoch)

    async def tick(ticker: Ticker) -> HostPositions:
        return await ticker.look()

    monkeypatch.setattr(Progress, "note_host", note_host)
    monkeypatch.setattr(Ticker, "tick", tick)


def lists_before_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog has the row and the points before the object is there."""
    waiting: list[tuple[DirectoryObjects, str, Sequence[Bytes]]] = []
    put, catalogue = DirectoryObjects.put, Ingester._catalogue

    def put_later(objects: DirectoryObjects, name: str, pieces: Sequence[Bytes]) -> None:
        waiting.append((objects, name, pieces))

    def catalogue_first(ingester: Ingester, entries: Sequence[Entry]) -> None:
        try:
            catalogue(ingester, entries)
            for each in waiting:
                put(*each)
        finally:
            waiting.clear()

    monkeypatch.setattr(DirectoryObjects, "put", put_later)
    monkeypatch.setattr(Ingester, "_catalogue", catalogue_first)


def lists_points_inside_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose first content is not here yet does not keep points from being listed."""
    for room in (vault_room, listing_room):
        monkeypatch.setattr(room, "gap_at", lambda gaps, lsn: None)


def resumes_at_the_wrong_lsn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store's word differs from the host's, shipping goes on one record too late."""
    real = shipping_session_room.cursor_at

    def cursor_at(storage: Storage, machine_id: bytes, reader: JournalReader, start: Cursor, lsn: int) -> Cursor:
        found = real(storage, machine_id, reader, start, lsn)
        try:
            return reader.read(found, lsn + 1, 1).cursor
        except Exception:
            return found

    monkeypatch.setattr(shipping_session_room, "cursor_at", cursor_at)


def forgets_sealed_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync takes the open segment alone."""
    real: Callable[[Journal], OSError | None] = Journal._commit

    def commit(journal: Journal) -> OSError | None:
        journal._unsynced.clear()
        return real(journal)

    monkeypatch.setattr(Journal, "_commit", commit)


def saves_positions_before_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be applied was not synced into the images."""
    real = Applier.apply_span

    def apply_span(applier: Applier, durable_lsn: int) -> Cursor:
        below = applier._images
        applier._images = _WithoutSync(below)
        try:
            return real(applier, durable_lsn)
        finally:
            applier._images = below

    monkeypatch.setattr(Applier, "apply_span", apply_span)


class _WithoutSync:
    """Images whose sync says yes and does nothing."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def image(self, slot: int) -> Image | None:
        image = self._images.image(slot)
        return image and Image(cast(File, _UnsyncedFile(image.file)), image.size_bytes)

    def drop(self, slot: int) -> None:
        self._images.drop(slot)


class _UnsyncedFile:
    def __init__(self, file: File) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def datasync(self) -> None:
        return


def _plant(apply: Callable[[pytest.MonkeyPatch], None], shows: str) -> Plant:
    text = (apply.__doc__ or "").strip()
    return Plant(f"{LEVEL}: {apply.__name__.replace('_', ' ')}", text, LEVEL, _CASES, apply, shows)


PLANTS: tuple[Plant, ...] = (
    _plant(acknowledges_before_durable, "can still be lost"),
    _plant(forgets_the_objects_name, "I3:"),
    _plant(accepts_a_gap, "a history has no gap"),
    _plant(stores_an_lsn_twice, "I3:"),
    _plant(accepts_an_old_epoch, "I6:"),
    _plant(lets_two_sessions_write, "I6:"),
    _plant(trims_before_acknowledged, "I4:"),
    _plant(trims_on_unsaved_positions, "I4:"),
    _plant(frees_what_the_store_has_lost, "I4:"),
    _plant(ships_before_it_is_saved, "not drained.*(diverged|log object)|I3:|I4:"),
    _plant(frees_what_is_still_read, "I9:"),
    _plant(ships_what_is_not_durable, "I1:|not durable here"),
    _plant(lists_before_the_object, "no such object"),
    _plant(lists_points_inside_a_gap, "I5:"),
    _plant(resumes_at_the_wrong_lsn, "not drained"),
    _plant(forgets_sealed_segments, "not drained|I2:"),
    _plant(saves_positions_before_images, "I9:"),
)
