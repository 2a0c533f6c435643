"""A log object: consecutive records of one epoch as they travel and as the vault keeps them.

    clear header | frame table | sealed index | sealed frames | BLAKE3 of all before

The index holds one column for each field of a record and the small payloads of MARKER and DISK records ("notes"); the
frames hold the payloads of WRITE and FILL records, end to end, cut every `frame_raw_bytes`. Each is compressed by
itself, then sealed with AES-256-GCM; the whole clear header is authenticated with every seal. Index and payload have
different keys, both derived from the machine's keys and the session's salt, so a pair of key and nonce never repeats:
a session ships an LSN once, and a new session has a new salt.

An object of version 2 is a stretch: it stands for all LSNs from its first to its last, but has records of some of them
only. So just the state behind its last record exists, and no place inside may be shown.

Here is what objects look like and how they are opened; `object_index.py` has the columns, `object_encoder.py` makes
objects.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import zstandard
from blake3 import blake3
from crc32c import crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from asrfs.errors import FormatError

OBJECT_MAGIC = b"ASROBJ1\n"
OBJECT_VERSION = 1
"""Of an object that has a record of each of its LSNs."""
STRETCH_VERSION = 2
OBJECT_HEADER_BYTES = 256
OBJECT_BYTES_MAX = 64 << 20
DIGEST_BYTES = 32
SALT_BYTES = 32
KEY_BYTES = 32
FRAME_RAW_BYTES = 128 << 10
FRAME_RAW_BYTES_MAX = 1 << 20
INDEX_RAW_BYTES_MAX = 16 << 20
RECORDS_MAX = 1 << 16
"""Bound what one object costs its reader, however small it is when packed. A host cuts its objects at this."""
FRAME_IS_COMPRESSED = 1
NO_DIGEST = bytes(DIGEST_BYTES)

SEAL_BYTES = 16
INDEX_FRAME = 0xFFFFFFFF
_HEADER = struct.Struct("<16sII32sQQQQ32sQIIIIQI")
_PREFIX = struct.Struct("<8sI")
FRAME = struct.Struct("<II")
_NONCE = struct.Struct("<QI")

Bytes = bytes | bytearray | memoryview


_idle: list[zstandard.ZstdDecompressor] = []
"""Each is used by one thread at a time: to make one costs more than to unpack a frame."""


class ObjectHeader(NamedTuple):
    """Clear header. LSN and time ranges are inclusive; `session_salt` also names the session that shipped it.

    `stretch_count`: how many records a stretch has; 0 where there is one for each LSN.
    """

    machine_id: bytes
    version: int
    epoch: int
    session_salt: bytes
    first_lsn: int
    last_lsn: int
    first_time_ns: int
    last_time_ns: int
    previous_digest: bytes
    payload_raw_length: int
    index_length: int
    index_raw_length: int
    frame_count: int
    frame_raw_bytes: int
    frames_length: int
    stretch_count: int = 0

    @property
    def is_stretch(self) -> bool:
        """Whether only the state behind its last record exists."""
        return self.version == STRETCH_VERSION

    @property
    def record_count(self) -> int:
        return self.stretch_count if self.is_stretch else self.last_lsn - self.first_lsn + 1

    @property
    def index_offset(self) -> int:
        return OBJECT_HEADER_BYTES + self.frame_count * FRAME.size

    @property
    def frames_offset(self) -> int:
        return self.index_offset + self.index_length

    @property
    def object_length(self) -> int:
        return self.frames_offset + self.frames_length + DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """Keys of one session, derived; see `derive_keys`."""

    index: bytes
    payload: bytes


def derive_keys(index_key: bytes, payload_key: bytes, machine_id: bytes, epoch: int, session_salt: bytes) -> ObjectKeys:
    """Keys of a session from the machine's two keys (32 bytes each): HKDF-SHA256 (RFC 5869)."""
    info = b"asrfs log object 1" + machine_id + epoch.to_bytes(4, "little")

    def derive(key: bytes, use: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=session_salt, info=info + use).derive(key)

    return ObjectKeys(derive(index_key, b"index"), derive(payload_key, b"payload"))


def encode_object_header(header: ObjectHeader) -> bytes:
    """All 256 bytes."""
    body = _HEADER.pack(*header).ljust(OBJECT_HEADER_BYTES - _PREFIX.size, b"\0")
    return _PREFIX.pack(OBJECT_MAGIC, crc32c(body)) + body


def decode_object_header(buffer: Bytes, where: str) -> ObjectHeader:
    """Read and check a clear header; lengths are believed only after its checksum. Raises FormatError."""
    if len(buffer) < OBJECT_HEADER_BYTES:
        raise FormatError(f"{where}: {len(buffer)} bytes are too few for a log object")
    magic, crc = _PREFIX.unpack_from(buffer)
    body = bytes(buffer[_PREFIX.size : OBJECT_HEADER_BYTES])
    if magic != OBJECT_MAGIC:
        raise FormatError(f"{where}: not a log object")
    if crc32c(body) != crc:
        raise FormatError(f"{where}: the header of the log object does not match its checksum")
    header = ObjectHeader._make(_HEADER.unpack_from(body))
    if header.version not in (OBJECT_VERSION, STRETCH_VERSION):
        raise FormatError(f"{where}: log object format {header.version} is not known to this program: upgrade it")
    if not 0 < header.first_lsn <= header.last_lsn or not 0 < header.record_count <= RECORDS_MAX:
        raise FormatError(f"{where}: impossible LSN range {header.first_lsn}..{header.last_lsn}")
    if header.stretch_count and not header.is_stretch:
        raise FormatError(
            f"{where}: LSN {header.first_lsn}..{header.last_lsn} cannot have a number of records of its own"
        )
    frames_needed = -(-header.payload_raw_length // header.frame_raw_bytes) if header.frame_raw_bytes else -1
    if (
        frames_needed != header.frame_count
        or header.frame_raw_bytes > FRAME_RAW_BYTES_MAX
        or header.index_raw_length > INDEX_RAW_BYTES_MAX
        or header.object_length > OBJECT_BYTES_MAX
    ):
        raise FormatError(f"{where}: lengths in the header of LSN {header.first_lsn} do not fit together")
    return header


def check_digest(buffer: Bytes, where: str) -> bytes:
    """The digest of a whole object, checked against its bytes. Raises FormatError naming `where` and the LSNs."""
    header = decode_object_header(buffer, where)
    if len(buffer) != header.object_length:
        raise FormatError(
            f"{where}: log object of LSN {header.first_lsn}..{header.last_lsn} has {len(buffer)} bytes "
            f"instead of {header.object_length}"
        )
    view = memoryview(buffer)
    digest = bytes(view[-DIGEST_BYTES:])
    if blake3(view[:-DIGEST_BYTES]).digest() != digest:
        raise FormatError(
            f"{where}: log object of LSN {header.first_lsn}..{header.last_lsn} does not match its BLAKE3 digest"
        )
    return digest


class FrameTable:
    """Where each sealed frame of an object lies. Read from the object's beginning; holds no payload."""

    def __init__(self, header: ObjectHeader, head: Bytes, where: str) -> None:
        self.header = header
        self._where = where
        self._clear = bytes(memoryview(head)[:OBJECT_HEADER_BYTES])
        table = memoryview(head)[OBJECT_HEADER_BYTES : header.index_offset]
        self._entries: list[tuple[int, int, int]] = []
        at = header.frames_offset
        for stored_length, flags in FRAME.iter_unpack(table):
            self._entries.append((at, stored_length, flags))
            at += stored_length
        if at != header.frames_offset + header.frames_length or len(self._entries) != header.frame_count:
            raise FormatError(f"{where}: the frame table of LSN {header.first_lsn} does not add up")

    def extent(self, i: int) -> tuple[int, int]:
        """`(offset, length)` of sealed frame i inside the object."""
        return self._entries[i][0], self._entries[i][1]

    def flags(self, i: int) -> int:
        return self._entries[i][2]

    def open_frame(self, i: int, sealed: Bytes, payload_key: bytes) -> bytes:
        """The raw bytes of frame i, which hold the raw payload from `i * frame_raw_bytes`. Raises FormatError."""
        header = self.header
        where = f"{self._where}: byte {self.extent(i)[0]}: frame {i} of LSN {header.first_lsn}..{header.last_lsn}"
        raw_length = min(header.frame_raw_bytes, header.payload_raw_length - i * header.frame_raw_bytes)
        packed = unseal(payload_key, nonce_of(header, i), sealed, self._clear, where)
        if self.flags(i) & FRAME_IS_COMPRESSED:
            return unpack(packed, raw_length, where)
        if len(packed) != raw_length:
            raise FormatError(f"{where}: {len(packed)} bytes instead of {raw_length}")
        return packed


def unpack(packed: Bytes, raw_length: int, where: str) -> bytes:
    """Decompress to exactly `raw_length` bytes. The cap is ours: a frame's own size field is not believed."""
    decompressor = _idle.pop() if _idle else zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(packed) != raw_length:
            raise FormatError(f"{where}: the compressed size is not what the header says")
        return decompressor.decompress(packed, max_output_size=raw_length)
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: cannot be decompressed ({error})") from None
    finally:
        _idle.append(decompressor)


def unseal(key: bytes, nonce: bytes, sealed: Bytes, clear: bytes, where: str) -> bytes:
    """Raises FormatError."""
    try:
        return AESGCM(key).decrypt(nonce, bytes(sealed), clear)
    except (InvalidTag, ValueError):
        raise FormatError(f"{where}: the seal is broken, or the key is not the one it was sealed with") from None


def nonce_of(header: ObjectHeader, frame: int) -> bytes:
    return _NONCE.pack(header.first_lsn, frame)
