"""PURE: numbers and layouts of the NBD protocol, as far as this server speaks it; all big-endian.

Source: the protocol's own specification, `doc/proto.md` of the nbd project. What is spoken of it: fixed newstyle,
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT with the one context
`base:allocation`; READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS. Nothing else is announced or accepted.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from asrfs.errors import AsrfsError

Bytes = bytes | bytearray | memoryview

GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

GREETING = struct.Struct(">8s8sH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_REPLY = struct.Struct(">QH")
EXPORT_REPLY_PADDING = bytes(124)
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZES = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
CHUNK_OFFSET = struct.Struct(">Q")
CHUNK_HOLE = struct.Struct(">QI")
CHUNK_ERROR = struct.Struct(">IH")
CHUNK_CONTEXT = struct.Struct(">I")
EXTENT_STATUS = struct.Struct(">II")

NAME_BYTES_MAX = 4096
"""Of an export's name or a query, by the specification."""
OPTION_BYTES_MAX = 64 << 10
OPTIONS_MAX = 256
"""Of one connection, until it chooses an export."""
REQUEST_BYTES_MAX = 32 << 20
"""Of one READ or WRITE; announced, and usual."""
BLOCK_BYTES_PREFERRED = 4096
BASE_ALLOCATION = b"base:allocation"
CONTEXT_ID = 1

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
"""Flags of the greeting and of the client's answer."""


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """To an option; the upper bit marks errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = (1 << 31) | 1
    POLICY = (1 << 31) | 2
    INVALID = (1 << 31) | 3
    TLS_REQUIRED = (1 << 31) | 5
    UNKNOWN = (1 << 31) | 6
    TOO_BIG = (1 << 31) | 9


class Fact(IntEnum):
    """What an INFO reply tells."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8


class ChunkType(IntEnum):
    """Of a structured reply; the upper bit marks errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) | 1


CHUNK_DONE = 1
STATUS_HOLE, STATUS_ZERO = 1, 2
"""Bits of `base:allocation`."""


class ErrorNumber(IntEnum):
    """What a reply may say went wrong."""

    NONE = 0
    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75


class NbdError(AsrfsError):
    """The peer does not speak the protocol: the connection ends."""
