"""The disks of a machine that have a base, as its disk server serves them: overlays, what is in doubt, and who waits.

A disk server that starts takes from `hydration.json` what is in doubt, and is told of each later turn before a byte of
it is written (verb `hydrating`). The file is read before the positions: a turn that began meanwhile was not begun
before this disk server knew of it, and one that is over is known by positions that lie behind it.
"""

from __future__ import annotations

from asrfs.daemon.control import Fields
from asrfs.daemon.state import HYDRATION_FILE, StateDirectory
from asrfs.disk.base_file import BaseFile
from asrfs.disk.overlay import BasedImage
from asrfs.errors import BadInputError, IntegrityError
from asrfs.model.hydration import EXTENTS_MAX
from asrfs.model.machine import DiskConfig
from asrfs.replication.hydration_file import load_turn
from asrfs.storage.directory import DirectoryStorage, OpenFile
from asrfs.storage.holes import check_holes


class BasedDisks:
    """Raises IntegrityError for a file that cannot be read."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._images: dict[int, BasedImage] = {}
        try:
            self._turn = load_turn(DirectoryStorage(state.root), HYDRATION_FILE)
        except IntegrityError as error:
            raise IntegrityError(f"{state.root}: {error}") from None
        self._applied_lsn = state.load_positions().applied.lsn
        self._doubt_lsn: dict[int, int] = {}
        self._is_checked = False

    def overlay(self, config: DiskConfig, image: OpenFile) -> OpenFile | BasedImage:
        """What a disk is read from. Raises RefusedError where its image cannot be an overlay, OSError."""
        if config.base is None:
            return image
        if not self._is_checked:
            check_holes(self._state.path("images"))
            self._is_checked = True
        doubtful = self._turn.doubtful(config.id, self._applied_lsn)
        based = BasedImage(image, BaseFile(config.base, config.size_bytes), doubtful)
        self._images[config.slot] = based
        if doubtful:
            self._doubt_lsn[config.slot] = self._turn.applied_lsn
        return based

    def based(self, slot: int) -> BasedImage | None:
        return self._images.get(slot)

    def is_whole(self, slot: int) -> None:
        """The image has everything and nobody reads the overlay any more but who began before."""
        based = self._images.pop(slot, None)
        self._doubt_lsn.pop(slot, None)
        if based is not None:
            based.close()

    def applied(self, lsn: int) -> None:
        """Before maps are dropped: turns from before this LSN are over."""
        for slot, doubt_lsn in list(self._doubt_lsn.items()):
            based = self._images.get(slot)
            if lsn > doubt_lsn and based is not None:
                based.doubt(())
                self._doubt_lsn.pop(slot, None)

    def hydrating(self, request: Fields) -> Fields:
        """From the answer on, what a turn is to bring is read from the base; nothing is, where it names nothing."""
        slot, lsn, extents = request["slot"], request["applied_lsn"], request["extents"]
        if not isinstance(slot, int) or not isinstance(lsn, int) or not isinstance(extents, list | tuple):
            raise BadInputError("hydrating names a slot, an LSN and extents")
        if len(extents) > EXTENTS_MAX:
            raise BadInputError(f"a turn has {EXTENTS_MAX} extents at the most, not {len(extents)}")
        based = self._images.get(slot)
        if based is not None:
            based.doubt([(int(offset), int(end)) for offset, end in extents])
            if extents:
                self._doubt_lsn[slot] = lsn
            else:
                self._doubt_lsn.pop(slot, None)
        return {}
