"""The disk images as the applier, the hydrator and the filler open them, by what `machine.json` says."""

from __future__ import annotations

import os
from collections.abc import Sequence

from asrfs.daemon.state import HYDRATION_FILE, MACHINE_FILE, StateDirectory
from asrfs.disk.base_file import BaseFile
from asrfs.disk.overlay import KeptImage, WholeView
from asrfs.errors import IntegrityError
from asrfs.model.machine import DiskConfig
from asrfs.replication.applier import Image
from asrfs.replication.hydration_file import HydrationFile
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.directory import DirectoryStorage, OpenFile, open_path


class StateImages:
    """`replication.applier.Images` of a state directory. Used by one thread at a time.

    `machine.json` is read again when it was replaced: it names a disk before the history does, and from the moment it
    says that a disk was released nothing more is written to that image, which may belong to somebody else by then.

    `beside_server`: a disk server may be running, and may take a disk to have a base for longer than `machine.json`
    says so. Zeros become holes only where it is known not to (`may_punch`).
    """

    def __init__(self, state: StateDirectory, positions: PositionsFile, *, beside_server: bool) -> None:
        self._state = state
        self._disks: dict[int, DiskConfig] = {}
        self._version: tuple[int, int] = (0, 0)
        self._open: dict[int, OpenFile] = {}
        self._content: dict[int, Sequence[tuple[int, int]]] = {}
        self._bases: dict[int, BaseFile] = {}
        recovered = state.load_recovered() if beside_server else None
        self._kept = {disk.slot for disk in recovered.disks} if recovered else set()
        files = DirectoryStorage(state.root)
        self.hydration = HydrationFile(files, HYDRATION_FILE, lambda: positions.saved.applied.lsn)

    def image(self, slot: int) -> Image | None:
        self._refresh()
        config = self._disks.get(slot)
        if config is None:
            raise IntegrityError(
                f"the history has records of slot {slot}, which {self._state.path(MACHINE_FILE)} does not know"
            )
        if config.released:
            return None
        file = self._opened(config)
        if file is None:
            return None
        if config.base is not None:
            return Image(KeptImage(file, self._content.get(slot), self._base_of(config)), config.size_bytes)
        if slot in self._kept:
            return Image(KeptImage(file, None), config.size_bytes)
        return Image(file, config.size_bytes)

    def drop(self, slot: int) -> None:
        file = self._open.pop(slot, None)
        if file is not None:
            file.close()

    def settle(self) -> None:
        turn = self.hydration.pending
        if turn is None:
            return
        self._refresh()
        based = {config.id: config for config in self._disks.values() if config.base is not None}

        def opened(disk_id: str) -> OpenFile | None:
            config = based.get(disk_id)
            if config is None:
                return None
            self.drop(config.slot)
            return self._opened(config)

        try:
            self.hydration.take_back(opened)
        except OSError:
            self.drop(based[turn.disk_id].slot)
            raise

    def raw(self, slot: int) -> OpenFile | None:
        """The image itself, for who writes what the base has there."""
        self._refresh()
        config = self._disks.get(slot)
        return None if config is None or config.released else self._opened(config)

    def know_content(self, slot: int, content: Sequence[tuple[int, int]]) -> None:
        """Where the base of a disk may have content: elsewhere zeros need not be written."""
        self._content[slot] = content

    def may_punch(self, slot: int) -> None:
        """No disk server takes this disk to have a base any more."""
        self._kept.discard(slot)
        self._content.pop(slot, None)
        if (base := self._bases.pop(slot, None)) is not None:
            base.close()

    def close(self) -> None:
        for base in self._bases.values():
            base.close()
        for slot in list(self._open):
            self.drop(slot)

    def _base_of(self, config: DiskConfig) -> BaseFile:
        if config.slot not in self._bases:
            self._bases[config.slot] = base_of(config)
        return self._bases[config.slot]

    def _opened(self, config: DiskConfig) -> OpenFile | None:
        file = self._open.get(config.slot)
        if file is None:
            try:
                file = self._open[config.slot] = open_path(self._state.image_path(config), write=True)
            except FileNotFoundError:
                if config.removed:
                    return None
                raise
        return file

    def _refresh(self) -> None:
        status = os.stat(self._state.path(MACHINE_FILE))
        version = (status.st_mtime_ns, status.st_ino)
        if version == self._version:
            return
        self._disks = {disk.slot: disk for disk in self._state.load_machine().disks}
        self._version = version
        for slot in [slot for slot in self._open if slot not in self._disks or self._disks[slot].released]:
            self.drop(slot)


def open_whole(state: StateDirectory, disk: DiskConfig) -> OpenFile | WholeView:
    """All that is to be read of a disk's image, for who may wait for its base. Raises OSError."""
    image = open_path(state.image_path(disk))
    return image if disk.base is None else WholeView(image, base_of(disk))


def base_of(disk: DiskConfig) -> BaseFile:
    """The base of a disk that has one. Opens nothing yet."""
    assert disk.base is not None
    return BaseFile(disk.base, disk.size_bytes)
