"""What a host keeps of a point that is copied back over its disks. Pure.

    held ──▶ writing ──▶ written ──▶ gone        held ──▶ gone, if nothing was written

A file of the state directory: as long as it is there no guest writes, and from `writing` to `written` none reads,
either, because the disks are neither what they were nor what they are to be.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asrfs.errors import FormatError, RefusedError
from asrfs.model.boot import NO_BOOT, BootSettings, decode_boot
from asrfs.model.machine import DiskRecord, MachineConfig

PROMOTING_FILE = "promoting.json"
Phase = Literal["held", "writing", "written"]


class Promoting(msgspec.Struct, frozen=True, kw_only=True):
    """`promoting.json`. `id`: of the promotion; `lsn`: record of the history that the disks are brought to.

    `epoch`: this host's, in which it began; in another one it is not known any more what differs. `before_lsn`: of the
    point of what the disks were. `slot`, `offset`: disks and bytes before there are written. `is_broken`: disks were
    partly written already, for a promotion that this one took the place of.
    """

    format: Literal[1] = 1
    id: str
    phase: Phase
    epoch: int
    time_ns: int
    lsn: int = 0
    before_lsn: int = 0
    end_lsn: int = 0
    slot: int = 0
    offset: int = 0
    bytes_written: int = 0
    is_broken: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether the disks are neither what they were nor what they are to be."""
        return self.phase == "writing" or (self.phase == "held" and self.is_broken)


def decode_promoting(content: bytes) -> Promoting:
    """Raises FormatError."""
    try:
        return msgspec.json.decode(content, type=Promoting)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{PROMOTING_FILE} cannot be read: {error}") from None


def check_disks(machine: MachineConfig, disks: tuple[DiskRecord, ...], left: tuple[int, ...]) -> None:
    """Raise RefusedError unless the machine has just these disks, none shorter than it was, and those that are left."""
    live = {disk.slot: disk for disk in machine.live_disks()}
    for record in disks:
        disk = live.pop(record.slot, None)
        if disk is None or disk.id != record.id:
            raise RefusedError(f"the machine has no disk {record.name} any more that was there at this point")
        if disk.size_bytes < record.size_bytes:
            raise RefusedError(f"disk {disk.name} is shorter than it was at this point")
        if disk.base is not None:
            raise RefusedError(f"disk {disk.name} is still being filled from what it was recovered from: wait for that")
    for disk in live.values():
        if disk.slot not in left:
            raise RefusedError(f"disk {disk.name} is not of this point, and nobody said that it stays as it is")


def restored(
    machine: MachineConfig, disks: tuple[DiskRecord, ...], boot: bytes | None, *, still_open: frozenset[int]
) -> MachineConfig:
    """`machine` whose disks are what they were at the point, and which is started as it was then.

    `still_open`: slots of disks of which the store lacks something all the same. Raises FormatError for a boot document
    that a newer host wrote.
    """
    closed = {disk.slot for disk in disks} - still_open
    change = msgspec.structs.replace
    machine = change(
        machine, disks=tuple(change(disk, gap=False) if disk.slot in closed else disk for disk in machine.disks)
    )
    if boot is None:
        return machine
    settings: BootSettings | None = decode_boot(boot)
    return change(machine, boot=None if settings == NO_BOOT and not boot else settings)


def with_open_gaps(machine: MachineConfig, disks: tuple[DiskRecord, ...]) -> MachineConfig:
    """`machine` whose disks are being written: no point is listed before that is over."""
    slots = {disk.slot for disk in disks}
    change = msgspec.structs.replace
    return change(machine, disks=tuple(change(d, gap=True) if d.slot in slots else d for d in machine.disks))


def promoting_text(promoting: Promoting) -> str:
    """What people are told of a host whose disks are being brought to a point."""
    head = f"the disks are being brought back to LSN {promoting.lsn} (promotion {promoting.id[:12]})"
    if promoting.is_partial:
        return f"{head} and are neither the old nor the new until that is over: they can be neither read nor written"
    if promoting.phase == "written":
        return f"{head}: that is done, and the store says when they can be written again"
    return f"{head}: they take no writes"
