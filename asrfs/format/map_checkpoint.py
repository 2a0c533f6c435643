"""A map checkpoint: what a stretch of a history made of one disk, kept so that nobody reads those indexes again.

    clear header | part table | sealed objects | sealed extents, part by part

Extents and what they refer to say where a machine wrote, as indexes do, so they are sealed with a key that is derived
from the machine's index key and a salt of the file's own; header and table are authenticated with every part. The
header names the digest of the log object at which the stretch ends. As digests chain, that is the whole history up to
there: a checkpoint is good for the history that has this object, and for no other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from asrfs.errors import FormatError
from asrfs.format.log_object import DIGEST_BYTES, KEY_BYTES

MAP_MAGIC = b"ASRMAP1\n"
MAP_VERSION = 1
MAP_HEADER_BYTES = 256
PART_EXTENTS = 1 << 15
"""Columns of a part fit in a processor's cache while they are taken apart."""
EXTENTS_MAX = 1 << 32
OBJECTS_MAX = 1 << 31
SECTORS_END = 1 << 54

_SEAL_BYTES = 16
_HEADER = struct.Struct("<16sIHH32sQQ32sQII")
_PREFIX = struct.Struct("<8sI")
_PART = struct.Struct("<I")
_PART_HEAD = struct.Struct("<IQ")
_COLUMN = struct.Struct("<BQ")
_WIDTHS = {0: None, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Bytes = bytes | bytearray | memoryview
UInt64s = npt.NDArray[np.uint64]


class MapHeader(NamedTuple):
    """Clear header. The stretch is records `after_lsn + 1` to `lsn`; `digest`: of the log object that ends there."""

    machine_id: bytes
    version: int
    slot: int
    reserved: int
    salt: bytes
    after_lsn: int
    lsn: int
    digest: bytes
    extent_count: int
    object_count: int
    part_count: int

    @property
    def parts_offset(self) -> int:
        return MAP_HEADER_BYTES + self.part_count * _PART.size


class MapObjects(NamedTuple):
    """The log objects that a map's extents refer to, by number: LSN of the first record, digest (n × 32 bytes), and
    raw bytes in each frame."""

    first_lsn: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint8]
    frame_bytes: npt.NDArray[np.int64]


class MapExtents(NamedTuple):
    """Columns of sorted, disjoint extents, in sectors of 512 bytes. `object`: 0 reads as zeros, else one more than the
    number of a log object, in whose payload the bytes begin at `position`."""

    start: UInt64s
    length: UInt64s
    object: UInt64s
    position: UInt64s


def derive_map_key(index_key: bytes, machine_id: bytes, salt: bytes) -> bytes:
    """The key of one checkpoint: HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"asrfs map checkpoint 1" + machine_id).derive(
        index_key
    )


def part_count_of(extent_count: int) -> int:
    """Parts of a checkpoint: one of objects, and those of extents."""
    return 1 + -(-extent_count // PART_EXTENTS)


def encode_map(header: MapHeader, objects: MapObjects, parts: Iterator[MapExtents], key: bytes) -> list[bytes]:
    """All pieces of the file. `parts`: the extents, `PART_EXTENTS` in each but the last. Releases the interpreter in
    its large steps."""
    assert header.part_count == part_count_of(header.extent_count)
    raw = [_encode_objects(objects), *map(_encode_part, parts)]
    assert len(raw) == header.part_count
    body = _HEADER.pack(*header).ljust(MAP_HEADER_BYTES - _PREFIX.size, b"\0")
    clear = _PREFIX.pack(MAP_MAGIC, crc32c(body)) + body
    clear += b"".join(_PART.pack(len(part) + _SEAL_BYTES) for part in raw)
    cipher = AESGCM(key)
    return [clear, *(cipher.encrypt(_nonce(i), part, clear) for i, part in enumerate(raw))]


def decode_map_header(buffer: Bytes, where: str) -> MapHeader:
    """Read and check a clear header; nothing in it is believed before its checksum. Raises FormatError."""
    if len(buffer) < MAP_HEADER_BYTES:
        raise FormatError(f"{where}: {len(buffer)} bytes are too few for a map checkpoint")
    magic, crc = _PREFIX.unpack_from(buffer)
    body = bytes(buffer[_PREFIX.size : MAP_HEADER_BYTES])
    if magic != MAP_MAGIC or crc32c(body) != crc:
        raise FormatError(f"{where}: not a map checkpoint, or its header does not match its checksum")
    header = MapHeader._make(_HEADER.unpack_from(body))
    sound = (
        header.version == MAP_VERSION
        and header.after_lsn < header.lsn < 1 << 63
        and header.extent_count < EXTENTS_MAX
        and header.object_count < OBJECTS_MAX
        and header.part_count == part_count_of(header.extent_count)
    )
    if not sound:
        raise FormatError(f"{where}: a map checkpoint of another format, or one that cannot be")
    return header


class SealedMap:
    """Where each part of a checkpoint lies, and opening them. Read from the file's beginning, up to
    `header.parts_offset`; safe for threads."""

    def __init__(self, header: MapHeader, head: Bytes, key: bytes, where: str) -> None:
        """Raises FormatError."""
        self.header = header
        self._clear = bytes(memoryview(head)[: header.parts_offset])
        if len(self._clear) != header.parts_offset:
            raise FormatError(f"{where}: ends in its part table")
        self._where = where
        self._cipher = AESGCM(key)
        self._extents: list[tuple[int, int]] = []
        at = header.parts_offset
        for (length,) in _PART.iter_unpack(self._clear[MAP_HEADER_BYTES:]):
            self._extents.append((at, length))
            at += length

    def extent(self, i: int) -> tuple[int, int]:
        """`(offset, length)` of sealed part i in the file."""
        return self._extents[i]

    def objects(self, sealed: Bytes) -> MapObjects:
        """From part 0. Raises FormatError."""
        raw = self._open(0, sealed)
        count = self.header.object_count
        if len(raw) != count * (8 + 4 + DIGEST_BYTES):
            raise FormatError(f"{self._where}: does not hold the objects it says")
        return MapObjects(
            np.frombuffer(raw, np.int64, count),
            np.frombuffer(raw, np.uint8, count * DIGEST_BYTES, 12 * count).reshape(count, DIGEST_BYTES),
            np.frombuffer(raw, np.uint32, count, 8 * count).astype(np.int64),
        )

    def extents(self, i: int, sealed: Bytes) -> MapExtents:
        """From part i, of those behind the first. Raises FormatError."""
        raw = self._open(i, sealed)
        expected = min(PART_EXTENTS, self.header.extent_count - (i - 1) * PART_EXTENTS)
        try:
            count, first = _PART_HEAD.unpack_from(raw)
            at = _PART_HEAD.size
            columns = []
            for _ in range(4):
                column, at = _decode_column(raw, at, count)
                columns.append(column)
        except (struct.error, ValueError, KeyError):
            raise FormatError(f"{self._where}: part {i} cannot be read") from None
        gap, length, number, position = columns
        if count != expected or at != len(raw) or int(number.max()) > self.header.object_count:
            raise FormatError(f"{self._where}: part {i} does not hold what the header says")
        end = gap
        end += length
        # About at first, so that the exact sum cannot pass what its type holds.
        if int(length.min()) == 0 or first + float(end.sum(dtype=np.float64)) >= 2 * SECTORS_END:
            raise FormatError(f"{self._where}: part {i} has extents that no disk can have")
        np.cumsum(end, out=end)
        end += np.uint64(first)
        if int(end[-1]) >= SECTORS_END:
            raise FormatError(f"{self._where}: part {i} has extents that no disk can have")
        return MapExtents(end - length, length, number, position)

    def _open(self, i: int, sealed: Bytes) -> bytes:
        try:
            return self._cipher.decrypt(_nonce(i), sealed, self._clear)
        except (InvalidTag, ValueError):
            raise FormatError(f"{self._where}: the seal of part {i} is broken") from None


def _encode_objects(objects: MapObjects) -> bytes:
    columns = (objects.first_lsn.astype(np.int64), objects.frame_bytes.astype(np.uint32), objects.digest)
    return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)


def _encode_part(extents: MapExtents) -> bytes:
    """Starts are kept as the distance from the end before, so that they need few bytes."""
    start, length = extents.start, extents.length
    gap = np.zeros(len(start), np.uint64)
    gap[1:] = start[1:] - (start + length)[:-1]
    columns = (gap, length, extents.object, extents.position)
    return _PART_HEAD.pack(len(start), int(start[0])) + b"".join(map(_encode_column, columns))


def _encode_column(column: UInt64s) -> bytes:
    """The least value, and what each has more than it, in as few bytes as the largest needs; none if all are equal."""
    least = int(column.min())
    most = int(column.max()) - least
    width = next(width for width in _WIDTHS if most < 1 << (8 * width))
    dtype = _WIDTHS[width]
    more = b"" if dtype is None else (column - np.uint64(least)).astype(dtype).tobytes()
    return _COLUMN.pack(width, least) + more


def _decode_column(raw: bytes, at: int, count: int) -> tuple[UInt64s, int]:
    width, least = _COLUMN.unpack_from(raw, at)
    at += _COLUMN.size
    dtype = _WIDTHS[width]
    if dtype is None:
        return np.full(count, least, np.uint64), at
    column = np.frombuffer(raw, dtype, count, at).astype(np.uint64)
    if least:
        column += np.uint64(least)
    return column, at + width * count


def _nonce(part: int) -> bytes:
    return part.to_bytes(12, "little")
