"""The index of a log object: a column for each field of its records, and their small payloads, the notes.

A module of its own because numpy takes as long to load as most verbs run, and most need no more of an object than its
header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from asrfs.errors import FormatError
from asrfs.format.log_object import INDEX_FRAME, Bytes, ObjectHeader, ObjectKeys, nonce_of, unpack, unseal
from asrfs.format.record import CARRIES_EXTENT_BYTES, READS_AS_ZEROS, Kind

_COUNTS = struct.Struct("<II")

_BYTES, _NOTE, _ZEROS = 1, 2, 3
_CLASSES = np.zeros(1 << 16, np.uint8)
"""What a record of each kind has: bytes in the frames, a note, neither; 0 for what is no kind."""
_CLASSES[[int(kind) for kind in CARRIES_EXTENT_BYTES]] = _BYTES
_CLASSES[[int(kind) for kind in READS_AS_ZEROS]] = _ZEROS
_CLASSES[[int(Kind.MARKER), int(Kind.DISK)]] = _NOTE


@dataclass(frozen=True, slots=True)
class Index:
    """Columns of the records, in LSN order. All arrays have the same length.

    Record i has LSN `first_lsn + i`, or in a stretch `stretch_lsn[i]`: `lsn` is right for both. `payload_position` is
    the byte at which the record's payload begins: in the concatenated raw payload for WRITE and FILL, in `notes` for
    MARKER and DISK (whose payload length is then `note_length`, else 0).
    """

    first_lsn: int
    time_ns: npt.NDArray[np.uint64]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    payload_position: npt.NDArray[np.uint64]
    note_length: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint16]
    slot: npt.NDArray[np.uint16]
    notes: bytes
    stretch_lsn: npt.NDArray[np.uint64] | None = None

    @property
    def is_stretch(self) -> bool:
        return self.stretch_lsn is not None

    @property
    def lsn(self) -> npt.NDArray[np.uint64]:
        """LSN of each record."""
        if self.stretch_lsn is not None:
            return self.stretch_lsn
        return np.arange(self.first_lsn, self.first_lsn + len(self), dtype=np.uint64)

    @property
    def last_lsn(self) -> int:
        return int(self.stretch_lsn[-1]) if self.stretch_lsn is not None else self.first_lsn + len(self) - 1

    def __len__(self) -> int:
        return len(self.kind)

    def note(self, i: int) -> bytes:
        """Payload of MARKER or DISK record i."""
        start = int(self.payload_position[i])
        return self.notes[start : start + int(self.note_length[i])]


_COLUMNS: tuple[tuple[str, type[np.generic]], ...] = (
    ("time_ns", np.uint64),
    ("offset", np.uint64),
    ("length", np.uint64),
    ("payload_position", np.uint64),
    ("note_length", np.uint32),
    ("kind", np.uint16),
    ("slot", np.uint16),
)
_STRETCH_COLUMNS: tuple[tuple[str, type[np.generic]], ...] = (("lsn", np.uint64), *_COLUMNS)


def decode_index(header: ObjectHeader, head: Bytes, keys: ObjectKeys, where: str) -> Index:
    """Open the index. `head` is the object's beginning, at least up to `header.frames_offset`. Raises FormatError."""
    view = memoryview(head)
    clear = bytes(view[: header.index_offset])
    sealed = view[header.index_offset : header.frames_offset]
    place = f"{where}: index of LSN {header.first_lsn}"
    packed = unseal(keys.index, nonce_of(header, INDEX_FRAME), sealed, clear, place)
    raw = unpack(packed, header.index_raw_length, place)
    return _decode_index(header, raw, where)


def encode_index(index: Index) -> bytes:
    """The raw index: counts, columns, notes."""
    layout = _STRETCH_COLUMNS if index.is_stretch else _COLUMNS
    columns = [np.ascontiguousarray(getattr(index, name), dtype=dtype).tobytes() for name, dtype in layout]
    return b"".join([_COUNTS.pack(len(index), len(index.notes)), *columns, index.notes])


def _decode_index(header: ObjectHeader, raw: bytes, where: str) -> Index:
    where = f"{where}: index of LSN {header.first_lsn}..{header.last_lsn}"
    if len(raw) < _COUNTS.size:
        raise FormatError(f"{where}: too short")
    count, notes_length = _COUNTS.unpack_from(raw)
    layout = _STRETCH_COLUMNS if header.is_stretch else _COLUMNS
    record_bytes = sum(np.dtype(dtype).itemsize for _, dtype in layout)
    if count != header.record_count or len(raw) != _COUNTS.size + count * record_bytes + notes_length:
        raise FormatError(f"{where}: holds {count} records instead of {header.record_count}")
    at = _COUNTS.size
    columns: dict[str, Any] = {}
    for name, dtype in layout:
        columns[name] = np.frombuffer(raw, dtype=dtype, count=count, offset=at)
        at += columns[name].nbytes
    index = Index(first_lsn=header.first_lsn, notes=raw[at:], stretch_lsn=columns.pop("lsn", None), **columns)
    _check_index(header, index, where)
    if index.stretch_lsn is not None:
        _check_stretch(header, index, index.stretch_lsn, where)
    return index


def _check_index(header: ObjectHeader, index: Index, where: str) -> None:
    # One look-up for each record, and none of what a common object lacks: this is most of reading an index.
    classes = _CLASSES[index.kind]
    has_note = classes == _NOTE
    if has_note.any():
        has_none = ~has_note
        extents_sound = bool((index.length[has_none] > 0).all()) and not index.note_length[has_none].any()
        notes = index.note_length[has_note].astype(np.uint64)
        notes_sound = int(notes.sum()) == len(index.notes)
        notes_sound = notes_sound and bool((index.payload_position[has_note] == np.cumsum(notes) - notes).all())
    else:
        extents_sound = int(index.length.min()) > 0 and not index.note_length.any()
        notes_sound = not index.notes
    has_bytes = classes == _BYTES
    lengths, positions = index.length, index.payload_position
    if not has_bytes.all():
        lengths, positions = lengths[has_bytes], positions[has_bytes]
    sound = (
        bool(classes.all())
        and int(index.offset.max()) < 1 << 63
        and int(index.length.max()) < 1 << 63
        and extents_sound
        and notes_sound
        and (not len(lengths) or int(lengths.max()) <= header.payload_raw_length)
        and int(lengths.sum(dtype=np.uint64)) == header.payload_raw_length
        and bool((positions == np.cumsum(lengths, dtype=np.uint64) - lengths).all())
        and bool((index.time_ns[1:] >= index.time_ns[:-1]).all())
    )
    if not sound:
        raise FormatError(f"{where}: its columns contradict each other")
    if int(index.time_ns[0]) != header.first_time_ns or int(index.time_ns[-1]) != header.last_time_ns:
        raise FormatError(f"{where}: times differ from the header's")


def _check_stretch(header: ObjectHeader, index: Index, lsn: npt.NDArray[np.uint64], where: str) -> None:
    """Each record has an LSN of its own, within the stretch, the last one the last. Only DISK records may share that
    one, one a slot: what holds at the end of records that were given up has no LSNs of its own. A MARKER names a state
    that exists, so there is none before the last LSN."""
    is_last = lsn == np.uint64(header.last_lsn)
    shares = np.flatnonzero(lsn[1:] == lsn[:-1]) + 1
    at_end = index.slot[is_last]
    sound = (
        int(lsn[0]) >= header.first_lsn
        and int(lsn[-1]) == header.last_lsn
        and bool((lsn[1:] >= lsn[:-1]).all())
        and (not len(shares) or bool(is_last[shares].all() and (index.kind[is_last] == Kind.DISK).all()))
        and (not len(shares) or len(np.unique(at_end)) == len(at_end))
        and not (index.kind[~is_last] == Kind.MARKER).any()
    )
    if not sound:
        raise FormatError(f"{where}: its records cannot be those of a stretch")
