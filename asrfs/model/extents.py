"""Arithmetic of extents `[offset, offset + length)` on a disk, in bytes, and of the 4 KiB blocks that cover them.

A disk's size is a multiple of 512, so its last block may be short: every block extent ends with the disk.
"""

from __future__ import annotations

BLOCK_BYTES = 4096
BLOCK_SHIFT = 12
CHUNK_BYTES = 64 * 1024
"""Unit of the dirty map and of the digest tree."""


def is_block_aligned(offset: int, length: int, size_bytes: int) -> bool:
    """Whether the extent consists of whole blocks of a disk of `size_bytes`."""
    end = offset + length
    return offset % BLOCK_BYTES == 0 and (end % BLOCK_BYTES == 0 or end == size_bytes)


def widen_to_blocks(offset: int, length: int, size_bytes: int) -> tuple[int, int]:
    """The smallest extent of whole blocks that covers this one: `(offset, length)`, cut at the disk's end."""
    first = offset - offset % BLOCK_BYTES
    end = min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, size_bytes)
    return first, end - first


def block_range(offset: int, length: int) -> range:
    """Numbers of the blocks touched by the extent."""
    return range(offset >> BLOCK_SHIFT, (offset + length + BLOCK_BYTES - 1) >> BLOCK_SHIFT)
