"""Where a file has content, asked of a filesystem that lseek cannot ask: by an extended attribute named with an offset.

`user.asrfs.content.OFFSET` is a list of `(offset, length)`, each number 8 bytes little-endian: the first extents from
OFFSET on that may hold anything but zeros, in order. Empty: there is none. Only our own trees of points have it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

from asrfs.storage.directory import OpenFile

CONTENT_EXTENTS_MAX = 2048
"""In one answer: an attribute has 64 KiB at the most."""
_PREFIX = b"user.asrfs.content."
_PAIR = struct.Struct("<QQ")
_NOT_KNOWN = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def content_asked(name: bytes) -> int | None:
    """The offset in such a name, None for any other name."""
    digits = name.removeprefix(_PREFIX)
    return int(digits) if digits != name and digits.isdigit() and len(digits) < 20 else None


def encode_content(extents: list[tuple[int, int]]) -> bytes:
    return b"".join(_PAIR.pack(offset, length) for offset, length in extents)


def content_of(file: OpenFile, start: int = 0) -> Iterator[tuple[int, int]]:
    """`(offset, length)` of what may hold anything but zeros from `start` on, by the best way there is. Raises
    OSError."""
    while True:
        try:
            told = os.getxattr(file.fd, _PREFIX + str(start).encode())
        except OSError as error:
            if error.errno not in _NOT_KNOWN:
                raise
            yield from file.data_extents(start)
            return
        if not told or len(told) % _PAIR.size:
            return
        for offset, length in _PAIR.iter_unpack(told):
            if offset + length > start:
                begin, start = max(offset, start), offset + length
                yield begin, start - begin
