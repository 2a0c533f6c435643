"""Reads a backlog of the journal for a stretch: up to the next marker, without what is overwritten on the way. Blocks.

Headers are looked at first, as far as what is left of the records fits; their bytes are read again once it is known
that it pays, and only what is left of them is kept. So a stretch may stand for far more of the journal than memory
would hold. It is whole by itself: the state behind its last record is exact.

Where it does not pay, as with writes that go on and on to new places, the next look is further on: looking costs as
much as reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asrfs.format.log_object import RECORDS_MAX
from asrfs.format.object_index import Index
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.journal.columns import Columns, Table
from asrfs.journal.reader import JournalReader, Slabs
from asrfs.model.positions import Cursor
from asrfs.replication.folding import Kept, Room, fold

FOLDED_BYTES_MAX = 16 << 20
"""Left of the records of one stretch. It bounds memory, and what is sent again when a link is lost."""
BYTES_LEAST = 64 << 20
SAVED_SHARE_LEAST = 0.2
"""Folding less than this is not worth that states are missing and that all is read twice."""
RECORDS_READ_MAX = 1 << 18
BYTES_READ_MAX = 512 << 20
_LOOKS_APART = 4
"""After a look that did not pay, the next one is this many times as far on as that one reached."""
_BATCH_BYTES = 4 << 20
_LOSSES_MAX = 10
_CARRIES = sorted(int(kind) for kind in CARRIES_EXTENT_BYTES)


@dataclass(frozen=True, slots=True)
class Stretch:
    """What becomes a log object of version 2. `payloads` stay valid until the next one is read."""

    index: Index
    payloads: list[memoryview]
    cursor: Cursor
    epoch: int


class _Looked(NamedTuple):
    """Records up to `last_lsn`, which follow one another and end with a marker or with what fits."""

    headers: Table
    kept: Kept
    last_lsn: int

    @property
    def pays(self) -> bool:
        carries = np.isin(self.headers["kind"], _CARRIES)
        before = int(self.headers["length"][carries].sum(dtype=np.int64))
        after = self.bytes_kept
        return before >= BYTES_LEAST and after <= FOLDED_BYTES_MAX and before - after >= SAVED_SHARE_LEAST * before

    @property
    def bytes_kept(self) -> int:
        return int(self.kept.length[np.isin(self.headers["kind"][self.kept.number], _CARRIES)].sum())


class StretchReader:
    """Shares its reader with who reads for other objects; one call at a time.

    The more a stretch may have left, the more is overwritten in it. But what is lost with its connection is sent again:
    so after a stretch was, there is no more in one than in another object, for twice as far as was lost, and for twice
    that again with each session to which it happens, too.
    """

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._slabs = Slabs()
        self._not_before_lsn = 0
        self._session = b""
        self._last_lsn = 0
        self._losses = 0
        self._small_until_lsn = 0

    def read(self, cursor: Cursor, durable_lsn: int, *, session_salt: bytes, object_size: int) -> Stretch | None:
        """The records behind `cursor`, none above `durable_lsn`; None where folding does not pay. `object_size`: of
        payload in other objects. Raises IntegrityError, OSError."""
        if session_salt != self._session:
            self._begin_session(session_salt, cursor.lsn)
        if cursor.lsn < self._not_before_lsn or cursor.lsn >= durable_lsn:
            return None
        is_small = cursor.lsn < self._small_until_lsn
        looked = self._look(cursor, durable_lsn, min(object_size, FOLDED_BYTES_MAX) if is_small else FOLDED_BYTES_MAX)
        if not looked.pays:
            self._not_before_lsn = cursor.lsn + _LOOKS_APART * (looked.last_lsn - cursor.lsn)
            return None
        stretch = self._gather(cursor, looked)
        self._last_lsn = looked.last_lsn
        return stretch

    def _begin_session(self, session_salt: bytes, lsn: int) -> None:
        """It goes on behind `lsn`, whatever the one before it had sent."""
        lost = self._last_lsn - lsn
        self._losses = min(self._losses + 1, _LOSSES_MAX) if lost > 0 else 0
        if lost > 0:
            self._small_until_lsn = lsn + (lost << self._losses)
        self._session, self._not_before_lsn, self._last_lsn = session_salt, 0, 0

    def _look(self, cursor: Cursor, durable_lsn: int, bytes_max: int) -> _Looked:
        room = Room(bytes_max, RECORDS_MAX)
        epoch, bytes_read, is_at_marker = self._reader.epoch(cursor), 0, False
        last_lsn, until_lsn = cursor.lsn, min(durable_lsn, cursor.lsn + RECORDS_READ_MAX)
        tables: list[Table] = []
        while last_lsn < until_lsn and bytes_read < BYTES_READ_MAX and not (room.is_full or is_at_marker):
            if self._reader.epoch(cursor) != epoch:
                break
            batch = self._reader.read(cursor, until_lsn, _BATCH_BYTES, self._slabs)
            cursor = batch.cursor
            for part in batch.parts:
                headers, is_at_marker = _up_to_marker(part)
                taken = room.add(headers)
                tables.append(headers[:taken])
                last_lsn += taken
                bytes_read += int(headers["payload_length"].sum(dtype=np.int64))
                if room.is_full or is_at_marker:
                    break
        table = np.concatenate(tables)
        return _Looked(table, fold(table), last_lsn)

    def _gather(self, cursor: Cursor, looked: _Looked) -> Stretch:
        """Read the bytes of what is left, in order."""
        first_lsn, epoch = cursor.lsn + 1, self._reader.epoch(cursor)
        kept, room = looked.kept, memoryview(bytearray(looked.bytes_kept))
        payloads: list[memoryview] = []
        notes: list[bytes] = []
        filled = at = seen = 0
        while cursor.lsn < looked.last_lsn:
            batch = self._reader.read(cursor, looked.last_lsn, _BATCH_BYTES, self._slabs)
            cursor = batch.cursor
            for part in batch.parts:
                carries = part.carries_bytes()
                while at < len(kept.number) and int(kept.number[at]) < seen + len(part):
                    i = int(kept.number[at]) - seen
                    if carries[i]:
                        skipped, length = int(kept.skipped[at]), int(kept.length[at])
                        place = room[filled : filled + length]
                        place[:] = part.payload(i)[skipped : skipped + length]
                        payloads.append(place)
                        filled += length
                    at += 1
                notes += map(bytes, part.payloads(part.has_note()))
                seen += len(part)
        return Stretch(_index_of(first_lsn, looked, b"".join(notes)), payloads, cursor, epoch)


def _up_to_marker(part: Columns) -> tuple[Table, bool]:
    """The headers up to the first marker, that one with them; whether there is one."""
    markers = np.flatnonzero(part.headers["kind"] == Kind.MARKER)
    return (part.headers[: int(markers[0]) + 1], True) if len(markers) else (part.headers, False)


def _index_of(first_lsn: int, looked: _Looked, notes: bytes) -> Index:
    headers = looked.headers[looked.kept.number]
    carries = np.isin(headers["kind"], _CARRIES)
    noted = np.isin(headers["kind"], (int(Kind.MARKER), int(Kind.DISK)))
    note_length = np.where(noted, headers["payload_length"], np.uint32(0)).astype(np.uint32)
    position = np.zeros(len(headers), np.uint64)
    for chosen, sizes in ((carries, looked.kept.length[carries].astype(np.uint64)), (noted, note_length[noted])):
        position[chosen] = np.cumsum(sizes, dtype=np.uint64) - sizes
    return Index(
        first_lsn=first_lsn,
        time_ns=headers["time_ns"],
        offset=looked.kept.offset.astype(np.uint64),
        length=looked.kept.length.astype(np.uint64),
        payload_position=position,
        note_length=note_length,
        kind=headers["kind"],
        slot=headers["slot"],
        notes=notes,
        stretch_lsn=headers["lsn"],
    )
