"""A disk whose every change is a record of the journal. Reads take the newest bytes: journal, else image.

It never writes to the image (I1): the applier does, from durable records. Writes are widened to whole 4 KiB blocks;
a change and its note in the map are one step under the journal's lock, so that no reader, drop or fill comes between.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence

from asrfs.disk.interface import check_extent
from asrfs.format.record import CARRIES_EXTENT_BYTES, PAYLOAD_BYTES_MAX, Kind
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.journal.block_map import BlockMap, Run
from asrfs.journal.recovery import Recovered
from asrfs.journal.writer import Journal
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT, widen_to_blocks
from asrfs.storage.interface import Bytes, File

_IN_BLOCK = BLOCK_BYTES - 1
_ZEROS = bytes(bytearray(PAYLOAD_BYTES_MAX))
"""Written once, so that its pages are there: a process killed while the kernel copies an absent one fails the reply."""
_WRITE = int(Kind.WRITE)
_ZERO = int(Kind.ZERO)
_JOIN_GAP_MAX = 2 * BLOCK_BYTES
"""Journaled runs this near to each other are read in one go: single block writes lie 64 bytes apart."""


class JournaledDisk:
    """One disk of the machine. Safe for any thread; offsets and lengths are bytes inside `size_bytes`."""

    def __init__(self, slot: int, size_bytes: int, image: File, journal: Journal, block_map: BlockMap) -> None:
        self.slot = slot
        self.size_bytes = size_bytes
        self.image = image
        self.map = block_map
        self._journal = journal
        self._lock = journal.lock
        self._append = journal.append_locked
        self._note = block_map.note
        self._runs = block_map.runs

    # ---- change ----

    def write(self, offset: int, payload: Bytes) -> None:
        """Journal a write. `payload` is used only during the call. Raises OSError, BadInputError outside the disk."""
        length = len(payload)
        if (
            (offset | length) & _IN_BLOCK
            or not 0 < length <= PAYLOAD_BYTES_MAX
            or offset < 0
            or offset + length > self.size_bytes
        ):
            self._write_slowly(offset, payload)
            return
        if not payload[0] and not payload[-1] and bytes(payload) == _ZEROS[:length]:
            with self._lock:
                self._journal_zeros(_ZERO, offset, length)
            return
        with self._lock:
            position = self._append(_WRITE, self.slot, offset, length, payload)
            self._note(offset >> BLOCK_SHIFT, length >> BLOCK_SHIFT, position)

    def zero(self, offset: int, length: int) -> None:
        """The extent reads as zeros; space may stay reserved."""
        self._clear(Kind.ZERO, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """The extent reads as zeros and gives its space back."""
        self._clear(Kind.DISCARD, offset, length)

    def fill(self, offset: int, length: int) -> int:
        """Append the present content of the blocks of an extent as FILL records; returns the LSN of the last.

        Each of up to 1 MiB is atomic with respect to writes.
        """
        check_extent(offset, length, self.size_bytes)
        start, length = widen_to_blocks(offset, length, self.size_bytes)
        end = start + length
        lsn = self._journal.appended_lsn
        while start < end:
            size = min(PAYLOAD_BYTES_MAX, end - start)
            with self._lock:
                content = b"".join(self._read_locked(start, size))
                self._journal_bytes(Kind.FILL, start, content)
                lsn = self._journal.appended_lsn
            start += size
        return lsn

    # ---- read ----

    def read(self, offset: int, length: int) -> Sequence[Bytes]:
        """Exactly `length` bytes, as buffers to be written one after the other. Raises OSError."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            check_extent(offset, length, self.size_bytes)
        with self._lock:
            runs = self._runs(offset, length)
            if len(runs) == 1:
                place = runs[0][2]
                if place is not None:
                    if place & POSITION_MASK:
                        return (self._journal.read_locked(place, length),)
                    return _zeros_of(length)
            else:
                pieces = self._read_runs(runs)
        # What is in the image stays in it, and a block only leaves a map for the image: no lock is needed.
        if len(runs) == 1:
            return (self._read_image(offset, length),)
        self._read_holes(runs, pieces)
        return [buffer for piece in pieces for buffer in piece]

    def _read_locked(self, offset: int, length: int) -> list[Bytes]:
        runs = self._runs(offset, length)
        pieces = self._read_runs(runs)
        self._read_holes(runs, pieces)
        return [buffer for piece in pieces for buffer in piece]

    def _read_runs(self, runs: list[Run]) -> list[Sequence[Bytes]]:
        """Buffers of the runs that are zeros or in the journal; nothing yet for those in the image."""
        pieces: list[Sequence[Bytes]] = []
        i = 0
        while i < len(runs):
            _, length, place = runs[i]
            if place is None:
                pieces.append(())
                i += 1
            elif not place & POSITION_MASK:
                pieces.append(_zeros_of(length))
                i += 1
            else:
                last = _last_near(runs, i)
                size = _place(runs[last]) + runs[last][1] - place
                content = self._journal.read_locked(place, size)
                if last == i:
                    pieces.append((content,))
                else:
                    view = memoryview(content)
                    for _, length, near in runs[i : last + 1]:
                        at = (near or 0) - place
                        pieces.append((view[at : at + length],))
                i = last + 1
        return pieces

    def _read_holes(self, runs: list[Run], pieces: list[Sequence[Bytes]]) -> None:
        """Put what is in the image where `_read_runs` left nothing, in one read."""
        holes = [i for i, run in enumerate(runs) if run[2] is None]
        if not holes:
            return
        start = runs[holes[0]][0]
        end = runs[holes[-1]][0] + runs[holes[-1]][1]
        content = memoryview(self._read_image(start, end - start))
        for i in holes:
            at = runs[i][0] - start
            pieces[i] = (content[at : at + runs[i][1]],)

    def _read_image(self, offset: int, length: int) -> bytes:
        content = self.image.read_at(length, offset)
        if len(content) != length:
            raise OSError(errno.EIO, f"the image of slot {self.slot} ends at {offset + len(content)}")
        return content

    # ---- the rarer ways of a change ----

    def _write_slowly(self, offset: int, payload: Bytes) -> None:
        """A write that is not whole blocks, or longer than a record."""
        check_extent(offset, len(payload), self.size_bytes)
        if len(payload):
            with self._lock:
                self._write_locked(offset, payload)

    def _write_locked(self, offset: int, payload: Bytes) -> None:
        start, length = widen_to_blocks(offset, len(payload), self.size_bytes)
        before, after = offset - start, start + length - offset - len(payload)
        content: Bytes = payload
        if before or after:
            content = bytearray(length)
            if before:
                content[:BLOCK_BYTES] = b"".join(self._read_locked(start, min(BLOCK_BYTES, length)))
            if after and not (before and length <= BLOCK_BYTES):
                last = start + (length - 1 & ~_IN_BLOCK)
                content[last - start :] = b"".join(self._read_locked(last, start + length - last))
            content[before : before + len(payload)] = payload
        view = memoryview(content)
        for at in range(0, length, PAYLOAD_BYTES_MAX):
            piece = view[at : at + PAYLOAD_BYTES_MAX]
            if not piece[0] and bytes(piece) == _ZEROS[: len(piece)]:
                self._journal_zeros(_ZERO, start + at, len(piece))
            else:
                self._journal_bytes(_WRITE, start + at, piece)

    def _clear(self, kind: Kind, offset: int, length: int) -> None:
        check_extent(offset, length, self.size_bytes)
        if length:
            self._zeros(kind, offset, length)

    def _zeros(self, kind: int, offset: int, length: int) -> None:
        """Whole blocks become one record; the edges, which are shares of blocks, are written."""
        end = offset + length
        first = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
        last = end if end == self.size_bytes else end & ~_IN_BLOCK
        with self._lock:
            if first >= last:
                self._write_locked(offset, _ZEROS[:length])
                return
            if offset < first:
                self._write_locked(offset, _ZEROS[: first - offset])
            self._journal_zeros(kind, first, last - first)
            if last < end:
                self._write_locked(last, _ZEROS[: end - last])

    def _journal_bytes(self, kind: int, offset: int, payload: Bytes) -> None:
        length = len(payload)
        position = self._append(kind, self.slot, offset, length, payload)
        self._note(offset >> BLOCK_SHIFT, (length + _IN_BLOCK) >> BLOCK_SHIFT, position)

    def _journal_zeros(self, kind: int, offset: int, length: int) -> None:
        position = self._append(kind, self.slot, offset, length, b"")
        count = (length + _IN_BLOCK) >> BLOCK_SHIFT
        self.map.note_zeros(offset >> BLOCK_SHIFT, count, position >> POSITION_SHIFT)


def rebuild_maps(recovered: Recovered, maps: Mapping[int, BlockMap]) -> None:
    """Note every record that recovery found behind the applied LSN. Records of slots without a map are passed over."""
    for record in recovered.records():
        block_map = maps.get(record.slot)
        if block_map is None or not record.length:
            continue
        first, count = record.offset >> BLOCK_SHIFT, (record.length + _IN_BLOCK) >> BLOCK_SHIFT
        if record.kind in CARRIES_EXTENT_BYTES:
            block_map.note(first, count, record.position)
        else:
            block_map.note_zeros(first, count, record.position >> POSITION_SHIFT)


def drop_applied(journal: Journal, disks: Iterable[JournaledDisk], segment: int) -> None:
    """Everything in segments up to `segment` is in the images: reads take it from there. Then they may be recycled."""
    journal.drop_through(segment, [disk.map for disk in disks])


def _last_near(runs: list[Run], i: int) -> int:
    """The last of the runs from `i` on that lie behind one another in one segment with small gaps."""
    while i + 1 < len(runs):
        place = runs[i + 1][2]
        if place is None or not place & POSITION_MASK:
            break
        gap = place - (_place(runs[i]) + runs[i][1])
        if not 0 <= gap <= _JOIN_GAP_MAX or place >> POSITION_SHIFT != _place(runs[i]) >> POSITION_SHIFT:
            break
        i += 1
    return i


def _place(run: Run) -> int:
    assert run[2] is not None
    return run[2]


def _zeros_of(length: int) -> Sequence[Bytes]:
    if length <= len(_ZEROS):
        return (memoryview(_ZEROS)[:length],)
    whole, rest = divmod(length, len(_ZEROS))
    return [_ZEROS] * whole + [_ZEROS[:rest]]
