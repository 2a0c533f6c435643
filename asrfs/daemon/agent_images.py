"""The disk images as the applier and the filler open them, by what `machine.json` says."""

from __future__ import annotations

import os

from asrfs.daemon.state import MACHINE_FILE, StateDirectory
from asrfs.errors import IntegrityError
from asrfs.model.machine import DiskConfig
from asrfs.replication.applier import Image
from asrfs.storage.directory import OpenFile, open_path


class StateImages:
    """`replication.applier.Images` of a state directory. Used by one thread at a time.

    `machine.json` is read again when it was replaced: it names a disk before the history does, and from the moment it
    says that a disk was released nothing more is written to that image, which may belong to somebody else by then.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._disks: dict[int, DiskConfig] = {}
        self._version: tuple[int, int] = (0, 0)
        self._open: dict[int, OpenFile] = {}

    def image(self, slot: int) -> Image | None:
        self._refresh()
        config = self._disks.get(slot)
        if config is None:
            raise IntegrityError(
                f"the history has records of slot {slot}, which {self._state.path(MACHINE_FILE)} does not know"
            )
        if config.released:
            return None
        file = self._open.get(slot)
        if file is None:
            try:
                file = self._open[slot] = open_path(self._state.image_path(config), write=True)
            except FileNotFoundError:
                if config.removed:
                    return None
                raise
        return Image(file, config.size_bytes)

    def drop(self, slot: int) -> None:
        file = self._open.pop(slot, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        for slot in list(self._open):
            self.drop(slot)

    def _refresh(self) -> None:
        status = os.stat(self._state.path(MACHINE_FILE))
        version = (status.st_mtime_ns, status.st_ino)
        if version == self._version:
            return
        self._disks = {disk.slot: disk for disk in self._state.load_machine().disks}
        self._version = version
        for slot in [slot for slot in self._open if slot not in self._disks or self._disks[slot].released]:
            self.drop(slot)
