"""What a disk server does while a point is copied back over its disks: it writes what the agent brings, for nobody
else, and gives nobody a disk that is partly written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asrfs.daemon.control import Fields
from asrfs.daemon.state import StateDirectory
from asrfs.disk.interface import check_extent
from asrfs.errors import BadInputError, FormatError
from asrfs.journal.disk import JournaledDisk
from asrfs.journal.hold import WriteHold
from asrfs.model.promoting import PROMOTING_FILE, decode_promoting


def is_partial(state: StateDirectory) -> bool:
    """Whether disks are partly written; also if it cannot be known. Raises OSError."""
    if not state.is_promoting():
        return False
    with open(state.path(PROMOTING_FILE), "rb") as file:
        content = file.read()
    try:
        return decode_promoting(content).is_partial
    except FormatError:
        return True


def rewrite(disk: JournaledDisk, hold: WriteHold, request: Fields) -> None:
    """Write `content`, the bytes of `extents` one after the other, and have `zeros` read as zeros: ordinary records.

    Raises BadInputError for what is not inside the disk, before anything is written; RefusedError, OSError.
    """
    content = memoryview(bytes(request["content"]))
    extents, zeros = _extents(request["extents"]), _extents(request["zeros"])
    for offset, length in (*extents, *zeros):
        check_extent(offset, length, disk.size_bytes)
    if sum(length for _, length in extents) != len(content):
        raise BadInputError("extents that are rewritten have as many bytes as they are long")
    at = 0
    with hold.passing():
        for offset, length in extents:
            disk.write(offset, content[at : at + length])
            at += length
        for offset, length in zeros:
            disk.discard(offset, length)


def _extents(given: Any) -> list[tuple[int, int]]:
    if not isinstance(given, Sequence):
        raise BadInputError("extents are a list")
    return [(int(offset), int(length)) for offset, length in given]
