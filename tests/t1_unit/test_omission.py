"""Log objects that travel in part: what is left out is exactly what chunks of FILL records fill, and comes back."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from asrfs.errors import FormatError
from asrfs.format.log_object import FRAME_RAW_BYTES, ObjectHeader, decode_object_header, derive_keys
from asrfs.format.object_encoder import ZSTD_LEVEL, ZSTD_LEVEL_FAST, ObjectEncoder
from asrfs.format.object_index import Index
from asrfs.format.omission import filled_chunks, frames_within, pieces_of, restored, without_frames
from asrfs.format.record import Kind

CHUNK = 64 << 10
MACHINE = bytes(range(16))
SALT = bytes(32)
KEYS = derive_keys(bytes(32), bytes(range(32)), MACHINE, 1, SALT)
WHERE = "an object"


class Disk:
    """Content of one disk, and records that were made of it."""

    def __init__(self, rng: random.Random) -> None:
        self.content = b"".join(rng.randbytes(CHUNK) if n % 3 else rng.randbytes(64) * 1024 for n in range(64))
        self.records: list[tuple[Kind, int, int]] = []
        self.rng = rng

    def add(self, kind: Kind, offset: int, length: int) -> None:
        self.records.append((kind, offset, length))

    def build(self, level: int | None) -> tuple[bytes, Index, ObjectHeader]:
        payloads = [
            self.content[offset : offset + length] if kind == Kind.FILL else self.rng.randbytes(length)
            for kind, offset, length in self.records
        ]
        lengths = np.array([length for _, _, length in self.records], np.uint64)
        index = Index(
            first_lsn=5,
            time_ns=np.arange(7, 7 + len(self.records), dtype=np.uint64),
            offset=np.array([offset for _, offset, _ in self.records], np.uint64),
            length=lengths,
            payload_position=np.cumsum(lengths, dtype=np.uint64) - lengths,
            note_length=np.zeros(len(self.records), np.uint32),
            kind=np.array([int(kind) for kind, _, _ in self.records], np.uint16),
            slot=np.zeros(len(self.records), np.uint16),
            notes=b"",
        )
        _, content = ObjectEncoder().encode(
            machine_id=MACHINE,
            epoch=1,
            session_salt=SALT,
            previous_digest=bytes(32),
            index=index,
            payloads=payloads,
            keys=KEYS,
            level=level,
        )
        return bytes(content), index, decode_object_header(content, WHERE)

    def content_of(self, header: ObjectHeader, index: Index) -> Callable[[int], bytes]:
        def read(frame: int) -> bytes:
            return b"".join(
                self.content[piece.offset : piece.offset + piece.length] for piece in pieces_of(header, index, frame)
            )

        return read


@pytest.fixture
def disk(rng: random.Random) -> Disk:
    return Disk(rng)


@pytest.mark.parametrize("level", [None, ZSTD_LEVEL, ZSTD_LEVEL_FAST])
def test_an_object_is_the_same_byte_for_byte(disk: Disk, level: int | None) -> None:
    disk.add(Kind.WRITE, 3 * CHUNK, 4096)
    disk.add(Kind.FILL, 0, 16 * CHUNK)
    disk.add(Kind.FILL, 32 * CHUNK, 5 * CHUNK)
    disk.add(Kind.WRITE, 0, 8192)
    disk.add(Kind.FILL, 40 * CHUNK, CHUNK)
    content, index, header = disk.build(level)
    chunks = filled_chunks(index)
    assert [each.chunk for each in chunks] == [*range(16), *range(32, 37), 40]
    frames = frames_within(header, [each.position for each in chunks])
    assert frames == [*range(1, 10), 11], "the first has 4 KiB of a write, the tenth other writes"
    kept = b"".join(without_frames(content, header, frames))
    assert len(kept) < len(content)
    read = disk.content_of(header, index)
    whole = restored(kept, header, frames, read, payload_key=KEYS.payload, level=level, where=WHERE)
    assert bytes(whole) == content


def test_the_last_frame_is_left_out_when_chunks_fill_it(disk: Disk) -> None:
    disk.add(Kind.FILL, 0, 3 * CHUNK)
    _, index, header = disk.build(ZSTD_LEVEL)
    positions = [each.position for each in filled_chunks(index)]
    assert frames_within(header, positions) == [0, 1]
    assert frames_within(header, positions[:2]) == [0]
    assert frames_within(header, positions[1:]) == [1]
    assert frames_within(header, []) == []


def test_chunks_in_part_do_not_count(disk: Disk) -> None:
    disk.add(Kind.FILL, 4096, 2 * CHUNK)
    disk.add(Kind.FILL, 10 * CHUNK, CHUNK - 512)
    _, index, _ = disk.build(None)
    assert [(each.chunk, each.position) for each in filled_chunks(index)] == [(1, CHUNK - 4096)]


def test_a_frame_with_anything_else_is_not_made_up(disk: Disk) -> None:
    disk.add(Kind.FILL, 0, CHUNK)
    disk.add(Kind.WRITE, 4 * CHUNK, CHUNK)
    content, index, header = disk.build(None)
    with pytest.raises(FormatError, match="more than FILL records"):
        pieces_of(header, index, 0)
    with pytest.raises(FormatError):
        restored(content, header, [7], bytes, payload_key=KEYS.payload, level=None, where=WHERE)
    with pytest.raises(FormatError, match="without"):
        restored(content, header, [0], bytes, payload_key=KEYS.payload, level=None, where=WHERE)


def test_other_content_or_level_is_not_the_object(disk: Disk) -> None:
    disk.add(Kind.FILL, 2 * CHUNK, 2 * CHUNK)
    content, index, header = disk.build(ZSTD_LEVEL)
    kept = b"".join(without_frames(content, header, [0]))

    def made(read: Callable[[int], bytes], level: int | None) -> bytes:
        whole = restored(kept, header, [0], read, payload_key=KEYS.payload, level=level, where=WHERE)
        return bytes(whole)

    with pytest.raises(FormatError, match="packed differently"):
        made(lambda frame: bytes(FRAME_RAW_BYTES), ZSTD_LEVEL)
    with pytest.raises(FormatError, match="packed differently"):
        made(disk.content_of(header, index), None)
    assert made(disk.content_of(header, index), ZSTD_LEVEL) == content
