"""A seed: the copy of a disk that was brought to the store by hand, as the store keeps it until the first copy is done.

    header | table: a keyed digest of each chunk | sealed chunks, each at a place of its own

Chunks of 64 KiB are sealed one by one, so any of them can be read alone; what is all zeros is a hole of the file and
has the digest `NO_CHUNK`, which no content has. The digests are keyed with what host and store of one machine know, so
the table says nothing to others, and the host can ask for a chunk by its digest.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from blake3 import blake3
from crc32c import crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from asrfs.errors import FormatError
from asrfs.format.log_object import KEY_BYTES, SALT_BYTES, SEAL_BYTES, Bytes
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.quantities import FILE_BYTES_MAX

SEED_MAGIC = b"ASRSEED\n"
SEED_VERSION = 1
SEED_HEADER_BYTES = 4096
CHUNK_DIGEST_BYTES = 16
"""A wrong match costs traffic and nothing else: the whole log object has a digest of its own."""
NO_CHUNK = bytes(CHUNK_DIGEST_BYTES)
SEALED_CHUNK_BYTES = CHUNK_BYTES + SEAL_BYTES

_PREFIX = struct.Struct("<8sI")
_HEADER = struct.Struct("<16sIQ32s")
_DIGEST_CONTEXT = "asrfs seed chunk digest 1"


class SeedHeader(NamedTuple):
    """`size_bytes`: of the disk; `salt`: for the key of the chunks."""

    machine_id: bytes
    version: int
    size_bytes: int
    salt: bytes

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    @property
    def contents_offset(self) -> int:
        """Where the sealed chunks begin."""
        end = SEED_HEADER_BYTES + self.chunks * CHUNK_DIGEST_BYTES
        return -(-end // SEED_HEADER_BYTES) * SEED_HEADER_BYTES

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return self.contents_offset + self.chunks * SEALED_CHUNK_BYTES

    def digest_place(self, chunk: int) -> int:
        return SEED_HEADER_BYTES + chunk * CHUNK_DIGEST_BYTES

    def chunk_place(self, chunk: int) -> int:
        return self.contents_offset + chunk * SEALED_CHUNK_BYTES

    def chunk_bytes(self, chunk: int) -> int:
        """Of its content: the last chunk of a disk may be short."""
        return min(CHUNK_BYTES, self.size_bytes - chunk * CHUNK_BYTES)


def encode_seed_header(header: SeedHeader) -> bytes:
    """All of it."""
    body = _HEADER.pack(*header).ljust(SEED_HEADER_BYTES - _PREFIX.size, b"\0")
    return _PREFIX.pack(SEED_MAGIC, crc32c(body)) + body


def decode_seed_header(buffer: bytes, machine_id: bytes, where: str) -> SeedHeader:
    """Raises FormatError for anything but the seed of a disk of this machine."""
    if len(buffer) != SEED_HEADER_BYTES:
        raise FormatError(f"{where}: {len(buffer)} bytes are too few for a seed")
    magic, crc = _PREFIX.unpack_from(buffer)
    body = buffer[_PREFIX.size :]
    if magic != SEED_MAGIC or crc32c(body) != crc:
        raise FormatError(f"{where}: not a seed, or its header does not match its checksum")
    header = SeedHeader._make(_HEADER.unpack_from(body))
    if header.version != SEED_VERSION or header.machine_id != machine_id:
        raise FormatError(f"{where}: not a seed of this machine that this program knows")
    if not 0 < header.size_bytes <= FILE_BYTES_MAX:
        raise FormatError(f"{where}: no disk has {header.size_bytes} bytes")
    return header


def derive_digest_key(index_key: bytes) -> bytes:
    """What the digests of a machine's chunks are keyed with, from its index key; host and store have that."""
    return blake3(index_key, derive_key_context=_DIGEST_CONTEXT).digest()


def chunk_digest(key: bytes, content: Bytes) -> bytes:
    """Of a chunk's content."""
    return blake3(content, key=key).digest(CHUNK_DIGEST_BYTES)


class SeedSealer:
    """Seals and opens the chunks of one seed."""

    def __init__(self, header: SeedHeader, payload_key: bytes) -> None:
        info = b"asrfs seed 1" + header.machine_id
        key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=header.salt, info=info).derive(payload_key)
        self._cipher = AESGCM(key)
        self._clear = encode_seed_header(header)

    def seal(self, chunk: int, content: Bytes) -> bytes:
        return self._cipher.encrypt(_nonce(chunk), content, self._clear)

    def open(self, chunk: int, sealed: Bytes, where: str) -> bytes:
        """Raises FormatError."""
        try:
            return self._cipher.decrypt(_nonce(chunk), sealed, self._clear)
        except (InvalidTag, ValueError):
            raise FormatError(f"{where}: the seal of chunk {chunk} is broken") from None


def _nonce(chunk: int) -> bytes:
    return chunk.to_bytes(12, "little")


assert SALT_BYTES == 32, "as the header has it"
