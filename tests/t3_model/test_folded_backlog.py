"""A backlog of a host's journal reaches the store folded: less is sent, no point is lost, and whatever state there is
is the model, byte for byte (I9).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path

import pytest

from asrfs.errors import IntegrityError, NotFoundError
from asrfs.format.log_object import NO_DIGEST, ObjectHeader, decode_object_header
from asrfs.format.record import RECORD_HEADER_BYTES, Kind
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.positions import Cursor, Positions
from asrfs.replication import stretch_reader
from asrfs.replication.object_builder import BuiltObject, MachineKeys, ObjectBuilder
from asrfs.replication.stretch_reader import StretchReader
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.scrub import scrub
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld
from tests.fakes.replicated_world import BLOCK, ReplicatedWorld
from tests.fakes.vault_world import VaultWorld

KEYS = MachineKeys(MACHINE_ID, b"i" * 32, b"p" * 32)
SALTS = (b"s" * 32, b"t" * 32)


def fill(pair: ReplicatedWorld, rng: random.Random, records: int) -> None:
    """Mostly the same few blocks again and again, a point now and then, something durable always."""
    for _ in range(records):
        disk = rng.choice(pair.host.disks)
        last = disk.size_bytes // BLOCK
        at = min(rng.randrange(last), rng.randrange(last)) * BLOCK
        blocks = rng.randint(1, min(3, last - at // BLOCK))
        chance = rng.random()
        if chance < 0.8:
            disk.write(at, rng.randbytes(blocks * BLOCK))
        elif chance < 0.85:
            disk.write(disk.size_bytes - 512, rng.randbytes(512))
        elif chance < 0.9:
            disk.discard(at, blocks * BLOCK)
        elif chance < 0.94:
            pair.host.disks[0].write(at, bytes(BLOCK))
        elif chance < 0.97:
            pair.announce()
        else:
            pair.marker()
    pair.host.sync()


def folded_lsns(pair: ReplicatedWorld) -> int:
    """How many have no state at the store."""
    stretches = [row for row in pair.store.vault.objects_of(MACHINE_ID.hex(), 1 << 62) if row.is_stretch]
    return sum(row.last_lsn - row.first_lsn for row in stretches)


def check_every_state(pair: ReplicatedWorld) -> tuple[int, int]:
    """How many LSNs have a state and how many have none."""
    vault, frames = pair.store.vault, FrameCache(pair.store.vault)
    there = gone = 0
    for row in vault.objects_of(MACHINE_ID.hex(), 1 << 62):
        for lsn in range(row.first_lsn, row.last_lsn + 1):
            if row.is_stretch and lsn != row.last_lsn:
                with pytest.raises(NotFoundError, match="one stretch"):
                    resolve(vault, "web1", f"lsn:{lsn}")
                gone += 1
                continue
            cut = resolve(vault, "web1", f"lsn:{lsn}")
            opened = open_disks(vault, cut, [disk.name for disk in disks_of(vault, cut)], frames)
            for slot, content in enumerate(pair.host.model.disks_at(lsn)):
                if f"d{slot}" in opened:
                    assert opened[f"d{slot}"].read(0, len(content)) == content, f"I9: disk {slot} at LSN {lsn}"
            there += 1
    return there, gone


@pytest.mark.parametrize("bytes_max", [BLOCK, 3 * BLOCK, 1 << 20])
def test_i5_i9_a_folded_backlog_is_exact_wherever_there_is_a_state(
    scratch: Path, rng: random.Random, bytes_max: int
) -> None:
    pair = ReplicatedWorld.new(VaultWorld.new(scratch / "vault", rng.getrandbits(30)), rng)
    for number, folded_share in enumerate(chain((1.0, 0.5), repeat(1.0, 10))):
        if number >= 3 and folded_lsns(pair) > 20:
            break
        pair.folded_share = folded_share
        fill(pair, rng, 120)
        pair.ship(bytes_max=bytes_max)
    last = len(pair.host.model.records)
    assert pair.store.acknowledged == last
    there, gone = check_every_state(pair)
    assert there + gone == last and gone > 20
    markers = [lsn for lsn, record in enumerate(pair.host.model.records, 1) if record.kind == Kind.MARKER]
    assert [point.lsn for point in pair.store.vault.points(MACHINE_ID.hex())] == markers, "points never vanish"
    assert scrub(pair.store.vault, pair.store.vault.machines()).damages == []
    pair.close()


class Backlog:
    """A journal and a builder that reads it; `place` is where the store stands."""

    def __init__(self, rng: random.Random, writes: Iterable[int], segment_bytes: int = 1 << 20) -> None:
        self.world = JournalWorld(CrashStorage(), sizes=(256 * BLOCK, BLOCK), segment_bytes=segment_bytes)
        for block in writes:
            self.world.disks[0].write(block * BLOCK, rng.randbytes(BLOCK))
        self.world.sync()
        self.reader = JournalReader(self.world.journal_storage, MACHINE_ID)
        self.builder = ObjectBuilder(self.reader)
        self.place, self.digest = Cursor(), NO_DIGEST

    def close(self) -> None:
        self.reader.close()
        self.world.close()

    def next(self, salt: bytes, *, folds: bool = True, bytes_max: int = BLOCK) -> BuiltObject | None:
        return self.builder.build(
            self.place,
            self.world.journal.durable_lsn,
            keys=KEYS,
            session_salt=salt,
            previous_digest=self.digest,
            bytes_max=bytes_max,
            folds=folds,
        )

    def accept(self, built: BuiltObject) -> BuiltObject:
        assert built.first_lsn == self.place.lsn + 1
        self.place, self.digest = built.cursor, built.digest
        return built

    def all(self, salt: bytes, *, folds: bool = True, bytes_max: int = BLOCK) -> list[BuiltObject]:
        built = []
        while (each := self.next(salt, folds=folds, bytes_max=bytes_max)) is not None:
            built.append(self.accept(each))
        return built


def header_of(built: BuiltObject) -> ObjectHeader:
    return decode_object_header(b"".join(built.pieces), "built")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few blocks are a backlog."""
    monkeypatch.setattr(stretch_reader, "BYTES_LEAST", 0)
    monkeypatch.setattr(stretch_reader, "FOLDED_BYTES_MAX", 64 * BLOCK)


@pytest.mark.usefixtures("small")
def test_overwritten_blocks_are_sent_once(rng: random.Random) -> None:
    backlog = Backlog(rng, [number % 10 for number in range(400)])
    (built,) = backlog.all(SALTS[0], bytes_max=4 * BLOCK)
    header = header_of(built)
    assert (header.first_lsn, header.last_lsn, header.record_count) == (1, 400, 10)
    assert header.payload_raw_length == 10 * BLOCK
    backlog.place = Cursor()
    plain = backlog.all(SALTS[1], folds=False, bytes_max=4 * BLOCK)
    assert sum(header_of(each).payload_raw_length for each in plain) == 400 * BLOCK
    backlog.close()


@pytest.mark.usefixtures("small")
def test_where_it_does_not_pay_objects_are_as_ever(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written twice, and looking for it is given up for a while."""
    backlog = Backlog(rng, range(256))
    looks: list[int] = []
    sound = StretchReader._look

    def look(self: StretchReader, cursor: Cursor, durable_lsn: int, bytes_max: int) -> object:
        looks.append(cursor.lsn)
        return sound(self, cursor, durable_lsn, bytes_max)

    monkeypatch.setattr(StretchReader, "_look", look)
    built = backlog.all(SALTS[0])
    assert [header_of(each).is_stretch for each in built] == [False] * 256
    assert looks == [0], "it looked 64 blocks far, and three times as many were passed over"
    backlog.close()


@pytest.mark.usefixtures("small")
def test_too_little_to_be_worth_it(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighty in a hundred left are worth it, eighty-one are not; nor is a little of anything."""
    for left, is_worth in ((80, True), (81, False)):
        backlog = Backlog(rng, [*range(left), *range(100 - left)])
        built = backlog.next(SALTS[0], bytes_max=64 * BLOCK)
        assert built is not None and header_of(built).is_stretch == (is_worth and left <= 64)
        monkeypatch.setattr(stretch_reader, "FOLDED_BYTES_MAX", 100 * BLOCK)
        backlog.builder = ObjectBuilder(backlog.reader)
        built = backlog.next(SALTS[0], bytes_max=64 * BLOCK)
        assert built is not None and header_of(built).is_stretch == is_worth
        monkeypatch.setattr(stretch_reader, "BYTES_LEAST", 101 * BLOCK)
        backlog.builder = ObjectBuilder(backlog.reader)
        built = backlog.next(SALTS[0], bytes_max=64 * BLOCK)
        assert built is not None and not header_of(built).is_stretch
        monkeypatch.setattr(stretch_reader, "BYTES_LEAST", 0)
        backlog.close()


@pytest.mark.usefixtures("small")
def test_stretches_are_small_after_one_was_lost(rng: random.Random) -> None:
    """As large as is allowed, until one is lost with its connection: then for a while no larger than other objects,
    the longer the oftener that happens; once nothing was lost it is forgotten."""
    backlog = Backlog(rng, [number // 2 % 256 for number in range(4096)])

    def size(salt: bytes, *, is_lost: bool = False) -> int:
        built = backlog.next(salt, bytes_max=8 * BLOCK)
        assert built is not None and header_of(built).is_stretch
        if not is_lost:
            backlog.accept(built)
        return header_of(built).payload_raw_length // BLOCK

    assert [size(SALTS[0]), size(SALTS[0]), size(SALTS[0], is_lost=True)] == [64, 64, 64]
    assert [size(SALTS[1]) for _ in range(17)] == [8] * 16 + [64], "twice as far as was lost"
    assert size(SALTS[1], is_lost=True) == 64
    assert [size(SALTS[0]) for _ in range(33)] == [8] * 32 + [64], "four times, as it happened again"
    assert size(SALTS[1]) == 64
    assert size(SALTS[1], is_lost=True) == 64
    assert [size(SALTS[0]) for _ in range(17)] == [8] * 16 + [64]
    backlog.close()


@pytest.mark.usefixtures("small")
def test_a_stretch_holds_one_epoch(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage())
    for _ in range(6):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.close()
    storage = world.journal_storage
    recovered = recover(storage, Positions(), MACHINE_ID, segment_bytes=world.segment_bytes)
    journal = Journal(storage, MACHINE_ID, recovered, world.clock, epoch=2, segment_bytes=world.segment_bytes)
    for _ in range(6):
        journal.append(Kind.WRITE, 0, 0, BLOCK, rng.randbytes(BLOCK))
    journal.sync()
    with closing(JournalReader(storage, MACHINE_ID)) as reader:
        builder, cursor, found = ObjectBuilder(reader), Cursor(), []
        for _ in range(2):
            built = builder.build(
                cursor, 12, keys=KEYS, session_salt=SALTS[0], previous_digest=NO_DIGEST, bytes_max=BLOCK, folds=True
            )
            assert built is not None
            header = header_of(built)
            found.append((header.epoch, header.first_lsn, header.last_lsn, header.record_count))
            cursor = built.cursor
    journal.close()
    assert found == [(1, 1, 6, 1), (2, 7, 12, 1)]


@pytest.mark.usefixtures("small")
def test_a_damaged_record_is_never_folded_away(rng: random.Random) -> None:
    """Also one that would have been left out: where a journal went bad nobody knows what else did."""
    backlog = Backlog(rng, [0] * 20)
    file = backlog.world.journal_storage.open(f"{1:016x}.segment", write=True)
    file.write_at([b"\0\1"], SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES + 7)
    file.close()
    with pytest.raises(IntegrityError, match="LSN 1 "):
        backlog.next(SALTS[0])
    backlog.close()
