"""Digests that were made for an earlier comparison: which of them hold still, reading them, and keeping new ones.

    leaves of a region, as of LSN k  ─▶ leaves that records k + 1 … n wrote are digested anew ─▶ leaves as of LSN n

**A kept digest of a leaf made at LSN k is taken at LSN n ≥ k only if no record behind k up to n wrote to the leaf, in
the history that LSN n is in.** Kept leaves name by digest the log object that ends at k, and are believed only where
the history has it there. As digests chain, everything up to k is then the same: not so after another epoch has begun
below k, in a catalog that was set back or made again with less, or for a copy of the vault that went its own way. What
is not believed, or cannot be opened, is passed over in silence and made anew: all it could say is in the objects, too.

What the objects have become since is not looked at: who must know that reads all of it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asrfs.errors import AsrfsError
from asrfs.format.kept_leaves import (
    LEAVES_FILE_BYTES_MAX,
    LEAVES_VERSION,
    LeavesHeader,
    decode_leaves_header,
    encode_leaves,
    open_leaves,
)
from asrfs.format.log_object import SALT_BYTES
from asrfs.model.digest_tree import LEAF_BYTES, NO_LEAF, REGION_NODES_MAX, Region, node_count
from asrfs.model.machine import DiskRecord
from replica_store.points.changed_since import Changed, changed_between, united
from replica_store.points.history import History
from replica_store.points.kept_maps import is_of_history
from replica_store.vault.leaf_files import LeavesName

BYTES_FREE_LEAST = 1 << 30
"""Nothing is kept when less is free: this space is for what hosts send."""
RECORDS_MAX = 16 << 20
"""Behind what is kept: bounds what reading their indexes takes of time, and of memory (two numbers an extent)."""
DISK_BYTES_MAX = 1 << 62
"""What lies behind is never kept, so that numbers of its extents need no care."""

Chosen = npt.NDArray[np.bool_]
"""One for each leaf of a region."""


class Kept(NamedTuple):
    """`leaves`: of a whole region, as they were at `lsn`."""

    lsn: int
    leaves: bytes


def is_keepable(disk: DiskRecord, region: Region) -> bool:
    """Whether digests of this are ever kept: of a region as comparing all of a disk has it, all of which the store's
    disk has, too. What lies behind a disk's end is never said by digests."""
    nodes = min(REGION_NODES_MAX, node_count(region.size_bytes) - region.first)
    is_whole = region.first % REGION_NODES_MAX == 0 and region.nodes == nodes
    return is_whole and region.end <= min(disk.size_bytes, DISK_BYTES_MAX)


def load_leaves(history: History, machine_id: str, disk: DiskRecord, region: Region) -> Kept | None:
    """What is kept of a region that is `is_keepable`; None if there is nothing that this history can believe."""
    name = LeavesName(disk.slot, region.first)
    with suppress(OSError, AsrfsError):
        content = history.leaves.read(machine_id, name, LEAVES_FILE_BYTES_MAX + 1)
        header = decode_leaves_header(content, str(name))
        said = (header.machine_id.hex(), header.slot, header.disk_id.hex(), header.begin, header.end)
        if said != (machine_id, disk.slot, disk.id, region.offset, region.end):
            return None
        if not is_of_history(history, machine_id, header.lsn, header.digest):
            return None
        return Kept(header.lsn, open_leaves(content, history.leaves_key(machine_id, header.salt), str(name)))
    return None


def keep_leaves(history: History, machine_id: str, disk: DiskRecord, region: Region, made: Kept) -> None:
    """Keep the digests of a region that is `is_keepable`, if `made.lsn` is where a log object ends. Nothing is said
    when that fails: the next comparison makes them again."""
    with suppress(OSError, AsrfsError):
        row = history.object_with(machine_id, made.lsn)
        if row is None or row.last_lsn != made.lsn or history.leaves.free_bytes() < BYTES_FREE_LEAST:
            return
        header = LeavesHeader(
            machine_id=bytes.fromhex(machine_id),
            version=LEAVES_VERSION,
            slot=disk.slot,
            reserved=0,
            salt=os.urandom(SALT_BYTES),
            disk_id=bytes.fromhex(disk.id),
            lsn=made.lsn,
            digest=row.digest,
            begin=region.offset,
            end=region.end,
        )
        content = encode_leaves(header, made.leaves, history.leaves_key(machine_id, header.salt))
        history.leaves.put(machine_id, LeavesName(disk.slot, region.first), content)


def forget_leaves(history: History, machine_id: str, disk: DiskRecord, region: Region) -> None:
    """Of a region that costs nothing to digest."""
    with suppress(OSError):
        history.leaves.remove(machine_id, LeavesName(disk.slot, region.first))


def sweep_leaves(history: History, machine_id: str, lsn: int) -> None:
    """Remove what is kept of no disk that the machine has at `lsn`."""
    ends = {disk.slot: disk.size_bytes for disk in history.disks_at(machine_id, lsn) if not disk.removed}
    with suppress(OSError):
        history.leaves.sweep(machine_id)
        for name in history.leaves.names(machine_id):
            if name.first >= node_count(ends.get(name.slot, 0)):
                history.leaves.remove(machine_id, name)


def unreadable(leaves: bytes) -> Chosen:
    """Leaves that could not be read when the others were digested."""
    words = np.frombuffer(leaves, np.uint8).reshape(-1, len(NO_LEAF))
    return np.logical_not(words.any(axis=1), dtype=np.bool_)


class ChangedLeaves:
    """What the history says of one disk of where it was written to, as far as it was asked. Rather too much than too
    little: an answer may hold what was written outside of what was asked about."""

    def __init__(self, history: History, machine_id: str, slot: int) -> None:
        self._history = history
        self._machine_id = machine_id
        self._slot = slot
        self._after = self._until = 0
        self._changed = _NOTHING

    def between(self, after_lsn: int, until_lsn: int, region: Region) -> Chosen | None:
        """Leaves of a region that records `after_lsn + 1` to `until_lsn` wrote to, both of which have a state; None if
        reading that takes too long. Raises IntegrityError, and knows nothing then."""
        assert 0 < after_lsn <= until_lsn
        if until_lsn - after_lsn > RECORDS_MAX:
            return None
        if after_lsn >= self._until or until_lsn <= self._after:
            self._after = self._until = after_lsn  # nothing that is known is of these
            self._changed = _NOTHING
        if until_lsn > self._until:
            self._learn(self._until, until_lsn)
            self._until = until_lsn
        if after_lsn < self._after:
            self._learn(after_lsn, self._after)
            self._after = after_lsn
        return chosen_leaves(self._changed, region)

    def _learn(self, after_lsn: int, until_lsn: int) -> None:
        more = changed_between(self._history, self._machine_id, self._slot, after_lsn, until_lsn, DISK_BYTES_MAX)
        start = np.concatenate((self._changed.start, more.start))
        end = np.concatenate((self._changed.end, more.end))
        self._changed = united(start, end, DISK_BYTES_MAX)


_NOTHING = Changed(np.empty(0, np.int64), np.empty(0, np.int64))


def chosen_leaves(changed: Changed, region: Region) -> Chosen:
    """Leaves of a region that any of the extents touches."""
    first = int(np.searchsorted(changed.end, region.offset, side="right"))
    last = int(np.searchsorted(changed.start, region.end, side="left"))
    start = np.maximum(changed.start[first:last] - region.offset, 0) // LEAF_BYTES
    end = -(-(np.minimum(changed.end[first:last], region.end) - region.offset) // LEAF_BYTES)
    steps = np.zeros(region.leaves + 1, np.int64)
    np.add.at(steps, start, 1)
    np.add.at(steps, end, -1)
    chosen: Chosen = np.cumsum(steps[:-1]) > 0
    return chosen
