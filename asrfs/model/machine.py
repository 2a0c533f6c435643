"""A machine, its disks, and what its history says of them.

`MachineConfig` is the host's file (`machine.json`); `DiskRecord` travels inside the history as the payload of DISK
records, so the store learns of disks in the same order as of writes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asrfs.errors import BadInputError, FormatError, NotFoundError
from asrfs.model.names import check_name, is_id
from asrfs.model.quantities import check_disk_size

NO_SLOT = 0xFFFF
"""Slot of records that belong to no disk (markers)."""
SLOT_MAX = 0xFFFE


class DiskConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk as the host knows it.

    `slot` numbers it in records and is never reused; `id` names this incarnation (a disk made again under the same
    name is another one); `adopted` is the path of a raw image or block device in use in place, None for our own
    sparse image; `gap` is true until content from before the history has been read into it. A disk that was `removed`
    takes no more writes; once it is `released` too, its image holds all of them and is nobody's concern here.
    `growing_from`: bytes it had, while its last block, which was not a whole one, is being made longer in the history.
    `base`: path of a file with what our image has no data for yet, holes of the image; None when it holds all.
    """

    slot: int
    id: str
    name: str
    size_bytes: int
    adopted: str | None = None
    removed: bool = False
    released: bool = False
    gap: bool = False
    growing_from: int | None = None
    base: str | None = None


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host's description of its machine. Removed disks stay, so that slots are never reused."""

    format: Literal[1] = 1
    id: str
    name: str
    disks: tuple[DiskConfig, ...] = ()

    def live_disks(self) -> tuple[DiskConfig, ...]:
        """Disks that exist now, by slot."""
        return tuple(disk for disk in self.disks if not disk.removed)

    def disk(self, name: str) -> DiskConfig:
        """The live disk of that name. Raises NotFoundError."""
        for disk in self.live_disks():
            if disk.name == name:
                return disk
        raise NotFoundError(f"machine {self.name} has no disk {name!r}: see `asrfs disk list`")

    def disk_to_remove(self, name: str) -> DiskConfig:
        """The disk of that name that is live, or whose removal was not finished. Raises NotFoundError."""
        for disk in self.disks:
            if disk.name == name and disk.removed and not disk.released:
                return disk
        return self.disk(name)


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of a DISK record: what holds for a slot from this LSN on. Writing it again changes nothing."""

    slot: int
    id: str
    name: str
    size_bytes: int
    removed: bool = False
    gap: bool = False

    @classmethod
    def of(cls, disk: DiskConfig) -> DiskRecord:
        return cls(
            slot=disk.slot,
            id=disk.id,
            name=disk.name,
            size_bytes=disk.size_bytes,
            removed=disk.removed,
            gap=disk.gap,
        )


def grown(machine: MachineConfig, disk: DiskConfig) -> MachineConfig:
    """`machine` where the history has all that this size of the disk needs."""

    def settled(each: DiskConfig) -> DiskConfig:
        is_meant = each.slot == disk.slot and each.size_bytes == disk.size_bytes
        return msgspec.structs.replace(each, growing_from=None) if is_meant else each

    return msgspec.structs.replace(machine, disks=tuple(settled(each) for each in machine.disks))


def check_machine(machine: MachineConfig) -> None:
    """Raise FormatError for a machine that `asrfs` never wrote: names, ids, sizes or slots that cannot be."""
    try:
        check_name(machine.name, "machine")
        for disk in machine.disks:
            check_name(disk.name, "disk")
            check_disk_size(disk.size_bytes, f"disk {disk.name}")
            if disk.growing_from is not None and not 0 < disk.growing_from <= disk.size_bytes:
                raise FormatError(f"disk {disk.name} cannot be growing from {disk.growing_from} bytes")
            if disk.base is not None and (disk.adopted is not None or disk.growing_from is not None or disk.removed):
                raise FormatError(f"disk {disk.name} cannot have a base: it was adopted, is growing or was removed")
    except BadInputError as error:
        raise FormatError(str(error)) from None
    slots = [disk.slot for disk in machine.disks]
    if not all(0 <= slot <= SLOT_MAX for slot in slots) or len(set(slots)) < len(slots):
        raise FormatError(f"its disks cannot have the slots {slots}"[:200])
    if not all(is_id(id) for id in (machine.id, *(disk.id for disk in machine.disks))):
        raise FormatError("the machine or a disk has no id of 32 hexadecimal digits")
    names = [disk.name for disk in machine.live_disks()]
    if len(set(names)) < len(names):
        raise FormatError("two disks have one name")


def encode_disk(record: DiskRecord) -> bytes:
    return msgspec.msgpack.encode(record)


def decode_disk(payload: bytes) -> DiskRecord:
    """Decode and check a DISK payload, which may come from a hostile peer. Raises FormatError."""
    try:
        record = msgspec.msgpack.decode(payload, type=DiskRecord)
        check_name(record.name, "disk")
        check_disk_size(record.size_bytes, "disk")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a DISK record cannot be read: {error}") from None
    except BadInputError as error:
        raise FormatError(f"a DISK record is not acceptable: {error}") from None
    if not is_id(record.id) or not 0 <= record.slot <= SLOT_MAX:
        raise FormatError(f"a DISK record names slot {record.slot} and id {record.id[:40]!r}")
    return record
