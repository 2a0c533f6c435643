"""Log objects: what a disk, a relay or a host with good keys may have done to one.

Unsealed changes are refused by the digest, and by each seal when only a part is read. What a host sealed itself, it
may fill with anything: then nothing but a typed error leaves, whatever is acknowledged can be read back, and a frame
never becomes more than the header says, however small it is when compressed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.format import log_object, object_encoder, object_index
from asrfs.format.log_object import OBJECT_HEADER_BYTES, ObjectHeader, ObjectKeys
from asrfs.format.object_index import Index
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.protocol.messages import ObjectBegin
from asrfs.protocol.session import ObjectReceived
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.rows import log_object_name
from replica_store.vault.scrub import scrub
from replica_store.vault.survey import Surveyed, survey
from tests.fakes.scripted_host import BuiltObject, HostHistory
from tests.proof.fuzzing.mutations import (
    Strike,
    as_msgpack,
    extreme,
    mutate_bytes,
    mutate_document,
    mutate_fields,
)
from tests.proof.fuzzing.sessions import SALT, StoreWorld
from tests.proof.fuzzing.target import Target, Trial, refused

_HEADER_BITS = (0, 32, 32, 0, 64, 64, 64, 64, 0, 64, 32, 32, 32, 32, 64, 32)
_COLUMN_BITS = {
    "time_ns": 64,
    "offset": 64,
    "length": 64,
    "payload_position": 64,
    "note_length": 32,
    "kind": 16,
    "slot": 16,
}
_BOMB_RAW_BYTES = 160 << 20
_FRAME_BYTES = 8192


@dataclass(frozen=True)
class Parts:
    """A log object taken apart: frames are packed and not yet sealed."""

    header: ObjectHeader
    index: bytes
    frames: list[tuple[bytes, int]]

    def sealed(self, keys: ObjectKeys, *, fits: bool = True) -> bytes:
        """The object, its seals and digest right. `fits`: the lengths in the header are made to say what is there."""
        header = self.header
        table = b"".join(struct.pack("<II", len(packed) + 16, flags) for packed, flags in self.frames)
        if fits:
            header = header._replace(
                index_length=len(self.index) + 16,
                frame_count=len(self.frames),
                frames_length=sum(len(packed) + 16 for packed, _ in self.frames),
            )
        clear = log_object.encode_object_header(header)
        nonce = struct.Struct("<QI").pack
        whole = (
            clear + table + AESGCM(keys.index).encrypt(nonce(header.first_lsn, 0xFFFFFFFF), self.index, clear + table)
        )
        cipher = AESGCM(keys.payload)
        whole += b"".join(
            cipher.encrypt(nonce(header.first_lsn, i), packed, clear) for i, (packed, _) in enumerate(self.frames)
        )
        return whole + blake3(whole).digest()


@dataclass(frozen=True)
class Sample:
    """A good object and what it is made of."""

    content: bytes
    parts: Parts
    raw_index: bytes
    keys: ObjectKeys

    @classmethod
    def of(cls, history: HostHistory, build: Callable[[], BuiltObject], frame_bytes: int = _FRAME_BYTES) -> Sample:
        with mock.patch.object(object_encoder, "FRAME_RAW_BYTES", frame_bytes):
            content = build().content
        keys = history.session_keys(SALT)
        header = log_object.decode_object_header(content, "sample")
        nonce = struct.Struct("<QI").pack
        clear = content[:OBJECT_HEADER_BYTES]
        at = header.index_offset
        sealed = content[at : at + header.index_length]
        first = header.first_lsn
        packed = AESGCM(keys.index).decrypt(nonce(first, 0xFFFFFFFF), sealed, content[:at])
        frames = []
        at += header.index_length
        for i in range(header.frame_count):
            length, flags = struct.unpack_from("<II", content, OBJECT_HEADER_BYTES + 8 * i)
            frames.append((AESGCM(keys.payload).decrypt(nonce(first, i), content[at : at + length], clear), flags))
            at += length
        return cls(content, Parts(header, packed, frames), zstandard.decompress(packed), keys)


def make_history(world: StoreWorld) -> HostHistory:
    """Two disks, every kind of record, payloads of several frames."""
    history = HostHistory(world.machine_id, world.keys, seed=9)
    history.disk(0)
    history.disk(1, gap=True)
    for number in range(12):
        history.write(1 + number % 4, slot=number % 2)
    history.append(Kind.ZERO, 0, 8192, 65536, b"")
    history.append(Kind.DISCARD, 1, 0, 4096, b"")
    history.append(Kind.FILL, 1, 4096, 4096, bytes(4096))
    history.disk(1)
    history.marker("noon")
    return history


# ---- changed and not sealed again ---------------------------------------------------------------------------------


def try_unsealed(samples: list[Sample], _world: StoreWorld, rng: random.Random, strike: Strike) -> None:
    sample, other = rng.sample(samples, 2)
    content = mutate_bytes(rng, sample.content, other.content, strike)
    if content == sample.content:
        return
    digest = refused(lambda: log_object.check_digest(content, "mutated"))
    assert digest is None, "a log object that was changed has a digest that fits"
    is_header_changed = content[:OBJECT_HEADER_BYTES] != sample.content[:OBJECT_HEADER_BYTES]
    header = refused(lambda: log_object.decode_object_header(content, "mutated"))
    if header is None:
        return
    assert not is_header_changed, "lengths were believed before their checksum"
    original = object_index.decode_index(header, sample.content, sample.keys, "sample")
    index = refused(lambda: object_index.decode_index(header, content, sample.keys, "mutated"))
    assert index is None or index.notes == original.notes
    if len(content) >= header.frames_offset:
        table = refused(lambda: log_object.FrameTable(header, content, "mutated"))
        for i in range(header.frame_count if table else 0):
            assert table is not None
            at, length = table.extent(i)
            raw = refused(
                lambda at=at, length=length, i=i: table.open_frame(i, content[at : at + length], sample.keys.payload)
            )
            assert raw is None or raw == _raw_frame(sample, i), f"frame {i} opened and is not what was sealed"


def _raw_frame(sample: Sample, i: int) -> bytes:
    packed, flags = sample.parts.frames[i]
    return zstandard.decompress(packed) if flags & 1 else packed


# ---- sealed by a host that lies -----------------------------------------------------------------------------------


def try_sealed(samples: list[Sample], world: StoreWorld, rng: random.Random, strike: Strike) -> None:
    sample = rng.choice(samples)
    parts = sample.parts
    kind = rng.choice(("header", "column", "column", "raw index", "note", "table"))
    if kind == "header":
        strike("field")
        parts = replace(parts, header=ObjectHeader._make(mutate_fields(rng, parts.header, _HEADER_BITS)))
        _store_and_read(world, sample, parts.sealed(sample.keys, fits=rng.random() < 0.5))
        return
    if kind == "table":
        strike("field")
        frames = list(parts.frames)
        if frames:
            at = rng.randrange(len(frames))
            packed, flags = frames[at]
            chosen = rng.choice(((packed, flags ^ 1), (packed[: rng.randrange(len(packed))], flags), (b"", flags)))
            frames[at : at + 1] = rng.choice(([chosen], [chosen, chosen], []))
        parts = replace(parts, frames=frames)
    else:
        raw = _broken_index(rng, sample, kind, strike)
        parts = replace(
            parts,
            index=zstandard.compress(raw),
            header=parts.header._replace(index_raw_length=len(raw)),
        )
    _store_and_read(world, sample, parts.sealed(sample.keys))


def _broken_index(rng: random.Random, sample: Sample, kind: str, strike: Strike) -> bytes:
    if kind == "raw index":
        return mutate_bytes(rng, sample.raw_index, sample.raw_index, strike)
    index = object_index.decode_index(sample.parts.header, sample.content, sample.keys, "sample")
    if kind == "note":
        return object_index.encode_index(_with_broken_note(rng, index, strike))
    strike("field")
    columns = {}
    bits = _COLUMN_BITS | ({"stretch_lsn": 64} if index.is_stretch else {})
    for name in rng.sample(sorted(bits), rng.choice((1, 1, 2))):
        column = np.array(getattr(index, name))
        at = rng.randrange(len(column))
        column[at] = extreme(rng, bits[name]) if rng.random() < 0.7 else rng.randrange(8) * 4096 & 0xFFFF
        if name == "stretch_lsn" and rng.random() < 0.5:
            column[at] = rng.randint(0, sample.parts.header.last_lsn + 1)
        columns[name] = column
    return object_index.encode_index(replace(index, **columns))


def _with_broken_note(rng: random.Random, index: Index, strike: Strike) -> Index:
    """The payload of a MARKER or DISK record says something else; all that points to notes fits."""
    noted = np.flatnonzero(index.note_length).tolist()
    notes = {i: index.note(i) for i in noted}
    at = rng.choice(noted)
    document = mutate_document(rng, msgspec.msgpack.decode(notes[at]), strike)
    notes[at] = as_msgpack(rng, document)
    lengths, positions = np.array(index.note_length), np.array(index.payload_position)
    end = 0
    for i in noted:
        lengths[i], positions[i] = len(notes[i]), end
        end += len(notes[i])
    return replace(index, note_length=lengths, payload_position=positions, notes=b"".join(notes.values()))


def _store_and_read(world: StoreWorld, sample: Sample, content: bytes) -> None:
    """Offer it to the store as the machine's first object, and when it is taken, use it in every way there is."""
    _check_bounds(sample, content)
    header = sample.parts.header
    begin = ObjectBegin(first_lsn=header.first_lsn, last_lsn=header.last_lsn, length=max(1, len(content)))
    ingester = world.ingester()
    taken = ingester.take([ObjectReceived(begin, content)])
    if not taken.acknowledged:
        assert taken.error is not None, "neither taken nor refused"
        assert world.stored() == [], "what was refused is not here"
        return
    assert world.stored() == [content]
    for lsn in (1, header.last_lsn):
        refused(lambda lsn=lsn: _read_disks(world, lsn))
    scrubbed = scrub(world.vault, world.vault.machines())
    assert all("differ" not in damage.text for damage in scrubbed.damages), scrubbed.damages
    name = log_object_name(world.machine_id, header.epoch, header.first_lsn, header.last_lsn, "deadbeef")
    for each in survey(world.vault.objects, world.machine_id, world.keys, [name]):
        assert isinstance(each, Surveyed), "rebuild cannot read what was acknowledged"


def _check_bounds(sample: Sample, content: bytes) -> None:
    """Said once more, one record at a time: no record of an index that is accepted points outside of what is there."""
    header = refused(lambda: log_object.decode_object_header(content, "sealed"))
    index = header and refused(lambda: object_index.decode_index(header, content, sample.keys, "sealed"))
    if not header or not index:
        return
    for i in range(len(index)):
        start, length = int(index.payload_position[i]), int(index.length[i])
        if int(index.kind[i]) in CARRIES_EXTENT_BYTES:
            assert start + length <= header.payload_raw_length, f"record {i} reads beyond the payload"
        elif int(index.note_length[i]):
            assert start + int(index.note_length[i]) <= len(index.notes), f"record {i} reads beyond the notes"
    lsns = index.lsn.tolist()
    assert lsns == sorted(lsns) and header.first_lsn <= lsns[0] and lsns[-1] == header.last_lsn
    inside = [lsn for lsn in lsns if lsn != header.last_lsn]
    assert len(set(inside)) == len(inside), "two records have one LSN"


def _read_disks(world: StoreWorld, lsn: int) -> None:
    """As an export would: cut, map, both ends of every disk."""
    for selector in (f"lsn:{lsn}", "latest", "latest-processed"):
        cut = refused(lambda selector=selector: resolve(world.vault, "web1", selector))
        if cut is None:
            continue
        disks = disks_of(world.vault, cut)
        opened = open_disks(world.vault, cut, [disk.name for disk in disks], FrameCache(world.vault, 1 << 20))
        for disk in opened.values():
            size = min(disk.size_bytes, 128 << 10)
            for offset in (0, disk.size_bytes - size):
                refused(lambda disk=disk, offset=offset, size=size: disk.read(offset, size))


# ---- bombs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bombs:
    """Small things that become large. `zeros`: a compressed frame of very many."""

    zeros: bytes
    nameless: bytes
    sizes: dict[int, bytes]

    @classmethod
    def make(cls) -> Bombs:
        compressor = zstandard.ZstdCompressor(level=19)
        pieces, chunk = compressor.compressobj(size=_BOMB_RAW_BYTES), bytes(1 << 20)
        zeros = b"".join(pieces.compress(chunk) for _ in range(_BOMB_RAW_BYTES >> 20)) + pieces.flush()
        nameless = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(bytes(4 << 20))
        sizes = {size: compressor.compress(bytes(size)) for size in (0, 1, _FRAME_BYTES, 1 << 20, 32 << 20)}
        return cls(zeros, nameless, sizes)


def lying(packed: bytes, size: int) -> bytes:
    """A zstd frame that says it holds `size` bytes, in a field of 8 bytes, whatever it holds (RFC 8878, 3.1.1.1)."""
    descriptor = packed[4]
    is_single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6] or (descriptor >> 5 & 1)
    window = b"" if is_single else packed[5:6]
    body = packed[5 + len(window) + width :]
    return packed[:4] + bytes([0xC0 | descriptor & 0x3F]) + window + size.to_bytes(8, "little") + body


def try_bomb(samples: list[Sample], world: StoreWorld, bombs: Bombs, rng: random.Random, strike: Strike) -> None:
    strike("bomb")
    sample = rng.choice([each for each in samples if each.parts.frames])
    parts, header = sample.parts, sample.parts.header
    said = rng.choice((_FRAME_BYTES, header.index_raw_length, 1 << 20, 64 << 20, (64 << 20) + 1, 1 << 40, 1 << 63))
    packed = rng.choice((bombs.zeros, bombs.nameless, *bombs.sizes.values()))
    if rng.random() < 0.6 and packed is not bombs.nameless:
        packed = lying(packed, said)
    if rng.random() < 0.2:
        packed = packed + packed
    kind = rng.choice(("index", "frame", "frame", "many"))
    if kind == "index":
        parts = replace(parts, index=packed, header=header._replace(index_raw_length=min(said, 0xFFFFFFFF)))
    elif kind == "frame":
        frames = list(parts.frames)
        frames[rng.randrange(len(frames))] = (packed, 1)
        parts = replace(parts, frames=frames)
    else:
        count = rng.choice((100, 2000))
        size = rng.choice((1, 512, 1 << 20))
        frame = bombs.sizes.get(size, packed)
        changed = header._replace(payload_raw_length=size * count, frame_raw_bytes=size)
        parts = Parts(changed, parts.index, [(frame, 1)] * count)
    content = parts.sealed(sample.keys)
    _open_whole(sample, content)
    _store_and_read(world, sample, content)


def _open_whole(sample: Sample, content: bytes) -> None:
    """Every frame the table names, as a scrub does. None is longer than the header allows."""
    header = refused(lambda: log_object.decode_object_header(content, "bomb"))
    table = header and refused(lambda: log_object.FrameTable(header, content, "bomb"))
    if not header or not table:
        return
    for i in range(min(header.frame_count, 50)):
        at, length = table.extent(i)
        raw = refused(
            lambda at=at, length=length, i=i: table.open_frame(i, content[at : at + length], sample.keys.payload)
        )
        assert raw is None or len(raw) <= header.frame_raw_bytes


# ---- targets ------------------------------------------------------------------------------------------------------


def _target(name: str, weight: int, make: Callable[[], Any], trial: Callable[..., None]) -> Target:
    @contextmanager
    def opened(scratch: Path) -> Iterator[Trial]:
        with StoreWorld.open(scratch) as world:
            history = make_history(world)
            last = history.last_lsn
            samples = [
                Sample.of(history, lambda: history.build(1, last, SALT)),
                Sample.of(history, lambda: history.build(1, 5, SALT), 128 << 10),
                Sample.of(history, lambda: history.build(1, 2, SALT)),
                Sample.of(history, lambda: history.build(1, last, SALT, is_folded=True)),
                Sample.of(history, lambda: history.build_gap(1, last, SALT)),
            ]
            for sample in samples:
                assert sample.parts.sealed(sample.keys) == sample.content, "taken apart and put together"
                _store_and_read(world, sample, sample.content)
                assert world.stored(), "the object itself is a good one"
            more = [made] if (made := make()) is not None else []
            yield lambda rng, strike: trial(samples, world, *more, rng, strike)

    return Target(name, weight, opened)


TARGETS = (
    _target("object bytes", 12, lambda: None, try_unsealed),
    _target("object fields", 4, lambda: None, try_sealed),
    _target("bombs", 1, Bombs.make, try_bomb),
)
