"""What guests are shown in the place of a disk that is not to be had as it is."""

from __future__ import annotations

import errno
from collections.abc import Callable

from asrfs.journal.disk import JournaledDisk
from asrfs.storage.interface import Bytes

_HIDDEN = "the disk is being brought back to a point and is not whole"


class HiddenDisk:
    """A disk that nobody may read or write. The file is there: who has it open gets an error for each request."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise OSError(errno.EIO, _HIDDEN)

    def write(self, offset: int, payload: Bytes) -> None:
        raise OSError(errno.EROFS, _HIDDEN)

    def zero(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, _HIDDEN)

    def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, _HIDDEN)


class UnannouncedDisk:
    """A disk whose DISK record could not be appended for lack of space: `announce`, before the first change, does."""

    def __init__(self, announce: Callable[[], None], disk: JournaledDisk) -> None:
        self._announce = announce
        self._disk = disk
        self.size_bytes = disk.size_bytes

    def write(self, offset: int, payload: Bytes) -> None:
        self._announce()
        self._disk.write(offset, payload)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._disk.read_into(offset, buffer)

    def zero(self, offset: int, length: int) -> None:
        self._announce()
        self._disk.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._announce()
        self._disk.discard(offset, length)
