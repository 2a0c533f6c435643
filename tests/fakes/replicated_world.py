"""A protected host and its store in one process, each on a `CrashStorage` of its own, with one model beside them.

The host is the real journal, applier, positions, trimming and object builder; the store the real ingester, adoption,
catalog and vault. What lies between them in the product, a connection, is here a call: tasks and wires are the
simulation's. The model is what the host's disks must be at every LSN, so also what the store must give back.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple, cast
from unittest import mock

import msgspec
import trio

from asrfs.errors import AsrfsError, IntegrityError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.format.record import Kind
from asrfs.journal import spares
from asrfs.journal.reader import JournalReader
from asrfs.model import dirty_map
from asrfs.model.machine import NO_SLOT
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Cursor
from asrfs.protocol.messages import ObjectBegin
from asrfs.protocol.session import ObjectReceived
from asrfs.replication import filler as filler_room
from asrfs.replication import stretch_reader, trimmer
from asrfs.replication.object_builder import BuiltObject, MachineKeys, ObjectBuilder
from asrfs.replication.reconciliation import Side, check_same_history
from asrfs.replication.rewind import cursor_at
from replica_store.ingest.ingester import Ingester
from tests.fakes.applied_world import BLOCK, AppliedWorld
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.healing_host import HealingHost
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, Model
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.power_loss import Seen, distinct_starts
from tests.fakes.scripted_host import HostRecord
from tests.fakes.vault_world import VaultWorld

SIZES = (10 * BLOCK + 512, 6 * BLOCK)


@dataclass
class _Session:
    """A connection that lives as long as both ends do."""

    ingester: Ingester
    salt: bytes
    digest: bytes


@dataclass(frozen=True)
class PairLook:
    """Both disks after an operation of one `side`, the model, and what had been promised by then."""

    side: str
    kind: str
    name: str
    host: CrashStorage
    store: CrashStorage
    model: Model
    acknowledged: int
    catalogs: tuple[bytes, ...]


class PairStart(NamedTuple):
    """What a crash left. `catalog` None: it is made again."""

    host: CrashStorage
    store: CrashStorage
    catalog: bytes | None


class ReplicatedWorld:
    """One life of both. `keeps`: looks are added to it from now on."""

    def __init__(self, host: JournalWorld, store: VaultWorld, rng: random.Random) -> None:
        self.host = host
        self.store = store
        self.rng = rng
        self.applied = AppliedWorld(host, rng)
        self.keys = MachineKeys(MACHINE_ID, store.history.keys.index_key, store.history.keys.payload_key)
        self.session: _Session | None = None
        self.folded_share = 0.4
        self.healing = self._healing_of(host, self.applied)
        self.looks: list[PairLook] | None = None
        self._host_storage, self._model, self._store_storage = host.storage, host.model, store.storage

    @classmethod
    def new(cls, store: VaultWorld, rng: random.Random) -> ReplicatedWorld:
        """A new host, whose disks begin as zeros, for a store that has received nothing."""
        model = Model(tuple(bytes(size) for size in SIZES))
        storage = CrashStorage()
        images = storage.below("images")
        for slot, content in enumerate(model.initial):
            with closing(images.create(str(slot))) as file:
                file.truncate(len(content))
                file.datasync()
        images.sync_directory("")
        world = cls(JournalWorld(storage, model, seed=rng.getrandbits(32)), store, rng)
        world.announce()
        return world

    @classmethod
    def next_start(cls, look: PairLook, host: CrashStorage, store: VaultWorld, rng: random.Random) -> ReplicatedWorld:
        """Both after a crash; `store` was started already."""
        store.acknowledged = look.acknowledged
        return cls(JournalWorld(host, look.model.copy(), seed=rng.getrandbits(32)), store, rng)

    def close(self) -> None:
        self.look_away()
        self.host.close()
        self.store.vault.close()

    @property
    def is_alive(self) -> bool:
        """Whether neither failed to start again."""
        return self._host_storage is self.host.storage and self._store_storage is self.store.storage

    # ---- looking ----

    def look_at_everything(self, looks: list[PairLook]) -> None:
        self.looks = looks
        self._look_at_host(self.host.storage, self.host.model)
        self._look_at_store(self.store.storage)
        cast(MemoryCatalog, self.store.vault.catalog).on_commit = lambda: self._look("store", "commit", "catalog")

    def _look_at_host(self, storage: CrashStorage, model: Model) -> None:
        self._host_storage, self._model = storage, model
        if self.looks is not None:
            storage.after_operation = lambda kind, name: self._look("host", kind, name)

    def _look_at_store(self, storage: CrashStorage) -> None:
        self._store_storage = storage
        if self.looks is not None:
            storage.after_operation = lambda kind, name: self._look("store", kind, name)

    def look_away(self) -> None:
        self.looks = None
        self.host.storage.after_operation = None
        self.store.look_away()

    def _look(self, side: str, kind: str, name: str) -> None:
        assert self.looks is not None
        self.looks.append(self.look(side, kind, name))

    def look(self, side: str, kind: str, name: str) -> PairLook:
        """Both as they are now."""
        host, store = self._host_storage.killed(), self._store_storage.killed()
        catalogs = tuple(self.store.catalogs)
        return PairLook(side, kind, name, host, store, self._model.copy(), self.store.acknowledged, catalogs)

    # ---- what happens to a host ----

    def _healing_of(self, host: JournalWorld, applied: AppliedWorld) -> HealingHost:
        """What gives up and fills, of a host's life. Raises what its disk refuses to read."""
        healing = HealingHost(host, applied.positions)
        healing.server.syncs_fills = True
        healing.filler.make_point = self._make_point
        return healing

    def announce(self) -> None:
        """As each start of a disk server does: what the disks are."""
        self.healing.server.announced.clear()
        self.healing.server.announce()

    def marker(self) -> None:
        """A recovery point here and now; durable when this returns, as for `point create`."""
        point = MarkerRecord(id=f"{self.rng.getrandbits(128):032x}")
        self.host.journal.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(point))
        self.host.sync()

    def write(self, blocks: int = 1) -> None:
        disk = self.rng.choice(self.host.disks)
        at = self.rng.randrange(disk.size_bytes // BLOCK - blocks + 1) * BLOCK
        disk.write(at, self.rng.randbytes(blocks * BLOCK))

    def apply(self) -> None:
        self.applied.apply_once()

    def save(self) -> None:
        """What the store acknowledged, for the next start."""
        self.applied.positions.save()

    def trim(self) -> None:
        """As `ApplierTask.run_trimming`: maps first, then what the saved positions allow (I4)."""
        saved = self.applied.positions.saved
        dropped = trimmer.Limit(saved.applied.lsn, saved.applied.segment - 1)
        self.host.journal.drop_through(dropped.segment, [disk.map for disk in self.host.disks])
        limit = trimmer.freeable(self.applied.positions, self.healing.dirty.given_up, dropped)
        spares.trim(
            self.host.journal_storage,
            MACHINE_ID,
            limit.lsn,
            spares_max=2,
            through_segment=limit.segment,
            segment_bytes=self.host.segment_bytes,
        )

    def give_up(self) -> None:
        """As `Quota.run` does when the journal is over it."""
        self._run(self.healing.quota.give_up)

    def heal(self, runs_max: int | None = None) -> None:
        """As `Resyncer.run` does when the store knows what was given up; at most so many runs of chunks."""
        self.ship()
        self._run(self._heal, runs_max)

    async def _heal(self, runs_max: int | None) -> None:
        filler, calls = self.healing.filler, self.healing.server
        calls.calls_left = 1 << 30 if runs_max is None else runs_max
        machine = await filler.prepare()
        for disk in machine.live_disks():
            if disk.slot in self.healing.dirty.map:
                await filler.fill(disk, lambda: calls.calls_left > 0)
        slots = self.healing.dirty.map.slots()
        if slots and not any(self.healing.dirty.map.dirty_chunks(slot) for slot in slots):
            assert await filler.close(slots, "healed"), "nothing was given up meanwhile"

    def heal_unheard(self) -> None:
        """All is filled and the gap closes, but of that the store hears nothing."""
        self._run(self._heal_unheard)

    async def _heal_unheard(self) -> None:
        filler = self.healing.filler
        self.healing.server.calls_left = 1 << 30
        for disk in (await filler.prepare()).live_disks():
            await filler.fill(disk, lambda: True)
        filler.make_point = self._die_at_the_point
        try:
            with suppress(TemporaryError):
                await filler.close(self.healing.dirty.map.slots(), "unheard")
        finally:
            filler.make_point = self._make_point

    async def _die_at_the_point(self, note: str) -> int:
        self.marker()
        raise TemporaryError("the agent is gone")

    async def _make_point(self, note: str) -> int:
        self.marker()
        lsn = self.host.journal.appended_lsn
        self.ship()
        self.healing.progress.note_acknowledged(self.applied.positions.current.acknowledged)
        return lsn

    def _run(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """In a loop of its own, with what the host knows by now."""
        self.healing.progress.note_acknowledged(self.applied.positions.current.acknowledged)
        self.healing.server.note()
        with (
            mock.patch.object(dirty_map, "CHUNK_SHIFT", 12),
            mock.patch.object(filler_room, "RUN_BYTES_MAX", 2 * BLOCK),
        ):
            trio.run(function, *arguments)

    def restart_host(self) -> None:
        """SIGKILL of all of it and the next start."""
        storage, model = self.host.storage.killed(), self.host.model.copy()
        storage.keep_failing(self.host.storage)
        self.host.close()
        self._look_at_host(storage, model)
        host = JournalWorld(storage, model, seed=self.rng.getrandbits(32))
        try:
            applied = AppliedWorld(host, self.rng)
            healing = self._healing_of(host, applied)
        except BaseException:  # then it has not started, and nobody goes on with half of it
            host.close()
            raise
        self.host, self.applied, self.healing, self.session = host, applied, healing, None
        if self.looks is not None:
            self.look_at_everything(self.looks)
        self.announce()

    def restart_store(self, *, keeps_catalog: bool = True) -> None:
        """SIGKILL and the next start, or a rebuild of its catalog."""
        acknowledged, catalogs = self.store.acknowledged, self.store.catalogs
        storage = self.store.storage.killed()
        storage.keep_failing(self.store.storage)
        self.store.vault.close()
        self._look_at_store(storage)
        self.store = self.store.next_start(storage, catalogs[-1] if keeps_catalog else None)
        self.store.acknowledged = acknowledged
        self.session = None
        if self.looks is not None:
            self.look_at_everything(self.looks)

    # ---- shipping ----

    def connect(self) -> None:
        """As `ShippingSession._greet` and `_reconcile`."""
        ingester, position, salt = self.store.begin(self.rng)
        journal, positions = self.host.journal, self.applied.positions
        ours = positions.current
        check_same_history(
            Side(journal.epoch, ours.acknowledged.lsn, ours.last_digest),
            journal.durable_lsn,
            Side(position.epoch, position.lsn, position.digest_hex),
        )
        cursor, given_up = ours.acknowledged, self.healing.dirty.given_up
        if position.lsn != cursor.lsn:
            start = given_up.needed_behind(cursor)
            with closing(JournalReader(self.host.journal_storage, MACHINE_ID)) as reader:
                try:
                    cursor = cursor_at(self.host.journal_storage, MACHINE_ID, reader, start, position.lsn)
                except IntegrityError:
                    if not given_up.covers(position.lsn):
                        raise
                    cursor = msgspec.structs.replace(cursor, lsn=position.lsn)
        positions.change(acknowledged=cursor, last_digest=position.digest_hex)
        if cursor.lsn < ours.acknowledged.lsn:
            positions.save()
        self.session = _Session(ingester, salt, position.digest or NO_DIGEST)

    def ship(self, objects_max: int = 1000, *, bytes_max: int = 3 * BLOCK, loses_answer: bool = False) -> None:
        """Up to so many log objects of what is durable, in batches, some of them folded; raises what the store or the
        host refused."""
        if self.session is None:
            self.connect()
        session = self.session
        assert session is not None
        with (
            closing(JournalReader(self.host.journal_storage, MACHINE_ID)) as reader,
            mock.patch.object(stretch_reader, "BYTES_LEAST", 0),
            mock.patch.object(stretch_reader, "FOLDED_BYTES_MAX", self.rng.choice((4, 12, 4096)) * BLOCK),
            mock.patch.object(stretch_reader, "SAVED_SHARE_LEAST", self.rng.choice((0.0, 0.2))),
        ):
            builder = ObjectBuilder(reader)
            cursor = self.applied.positions.current.acknowledged
            while objects_max > 0:
                batch: list[BuiltObject] = []
                for _ in range(min(objects_max, self.rng.randint(1, 3))):
                    built = self._build(builder, cursor, session, bytes_max)
                    if built is None:
                        break
                    batch.append(built)
                    cursor, session.digest = built.cursor, built.digest
                if not batch:
                    return
                objects_max -= len(batch)
                self._deliver(session, batch, loses_answer)
                if loses_answer:
                    return

    def _build(self, builder: ObjectBuilder, cursor: Cursor, session: _Session, bytes_max: int) -> BuiltObject | None:
        """As `ShippingSession._next_object`."""
        given_up = self.healing.dirty.given_up
        if given_up.covers(cursor.lsn):
            return builder.build_gap(
                cursor.lsn + 1,
                given_up.through,
                given_up.disks,
                epoch=self.host.journal.epoch,
                keys=self.keys,
                session_salt=session.salt,
                previous_digest=session.digest,
            )
        return builder.build(
            cursor,
            self.host.journal.durable_lsn,
            keys=self.keys,
            session_salt=session.salt,
            previous_digest=session.digest,
            bytes_max=bytes_max,
            folds=self.rng.random() < self.folded_share,
        )

    def _deliver(self, session: _Session, batch: list[BuiltObject], loses_answer: bool) -> None:
        """What is shipped was durable at the host, so the host may never lose it again (I1)."""
        model = self.host.model
        model.promised_lsn = max(model.promised_lsn, batch[-1].last_lsn)
        received = []
        for each in batch:
            begin = ObjectBegin(first_lsn=each.first_lsn, last_lsn=each.last_lsn, length=each.length)
            received.append(ObjectReceived(begin, b"".join(each.pieces)))
        taken = session.ingester.take(received)
        if loses_answer or taken.error is not None:
            self.session = None
        if loses_answer:
            return
        self.store.note(taken.acknowledged)
        for acknowledge in taken.acknowledged:
            built = next(each for each in batch if each.last_lsn == acknowledge.lsn)
            assert acknowledge.digest == built.digest.hex()
            self.applied.positions.change(acknowledged=built.cursor, last_digest=acknowledge.digest)
        if taken.error is not None:
            raise taken.error

    # ---- what must hold ----

    def know_history(self) -> None:
        """Tell the store's model what the host has appended."""
        self.store.history.records = [
            HostRecord(Kind(each.kind), each.slot, each.offset, each.length, each.content, 0)
            for each in self.host.model.records
        ]

    def check_found(self) -> None:
        """Right after both have started: I1, I2, I9 at the host, I3 and I5 at the store, I3 and I4 between them."""
        self.host.check()
        self.know_history()
        saved = self.host.positions.acknowledged.lsn
        self.connect()
        received = self.store.vault.received_lsn(MACHINE_ID.hex())
        assert received >= saved, f"I3: the host holds LSN {saved} for acknowledged, the store has {received}"
        self.store.check(self.rng, points_max=2)
        if not self.store.storage.is_settled():
            self.store.check(self.rng, self.store.storage.crash(Fate.LOST, self.rng), points_max=2)
        self.trim()  # at once, on the strength of the positions that were found

    def go_on(self) -> None:
        """Write, apply and ship everything, free what may go; then both hold the model, also after a power loss."""
        self.announce()
        self.write()
        self.marker()
        self.applied.apply_all()
        self.ship()
        self.heal()
        self.applied.apply_all()
        self.ship()
        assert not self.healing.dirty.map.slots(), "I5: a gap that never closes"
        self.save()
        self.trim()
        self.host.check()
        self.applied.check_images()
        self.know_history()
        last = len(self.host.model.records)
        assert self.store.acknowledged == last, f"I3: LSN {last} was shipped, {self.store.acknowledged} acknowledged"
        self.store.check(self.rng, self.store.storage.crash(Fate.LOST, self.rng), points_max=1)


def starts_of(look: PairLook, rng: random.Random, seen: Seen) -> Iterator[tuple[str, PairStart]]:
    """What the next start of both can find: the side that was at work killed or without power, or both of them."""
    catalog = look.catalogs[-1]
    is_host = look.side == "host"
    at_work = look.host if is_host else look.store
    promised = (look.model.promised_lsn, look.acknowledged, id(catalog), *map(id, look.model.records))
    for way, one in distinct_starts(at_work, rng, seen, promised):
        host, store = (one, look.store.killed()) if is_host else (look.host.killed(), one)
        yield f"{look.side} {way}", PairStart(host, store, catalog)
    fates = rng.choice(list(Fate)), rng.choice(list(Fate))
    number = rng.choice((len(look.catalogs) - 1, rng.randrange(len(look.catalogs)), -1))
    older = look.catalogs[number] if number >= 0 else None
    what = f"both: {fates[0].value}, {fates[1].value}, catalog {number}"
    yield what, PairStart(look.host.crash(fates[0], rng), look.store.crash(fates[1], rng), older)


def is_refusal(error: BaseException) -> bool:
    """Whether it is what a failing disk may raise: typed, and worth another try."""
    return isinstance(error, OSError) or (isinstance(error, AsrfsError) and error.retryable)
