"""Digests of a region of a disk image. Blocks. Holes are not read; what is read is read once, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from asrfs.model.digest_tree import NODE_BYTES, LeafDigester, Region


class ImageDigests(NamedTuple):
    """`leaves`: digests of all leaves of the region; `bytes_read`: of the image."""

    leaves: bytes
    bytes_read: int


class Readable(Protocol):
    """What of `File` is needed."""

    def read_into(self, buffer: memoryview, offset: int) -> int: ...

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]: ...


def digest_image(image: Readable, region: Region) -> ImageDigests:
    """Whoever writes to the image meanwhile goes on: each byte is one it had. Raises OSError."""
    digester = LeafDigester(region)
    piece = memoryview(bytearray(NODE_BYTES))
    bytes_read = 0
    for begin, length in image.data_extents(region.offset):
        at, end = max(begin, region.offset), min(begin + length, region.end)
        while at < end:
            room = piece[: min(end, at - at % NODE_BYTES + NODE_BYTES) - at]
            count = image.read_into(room, at)
            if not count:
                break
            digester.add(at, room[:count])
            bytes_read += count
            at += count
        if begin + length >= region.end:
            break
    return ImageDigests(digester.finish(), bytes_read)
