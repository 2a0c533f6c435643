"""Turns durable records of the journal into log objects. Blocks (zstd, AES, BLAKE3); runs in a thread.

An object holds consecutive records of one epoch and ends at the wanted size, at the last durable record, or right
after a MARKER, so that a recovery point never waits for what comes behind it. Of a long backlog a stretch may be made,
without what was overwritten on the way. A gap object stands for records that were
given up: it is a stretch that says only which disks there are and that content of theirs is missing.

Payload checksums are verified here: a journal that went bad raises IntegrityError and its bytes never leave the host.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from asrfs.errors import IntegrityError
from asrfs.format.log_object import (
    RECORDS_MAX,
    ObjectHeader,
    ObjectKeys,
    decode_object_header,
    derive_keys,
)
from asrfs.format.object_encoder import ZSTD_LEVEL, ObjectEncoder
from asrfs.format.object_index import Index
from asrfs.format.omission import FilledChunk, filled_chunks
from asrfs.format.record import Kind
from asrfs.format.seed_file import chunk_digest, derive_digest_key
from asrfs.journal.columns import Columns
from asrfs.journal.reader import JournalReader, Slabs
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import DiskRecord, encode_disk
from asrfs.model.positions import Cursor
from asrfs.protocol.messages import MATCH_CHUNKS_MAX
from asrfs.replication.stretch_reader import StretchReader


@dataclass(frozen=True, slots=True)
class MachineKeys:
    """What enrolment gave: the two keys (32 bytes each) every session's keys are derived from."""

    machine_id: bytes
    index: bytes
    payload: bytes

    def of_session(self, epoch: int, salt: bytes) -> ObjectKeys:
        return derive_keys(self.index, self.payload, self.machine_id, epoch, salt)


class Filled(NamedTuple):
    """Whole chunks of disks that an object's FILL records carry, in the order of its payload, and the digest of each
    (`format/seed_file.py`)."""

    header: ObjectHeader
    chunks: list[FilledChunk]
    digests: list[bytes]


@dataclass(frozen=True, slots=True)
class BuiltObject:
    """A log object ready to be sent. `cursor` is the place just after its last record."""

    first_lsn: int
    last_lsn: int
    first_time_ns: int
    digest: bytes
    pieces: list[memoryview]
    """Its bytes, until they were given back."""
    length: int
    cursor: Cursor
    level: int | None = None
    """Of zstd, for its frames."""
    filled: Filled | None = None
    """What it has that a seed may have, too."""


class ObjectBuilder:
    """Reads with its own reader; one call at a time."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._slabs = Slabs()
        self._stretches = StretchReader(reader)
        self._encoder = ObjectEncoder()

    def build(
        self,
        cursor: Cursor,
        durable_lsn: int,
        *,
        keys: MachineKeys,
        session_salt: bytes,
        previous_digest: bytes,
        bytes_max: int,
        level: int | None = ZSTD_LEVEL,
        folds: bool = False,
        is_seeded: Callable[[int], bool] | None = None,
    ) -> BuiltObject | None:
        """The object of the records after `cursor`, none above `durable_lsn`; None when there are none. `level`: of
        zstd, or None. `folds`: as a stretch up to the next marker, or as far as it gets, if what is left out pays.
        `is_seeded`: whether FILL records of the disk in a slot may be of content that the store has.

        Raises IntegrityError for a corrupt journal, OSError when it cannot be read.
        """
        seal = partial(self._seal, keys, session_salt, previous_digest, is_seeded)
        if folds:
            stretch = self._stretches.read(cursor, durable_lsn, session_salt=session_salt, object_size=bytes_max)
            if stretch is not None:
                assert stretch.index.last_lsn == stretch.cursor.lsn <= durable_lsn, "only durable records are shipped"
                return seal(stretch.epoch, stretch.index, stretch.payloads, stretch.cursor, level)
        until_lsn = min(durable_lsn, cursor.lsn + RECORDS_MAX)
        batch = self._reader.read(cursor, until_lsn, bytes_max, self._slabs)
        if not batch.parts:
            return None
        marker_lsn = _first_marker(batch.parts)
        if marker_lsn is not None and marker_lsn < batch.cursor.lsn:
            batch = self._reader.read(cursor, marker_lsn, bytes_max, self._slabs)
        index = index_of(batch.parts)
        if index.first_lsn != cursor.lsn + 1 or batch.cursor.lsn != index.last_lsn:
            raise IntegrityError(f"the journal goes on with LSN {index.first_lsn} where LSN {cursor.lsn + 1} was due")
        assert batch.cursor.lsn <= durable_lsn, "only durable records are shipped"
        payloads = [payload for part in batch.parts for payload in part.payloads(part.carries_bytes())]
        return seal(self._reader.epoch(cursor), index, payloads, batch.cursor, level)

    def build_gap(
        self,
        first_lsn: int,
        through: Cursor,
        disks: Sequence[DiskRecord],
        *,
        epoch: int,
        keys: MachineKeys,
        session_salt: bytes,
        previous_digest: bytes,
    ) -> BuiltObject:
        """The object of the records from `first_lsn` up to `through`, which were given up and are not read.

        `disks`: all the machine ever had, as they are at `through`, by slot; whichever is there has a gap.
        """
        assert 0 < first_lsn <= through.lsn, "a gap has records that were given up"
        assert disks, "a gap is one of disks"
        assert all(disk.gap or disk.removed for disk in disks), "I5: what was given up is missing from every disk"
        index = gap_index(first_lsn, through, disks)
        return self._seal(keys, session_salt, previous_digest, None, epoch, index, [], through, ZSTD_LEVEL)

    def _seal(
        self,
        keys: MachineKeys,
        session_salt: bytes,
        previous_digest: bytes,
        is_seeded: Callable[[int], bool] | None,
        epoch: int,
        index: Index,
        payloads: Sequence[memoryview],
        cursor: Cursor,
        level: int | None,
    ) -> BuiltObject:
        digest, content = self._encoder.encode(
            machine_id=keys.machine_id,
            epoch=epoch,
            session_salt=session_salt,
            previous_digest=previous_digest,
            index=index,
            payloads=payloads,
            keys=keys.of_session(epoch, session_salt),
            level=level,
        )
        return BuiltObject(
            first_lsn=index.first_lsn,
            last_lsn=index.last_lsn,
            first_time_ns=int(index.time_ns[0]),
            digest=digest,
            pieces=[content],
            length=len(content),
            cursor=cursor,
            level=level,
            filled=_filled(content, index, payloads, keys, is_seeded) if is_seeded else None,
        )

    def give_back(self, built: BuiltObject) -> None:
        """Its bytes were sent; their memory will hold those of another object."""
        self._encoder.give_back(built.pieces.pop())


def _filled(
    content: memoryview,
    index: Index,
    payloads: Sequence[memoryview],
    keys: MachineKeys,
    is_seeded: Callable[[int], bool],
) -> Filled | None:
    chunks = [chunk for chunk in filled_chunks(index) if is_seeded(chunk.slot)][:MATCH_CHUNKS_MAX]
    if not chunks:
        return None
    key = derive_digest_key(keys.index)
    begins = [0, *accumulate(map(len, payloads))]
    digests = []
    for chunk in chunks:
        n = bisect_right(begins, chunk.position) - 1
        at = chunk.position - begins[n]
        digests.append(chunk_digest(key, payloads[n][at : at + CHUNK_BYTES]))
    return Filled(decode_object_header(content, "a log object of our own"), chunks, digests)


def index_of(parts: Sequence[Columns]) -> Index:
    """The columns of consecutive records."""
    headers = np.concatenate([part.headers for part in parts])
    payload_length = headers["payload_length"].astype(np.uint64)
    noted = np.concatenate([part.has_note() for part in parts])
    position = np.zeros(len(headers), np.uint64)
    for chosen in (np.concatenate([part.carries_bytes() for part in parts]), noted):
        sizes = payload_length[chosen]
        position[chosen] = np.cumsum(sizes, dtype=np.uint64) - sizes
    return Index(
        first_lsn=int(headers["lsn"][0]),
        time_ns=headers["time_ns"],
        offset=headers["offset"],
        length=headers["length"],
        payload_position=position,
        note_length=np.where(noted, headers["payload_length"], np.uint32(0)),
        kind=headers["kind"],
        slot=headers["slot"],
        notes=b"".join(payload for part in parts for payload in part.payloads(part.has_note())),
    )


def gap_index(first_lsn: int, through: Cursor, disks: Sequence[DiskRecord]) -> Index:
    """Columns of a stretch whose only records are what holds for the disks at its end."""
    notes = [encode_disk(disk) for disk in disks]
    sizes = np.array([len(note) for note in notes], np.uint64)
    count = len(disks)
    return Index(
        first_lsn=first_lsn,
        time_ns=np.full(count, through.time_ns, np.uint64),
        offset=np.zeros(count, np.uint64),
        length=np.zeros(count, np.uint64),
        payload_position=np.cumsum(sizes, dtype=np.uint64) - sizes,
        note_length=sizes.astype(np.uint32),
        kind=np.full(count, Kind.DISK, np.uint16),
        slot=np.array([disk.slot for disk in disks], np.uint16),
        notes=b"".join(notes),
        stretch_lsn=np.full(count, through.lsn, np.uint64),
    )


def _first_marker(parts: Sequence[Columns]) -> int | None:
    """LSN of the first MARKER."""
    for part in parts:
        markers = np.flatnonzero(part.headers["kind"] == Kind.MARKER)
        if len(markers):
            return part.header(int(markers[0])).lsn
    return None
