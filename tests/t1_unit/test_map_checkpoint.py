"""The layout of a map checkpoint: what was encoded comes back, and nothing that was changed does."""

from __future__ import annotations

import random

import numpy as np
import pytest

from asrfs.errors import FormatError
from asrfs.format import map_checkpoint
from asrfs.format.map_checkpoint import (
    MAP_HEADER_BYTES,
    MAP_VERSION,
    SECTORS_END,
    MapExtents,
    MapHeader,
    MapObjects,
    SealedMap,
    decode_map_header,
    derive_map_key,
    encode_map,
    part_count_of,
)

KEY = derive_map_key(bytes(32), bytes(16), bytes(32))


def columns(rng: random.Random, count: int, gap_max: int, objects: int) -> MapExtents:
    gaps = np.array([rng.randint(0, gap_max) for _ in range(count)], np.uint64)
    lengths = np.array(
        [rng.choice((8, 8, 8, rng.randint(1, 1 << rng.randint(0, 33)))) for _ in range(count)], np.uint64
    )
    start = np.cumsum(gaps + lengths) - lengths
    numbers = np.array([rng.randint(0, objects) for _ in range(count)], np.uint64)
    return MapExtents(start, lengths, numbers, np.array([rng.randrange(1 << 31) for _ in range(count)], np.uint64))


def encoded(extents: MapExtents, objects: int) -> tuple[bytes, MapObjects]:
    count = len(extents.start)
    known = MapObjects(
        np.arange(1, objects + 1, dtype=np.int64) * 7,
        np.arange(objects * 32, dtype=np.uint64).astype(np.uint8).reshape(objects, 32),
        np.full(objects, 131072, np.int64),
    )
    header = MapHeader(
        *(bytes(16), MAP_VERSION, 3, 0, bytes(32), 5, 99, bytes(range(32)), count, objects, part_count_of(count))
    )
    size = map_checkpoint.PART_EXTENTS
    parts = (MapExtents(*(column[at : at + size] for column in extents)) for at in range(0, count, size))
    return b"".join(encode_map(header, known, parts, KEY)), known


def decoded(content: bytes) -> tuple[MapHeader, MapObjects, MapExtents]:
    header = decode_map_header(content, "x")
    sealed = SealedMap(header, content[: header.parts_offset], KEY, "x")

    def part(i: int) -> bytes:
        at, length = sealed.extent(i)
        return content[at : at + length]

    parts = [sealed.extents(i, part(i)) for i in range(1, header.part_count)]
    joined = MapExtents(*(np.concatenate([np.empty(0, np.uint64), *each]) for each in zip(*parts, strict=True)))
    return header, sealed.objects(part(0)), joined


@pytest.mark.parametrize("gap_max", [0, 200, 60_000, 1 << 33])
@pytest.mark.parametrize("count", [1, 7, 8, 100])
def test_what_was_encoded_comes_back(
    count: int, gap_max: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_checkpoint, "PART_EXTENTS", 8)
    extents = columns(rng, count, gap_max, 300)
    content, objects = encoded(extents, 300)
    header, found_objects, found = decoded(content)
    assert (header.slot, header.after_lsn, header.lsn, header.digest) == (3, 5, 99, bytes(range(32)))
    for before, after in zip([*extents, *objects], [*found, *found_objects], strict=True):
        assert np.array_equal(before, after)


def test_an_extent_of_random_4_kib_writes_takes_few_bytes(rng: random.Random) -> None:
    count = map_checkpoint.PART_EXTENTS
    start = np.sort(np.random.default_rng(rng.getrandbits(32)).choice(1 << 22, count, replace=False)).astype(np.uint64)
    numbers = np.array([rng.randint(1, 10_000) for _ in range(count)], np.uint64)
    positions = np.array([8 * rng.randrange(1024) for _ in range(count)], np.uint64)
    content, _ = encoded(MapExtents(start * np.uint64(8), np.full(count, 8, np.uint64), numbers, positions), 10_000)
    assert len(content) <= 6 * count + 44 * 10_000 + 4096


def test_every_changed_byte_is_noticed(rng: random.Random) -> None:
    content, _ = encoded(columns(rng, 20, 100, 3), 3)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError):
            decoded(bytes(changed))
    for length in range(0, len(content), 3):
        with pytest.raises(FormatError):
            decoded(content[:length])


def test_another_key_opens_nothing() -> None:
    content, _ = encoded(columns(random.Random(1), 20, 100, 3), 3)
    header = decode_map_header(content, "x")
    for key in (
        derive_map_key(bytes(31) + b"1", bytes(16), bytes(32)),
        derive_map_key(bytes(32), bytes(15) + b"1", bytes(32)),
        derive_map_key(bytes(32), bytes(16), bytes(31) + b"1"),
    ):
        sealed = SealedMap(header, content, key, "x")
        at, length = sealed.extent(0)
        with pytest.raises(FormatError, match="seal of part 0"):
            sealed.objects(content[at : at + length])


@pytest.mark.parametrize(
    "extents",
    [
        MapExtents(*(np.array([value], np.uint64) for value in (0, 0, 1, 0))),
        MapExtents(*(np.array([value], np.uint64) for value in (SECTORS_END, 1, 1, 0))),
        MapExtents(*(np.array([value], np.uint64) for value in (0, 8, 4, 0))),
    ],
    ids=["empty", "too far", "no such object"],
)
def test_extents_that_cannot_be_are_refused_under_a_good_seal(extents: MapExtents) -> None:
    content, _ = encoded(extents, 3)
    with pytest.raises(FormatError, match="part 1"):
        decoded(content)


def test_a_header_of_another_version_is_refused() -> None:
    content, _ = encoded(columns(random.Random(1), 1, 0, 1), 1)
    fields = list(decode_map_header(content, "x"))
    fields[1] = MAP_VERSION + 1
    body = map_checkpoint._HEADER.pack(*fields).ljust(MAP_HEADER_BYTES - 12, b"\0")
    head = map_checkpoint._PREFIX.pack(map_checkpoint.MAP_MAGIC, map_checkpoint.crc32c(body)) + body
    with pytest.raises(FormatError, match="another format"):
        decode_map_header(head, "x")
