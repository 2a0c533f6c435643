"""Makes log objects; their layout is in `log_object.py`, which reads them.

Every byte of payload passes here on the host, so it is copied as seldom as can be: a frame that lies within one payload
is packed where it is, the others are gathered once; seals are written into the object, in memory that is used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.format.log_object import (
    FRAME,
    FRAME_IS_COMPRESSED,
    FRAME_RAW_BYTES,
    INDEX_FRAME,
    OBJECT_HEADER_BYTES,
    OBJECT_VERSION,
    SEAL_BYTES,
    STRETCH_VERSION,
    Bytes,
    ObjectHeader,
    ObjectKeys,
    encode_object_header,
    nonce_of,
)
from asrfs.format.object_index import Index, encode_index

ZSTD_LEVEL = 1
ZSTD_LEVEL_FAST = -5
"""A third of the work of level 1 for bytes that pack badly, two thirds of it for programs; text packs a third worse."""
_PROBE_BYTES = 4096
_PROBE_KEPT_MAX = 0.97
_ROOMS_KEPT = 2
_ROOM_STEP = 1 << 20


class Packer:
    """Compresses frames. The same content and level give the same bytes, for one version of zstd."""

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compress(self, content: Bytes, level: int) -> bytes:
        if level not in self._compressors:
            self._compressors[level] = zstandard.ZstdCompressor(level=level)
        return self._compressors[level].compress(content)

    def pack(self, frame: memoryview, level: int | None) -> tuple[Bytes, int]:
        """A frame and its flags; compressed unless a probe of its middle says that it does not pay."""
        if level is None:
            return frame, 0
        middle = len(frame) // 2
        probe = frame[middle : middle + _PROBE_BYTES]
        if len(frame) > 4 * len(probe) and len(self.compress(probe, level)) > len(probe) * _PROBE_KEPT_MAX:
            return frame, 0
        packed = self.compress(frame, level)
        return (packed, FRAME_IS_COMPRESSED) if len(packed) < len(frame) else (frame, 0)


class ObjectEncoder:
    """One call at a time; it releases the interpreter in its large steps, so it may run beside an event loop."""

    def __init__(self) -> None:
        self._packer = Packer()
        self._gathered = memoryview(bytearray())
        self._rooms: list[memoryview] = []

    def encode(
        self,
        *,
        machine_id: bytes,
        epoch: int,
        session_salt: bytes,
        previous_digest: bytes,
        index: Index,
        payloads: Sequence[Bytes],
        keys: ObjectKeys,
        level: int | None = ZSTD_LEVEL,
    ) -> tuple[bytes, memoryview]:
        """Build one log object, a stretch if the index is one: its digest, and all of it, trailer included.

        `payloads` are the WRITE and FILL payloads in LSN order, `level` that of zstd, or None to pack nothing but the
        index. The object is the caller's until `give_back`.
        """
        raw_index = encode_index(index)
        packed_index = self._packer.compress(raw_index, ZSTD_LEVEL)
        packed = [self._packer.pack(frame, level) for frame in self._frames(payloads)]
        table = b"".join(FRAME.pack(len(frame) + SEAL_BYTES, flags) for frame, flags in packed)
        header = ObjectHeader(
            machine_id=machine_id,
            version=STRETCH_VERSION if index.is_stretch else OBJECT_VERSION,
            epoch=epoch,
            session_salt=session_salt,
            first_lsn=index.first_lsn,
            last_lsn=index.last_lsn,
            first_time_ns=int(index.time_ns[0]),
            last_time_ns=int(index.time_ns[-1]),
            previous_digest=previous_digest,
            payload_raw_length=sum(map(len, payloads)),
            index_length=len(packed_index) + SEAL_BYTES,
            index_raw_length=len(raw_index),
            frame_count=len(packed),
            frame_raw_bytes=FRAME_RAW_BYTES,
            frames_length=sum(len(frame) + SEAL_BYTES for frame, _ in packed),
            stretch_count=len(index) if index.is_stretch else 0,
        )
        clear = encode_object_header(header)
        content = self._room(header.object_length)
        content[:OBJECT_HEADER_BYTES] = clear
        content[OBJECT_HEADER_BYTES : header.index_offset] = table
        index_room = content[header.index_offset : header.frames_offset]
        AESGCM(keys.index).encrypt_into(nonce_of(header, INDEX_FRAME), packed_index, clear + table, index_room)
        cipher = AESGCM(keys.payload)
        at = header.frames_offset
        for i, (frame, _) in enumerate(packed):
            end = at + len(frame) + SEAL_BYTES
            cipher.encrypt_into(nonce_of(header, i), frame, clear, content[at:end])
            at = end
        digest = blake3(content[:at]).digest()
        content[at:] = digest
        return digest, content

    def give_back(self, content: memoryview) -> None:
        """An object made here is not needed any more; its memory will hold another one."""
        if len(self._rooms) < _ROOMS_KEPT:
            self._rooms.append(memoryview(content.obj))

    def _room(self, length: int) -> memoryview:
        room = self._rooms.pop() if self._rooms else memoryview(b"")
        if len(room) < length:
            room = _memory(length)
        return room[:length]

    def _frames(self, payloads: Sequence[Bytes]) -> Iterator[memoryview]:
        """The concatenation of `payloads`, cut every FRAME_RAW_BYTES. Views, good until the next call."""
        length = sum(map(len, payloads))
        if len(self._gathered) < length:
            self._gathered = _memory(length)
        gathered = self._gathered
        frame = at = 0
        for payload in payloads:
            size = len(payload)
            if at + size - frame < FRAME_RAW_BYTES:
                gathered[at : at + size] = payload
                at += size
                continue
            view, start = memoryview(payload), 0
            while start < size:
                end = min(size, start + frame + FRAME_RAW_BYTES - at)
                if at == frame and end - start == FRAME_RAW_BYTES:
                    yield view[start:end]
                    at = frame = at + FRAME_RAW_BYTES
                else:
                    gathered[at : at + end - start] = view[start:end]
                    at += end - start
                    if at - frame == FRAME_RAW_BYTES:
                        yield gathered[frame:at]
                        frame = at
                start = end
        if at > frame:
            yield gathered[frame:at]


def _memory(length: int) -> memoryview:
    """At least so much, its pages taken when they are first written."""
    return np.empty(-(-length // _ROOM_STEP) * _ROOM_STEP, np.uint8).data
