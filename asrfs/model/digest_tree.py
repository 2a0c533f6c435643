"""PURE: digests by which two copies of a disk are compared without sending either.

    leaf    BLAKE3 of 64 KiB, the chunk of the dirty map; the last of a disk may be short
    node    BLAKE3 of the digests of its 64 leaves: 4 MiB of the disk; the last may have fewer
    region  up to 32 nodes, 128 MiB: what is digested and asked about at once

Digests depend on size and content alone. A hole is the zeros that it reads as, so it has the digest of written zeros,
and nobody reads it to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from blake3 import blake3

from asrfs.model.extents import CHUNK_BYTES

LEAF_BYTES = CHUNK_BYTES
NODE_LEAVES = 64
NODE_BYTES = NODE_LEAVES * LEAF_BYTES
REGION_NODES_MAX = 32
TREE_DIGEST_BYTES = 32
REGION_LEAVES_BYTES_MAX = REGION_NODES_MAX * NODE_LEAVES * TREE_DIGEST_BYTES
"""Of the digests of all leaves of a region: 64 KiB."""

Bytes = bytes | bytearray | memoryview


def digest_of(content: Bytes) -> bytes:
    """BLAKE3 in one thread: more of them do not pay for 64 KiB."""
    return blake3(content).digest()


ZERO_LEAF = digest_of(bytes(LEAF_BYTES))
NO_LEAF = bytes(TREE_DIGEST_BYTES)
"""In place of the digest of a leaf that cannot be read: no content has it, so it is equal to none."""


def leaf_count(size_bytes: int) -> int:
    """Leaves of a disk: its chunks."""
    return -(-size_bytes // LEAF_BYTES)


def node_count(size_bytes: int) -> int:
    return -(-size_bytes // NODE_BYTES)


class Region(NamedTuple):
    """`nodes` nodes from node `first` on, of a disk of `size_bytes`."""

    size_bytes: int
    first: int
    nodes: int

    @property
    def offset(self) -> int:
        """First byte."""
        return self.first * NODE_BYTES

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return min((self.first + self.nodes) * NODE_BYTES, self.size_bytes)

    @property
    def first_leaf(self) -> int:
        """Number of the first leaf, on the whole disk."""
        return self.first * NODE_LEAVES

    @property
    def leaves(self) -> int:
        return leaf_count(self.end - self.offset)

    def leaves_in(self, node: int) -> int:
        """Leaves of the region's `node`, counted from 0."""
        return min(NODE_LEAVES, self.leaves - node * NODE_LEAVES)

    def is_possible(self) -> bool:
        """Whether such a disk has such a region."""
        return 0 < self.nodes <= REGION_NODES_MAX and 0 <= self.first <= node_count(self.size_bytes) - self.nodes


def regions_of(size_bytes: int) -> Iterator[Region]:
    """The whole disk, in order."""
    for first in range(0, node_count(size_bytes), REGION_NODES_MAX):
        yield Region(size_bytes, first, min(REGION_NODES_MAX, node_count(size_bytes) - first))


def regions_with(chunks: Sequence[int], size_bytes: int) -> Iterator[Region]:
    """Regions of the nodes that hold these chunks (ascending), neighbours together."""
    first = end = -1
    for node in sorted({chunk // NODE_LEAVES for chunk in chunks}):
        if node != end or node - first == REGION_NODES_MAX:
            if end > first:
                yield Region(size_bytes, first, end - first)
            first = node
        end = node + 1
    if end > first:
        yield Region(size_bytes, first, end - first)


class LeafDigester:
    """Digests of a region's leaves from its content, which is fed in order; what is not fed reads as zeros."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._at = region.offset
        self._digests = bytearray(ZERO_LEAF * region.leaves)
        if region.end % LEAF_BYTES:
            self._digests[-TREE_DIGEST_BYTES:] = digest_of(bytes(region.end % LEAF_BYTES))
        self._leaf = bytearray(LEAF_BYTES)
        self._is_open = False

    def add(self, offset: int, content: Bytes) -> None:
        """Bytes of the disk from `offset` on, at or behind all that was added."""
        assert self._at <= offset and offset + len(content) <= self._region.end
        rest = memoryview(content)
        while len(rest):
            if offset // LEAF_BYTES != self._at // LEAF_BYTES:
                self._close_leaf()
            begin = offset - offset % LEAF_BYTES
            length = min(len(rest), begin + LEAF_BYTES - offset)
            if length == self._leaf_bytes(begin):
                self._put(begin, digest_of(rest[:length]))
            else:
                self._leaf[offset - begin : offset - begin + length] = rest[:length]
                self._is_open = True
            self._at = offset = offset + length
            rest = rest[length:]
            if offset % LEAF_BYTES == 0 and self._is_open:
                self._close_leaf(begin)

    def finish(self) -> bytes:
        """The digests of all leaves, in order."""
        self._close_leaf()
        return bytes(self._digests)

    def _close_leaf(self, begin: int | None = None) -> None:
        """The leaf in which `_at` lies, or that begins at `begin`, gets nothing more."""
        if not self._is_open:
            return
        if begin is None:
            begin = self._at - self._at % LEAF_BYTES
        self._put(begin, digest_of(memoryview(self._leaf)[: self._leaf_bytes(begin)]))
        self._leaf = bytearray(LEAF_BYTES)
        self._is_open = False

    def _leaf_bytes(self, begin: int) -> int:
        return min(LEAF_BYTES, self._region.size_bytes - begin)

    def _put(self, begin: int, digest: bytes) -> None:
        at = (begin - self._region.offset) // LEAF_BYTES * TREE_DIGEST_BYTES
        self._digests[at : at + TREE_DIGEST_BYTES] = digest


def node_digests(leaves: bytes) -> bytes:
    """Digests of the nodes above the leaves of a region."""
    step = NODE_LEAVES * TREE_DIGEST_BYTES
    return b"".join(digest_of(leaves[at : at + step]) for at in range(0, len(leaves), step))


def different(ours: bytes, theirs: bytes) -> list[int]:
    """Numbers of the digests in which two sequences of them differ."""
    assert len(ours) == len(theirs)
    if ours == theirs:
        return []
    step = TREE_DIGEST_BYTES
    return [at // step for at in range(0, len(ours), step) if ours[at : at + step] != theirs[at : at + step]]


def bitmap_of(numbers: Sequence[int], count: int) -> bytes:
    """Bit n (from the lowest of the first byte) is set for each of the numbers below `count`."""
    return sum(1 << number for number in numbers).to_bytes(-(-count // 8), "little")


def numbers_of(bitmap: bytes) -> list[int]:
    """What `bitmap_of` was made of, ascending."""
    bits = int.from_bytes(bitmap, "little")
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def extents_of(chunks: Sequence[int], size_bytes: int) -> list[tuple[int, int]]:
    """`(offset, length)` of chunks (ascending), neighbours as one."""
    if not chunks:
        return []
    breaks = [i for i, (one, following) in enumerate(pairwise(chunks), 1) if following != one + 1]
    runs = [chunks[first:last] for first, last in pairwise([0, *breaks, len(chunks)])]
    return [(run[0] * LEAF_BYTES, min((run[-1] + 1) * LEAF_BYTES, size_bytes) - run[0] * LEAF_BYTES) for run in runs]
