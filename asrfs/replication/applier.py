"""Folds durable records into the disk images. Blocks; runs in a thread, one call at a time.

Order of a span, which is what keeps I1 and I4:

    read durable records ─▶ write images ─▶ … ─▶ datasync each image touched ─▶ persist positions.applied
                                                      ─▶ (caller) tell the disk server ─▶ (caller) free segments

A crash anywhere repeats the span from the persisted position: the same bytes reach the same blocks again, and
until then the disk server reads those blocks from the journal. When only the save failed, the span is not repeated: an
image never goes back while another task may save a position that is true of its newer state.

A failed datasync is final for what was written before it: asked again, the kernel may say yes to pages it gave up. So a
failed write or datasync drops the open images, and the next span writes every byte since the last good datasync again
through a fresh descriptor, from the journal, before it syncs. It never covers less than the one that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from asrfs.errors import IntegrityError
from asrfs.format.record import Kind, RecordHeader
from asrfs.journal.columns import Columns
from asrfs.journal.reader import JournalReader, Slabs
from asrfs.model.machine import NO_SLOT
from asrfs.model.positions import Cursor
from asrfs.replication.applier_round import DiskRound
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import File

ROUND_BYTES_MAX = 32 << 20
ROUND_RECORDS_MAX = 64 * 1024
ROUNDS_PER_SPAN_MAX = 4
"""Rounds that share one datasync and one save of the positions."""

OnMarker = Callable[[RecordHeader, bytes], None]


class Image(NamedTuple):
    """A disk's raw image, open for writing."""

    file: File
    size_bytes: int


class Images(Protocol):
    """Where the applier finds images. Opening may raise OSError."""

    def image(self, slot: int) -> Image | None:
        """The image of a disk, None for one that was given up. Raises IntegrityError for a slot that never was."""

    def drop(self, slot: int) -> None:
        """Close the image, if it is open, because what it holds is uncertain; `image` opens it again."""

    def settle(self) -> None:
        """Take out of the images what hydration has left in doubt. Before every span. Raises OSError."""


class Applier:
    """`on_marker` sees every MARKER record applied, in order, and may see one twice after a crash."""

    def __init__(
        self,
        reader: JournalReader,
        positions: PositionsFile,
        images: Images,
        on_marker: OnMarker | None = None,
        *,
        round_bytes_max: int = ROUND_BYTES_MAX,
        rounds_max: int = ROUNDS_PER_SPAN_MAX,
    ) -> None:
        self._reader = reader
        self._positions = positions
        self._images = images
        self._on_marker = on_marker
        self._round_bytes_max = round_bytes_max
        self._rounds_max = rounds_max
        self._slabs = Slabs()

    def apply_span(self, durable_lsn: int) -> Cursor:
        """Apply records above the last good datasync, none above `durable_lsn` (I1); returns the new position.

        Covers at most a few rounds, so call again while the result is below `durable_lsn`. Raises OSError or
        TemporaryError (nothing lost, call again), IntegrityError for a corrupt journal or a record that fits no disk.
        """
        self._images.settle()
        cursor = self._positions.current.applied
        touched: set[int] = set()
        try:
            for _ in range(self._rounds_max):
                if cursor.lsn >= durable_lsn:
                    break
                following = self._apply_round(cursor, durable_lsn, touched)
                if following.lsn == cursor.lsn:
                    break
                cursor = following
            for slot in sorted(touched):
                image = self._images.image(slot)
                if image is not None:
                    image.file.datasync()
        except BaseException:
            for slot in touched:
                self._images.drop(slot)
            raise
        if cursor.lsn > self._positions.saved.applied.lsn:
            self._positions.change(applied=cursor)
            self._positions.save()
        return cursor

    def _apply_round(self, cursor: Cursor, durable_lsn: int, touched: set[int]) -> Cursor:
        until_lsn = min(durable_lsn, cursor.lsn + ROUND_RECORDS_MAX)
        batch = self._reader.read(cursor, until_lsn, self._round_bytes_max, self._slabs)
        assert batch.cursor.lsn <= durable_lsn, "I1: only durable records reach an image"
        disks: dict[int, DiskRound] = {}
        for part in batch.parts:
            self._note_markers(part)
            slots = part.headers["slot"]
            has_extent = ~part.has_note() & (slots != NO_SLOT)
            for slot in np.unique(slots[has_extent]).tolist():
                disks.setdefault(slot, DiskRound()).note(part, slots == slot)
        for slot, disk in sorted(disks.items()):
            self._write(slot, disk, touched)
        return batch.cursor

    def _note_markers(self, part: Columns) -> None:
        if self._on_marker is not None:
            for i in np.flatnonzero(part.headers["kind"] == Kind.MARKER).tolist():
                self._on_marker(part.header(i), bytes(part.payload(i)))

    def _write(self, slot: int, disk: DiskRound, touched: set[int]) -> None:
        image = self._images.image(slot)
        if image is None:
            return
        if disk.end > image.size_bytes:
            raise IntegrityError(
                f"a record reaches to byte {disk.end} of the disk in slot {slot}, which has {image.size_bytes}"
            )
        touched.add(slot)
        for offset, length in disk.punches():
            image.file.punch(offset, length)
        for offset, buffers in disk.writes():
            image.file.write_at(buffers, offset)
