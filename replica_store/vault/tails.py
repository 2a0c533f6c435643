"""Tails: what a side that was superseded had written and this store did not have, kept beside the history (I7).

    history    1 … branch_lsn ─▶ branch_lsn + 1 …          of the epochs that went on
                        ╰──────▶ branch_lsn + 1 … last     the tail, all of it of the superseded epoch

A tail has tables and a room of objects of its own, so nothing that reads or adds to the history comes upon it. Who
reads past states calls it by an id of its own, `MACHINE~EPOCH`, for which `Vault` answers as for a machine: with the
history up to the branch and the tail behind it. There is one of each epoch. Of a tail only its end is a point, and only
once it is whole and no gap lies there (I5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asrfs.format.log_object import DIGEST_BYTES, NO_DIGEST
from asrfs.model.machine import DiskRecord
from asrfs.model.marker import MarkerRecord
from asrfs.model.names import is_id
from asrfs.model.tails import tail_epoch, tail_name
from replica_store.vault.catalog import Catalog
from replica_store.vault.gaps import gap_at, gaps_of
from replica_store.vault.row_checks import EPOCH_END, are, checked_disk, checked_lsn, checked_object, impossible
from replica_store.vault.rows import DiskRow, Entry, ObjectRow, PointRow

_TAIL_ID = re.compile(r"([0-9a-f]{32})~([0-9]{1,10})")
_TAIL = "machine_id, epoch, branch_lsn, branch_digest, whole"
_OBJECT = "machine_id, epoch, first_lsn, last_lsn, first_time_ns, last_time_ns, digest, length, nonce, is_stretch"
_DISK = "slot, id, name, size_bytes, removed, gap, boot"


@dataclass(frozen=True, slots=True)
class Tail:
    """A tail that has at least one log object. `branch_digest`: of the log object of the history that ends at
    `branch_lsn`."""

    machine_id: str
    epoch: int
    branch_lsn: int
    branch_digest: bytes
    is_whole: bool = False

    @property
    def id(self) -> str:
        return tail_id(self.machine_id, self.epoch)

    @property
    def name(self) -> str:
        return tail_name(self.epoch)


@dataclass(frozen=True, slots=True)
class TailMachine:
    """A machine as it is behind a tail, for who reads past states."""

    id: str
    name: str
    epoch: int


def tail_id(machine_id: str, epoch: int) -> str:
    """As what the past of the machine behind the tail of this epoch is read."""
    return f"{machine_id}~{epoch}"


def is_tail_id(machine_id: str) -> bool:
    """Whether it is not a machine's id but a tail's."""
    return "~" in machine_id


def machine_of(machine_id: str) -> str:
    """The machine's id, of a machine or one of its tails."""
    return machine_id.partition("~")[0]


# ---- rows -----------------------------------------------------------------------------------------------------------


def tails(catalog: Catalog, machine_id: str) -> list[Tail]:
    """Of a machine, by epoch, whole or not."""
    rows = catalog.select(f"SELECT {_TAIL} FROM tails WHERE machine_id = ? ORDER BY epoch", (machine_id,))  # noqa: S608
    return [_tail(tuple(row)) for row in rows]


def tail_of(catalog: Catalog, machine_id: str, epoch: int) -> Tail | None:
    return next((tail for tail in tails(catalog, machine_id) if tail.epoch == epoch), None)


def tail_with_id(catalog: Catalog, tail_id: str) -> Tail | None:
    match = _TAIL_ID.fullmatch(tail_id)
    return tail_of(catalog, match[1], int(match[2])) if match else None


def put_tail(catalog: Catalog, tail: Tail) -> None:
    """Make it or replace it. Inside a transaction."""
    values = (tail.machine_id, tail.epoch, tail.branch_lsn, tail.branch_digest, tail.is_whole)
    catalog.change(f"INSERT OR REPLACE INTO tails ({_TAIL}) VALUES (?, ?, ?, ?, ?)", values)  # noqa: S608


def append_to_tail(catalog: Catalog, tail: Tail, entries: Sequence[Entry]) -> None:
    """Add log objects, each directly after what is there. Inside a transaction."""
    rows = TailRows(catalog, tail)
    for entry in entries:
        row = entry.row
        last = rows.last_own()
        assert row.is_tail and row.epoch == tail.epoch, "a tail is all of one epoch"
        assert row.first_lsn == (last.last_lsn if last else tail.branch_lsn) + 1, "I3: a history has no gap"
        catalog.change(
            f"INSERT INTO tail_objects ({_OBJECT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                *(row.machine_id, row.epoch, row.first_lsn, row.last_lsn, row.first_time_ns, row.last_time_ns),
                *(row.digest, row.length, row.nonce, row.is_stretch),
            ),
        )
        for disk in entry.disks:
            record = disk.record
            catalog.change(
                f"INSERT INTO tail_disks (machine_id, epoch, lsn, {_DISK}) "  # noqa: S608
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(row.machine_id, row.epoch, disk.lsn, record.slot, record.id, record.name, record.size_bytes),
                    *(record.removed, record.gap, record.boot),
                ),
            )


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TailRows:
    """Rows of the history up to the branch and of the tail behind it. Takes a tail's id where `Catalog` takes a
    machine's, and looks at its own tail alone."""

    catalog: Catalog
    tail: Tail

    def objects_of(self, _: str, up_to_lsn: int, after_lsn: int = 0) -> list[ObjectRow]:
        tail = self.tail
        shared = self.catalog.objects_of(tail.machine_id, min(up_to_lsn, tail.branch_lsn), after_lsn)
        own = [row for row in self.own() if row.first_lsn <= up_to_lsn and row.last_lsn > after_lsn]
        return [*shared, *own]

    def object_with(self, _: str, lsn: int) -> ObjectRow | None:
        if lsn <= self.tail.branch_lsn:
            return self.catalog.object_with(self.tail.machine_id, lsn)
        rows = self._select_own("AND first_lsn <= ? ORDER BY first_lsn DESC LIMIT 1", min(lsn, (1 << 63) - 1))
        return rows[0] if rows and rows[0].last_lsn >= lsn else None

    def last_object(self, _: str) -> ObjectRow | None:
        """The newest; of the history where the tail has none yet."""
        return self.last_own() or self.object_with("", self.tail.branch_lsn)

    def disk_rows(self, _: str) -> list[DiskRow]:
        tail = self.tail
        shared = [row for row in self.catalog.disk_rows(tail.machine_id) if row.lsn <= tail.branch_lsn]
        rows = self.catalog.select(
            f"SELECT lsn, {_DISK} FROM tail_disks WHERE machine_id = ? AND epoch = ? ORDER BY lsn, slot",  # noqa: S608
            (tail.machine_id, tail.epoch),
        )
        return [*shared, *(DiskRow(tail.machine_id, checked_lsn(lsn), _disk(tuple(disk))) for lsn, *disk in rows)]

    def own(self) -> list[ObjectRow]:
        """Its own log objects, in LSN order."""
        return self._select_own("ORDER BY first_lsn")

    def last_own(self) -> ObjectRow | None:
        rows = self._select_own("ORDER BY first_lsn DESC LIMIT 1")
        return rows[0] if rows else None

    def _select_own(self, rest: str, *parameters: int) -> list[ObjectRow]:
        rows = self.catalog.select(
            f"SELECT {_OBJECT} FROM tail_objects WHERE machine_id = ? AND epoch = ? {rest}",  # noqa: S608
            (self.tail.machine_id, self.tail.epoch, *parameters),
        )
        return [replace(checked_object(ObjectRow(*row)), is_tail=True) for row in rows]


def point_of_tail(catalog: Catalog, tail: Tail) -> PointRow | None:
    """The point that a tail is; None while it is not whole, or where content is missing (I5)."""
    rows = TailRows(catalog, tail)
    last = rows.last_own() if tail.is_whole else None
    if last is None or gap_at(gaps_of(rows.disk_rows("")), last.last_lsn) is not None:
        return None
    marker = MarkerRecord(id=last.digest[:16].hex(), name=tail.name)
    return PointRow(tail.machine_id, last.last_lsn, tail.epoch, last.last_time_ns, marker, protected=True)


def tail_point(catalog: Catalog, machine_id: str, label: str) -> tuple[Tail, PointRow] | None:
    """The tail of a machine that a point's name or id means, if it is a point."""
    for tail in tails(catalog, machine_id):
        if tail_epoch(label) == tail.epoch or is_id(label):
            point = point_of_tail(catalog, tail)
            if point is not None and label in (point.name, point.id):
                return tail, point
    return None


def ends_at(catalog: Catalog, machine_id: str, epoch: int, lsn: int, digest: bytes) -> bool:
    """Whether the history has a log object, not of a later epoch, that ends at this LSN and has this digest, so that
    a tail of `epoch` may leave it there."""
    if lsn == 0:
        return digest == NO_DIGEST
    row = catalog.object_with(machine_id, lsn)
    return row is not None and row.last_lsn == lsn and row.digest == digest and row.epoch <= epoch


def _tail(row: tuple[object, ...]) -> Tail:
    if not are(row, (str, int, int, bytes, int)):
        raise impossible("tail", str(row[0]))
    machine_id, epoch, branch_lsn, branch_digest, whole = row
    tail = Tail(str(machine_id), int(str(epoch)), int(str(branch_lsn)), bytes(branch_digest), bool(whole))  # type: ignore[call-overload]
    sound = is_id(tail.machine_id) and 0 <= tail.epoch < EPOCH_END and tail.branch_lsn >= 0
    if not sound or len(tail.branch_digest) != DIGEST_BYTES or whole not in (0, 1):
        raise impossible("tail", tail.machine_id)
    return tail


def _disk(row: tuple[object, ...]) -> DiskRecord:
    slot, disk_id, name, size_bytes, removed, gap, boot = row
    return checked_disk(
        DiskRecord(
            slot=slot,  # type: ignore[arg-type]
            id=disk_id,  # type: ignore[arg-type]
            name=name,  # type: ignore[arg-type]
            size_bytes=size_bytes,  # type: ignore[arg-type]
            removed=bool(removed),
            gap=bool(gap),
            boot=boot,  # type: ignore[arg-type]
        )
    )
