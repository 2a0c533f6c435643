"""A disk whose every change is a record of the journal. Reads take the newest bytes: journal, else image.

It never writes to the image (I1): the applier does, from durable records. Writes are widened to whole 4 KiB blocks;
a change and its note in the map are one step under the journal's lock, so that no reader, drop or fill comes between.
Where the image has a base, a read or a change of shares of blocks may raise AbsentError: nothing that counts was done.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from asrfs.disk.interface import check_extent
from asrfs.disk.overlay import BasedImage
from asrfs.format.record import (
    CARRIES_EXTENT_BYTES,
    PAYLOAD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    Kind,
    WriteFrame,
    frame_write,
)
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.journal.block_map import BlockMap, Run
from asrfs.journal.map_table import MapTable
from asrfs.journal.recovery import Recovered
from asrfs.journal.segments import index_name
from asrfs.journal.writer import Journal
from asrfs.model.extents import BLOCK_BYTES, BLOCK_SHIFT, widen_to_blocks
from asrfs.storage.interface import Bytes, File, Storage

_IN_BLOCK = BLOCK_BYTES - 1
_ZEROS = bytes(bytearray(PAYLOAD_BYTES_MAX))
"""Written once, so that its pages are there: a process killed while the kernel copies an absent one fails the reply."""
_WRITE = int(Kind.WRITE)
_ZERO = int(Kind.ZERO)
_JOIN_GAP_MAX = 2 * BLOCK_BYTES
"""Journaled runs this near to each other are read in one go: single block writes lie 64 bytes apart."""


class JournaledDisk:
    """One disk of the machine. Safe for any thread; offsets and lengths are bytes inside `size_bytes`."""

    def __init__(
        self, slot: int, size_bytes: int, image: File | BasedImage, journal: Journal, block_map: BlockMap
    ) -> None:
        self.slot = slot
        self.size_bytes = size_bytes
        self._room = size_bytes
        self.image = image
        self.map = block_map
        self._journal = journal
        self._lock = journal.lock
        self._append = journal.append_locked
        self.note = block_map.note
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
            self.note(offset >> BLOCK_SHIFT, length >> BLOCK_SHIFT, position)

    def zero(self, offset: int, length: int) -> None:
        """The extent reads as zeros; space may stay reserved."""
        self._clear(Kind.ZERO, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """The extent reads as zeros and gives its space back."""
        self._clear(Kind.DISCARD, offset, length)

    def fill(self, offset: int, length: int) -> int:
        """Append the present content of the blocks of an extent as FILL records; returns the LSN of the last.

        Each of up to 1 MiB is atomic with respect to writes. One of zeros is a ZERO record.
        """
        check_extent(offset, length, self.size_bytes)
        start, length = widen_to_blocks(offset, length, self._room)
        end = start + length
        lsn = self._journal.appended_lsn
        while start < end:
            size = min(PAYLOAD_BYTES_MAX, end - start)
            with self._lock:
                content = self._read_locked(start, size)
                if not content[0] and not content[-1] and content == _ZEROS[:size]:
                    self._journal_zeros(_ZERO, start, size)
                else:
                    self._journal_bytes(Kind.FILL, start, content)
                lsn = self._journal.appended_lsn
            start += size
        return lsn

    # ---- grow ----

    def make_room(self, size_bytes: int) -> None:
        """From now on what is journaled of the last block reaches as far as it does in a disk of `size_bytes`, so that
        it can be read as far. The image must be as long already; what is new reads as zeros. Raises OSError.

        Nobody may use the new bytes (`size_bytes`) before this is durable and nobody will ask for it again.
        """
        with self._lock:
            share = self.size_bytes & _IN_BLOCK
            self._room = size_bytes
            if share:
                start = self.size_bytes - share
                content = bytearray(min(BLOCK_BYTES, size_bytes - start))
                content[:share] = self._read_locked(start, share)
                self._journal_bytes(_WRITE, start, content)

    # ---- read ----

    def read(self, offset: int, length: int) -> bytearray:
        """Raises OSError."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer`. Raises OSError."""
        length = len(buffer)
        if offset < 0 or offset + length > self.size_bytes:
            check_extent(offset, length, self.size_bytes)
        with self._lock:
            runs = self._runs(offset, length)
            place = runs[0][2] if len(runs) == 1 else 0
            if place is not None:
                if place & POSITION_MASK:
                    self._journal.read_into_locked(place, buffer)
                    return
                journaled = self._read_journaled(runs)
        # What is in the image stays in it, and a block only leaves a map for the image: no lock is needed.
        if place is None:
            self._read_image(offset, buffer)
        else:
            self._complete(offset, buffer, runs, journaled)

    def _read_image(self, offset: int, buffer: memoryview) -> None:
        have = self.image.read_into(buffer, offset)
        if have != len(buffer):
            raise OSError(errno.EIO, f"the image of slot {self.slot} ends at {offset + have}")

    def _read_locked(self, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        runs = self._runs(offset, length)
        self._complete(offset, memoryview(content), runs, self._read_journaled(runs))
        return content

    def _read_journaled(self, runs: list[Run]) -> list[tuple[int, Bytes]]:
        """`(offset, bytes)` of the runs that are in the journal; what lies near together is read in one go."""
        found: list[tuple[int, Bytes]] = []
        i = 0
        while i < len(runs):
            place = runs[i][2]
            if place is None or not place & POSITION_MASK:
                i += 1
                continue
            last = _last_near(runs, i)
            content = memoryview(self._journal.read_locked(place, _place(runs[last]) + runs[last][1] - place))
            for start, length, near in runs[i : last + 1]:
                at = (near or 0) - place
                found.append((start, content[at : at + length]))
            i = last + 1
        return found

    def _complete(self, offset: int, buffer: memoryview, runs: list[Run], journaled: list[tuple[int, Bytes]]) -> None:
        """Put everything into `buffer`: in one read what is in the image, over it zeros and what was in the journal."""
        holes = [run for run in runs if run[2] is None]
        image = self.image
        if holes and isinstance(image, BasedImage):
            image.read_pieces([(at, buffer[at - offset : at - offset + length]) for at, length, _ in holes])
        elif holes:
            start, end = holes[0][0], holes[-1][0] + holes[-1][1]
            self._read_image(start, buffer[start - offset : end - offset])
        for start, length, place in runs:
            if place is not None and not place & POSITION_MASK:
                _fill_with_zeros(buffer[start - offset : start - offset + length])
        for start, content in journaled:
            buffer[start - offset : start - offset + len(content)] = content

    # ---- the rarer ways of a change ----

    def _write_slowly(self, offset: int, payload: Bytes) -> None:
        """A write that is not whole blocks, or longer than a record."""
        check_extent(offset, len(payload), self.size_bytes)
        if len(payload):
            with self._lock:
                self._write_locked(offset, payload)

    def _write_locked(self, offset: int, payload: Bytes) -> None:
        start, length = widen_to_blocks(offset, len(payload), self._room)
        before, after = offset - start, start + length - offset - len(payload)
        content: Bytes = payload
        if before or after:
            content = bytearray(length)
            if before:
                content[:BLOCK_BYTES] = self._read_locked(start, min(BLOCK_BYTES, length))
            if after and not (before and length <= BLOCK_BYTES):
                last = start + (length - 1 & ~_IN_BLOCK)
                content[last - start :] = self._read_locked(last, start + length - last)
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
        last = end if end == self._room else end & ~_IN_BLOCK
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
        self.note(offset >> BLOCK_SHIFT, (length + _IN_BLOCK) >> BLOCK_SHIFT, position)

    def _journal_zeros(self, kind: int, offset: int, length: int) -> None:
        position = self._append(kind, self.slot, offset, length, b"")
        count = (length + _IN_BLOCK) >> BLOCK_SHIFT
        self.map.note_zeros(offset >> BLOCK_SHIFT, count, position >> POSITION_SHIFT)


class WriteTogether:
    """Several writes of whole blocks become records with one system call. `room`: bytes to use before each payload."""

    room = RECORD_HEADER_BYTES
    frame = staticmethod(frame_write)

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __call__(self, writes: Sequence[tuple[Any, int, WriteFrame]]) -> bool:
        """Journal all of `(disk, offset, framed payload)` in this order. False: nothing was done.

        It is not done when one of them is not plain: not whole blocks, past the end, perhaps zeros, or without space.
        Each by itself, by `JournaledDisk.write`, then finds out.
        """
        framed: list[tuple[int, int, WriteFrame]] = []
        for disk, offset, frame in writes:
            payload = frame[2]
            length = len(payload)
            if (
                type(disk) is not JournaledDisk
                or (offset | length) & _IN_BLOCK
                or not length
                or offset + length > disk.size_bytes
                or not (payload[0] or payload[-1])
            ):
                return False
            framed.append((disk.slot, offset, frame))
        with self._journal.lock:
            position = self._journal.append_framed_locked(framed)
            if position is None:
                return False
            for disk, offset, (_, _, payload) in writes:
                length = len(payload)
                disk.note(offset >> BLOCK_SHIFT, length >> BLOCK_SHIFT, position)
                position += RECORD_HEADER_BYTES + length
        return True


def rebuild_maps(recovered: Recovered, maps: Mapping[int, BlockMap], storage: Storage) -> None:
    """Note everything that recovery found behind the applied LSN. What is of slots without a map is passed over.

    `storage`: the one that was recovered. Raises OSError.
    """
    tables = iter(recovered.tables)
    due = next(tables, None)
    for record in recovered.records():
        while due is not None and due < record.position >> POSITION_SHIFT:
            _add_tables(recovered, maps, storage, due)
            due = next(tables, None)
        block_map = maps.get(record.slot)
        if block_map is None or not record.length:
            continue
        first, count = record.offset >> BLOCK_SHIFT, (record.length + _IN_BLOCK) >> BLOCK_SHIFT
        if record.kind in CARRIES_EXTENT_BYTES:
            block_map.note(first, count, record.position)
        else:
            block_map.note_zeros(first, count, record.position >> POSITION_SHIFT)
    for number in [] if due is None else [due, *tables]:
        _add_tables(recovered, maps, storage, number)


def _add_tables(recovered: Recovered, maps: Mapping[int, BlockMap], storage: Storage, number: int) -> None:
    for slot, shape in recovered.tables[number].items():
        if slot in maps and (shape.block_count or shape.zeros.starts):
            maps[slot].add_table(MapTable(storage.open(index_name(number)), shape, number, number))


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


def _fill_with_zeros(buffer: memoryview) -> None:
    for at in range(0, len(buffer), len(_ZEROS)):
        piece = buffer[at : at + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]
