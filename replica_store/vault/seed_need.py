"""What a seed of a disk would be good for, decided from the machine's disk rows alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.machine import DiskRecord
from replica_store.vault.rows import DiskRow


def check_need(machine: str, disk: str, size_bytes: int, rows: Iterable[DiskRow]) -> None:
    """Raise unless an image of `size_bytes` can be the seed of a disk of which something is missing here.

    Of a machine of which nothing came yet, no disk is known: any name is taken. NotFoundError, RefusedError,
    BadInputError.
    """
    newest = _newest(rows)
    if not newest:
        return
    live = {record.name: record for record in newest.values() if not record.removed}
    found = live.get(disk)
    if found is None:
        there = ", ".join(sorted(live)) or "none"
        raise NotFoundError(f"machine {machine} has no disk {disk!r}: it has {there}")
    if not found.gap:
        raise RefusedError(f"all of disk {disk} of machine {machine} is here already: there is nothing to seed")
    if found.size_bytes != size_bytes:
        raise BadInputError(
            f"the image has {size_bytes} bytes and disk {disk} of machine {machine} has {found.size_bytes}: "
            "it is not a copy of this disk"
        )


def is_over(disk: str, rows: Iterable[DiskRow]) -> bool:
    """Whether a seed of this disk is of no use any more: all of the disk is here, or the disk was removed."""
    of_name = [record for record in _newest(rows).values() if record.name == disk]
    return bool(of_name) and not any(record.gap and not record.removed for record in of_name)


def _newest(rows: Iterable[DiskRow]) -> dict[int, DiskRecord]:
    """By slot."""
    return {row.record.slot: row.record for row in sorted(rows, key=lambda row: row.lsn)}
