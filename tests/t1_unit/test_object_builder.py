"""Records of a journal become log objects that open to the same records: cuts, columns, chain, refusal of bad bytes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.errors import IntegrityError
from asrfs.format import object_encoder
from asrfs.format.log_object import (
    NO_DIGEST,
    FrameTable,
    ObjectHeader,
    check_digest,
    decode_object_header,
)
from asrfs.format.object_encoder import ZSTD_LEVEL, ZSTD_LEVEL_FAST
from asrfs.format.object_index import Index, decode_index
from asrfs.format.record import RECORD_HEADER_BYTES, Kind
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.machine import NO_SLOT, DiskRecord, decode_disk
from asrfs.model.positions import Cursor, Positions
from asrfs.replication import stretch_reader
from asrfs.replication.object_builder import BuiltObject, MachineKeys, ObjectBuilder
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld

BLOCK = 4096
KEYS = MachineKeys(MACHINE_ID, b"i" * 32, b"p" * 32)
SALT = b"s" * 32


def build(
    world: JournalWorld,
    cursor: Cursor,
    *,
    until: int | None = None,
    previous: bytes = NO_DIGEST,
    bytes_max: int = 1 << 20,
    compress: bool = True,
) -> BuiltObject | None:
    reader = JournalReader(world.journal_storage, MACHINE_ID)
    try:
        return ObjectBuilder(reader).build(
            cursor,
            world.journal.durable_lsn if until is None else until,
            keys=KEYS,
            session_salt=SALT,
            previous_digest=previous,
            bytes_max=bytes_max,
            level=ZSTD_LEVEL if compress else None,
        )
    finally:
        reader.close()


def open_object(built: BuiltObject) -> tuple[ObjectHeader, Index, bytes]:
    content = b"".join(built.pieces)
    assert len(content) == built.length
    assert check_digest(content, "built") == built.digest
    header = decode_object_header(content, "built")
    keys = KEYS.of_session(header.epoch, SALT)
    table = FrameTable(header, content, "built")
    payload = b""
    for i in range(header.frame_count):
        at, length = table.extent(i)
        payload += table.open_frame(i, content[at : at + length], keys.payload)
    return header, decode_index(header, content, keys, "built"), payload


@pytest.fixture
def world(rng: random.Random) -> Iterator[JournalWorld]:
    world = JournalWorld(CrashStorage(), seed=rng.randrange(1000))
    yield world
    world.close()


def test_every_kind_of_record_comes_back(world: JournalWorld, rng: random.Random) -> None:
    world.disks[0].write(0, rng.randbytes(2 * BLOCK))
    world.disks[1].zero(BLOCK, BLOCK)
    world.journal.append(Kind.DISK, 1, 0, 0, b"a disk")
    world.disks[0].discard(0, BLOCK)
    world.disks[1].write(2 * BLOCK, b"a" * BLOCK)
    world.journal.append(Kind.MARKER, NO_SLOT, 0, 0, b"a point")
    world.sync()
    for compress in (True, False):
        built = build(world, Cursor(), compress=compress)
        assert built is not None
        header, index, payload = open_object(built)
        assert (header.first_lsn, header.last_lsn, header.epoch) == (1, 6, 1)
        assert header.previous_digest == NO_DIGEST
        for i, record in enumerate(world.model.records):
            assert (index.kind[i], index.slot[i]) == (record.kind, record.slot)
            assert (index.offset[i], index.length[i]) == (record.offset, record.length)
            if record.kind in (Kind.MARKER, Kind.DISK):
                assert index.note(i) == record.content
            else:
                start = int(index.payload_position[i])
                assert payload[start : start + len(record.content)] == record.content
        assert built.first_time_ns == index.time_ns[0]


def test_objects_are_cut_by_size_and_chained(world: JournalWorld, rng: random.Random) -> None:
    for i in range(20):
        world.disks[0].write(i % 15 * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    cursor, previous, lsn = Cursor(), NO_DIGEST, 0
    while (built := build(world, cursor, previous=previous, bytes_max=3 * BLOCK)) is not None:
        header, _, payload = open_object(built)
        assert header.first_lsn == built.first_lsn == lsn + 1
        assert header.previous_digest == previous
        assert len(payload) <= 3 * BLOCK
        assert built.cursor.lsn == built.last_lsn
        cursor, previous, lsn = built.cursor, built.digest, built.last_lsn
    assert lsn == 20


def test_an_object_ends_right_after_a_marker(world: JournalWorld, rng: random.Random) -> None:
    for _ in range(4):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.marker()
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.marker()
    world.sync()
    first = build(world, Cursor())
    assert first is not None
    assert (first.first_lsn, first.last_lsn) == (1, 5)
    second = build(world, first.cursor)
    assert second is not None
    assert (second.first_lsn, second.last_lsn) == (6, 7)


def test_nothing_beyond_durable_is_built(world: JournalWorld, rng: random.Random) -> None:
    for _ in range(5):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    built = build(world, Cursor(), until=3)
    assert built is not None
    assert built.last_lsn == 3
    assert build(world, built.cursor, until=3) is None


def test_a_damaged_payload_is_never_built(world: JournalWorld, rng: random.Random) -> None:
    for _ in range(3):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    file = world.journal_storage.open(f"{1:016x}.segment", write=True)
    file.write_at([b"\0"], SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES + 7)
    file.write_at([b"\1"], SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES + 8)
    file.close()
    with pytest.raises(IntegrityError, match="LSN 1 "):
        build(world, Cursor())


def test_an_object_holds_one_epoch(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage())
    for _ in range(2):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.close()
    storage = world.journal_storage
    recovered = recover(storage, Positions(), MACHINE_ID, segment_bytes=world.segment_bytes)
    journal = Journal(storage, MACHINE_ID, recovered, world.clock, epoch=2, segment_bytes=world.segment_bytes)
    journal.append(Kind.WRITE, 0, 0, BLOCK, rng.randbytes(BLOCK))
    journal.sync()
    epochs = []
    cursor = Cursor()
    while (built := build(world, cursor, until=3)) is not None:
        header, _, _ = open_object(built)
        epochs.append((header.epoch, header.first_lsn, header.last_lsn))
        cursor = built.cursor
    journal.close()
    assert epochs == [(1, 1, 2), (2, 3, 3)]


def test_a_gap_object_says_which_disks_have_a_gap_and_nothing_else(world: JournalWorld, rng: random.Random) -> None:
    """It stands between objects of records: the one before names it, the one after goes on from it."""
    for _ in range(6):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    before = build(world, Cursor(), until=2)
    kept = build(world, Cursor(), until=5)
    assert before is not None and kept is not None
    disks = [
        DiskRecord(slot=0, id="0" * 32, name="root", size_bytes=1 << 30, gap=True),
        DiskRecord(slot=1, id="1" * 32, name="old", size_bytes=1 << 20, removed=True),
        DiskRecord(slot=4, id="4" * 32, name="old", size_bytes=1 << 40, gap=True),
    ]
    reader = JournalReader(world.journal_storage, MACHINE_ID)
    built = ObjectBuilder(reader).build_gap(
        3, kept.cursor, disks, epoch=1, keys=KEYS, session_salt=SALT, previous_digest=before.digest
    )
    reader.close()
    header, index, payload = open_object(built)
    assert (header.first_lsn, header.last_lsn, header.record_count, header.is_stretch) == (3, 5, 3, True)
    assert (built.first_lsn, built.last_lsn, built.cursor) == (3, 5, kept.cursor)
    assert header.first_time_ns == header.last_time_ns == kept.cursor.time_ns
    assert header.previous_digest == before.digest
    assert index.lsn.tolist() == [5, 5, 5]
    assert [decode_disk(index.note(i)) for i in range(3)] == disks
    assert payload == b""
    after = build(world, built.cursor, previous=built.digest)
    assert after is not None and after.first_lsn == 6


def test_a_gap_object_without_a_gap_is_never_built(world: JournalWorld) -> None:
    disk = DiskRecord(slot=0, id="0" * 32, name="root", size_bytes=1 << 30)
    reader = JournalReader(world.journal_storage, MACHINE_ID)
    with pytest.raises(AssertionError, match="I5"):
        ObjectBuilder(reader).build_gap(
            1, Cursor(lsn=4), [disk], epoch=1, keys=KEYS, session_salt=SALT, previous_digest=NO_DIGEST
        )
    reader.close()


class Seals:
    """Stands for the cipher while objects are built, and counts with which keys and nonces something is sealed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: Counter[tuple[bytes, bytes]] = Counter()
        monkeypatch.setattr(object_encoder, "AESGCM", partial(_Seal, self.pairs))


class _Seal:
    def __init__(self, pairs: Counter[tuple[bytes, bytes]], key: bytes) -> None:
        self._pairs, self._key = pairs, key

    def encrypt_into(self, nonce: bytes, content: bytes, clear: bytes, into: memoryview) -> int:
        self._pairs[self._key, nonce] += 1
        return AESGCM(self._key).encrypt_into(nonce, content, clear, into)


def ship(world: JournalWorld, cursor: Cursor, keys: MachineKeys, salt: bytes, rng: random.Random) -> list[Cursor]:
    """One session: objects of any size from a place on; where each begins and ends."""
    ends, previous = [cursor], NO_DIGEST
    reader = JournalReader(world.journal_storage, MACHINE_ID)
    builder = ObjectBuilder(reader)
    try:
        while built := builder.build(
            ends[-1],
            world.journal.durable_lsn,
            keys=keys,
            session_salt=salt,
            previous_digest=previous,
            bytes_max=rng.randint(1, 40) * 2 * BLOCK,
            level=rng.choice((None, ZSTD_LEVEL, ZSTD_LEVEL_FAST)),
            folds=rng.random() < 0.1,
        ):
            ends.append(built.cursor)
            previous = built.digest
            if rng.random() < 0.5:
                builder.give_back(built)
    finally:
        reader.close()
    return ends


def test_no_pair_of_key_and_nonce_seals_twice(
    world: JournalWorld, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many objects of many frames, sessions that go on anywhere and ship LSNs again, other machines with these keys."""
    for _ in range(200):
        world.disks[0].write(0, rng.randbytes(rng.choice((1, 3)) * BLOCK))
    world.sync()
    last = world.journal.durable_lsn
    monkeypatch.setattr(stretch_reader, "BYTES_LEAST", 0)
    seals = Seals(monkeypatch)
    ends, shipped = [Cursor()], 0
    for number in count():
        if number >= 24 and (len(seals.pairs) > 300 or number == 100):
            break
        keys = replace(KEYS, machine_id=bytes([number]) * 16) if number % 4 == 0 else KEYS
        start = rng.choice(ends[: len(ends) // 2 + 1]) if number % 3 else Cursor()
        shipped += last - start.lsn
        ends = ship(world, start, keys, rng.randbytes(len(SALT)), rng)
    assert max(seals.pairs.values()) == 1, "a key and a nonce have sealed two things"
    assert shipped > 8 * last and len(seals.pairs) > 300, "LSNs were shipped again and again"
    assert len({nonce[8:] for _, nonce in seals.pairs}) >= 3, "the index and several frames of an object"
    for _ in range(2):
        ship(world, Cursor(), KEYS, SALT, rng)
    assert max(seals.pairs.values()) == 2, "a salt that came again would have been seen"
