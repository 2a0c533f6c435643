"""Segments before and after their use: spares made ahead of need, and segments freed once nobody needs them.

A spare is as long as a segment and all of it was written once, so that a datasync in it later carries no metadata.
A freed segment becomes a spare by its name alone; its old records carry its old number, and no later segment gets that
number (`segments.py`). Freeing goes from the oldest on (I4: the caller passes the LSN up to which it may).
"""

from __future__ import annotations

from asrfs.format.segment import SEGMENT_BYTES
from asrfs.journal.segments import (
    HOUSEKEEPING_PREFIX,
    fresh_name,
    list_journal,
    read_header,
    remove_index,
    segment_name,
    spare_name,
)
from asrfs.storage.interface import Storage

_PIECE = bytes(1 << 20)


def prepare_spare(storage: Storage, *, segment_bytes: int = SEGMENT_BYTES) -> int:
    """Make a fresh spare: written with zeros, durable. Returns its count, the lowest that is free.

    Blocks for as long as the disk takes to write it. Raises OSError and leaves nothing; ENOSPC when there is no room.
    """
    taken = set(list_journal(storage).fresh)
    count = next(n for n in range(len(taken) + 1) if n not in taken)
    temporary = f"{HOUSEKEEPING_PREFIX}{count:016x}"
    for name in storage.names(""):
        if name.startswith(HOUSEKEEPING_PREFIX):
            storage.unlink(name)
    file = storage.create(temporary)
    try:
        try:
            for at in range(0, segment_bytes, len(_PIECE)):
                file.write_at((_PIECE[: segment_bytes - at],), at)
            file.datasync()
        finally:
            file.close()
        storage.rename(temporary, fresh_name(count))
    except BaseException:
        if storage.exists(temporary):
            storage.unlink(temporary)
        raise
    storage.sync_directory("")
    return count


def recycle(storage: Storage, segment_number: int) -> None:
    """Make one segment a spare. The caller syncs the directory (`trim` does)."""
    storage.rename(segment_name(segment_number), spare_name(segment_number))


def trim(
    storage: Storage,
    machine_id: bytes,
    through_lsn: int,
    *,
    spares_max: int,
    through_segment: int | None = None,
    segment_bytes: int = SEGMENT_BYTES,
) -> list[int]:
    """Free the sealed segments that hold nothing behind `through_lsn`; returns their numbers, oldest first.

    Never frees the last segment, nor one behind `through_segment`. Keeps at most `spares_max` spares; the rest of the
    freed segments are removed. Durable when it returns.
    """
    listing = list_journal(storage)
    freed: list[int] = []
    spares = len(listing.spare_names())
    for number, following in zip(listing.segments, listing.segments[1:], strict=False):
        if through_segment is not None and number > through_segment:
            break
        if not _begins_by(storage, following, machine_id, through_lsn + 1):
            break
        remove_index(storage, number)
        if spares < spares_max and _is_whole(storage, number, segment_bytes):
            recycle(storage, number)
            spares += 1
        else:
            storage.unlink(segment_name(number))
        freed.append(number)
    if freed:
        storage.sync_directory("")
    return freed


def _begins_by(storage: Storage, number: int, machine_id: bytes, lsn: int) -> bool:
    """Whether segment `number` begins with LSN `lsn` or one before it, so that those before it hold nothing later."""
    file = storage.open(segment_name(number))
    try:
        header = read_header(file, number, machine_id)
    finally:
        file.close()
    return header is not None and header.first_lsn <= lsn


def _is_whole(storage: Storage, number: int, segment_bytes: int) -> bool:
    file = storage.open(segment_name(number))
    try:
        return file.size() >= segment_bytes
    finally:
        file.close()
