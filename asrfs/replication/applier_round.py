"""What one round of records leaves on each disk: the newest bytes of every block, and the extents that become zeros.

Pure bookkeeping, no I/O. Records are noted in LSN order; afterwards the zeros go to the image first and the blocks
over them, because a block that was written and then zeroed is not among the blocks any more. Payloads are views of
the journal's buffer and are not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from asrfs.format.record import CARRIES_EXTENT_BYTES, READS_AS_ZEROS, RecordHeader
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT

BUFFERS_MAX = 1024
"""IOV_MAX of Linux: buffers in one write."""


class DiskRound:
    """One disk's share of a round."""

    def __init__(self) -> None:
        self.blocks: dict[int, memoryview] = {}
        self.zeros: list[tuple[int, int]] = []
        self.end = 0
        """First byte behind all extents noted."""

    def note(self, header: RecordHeader, payload: memoryview) -> None:
        """A record of this disk; later ones win. Extents are whole blocks, the disk's last one may be short."""
        offset, length = header.offset, header.length
        if offset + length > self.end:
            self.end = offset + length
        first = offset >> BLOCK_SHIFT
        if header.kind in CARRIES_EXTENT_BYTES:
            blocks = self.blocks
            if length <= BLOCK_BYTES:
                blocks[first] = payload
                return
            for at in range(0, length, BLOCK_BYTES):
                blocks[first] = payload[at : at + BLOCK_BYTES]
                first += 1
        elif header.kind in READS_AS_ZEROS:
            self._note_zeros(first, offset + length + BLOCK_BYTES - 1 >> BLOCK_SHIFT)
            self.zeros.append((offset, length))

    def writes(self) -> Iterator[tuple[int, list[memoryview]]]:
        """`(offset, buffers)` in block order, adjacent blocks together, at most BUFFERS_MAX buffers each."""
        buffers: list[memoryview] = []
        start = following = -1
        blocks = self.blocks
        for block in sorted(blocks):
            if block != following or len(buffers) == BUFFERS_MAX:
                if buffers:
                    yield start << BLOCK_SHIFT, buffers
                buffers, start = [], block
            buffers.append(blocks[block])
            following = block + 1
        if buffers:
            yield start << BLOCK_SHIFT, buffers

    def punches(self) -> Iterator[tuple[int, int]]:
        """`(offset, length)` of extents that read as zeros unless written, merged, in order."""
        start = end = -1
        for offset, length in sorted(self.zeros):
            if offset > end:
                if end > start:
                    yield start, end - start
                start, end = offset, offset + length
            else:
                end = max(end, offset + length)
        if end > start:
            yield start, end - start

    def _note_zeros(self, first: int, end: int) -> None:
        """Blocks `[first, end)` are zeros now; costs no more than the smaller of extent and blocks noted."""
        blocks = self.blocks
        if end - first <= len(blocks):
            for block in range(first, end):
                blocks.pop(block, None)
        else:
            for block in [block for block in blocks if first <= block < end]:
                del blocks[block]
