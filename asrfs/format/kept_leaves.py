"""Kept leaves: digests of all leaves of a region of a disk, as of a log object's end, so that nobody makes them anew.

    clear header | sealed digests

Digests tell whether a disk holds content that somebody knows, so they are as secret as the content: sealed with a key
that is derived from the machine's payload key and a salt of the file's own, the header authenticated with them. The
header names the digest of the log object at which they were made. As digests chain, that is the whole history up to
there: kept leaves are good for the history that has this object, and for no other.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from asrfs.errors import FormatError
from asrfs.format.log_object import KEY_BYTES
from asrfs.model.digest_tree import (
    NODE_BYTES,
    REGION_LEAVES_BYTES_MAX,
    REGION_NODES_MAX,
    TREE_DIGEST_BYTES,
    leaf_count,
)
from asrfs.model.quantities import FILE_BYTES_MAX

LEAVES_MAGIC = b"ASRLEAF\n"
LEAVES_VERSION = 1
LEAVES_HEADER_BYTES = 256
_SEAL_BYTES = 16
LEAVES_FILE_BYTES_MAX = LEAVES_HEADER_BYTES + REGION_LEAVES_BYTES_MAX + _SEAL_BYTES
_HEADER = struct.Struct("<16sIHH32s16sQ32sQQ")
_PREFIX = struct.Struct("<8sI")
_NONCE = bytes(12)
"""The key is of one file alone, and seals once."""

Bytes = bytes | bytearray | memoryview


class LeavesHeader(NamedTuple):
    """Clear header. The leaves are of bytes `[begin, end)` of the disk as it was at `lsn`; `digest`: of the log object
    that ends there. `begin` is where a region begins, and `end` where it ends, or the disk."""

    machine_id: bytes
    version: int
    slot: int
    reserved: int
    salt: bytes
    disk_id: bytes
    lsn: int
    digest: bytes
    begin: int
    end: int

    @property
    def leaves_bytes(self) -> int:
        """Of all digests."""
        return leaf_count(self.end - self.begin) * TREE_DIGEST_BYTES


def derive_leaves_key(payload_key: bytes, machine_id: bytes, salt: bytes) -> bytes:
    """The key of one file: HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"asrfs kept leaves 1" + machine_id).derive(
        payload_key
    )


def encode_leaves(header: LeavesHeader, leaves: bytes, key: bytes) -> bytes:
    """The whole file."""
    assert len(leaves) == header.leaves_bytes
    body = _HEADER.pack(*header).ljust(LEAVES_HEADER_BYTES - _PREFIX.size, b"\0")
    clear = _PREFIX.pack(LEAVES_MAGIC, crc32c(body)) + body
    return clear + AESGCM(key).encrypt(_NONCE, leaves, clear)


def decode_leaves_header(buffer: Bytes, where: str) -> LeavesHeader:
    """Read and check the clear header of a whole file; nothing in it is believed before its checksum. Raises
    FormatError."""
    if len(buffer) < LEAVES_HEADER_BYTES:
        raise FormatError(f"{where}: {len(buffer)} bytes are too few for kept leaves")
    magic, crc = _PREFIX.unpack_from(buffer)
    body = bytes(buffer[_PREFIX.size : LEAVES_HEADER_BYTES])
    if magic != LEAVES_MAGIC or crc32c(body) != crc:
        raise FormatError(f"{where}: no kept leaves, or their header does not match its checksum")
    header = LeavesHeader._make(_HEADER.unpack_from(body))
    region_bytes = REGION_NODES_MAX * NODE_BYTES
    sound = (
        header.version == LEAVES_VERSION
        and 0 < header.lsn < 1 << 63
        and header.begin % region_bytes == 0
        and header.begin < header.end <= min(header.begin + region_bytes, FILE_BYTES_MAX)
        and len(buffer) == LEAVES_HEADER_BYTES + header.leaves_bytes + _SEAL_BYTES
    )
    if not sound:
        raise FormatError(f"{where}: kept leaves of another format, or ones that cannot be")
    return header


def open_leaves(buffer: Bytes, key: bytes, where: str) -> bytes:
    """The digests of a whole file, the header of which was checked. Raises FormatError."""
    whole = memoryview(buffer)
    try:
        return AESGCM(key).decrypt(_NONCE, whole[LEAVES_HEADER_BYTES:], whole[:LEAVES_HEADER_BYTES])
    except InvalidTag:
        raise FormatError(f"{where}: kept leaves whose seal does not hold") from None
