"""Replays a dm-log-writes log: written from the kernel's description of the format, with nothing of the product's code.

`sector 0: magic, version, number of entries, sector size | entry sector | data sectors | entry sector | …`
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16


class Entry(NamedTuple):
    """`offset`, `length` in bytes of the device; `content` what was written there, None for a discard."""

    flags: int
    offset: int
    length: int
    content: bytes | None
    mark: str


def entries(log: Path) -> Iterator[Entry]:
    """All entries, in order; AssertionError for a log that a replayer would not take."""
    with log.open("rb") as file:
        magic, version, count, sector_bytes = struct.unpack("<QQQI", file.read(28))
        assert magic == 0x6A736677736872 and version == 1 and sector_bytes == 512
        file.seek(sector_bytes)
        for _ in range(count):
            head = file.read(sector_bytes)
            assert len(head) == sector_bytes, "the log ends before its last entry"
            sector, sectors, flags, mark_bytes = struct.unpack_from("<QQQQ", head)
            assert flags & ~(FLUSH | FUA | DISCARD | MARK | METADATA) == 0
            length = sectors * sector_bytes
            content = None
            if not flags & DISCARD:
                content = file.read(length)
                assert len(content) == length, "the log ends within an entry"
            mark = head[32 : 32 + mark_bytes].decode() if flags & MARK else ""
            yield Entry(flags, sector * sector_bytes, length, content, mark)
        assert not file.read(1), "something follows the last entry"


def put(device: bytearray, entry: Entry) -> None:
    """What an entry does to a device; a discarded extent reads as zeros."""
    device[entry.offset : entry.offset + entry.length] = bytes(entry.length) if entry.content is None else entry.content
