"""Whether rows of the catalog are such as this program writes. Pure.

The catalog is a file that bit rot, another program or another version may have changed; what is read from it becomes
names of objects, sizes of images and labels of directories. A row that cannot be is damage, and `rebuild` mends it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from asrfs.errors import BadInputError, IntegrityError
from asrfs.format.log_object import DIGEST_BYTES, OBJECT_BYTES_MAX
from asrfs.model.boot import BOOT_BYTES_MAX
from asrfs.model.machine import SLOT_MAX, DiskRecord
from asrfs.model.names import is_id, is_name
from asrfs.model.quantities import check_disk_size
from replica_store.vault.rows import LinkRow, MachineRow, ObjectRow

_NONCE = re.compile(r"[0-9a-f]{8}")
EPOCH_END = 1 << 32
_MACHINE = (str, str, int, str, int, int, bytes)
_OBJECT = (str, int, int, int, int, int, bytes, int, str, int)
_DISK = (int, str, str, int)
_LINK = (int, int, int, int)


def checked_machine(row: MachineRow) -> MachineRow:
    """Raises IntegrityError, as all here do."""
    types = (row.id, row.name, row.epoch, row.serial, row.enrolled_ns, row.generation, row.sealed_keys)
    if not are(types, _MACHINE):
        raise impossible("machine", str(row.id))
    if not (is_id(row.id) and is_name(row.name) and 0 <= row.epoch < EPOCH_END and row.generation >= 0):
        raise impossible("machine", row.id)
    return row


def checked_object(row: ObjectRow) -> ObjectRow:
    columns = (row.machine_id, row.epoch, row.first_lsn, row.last_lsn, row.first_time_ns, row.last_time_ns)
    sound = (
        are((*columns, row.digest, row.length, row.nonce, row.is_stretch), _OBJECT)
        and is_id(row.machine_id)
        and 0 < row.first_lsn <= row.last_lsn
        and 0 <= row.first_time_ns <= row.last_time_ns
        and 0 <= row.epoch < EPOCH_END
        and 0 < row.length <= OBJECT_BYTES_MAX
        and len(row.digest) == DIGEST_BYTES
        and _NONCE.fullmatch(row.nonce) is not None
        and row.is_stretch in (False, True)
    )
    if not sound:
        raise impossible("log object", f"{row.first_lsn}")
    return replace(row, is_stretch=bool(row.is_stretch))


def checked_disk(record: DiskRecord) -> DiskRecord:
    if not are((record.slot, record.id, record.name, record.size_bytes), _DISK):
        raise impossible("disk", f"{record.slot}")
    try:
        check_disk_size(record.size_bytes, "disk")
    except BadInputError:
        raise impossible("disk", f"{record.slot}") from None
    is_document = isinstance(record.boot, bytes) and len(record.boot) <= BOOT_BYTES_MAX
    if not (is_id(record.id) and is_name(record.name) and 0 <= record.slot <= SLOT_MAX and is_document):
        raise impossible("disk", f"{record.slot}")
    return record


def checked_link(row: LinkRow) -> LinkRow:
    if not are((row.heard_ns, row.appended_lsn, row.durable_lsn, row.durable_time_ns), _LINK):
        raise impossible("link", str(row.machine_id))
    return row


def checked_lsn(lsn: int) -> int:
    if not isinstance(lsn, int) or lsn <= 0:
        raise impossible("LSN", str(lsn))
    return lsn


def are(values: tuple[object, ...], types: tuple[type | tuple[type, ...], ...]) -> bool:
    """SQLite keeps a column's type, but not in a file that was changed."""
    return all(map(isinstance, values, types))


def impossible(what: str, which: str) -> IntegrityError:
    return IntegrityError(
        f"the catalog's row of {what} {which[:40]!r} cannot be: make the catalog again with `replica-store rebuild`"
    )
