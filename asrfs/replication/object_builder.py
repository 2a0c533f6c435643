"""Turns durable records of the journal into log objects. Blocks (zstd, AES, BLAKE3); runs in a thread.

An object holds consecutive records of one epoch and ends at the wanted size, at the last durable record, or right
after a MARKER, so that a recovery point never waits for what comes behind it. Payload checksums are verified here:
a journal that went bad raises IntegrityError and its bytes never leave the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asrfs.errors import IntegrityError
from asrfs.format.log_object import RECORDS_MAX, Index, ObjectKeys, derive_keys, encode_object
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind, RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.model.positions import Cursor

Records = Sequence[tuple[RecordHeader, memoryview]]
_WITH_BYTES = [int(kind) for kind in CARRIES_EXTENT_BYTES]
_WITH_NOTE = [int(Kind.MARKER), int(Kind.DISK)]


@dataclass(frozen=True, slots=True)
class MachineKeys:
    """What enrolment gave: the two keys (32 bytes each) every session's keys are derived from."""

    machine_id: bytes
    index: bytes
    payload: bytes

    def of_session(self, epoch: int, salt: bytes) -> ObjectKeys:
        return derive_keys(self.index, self.payload, self.machine_id, epoch, salt)


@dataclass(frozen=True, slots=True)
class BuiltObject:
    """A log object ready to be sent. `cursor` is the place just after its last record."""

    first_lsn: int
    last_lsn: int
    first_time_ns: int
    digest: bytes
    pieces: list[bytes]
    length: int
    cursor: Cursor


class ObjectBuilder:
    """Reads with its own reader; one call at a time."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader

    def build(
        self,
        cursor: Cursor,
        durable_lsn: int,
        *,
        keys: MachineKeys,
        session_salt: bytes,
        previous_digest: bytes,
        bytes_max: int,
        compress: bool = True,
    ) -> BuiltObject | None:
        """The object of the records after `cursor`, none above `durable_lsn`; None when there are none.

        Raises IntegrityError for a corrupt journal, OSError when it cannot be read.
        """
        until_lsn = min(durable_lsn, cursor.lsn + RECORDS_MAX)
        batch = self._reader.read(cursor, until_lsn, bytes_max)
        if not batch.records:
            return None
        for header, _ in batch.records:
            if header.kind == Kind.MARKER and header.lsn < batch.cursor.lsn:
                batch = self._reader.read(cursor, header.lsn, bytes_max)
                break
        epoch = self._reader.epoch(cursor)
        first = batch.records[0][0].lsn
        if first != cursor.lsn + 1 or batch.cursor.lsn != first + len(batch.records) - 1:
            raise IntegrityError(f"the journal goes on with LSN {first} where LSN {cursor.lsn + 1} was due")
        assert batch.cursor.lsn <= durable_lsn, "only durable records are shipped"
        digest, pieces = encode_object(
            machine_id=keys.machine_id,
            epoch=epoch,
            session_salt=session_salt,
            previous_digest=previous_digest,
            index=index_of(batch.records),
            payloads=[payload for header, payload in batch.records if header.kind in CARRIES_EXTENT_BYTES],
            keys=keys.of_session(epoch, session_salt),
            compress=compress,
        )
        return BuiltObject(
            first_lsn=first,
            last_lsn=batch.cursor.lsn,
            first_time_ns=batch.records[0][0].time_ns,
            digest=digest,
            pieces=pieces,
            length=sum(map(len, pieces)),
            cursor=batch.cursor,
        )


def index_of(records: Records) -> Index:
    """The columns of consecutive records."""
    headers = [header for header, _ in records]
    _, times, _, offsets, lengths, payload_lengths, _, kinds, slots = zip(*headers, strict=True)
    kind = np.array(kinds, np.uint16)
    payload_length = np.array(payload_lengths, np.uint64)
    position = np.zeros(len(headers), np.uint64)
    note_length = np.zeros(len(headers), np.uint32)
    for group in (_WITH_BYTES, _WITH_NOTE):
        chosen = np.isin(kind, group)
        sizes = payload_length[chosen]
        position[chosen] = np.cumsum(sizes, dtype=np.uint64) - sizes
    noted = np.isin(kind, _WITH_NOTE)
    note_length[noted] = payload_length[noted]
    return Index(
        first_lsn=headers[0].lsn,
        time_ns=np.array(times, np.uint64),
        offset=np.array(offsets, np.uint64),
        length=np.array(lengths, np.uint64),
        payload_position=position,
        note_length=note_length,
        kind=kind,
        slot=np.array(slots, np.uint16),
        notes=b"".join(bytes(payload) for header, payload in records if header.kind in _WITH_NOTE),
    )
