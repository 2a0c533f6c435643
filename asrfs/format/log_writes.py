"""A disk's write log as Linux's device-mapper target `log-writes` lays it out, for programs that replay such logs.

Not ours: the layout is that of `drivers/md/dm-log-writes.c`, version 1. The log is a row of sectors: the super block,
then for each entry one sector with its header, followed by its bytes if it has any.
"""

from __future__ import annotations

import struct
from enum import IntFlag

LOG_WRITES_MAGIC = 0x6A736677736872
LOG_WRITES_VERSION = 1
LOG_SECTOR_BYTES = 512

_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
MARK_BYTES_MAX = LOG_SECTOR_BYTES - _ENTRY.size


class LogFlag(IntFlag):
    """What an entry is."""

    WRITE = 0
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


def encode_log_super(entries: int) -> bytes:
    """The first sector of a log with so many entries."""
    return _SUPER.pack(LOG_WRITES_MAGIC, LOG_WRITES_VERSION, entries, LOG_SECTOR_BYTES).ljust(LOG_SECTOR_BYTES, b"\0")


def encode_log_entry(offset: int, length: int, flags: LogFlag = LogFlag.WRITE, mark: bytes = b"") -> bytes:
    """The sector that begins an entry for the extent; its bytes, unless it is a discard, follow. `mark`: of a MARK."""
    assert offset % LOG_SECTOR_BYTES == length % LOG_SECTOR_BYTES == 0 and len(mark) <= MARK_BYTES_MAX
    header = _ENTRY.pack(offset // LOG_SECTOR_BYTES, length // LOG_SECTOR_BYTES, flags, len(mark))
    return (header + mark).ljust(LOG_SECTOR_BYTES, b"\0")
