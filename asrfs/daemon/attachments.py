"""Loop devices that `asrfs attach` made, remembered: one whose server was lost is found again and can be let go.

Once a mount is gone, the kernel no longer says of a loop device over a file of it which mount that was. So its device
and sequence number are written down; the kernel gives each attachment another number.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from asrfs.daemon import loop_devices
from asrfs.daemon.loop_devices import LoopDevice
from asrfs.daemon.state import StateDirectory
from asrfs.errors import IntegrityError
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically

_FILE = "run/attached.json"


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """`sequence`: the kernel's number of this attachment."""

    disk: str
    device: str
    sequence: int


class Stale(NamedTuple):
    """A loop device over a mount that is gone: it gives I/O errors only."""

    disk: str
    loop: LoopDevice

    def __str__(self) -> str:
        where = f", mounted on {', '.join(self.loop.mounted_on)}," if self.loop.mounted_on else ""
        return (
            f"{self.loop.device}{where} is disk {self.disk} of a mount that is gone and gives I/O errors only: "
            f"`asrfs detach {self.disk}`"
        )


def remember(state: StateDirectory, disk: str, device: str) -> None:
    """Note an attachment; those that are no more are forgotten."""
    with state.attachments_lock():
        kept = [each for each in _load(state) if _is_there(each) and each.device != device]
        kept.append(Attachment(disk=disk, device=device, sequence=loop_devices.sequence_of(device)))
        write_atomically(DirectoryStorage(state.root), _FILE, msgspec.json.encode(kept))


def stale(state: StateDirectory) -> list[Stale]:
    """Attachments whose mount is gone."""
    served = state.load_served()
    mount = os.path.join(os.path.realpath(served.mount), "") if served else ""
    found = []
    for each in _load(state):
        loop = loop_devices.look(each.device) if _is_there(each) else None
        if loop is not None and loop.backing_file != f"{mount}{each.disk}.img":
            found.append(Stale(each.disk, loop))
    return found


def _is_there(attachment: Attachment) -> bool:
    return loop_devices.sequence_of(attachment.device) == attachment.sequence


def _load(state: StateDirectory) -> list[Attachment]:
    storage = DirectoryStorage(state.root)
    if not storage.exists(_FILE):
        return []
    try:
        return msgspec.json.decode(read_whole(storage, _FILE), type=list[Attachment])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{state.path(_FILE)} cannot be read: {error}: remove it") from None
