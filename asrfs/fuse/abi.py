"""The kernel's side of FUSE as far as disks need it: numbers and byte layouts of `linux/fuse.h`, protocol 7.40.

PURE in effect: packs and unpacks, does no I/O. All layouts are in host byte order and naturally aligned, as the kernel
writes them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 40
KERNEL_MINOR_VERSION_MIN = 28
"""First minor with `max_pages`, Linux 4.20."""

ROOT_NODE = 1
RESEND_BIT = 1 << 63
"""Set in `unique` of a request that was read before by a server that is gone; the reply carries it as it came."""

# Requests. What is not here is answered ENOSYS.
LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
SYMLINK = 6
MKNOD = 8
MKDIR = 9
UNLINK = 10
RMDIR = 11
RENAME = 12
LINK = 13
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
FSYNCDIR = 30
CREATE = 35
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
FALLOCATE = 43
RENAME2 = 45
TMPFILE = 51

NOTIFY_RESEND = 7

# INIT flags
ASYNC_READ = 1 << 0
BIG_WRITES = 1 << 5
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
INIT_EXT = 1 << 30
DIRECT_IO_ALLOW_MMAP = 1 << 36
HAS_RESEND = 1 << 39

# OPEN reply flags
FOPEN_DIRECT_IO = 1 << 0
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

# SETATTR `valid`
FATTR_SIZE = 1 << 3

# FALLOCATE modes
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

PAGE_BYTES = 4096
WRITE_BYTES_MAX = 1 << 20
IN_HEADER_BYTES = 40
WRITE_HEADER_BYTES = 80
REQUEST_BYTES_MAX = WRITE_HEADER_BYTES + WRITE_BYTES_MAX
"""The kernel refuses reads from `/dev/fuse` into less than this."""
OUT_HEADER_BYTES = 16

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""length, opcode, unique, node, uid, gid, pid, extension length, padding"""
REQUEST = struct.Struct("=IIQQ16xQQI")
"""length, opcode, unique, node, then of READ and WRITE alike: file handle, offset, size"""
OUT_HEADER = struct.Struct("=IiQ")
"""length, negative errno, unique"""
WRITE_REPLY = struct.Struct("=IiQII")
"""OUT_HEADER, then bytes written, padding"""
WRITE_REPLY_BYTES = WRITE_REPLY.size

_INIT_IN = struct.Struct("=IIII")
_INIT_IN_FLAGS2 = struct.Struct("=I")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_HEAD = struct.Struct("=QQQQII")
_ATTR_HEAD = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QIi")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_FALLOCATE_IN = struct.Struct("=QQQII")
_SETATTR_IN = struct.Struct("=IIQQ")
_READ_IN = struct.Struct("=QQI")

_NAME_BYTES_MAX = 255
_TYPE_DIRECTORY = 4
_TYPE_FILE = 8
_ATTR_VALID_S = 1


class InitRequest(NamedTuple):
    """What the kernel offers; `flags` has both words."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int


class Attributes(NamedTuple):
    """What a node looks like; times are seconds since 1970."""

    node: int
    size_bytes: int
    mode: int
    links: int
    time_s: int


def decode_init(request: bytes) -> InitRequest | None:
    """The INIT request in `request`, or None if it is another."""
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != INIT:
        return None
    major, minor, max_readahead, flags = _INIT_IN.unpack_from(request, IN_HEADER_BYTES)
    if flags & INIT_EXT:
        flags |= _INIT_IN_FLAGS2.unpack_from(request, IN_HEADER_BYTES + _INIT_IN.size)[0] << 32
    return InitRequest(unique, major, minor, max_readahead, flags)


def encode_init(request: InitRequest, flags: int, *, max_background: int, congestion_threshold: int) -> bytes:
    """The reply to INIT that agrees on `flags`."""
    body = _INIT_OUT.pack(
        KERNEL_VERSION,
        min(request.minor, KERNEL_MINOR_VERSION),
        request.max_readahead,
        flags & 0xFFFFFFFF,
        max_background,
        congestion_threshold,
        WRITE_BYTES_MAX,
        1,  # time granularity, nanoseconds
        WRITE_BYTES_MAX // PAGE_BYTES,
        0,  # map alignment
        flags >> 32,
        0,  # stack depth
        0,  # request timeout: none
    )
    return encode_reply(request.unique, body)


def encode_reply(unique: int, body: bytes = b"") -> bytes:
    """A reply that says: done."""
    return OUT_HEADER.pack(OUT_HEADER_BYTES + len(body), 0, unique) + body


def encode_error(unique: int, errno: int) -> bytes:
    """A reply that says: failed with `errno` (positive)."""
    return OUT_HEADER.pack(OUT_HEADER_BYTES, -errno, unique)


def encode_resend() -> bytes:
    """The notification that asks for every request again that was read and not answered."""
    return OUT_HEADER.pack(OUT_HEADER_BYTES, NOTIFY_RESEND, 0)


def encode_attributes(attributes: Attributes) -> bytes:
    """Body of the replies to GETATTR and SETATTR."""
    return _ATTR_HEAD.pack(_ATTR_VALID_S, 0, 0) + _pack_attributes(attributes)


def encode_entry(attributes: Attributes) -> bytes:
    """Body of the reply to LOOKUP."""
    head = _ENTRY_HEAD.pack(attributes.node, 0, _ATTR_VALID_S, _ATTR_VALID_S, 0, 0)
    return head + _pack_attributes(attributes)


def encode_open(flags: int) -> bytes:
    """Body of the replies to OPEN and OPENDIR; we need no file handles."""
    return _OPEN_OUT.pack(0, flags, 0)


def encode_statfs(total_bytes: int, files: int) -> bytes:
    """Body of the reply to STATFS. A loop device takes its discard granularity from the block size."""
    blocks = -(-total_bytes // PAGE_BYTES)
    return _STATFS_OUT.pack(blocks, 0, 0, files, 0, PAGE_BYTES, _NAME_BYTES_MAX, PAGE_BYTES, 0)


def encode_directory(entries: list[tuple[int, int, bool, bytes]], after: int, bytes_max: int) -> bytes:
    """Body of the reply to READDIR.

    `entries` are `(cookie, node, is directory, name)` by ascending cookie, which is greater than 0; those with a
    cookie up to `after` were delivered before.
    """
    body = bytearray()
    for cookie, node, is_directory, name in entries:
        if cookie <= after:
            continue
        kind = _TYPE_DIRECTORY if is_directory else _TYPE_FILE
        entry = _DIRENT.pack(node, cookie, len(name), kind) + name
        padded = -(-len(entry) // 8) * 8
        if len(body) + padded > bytes_max:
            break
        body += entry.ljust(padded, b"\0")
    return bytes(body)


def decode_read(arguments: memoryview) -> tuple[int, int]:
    """`(offset, size)` of READ and READDIR."""
    _, offset, size = _READ_IN.unpack_from(arguments)
    return offset, size


def decode_fallocate(arguments: memoryview) -> tuple[int, int, int]:
    """`(offset, length, mode)`."""
    _, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(arguments)
    return offset, length, mode


def decode_setattr(arguments: memoryview) -> int | None:
    """The size that is asked for, None if only other attributes are."""
    valid, _, _, size = _SETATTR_IN.unpack_from(arguments)
    return int(size) if valid & FATTR_SIZE else None


def _pack_attributes(attributes: Attributes) -> bytes:
    node, size_bytes, mode, links, time_s = attributes
    blocks = -(-size_bytes // 512)
    return _ATTR.pack(node, size_bytes, blocks, time_s, time_s, time_s, 0, 0, 0, mode, links, 0, 0, 0, PAGE_BYTES, 0)
