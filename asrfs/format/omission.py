"""A log object that travels without some of its frames, because the store has what is in them already.

    host:   object ─▶ chunks of FILL records ─▶ which of them does the store have? ─▶ object less whole frames of these
    store:  what came ─▶ each frame left out: content, packed and sealed again ─▶ the object, byte for byte

Packing and sealing give the same bytes for the same content, level and key, so the object at the store is the one
that the host made and its digest says so: no other part of the store knows that some of it never travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.errors import FormatError
from asrfs.format.log_object import (
    FRAME_RAW_BYTES,
    OBJECT_HEADER_BYTES,
    SEAL_BYTES,
    Bytes,
    FrameTable,
    ObjectHeader,
    nonce_of,
)
from asrfs.format.object_encoder import Packer
from asrfs.format.object_index import Index
from asrfs.format.record import Kind
from asrfs.model.extents import CHUNK_BYTES

_FILL = int(Kind.FILL)


class FilledChunk(NamedTuple):
    """A whole chunk of a disk that a FILL record carries; `position`: where it begins in the raw payload."""

    slot: int
    chunk: int
    position: int


class Piece(NamedTuple):
    """Bytes of a disk."""

    slot: int
    offset: int
    length: int


def filled_chunks(index: Index) -> list[FilledChunk]:
    """All whole chunks in FILL records, in the order of the payload."""
    found = []
    for i in np.flatnonzero(index.kind == _FILL).tolist():
        offset, position = int(index.offset[i]), int(index.payload_position[i])
        first = -(-offset // CHUNK_BYTES)
        end = (offset + int(index.length[i])) // CHUNK_BYTES
        slot = int(index.slot[i])
        found += [FilledChunk(slot, chunk, position + chunk * CHUNK_BYTES - offset) for chunk in range(first, end)]
    return found


def frames_within(header: ObjectHeader, positions: Iterable[int]) -> list[int]:
    """Numbers of the frames that have nothing but chunks that begin at these places (ascending) of the raw payload."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1][1] = position + CHUNK_BYTES
        else:
            runs.append([position, position + CHUNK_BYTES])
    size, raw = header.frame_raw_bytes, header.payload_raw_length
    frames: list[int] = []
    for begin, end in runs:
        last = header.frame_count if end == raw else end // size
        frames += range(-(-begin // size), last)
    return frames


def without_frames(content: Bytes, header: ObjectHeader, omitted: Collection[int]) -> list[memoryview]:
    """What is left of an object, in order."""
    table = FrameTable(header, content, "a log object of our own")
    view = memoryview(content)
    kept, at = [], 0
    for frame in sorted(omitted):
        offset, length = table.extent(frame)
        if at < offset:
            kept.append(view[at:offset])
        at = offset + length
    return [*kept, view[at:]]


def pieces_of(header: ObjectHeader, index: Index, frame: int) -> list[Piece]:
    """What a frame consists of. Raises FormatError unless that is FILL records alone."""
    begin = frame * header.frame_raw_bytes
    end = min(begin + header.frame_raw_bytes, header.payload_raw_length)
    position = index.payload_position
    found: list[Piece] = []
    fills = (index.kind == _FILL) & (position < end) & (position + index.length > begin)
    for i in np.flatnonzero(fills).tolist():
        start, length = int(position[i]), int(index.length[i])
        low, high = max(begin, start), min(end, start + length)
        found.append(Piece(int(index.slot[i]), int(index.offset[i]) + low - start, high - low))
    if sum(piece.length for piece in found) != end - begin:
        raise FormatError(f"frame {frame} of LSN {header.first_lsn} was left out, and has more than FILL records")
    return found


def restored(
    received: Bytes,
    header: ObjectHeader,
    omitted: Sequence[int],
    content_of: Callable[[int], bytes],
    *,
    payload_key: bytes,
    level: int | None,
    where: str,
) -> memoryview:
    """The whole object. `content_of` gives the raw bytes of a frame, `omitted` is ascending, `level` is the packer's.

    Raises FormatError where a frame is not as long as the object's table says, or `received` does not fit.
    """
    table = FrameTable(header, received, where)
    if omitted and (omitted[-1] >= header.frame_count or header.frame_raw_bytes > FRAME_RAW_BYTES):
        raise FormatError(f"{where}: LSN {header.first_lsn} has no frame {omitted[-1]} that could be left out")
    missing = sum(table.extent(frame)[1] for frame in omitted)
    if len(received) + missing != header.object_length:
        raise FormatError(f"{where}: LSN {header.first_lsn} came with {len(received)} bytes without {missing}")
    view, whole = memoryview(received), memoryview(bytearray(header.object_length))
    clear, cipher, packer = bytes(view[:OBJECT_HEADER_BYTES]), AESGCM(payload_key), Packer()
    at = taken = 0
    for frame in omitted:
        offset, length = table.extent(frame)
        whole[at:offset] = view[taken : taken + offset - at]
        taken += offset - at
        packed, flags = packer.pack(memoryview(content_of(frame)), level)
        if len(packed) + SEAL_BYTES != length or flags != table.flags(frame):
            raise FormatError(f"{where}: frame {frame} of LSN {header.first_lsn} is packed differently here")
        at = offset + length
        cipher.encrypt_into(nonce_of(header, frame), packed, clear, whole[offset:at])
    whole[at:] = view[taken:]
    return whole
