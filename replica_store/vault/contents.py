"""What the catalog gets from a log object: its row, and the disks and points that its records announce. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from asrfs.errors import FormatError
from asrfs.format.log_object import ObjectHeader
from asrfs.format.object_index import Index
from asrfs.format.record import Kind
from asrfs.model.machine import DiskRecord, decode_disk
from asrfs.model.marker import decode_marker
from asrfs.model.quantities import SECTOR_BYTES
from replica_store.vault.rows import DiskRow, Entry, ObjectRow, PointRow

_INT64_END = 1 << 63
_SLOTS = 1 << 16


def entry_of(header: ObjectHeader, index: Index, digest: bytes, nonce: str, where: str) -> Entry:
    """Raises FormatError, naming `where`, for notes that cannot be read or numbers no catalog can hold."""
    machine_id = header.machine_id.hex()
    if header.last_lsn >= _INT64_END or header.last_time_ns >= _INT64_END:
        raise FormatError(f"{where}: LSN {header.last_lsn} or its time is beyond what can be")
    row = ObjectRow(
        machine_id=machine_id,
        epoch=header.epoch,
        first_lsn=header.first_lsn,
        last_lsn=header.last_lsn,
        first_time_ns=header.first_time_ns,
        last_time_ns=header.last_time_ns,
        digest=digest,
        length=header.object_length,
        nonce=nonce,
        is_stretch=header.is_stretch,
    )
    disks: list[DiskRow] = []
    points: list[PointRow] = []
    completions: list[PointRow] = []
    confirmations: list[PointRow] = []
    lsns = index.lsn
    for i in np.flatnonzero((index.kind == Kind.MARKER) | (index.kind == Kind.DISK)).tolist():
        lsn = int(lsns[i])
        try:
            if index.kind[i] == Kind.DISK:
                disks.append(DiskRow(machine_id, lsn, _disk(index, i)))
            else:
                marker = decode_marker(index.note(i))
                row_of_point = PointRow(machine_id, lsn, header.epoch, int(index.time_ns[i]), marker)
                if marker.confirms:
                    confirmations.append(row_of_point)
                else:
                    (points if marker.completes is None else completions).append(row_of_point)
        except FormatError as error:
            raise FormatError(f"{where}: LSN {lsn}: {error}") from None
    return Entry(row, tuple(disks), tuple(points), tuple(completions), tuple(confirmations))


def check_extents(index: Index, disks: Iterable[DiskRecord], where: str) -> None:
    """Raise FormatError unless every extent lies on one of `disks` and consists of whole sectors."""
    size_of = np.zeros(_SLOTS, np.uint64)
    for disk in disks:
        size_of[disk.slot] = max(int(size_of[disk.slot]), disk.size_bytes)
    is_extent = (index.kind != Kind.MARKER) & (index.kind != Kind.DISK)
    sector = np.uint64(SECTOR_BYTES)
    outside = index.offset + index.length > size_of[index.slot]
    uneven = (index.offset % sector != 0) | (index.length % sector != 0)
    bad = np.flatnonzero(is_extent & (outside | uneven))
    if len(bad):
        i = int(bad[0])
        raise FormatError(
            f"{where}: LSN {index.lsn[i]} touches {int(index.offset[i])}+{int(index.length[i])} "
            f"of slot {int(index.slot[i])}, which no disk of this machine has"
        )


def _disk(index: Index, i: int) -> DiskRecord:
    record = decode_disk(index.note(i))
    if record.slot != int(index.slot[i]):
        raise FormatError(f"a DISK record of slot {int(index.slot[i])} describes slot {record.slot}")
    return record
