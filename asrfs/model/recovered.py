"""What a store says of a machine that is to go on from a recovery point: the file of `asrfs init --recovered`.

The store writes it, the host makes a state directory of it and keeps it there (`recovered.json`), so each knows the
other only by this. A disk's `base` is a file that is only read, with the disk's content at the point; the machine's own
history begins behind the point, in the epoch that is named here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asrfs.errors import BadInputError, FormatError
from asrfs.model.boot import BootSettings
from asrfs.model.machine import DiskConfig, MachineConfig, check_machine
from asrfs.model.names import is_id
from asrfs.model.positions import Cursor, Epoch, Number, Positions, Slot
from asrfs.model.quantities import check_disk_size, format_time

PATH_BYTES_MAX = 4095
POINT_CHARACTERS_MAX = 200


class RecoveredDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk at the point. `slot` and `id` are those of its history. `base`: absolute path of its content.

    One that was `removed` before the point has no base; it is named so that its slot is not used again.
    """

    slot: Slot
    id: str
    name: str
    size_bytes: int
    base: str = ""
    removed: bool = False


class RecoveredMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine at a point: the state behind record `lsn`, whose time is `time_ns`. Its journal goes on in `epoch`.

    `point`: as people call it, if it has a name or id. `boot`: how the machine is started, as its history says.
    `is_trial`: it is tried beside the machine itself, which goes on.
    """

    format: Literal[1] = 1
    machine_id: str
    name: str
    epoch: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
    lsn: Number
    time_ns: Number
    disks: tuple[RecoveredDisk, ...]
    point: str = ""
    boot: BootSettings | None = None
    is_trial: bool = False

    def described(self) -> str:
        """The point in words."""
        named = f"point {self.point}, " if self.point else ""
        return f"{named}LSN {self.lsn} of {format_time(self.time_ns)}"

    def config(self) -> MachineConfig:
        """`machine.json` of it."""
        disks = tuple(_config_of(disk) for disk in self.disks)
        return MachineConfig(id=self.machine_id, name=self.name, disks=disks, boot=self.boot)

    def positions(self) -> Positions:
        """Where its journal begins: what is up to the point is in the bases, and at the store."""
        at = Cursor(lsn=self.lsn, time_ns=self.time_ns)
        epoch: Epoch = self.epoch
        return Positions(epoch=epoch, applied=at, acknowledged=at)


def _config_of(disk: RecoveredDisk) -> DiskConfig:
    return DiskConfig(
        slot=disk.slot,
        id=disk.id,
        name=disk.name,
        size_bytes=disk.size_bytes,
        base=disk.base or None,
        removed=disk.removed,
        released=disk.removed,
    )


def check_recovered(machine: RecoveredMachine) -> RecoveredMachine:
    """Return what a state directory can be made of, else raise FormatError."""
    try:
        for disk in machine.disks:
            check_disk_size(disk.size_bytes, f"disk {disk.name}")
    except BadInputError as error:
        raise FormatError(str(error)) from None
    if not is_id(machine.machine_id):
        raise FormatError("its machine_id is not 32 hexadecimal digits")
    if len(machine.point) > POINT_CHARACTERS_MAX or not machine.point.isprintable():
        raise FormatError("its point has no name that can be shown")
    for disk in machine.disks:
        path = disk.base
        if disk.removed:
            if path:
                raise FormatError(f"disk {disk.name} was removed and has a base all the same")
        elif not path.startswith("/") or "\0" in path or len(path.encode(errors="replace")) > PATH_BYTES_MAX:
            raise FormatError(f"the base of disk {disk.name} is not an absolute path: {path[:80]!r}")
    check_machine(machine.config())
    return machine


def decode_recovered(content: bytes) -> RecoveredMachine:
    """The machine that a file describes. Raises FormatError."""
    try:
        return check_recovered(msgspec.json.decode(content, type=RecoveredMachine))
    except FormatError as error:
        raise FormatError(f"a recovered machine is not acceptable: {error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a recovered machine cannot be read: {error}") from None


def encode_recovered(machine: RecoveredMachine) -> bytes:
    """The file, for `decode_recovered`. Raises FormatError for what that would not take."""
    check_recovered(machine)
    return msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n"
