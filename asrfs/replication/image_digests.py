"""Digests of a region of a disk image. Blocks. Holes are not read; what is read is read once, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from asrfs.model.digest_tree import LeafDigester, Region

PIECE_BYTES = 512 << 10
"""Read at once: whole leaves, and no more than a processor's own cache holds until they are digested."""


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
    piece = memoryview(bytearray(PIECE_BYTES))
    bytes_read = 0
    for begin, length in image.data_extents(region.offset):
        at, end = max(begin, region.offset), min(begin + length, region.end)
        while at < end:
            room = piece[: min(end, at - at % PIECE_BYTES + PIECE_BYTES) - at]
            count = image.read_into(room, at)
            if not count:
                break
            digester.add(at, room[:count])
            bytes_read += count
            at += count
        if begin + length >= region.end:
            break
    return ImageDigests(digester.finish(), bytes_read)


def digest_in_threads(image: Readable, region: Region, threads: int) -> ImageDigests:
    """The same, the region in as many parts: reading and digesting release the interpreter."""
    parts = parts_of(region, threads)
    if len(parts) == 1:
        return digest_image(image, region)
    with ThreadPoolExecutor(len(parts) - 1) as others:
        rest = [others.submit(digest_image, image, part) for part in parts[1:]]
        found = [digest_image(image, parts[0]), *(each.result() for each in rest)]
    return ImageDigests(b"".join(each.leaves for each in found), sum(each.bytes_read for each in found))


def parts_of(region: Region, count: int) -> list[Region]:
    """Up to so many parts, about as long, of whole nodes."""
    ends = [region.nodes * (number + 1) // count for number in range(count)]
    spans = zip([0, *ends], ends, strict=False)
    return [region._replace(first=region.first + first, nodes=end - first) for first, end in spans if first < end]
