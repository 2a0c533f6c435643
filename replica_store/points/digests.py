"""Comparing what the store has of a disk with what its host says of it, by digests (`asrfs.model.digest_tree`).

The received history counts, listed or not: a disk inside a gap can be compared, too, and that is when it matters. Of a
region only what was ever written is read, each stored frame about once, and no more than the region is in memory.
What was digested is kept (`kept_leaves`), and who may be answered by that costs only what was written since. What the
store cannot read differs from everything, so it is told as different and can be sent again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from asrfs.errors import AsrfsError, IntegrityError, NotFoundError, TemporaryError
from asrfs.model.digest_tree import (
    LEAF_BYTES,
    NO_LEAF,
    NODE_LEAVES,
    TREE_DIGEST_BYTES,
    LeafDigester,
    Region,
    bitmap_of,
    different,
    node_digests,
)
from asrfs.model.machine import DiskRecord
from asrfs.protocol.messages import Compare, Compared, region_of
from replica_store.points.builder import build_states
from replica_store.points.history import History
from replica_store.points.kept_leaves import (
    ChangedLeaves,
    Kept,
    forget_leaves,
    is_keepable,
    keep_leaves,
    load_leaves,
    sweep_leaves,
    unreadable,
)
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from replica_store.points.selector import check_exists

FRAMES_BYTES = 2 << 20
"""Opened frames that are kept: those at the border of two regions. Few, so that their memory is used again at once."""


class Comparer:
    """Answers one request after the other. Blocks. It keeps the last state it read and continues from there."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._frames = FrameCache(history, FRAMES_BYTES)
        self._room = bytearray()
        self._machine_id = ""
        self._state: DiskState | None = None
        self._changed: tuple[tuple[str, str, int], ChangedLeaves] | None = None
        self._swept: set[str] = set()

    def answer(self, machine_id: str, wanted: Compare) -> Compared:
        """What differs. Failures are answers, too."""
        try:
            region = region_of(wanted)
            lsn = self._lsn(machine_id, wanted)
            disk = self._disk(machine_id, wanted, lsn)
            leaves = self._leaves(machine_id, disk, region, lsn, wanted.by_kept)
        except (AsrfsError, OSError) as error:
            code = error.exit_code if isinstance(error, AsrfsError) else TemporaryError.exit_code
            return Compared(number=wanted.number, exit_code=code, text=" ".join(str(error).split())[:500])
        return compared(wanted, region, lsn, leaves)

    def _lsn(self, machine_id: str, wanted: Compare) -> int:
        received = self._history.received_lsn(machine_id)
        lsn = wanted.lsn or received
        if lsn > received:
            raise TemporaryError(f"LSN {lsn} has not been received yet: the store has {received}")
        if (row := self._history.object_with(machine_id, lsn)) is not None:
            check_exists(lsn, row)
        return lsn

    def _disk(self, machine_id: str, wanted: Compare, lsn: int) -> DiskRecord:
        for disk in self._history.disks_at(machine_id, lsn):
            if disk.slot == wanted.slot and disk.id == wanted.disk_id and not disk.removed:
                return disk
        raise NotFoundError(f"the store knows no such disk in slot {wanted.slot} at LSN {lsn}")

    def _leaves(self, machine_id: str, disk: DiskRecord, region: Region, lsn: int, by_kept: bool) -> bytes:
        """Digests of all leaves of a region: anew, or by those that are kept. What was made is kept."""
        if not is_keepable(disk, region):
            return self._digest(machine_id, disk, lsn, region, None)
        if machine_id not in self._swept:
            self._swept.add(machine_id)
            sweep_leaves(self._history, machine_id, lsn)
        kept = load_leaves(self._history, machine_id, disk, region)
        if kept is not None and kept.lsn > lsn:
            made = self._digest(machine_id, disk, lsn, region, None)
            if unreadable(made).any():
                forget_leaves(self._history, machine_id, disk, region)
            return made
        leaves = self._renewed(machine_id, disk, lsn, region, kept) if by_kept and kept is not None else None
        if leaves is None:
            leaves = self._digest(machine_id, disk, lsn, region, None)
            if kept is None or kept.leaves != leaves:
                # At once, and with no space needed: what is stored may not be any more what it was when these were
                # made, and where the new ones could not be kept nobody would learn of that.
                forget_leaves(self._history, machine_id, disk, region)
                kept = None
            if not self._is_stored(region):
                return leaves
        if kept is None or kept != (lsn, leaves):
            keep_leaves(self._history, machine_id, disk, region, Kept(lsn, leaves))
        return leaves

    def _renewed(self, machine_id: str, disk: DiskRecord, lsn: int, region: Region, kept: Kept) -> bytes | None:
        """Kept digests, and new ones of the leaves that were written since, or could not be read; None where that is
        most of them, or what was written cannot be told, or only at length."""
        which = machine_id, disk.id, disk.slot
        if self._changed is None or self._changed[0] != which:
            self._changed = which, ChangedLeaves(self._history, machine_id, disk.slot)
        try:
            changed = self._changed[1].between(kept.lsn, lsn, region)
        except IntegrityError:
            return None  # of an index that making them anew may not need: a state can be there without
        if changed is None:
            return None
        chosen = changed | unreadable(kept.leaves)
        count = int(np.count_nonzero(chosen))
        if 2 * count > region.leaves:
            return None
        if not count:
            return kept.leaves
        made = np.frombuffer(self._digest(machine_id, disk, lsn, region, chosen), np.uint8)
        before = np.frombuffer(kept.leaves, np.uint8)
        return np.where(np.repeat(chosen, TREE_DIGEST_BYTES), made, before).tobytes()

    def _digest(
        self, machine_id: str, disk: DiskRecord, lsn: int, region: Region, chosen: npt.NDArray[np.bool_] | None
    ) -> bytes:
        """From the log objects: of the chosen leaves, or of all."""
        point = PointDisk(self._state_at(machine_id, disk, lsn), self._frames)
        return leaf_digests(point, region, self._room, None if chosen is None else runs_of(chosen))

    def _is_stored(self, region: Region) -> bool:
        """Whether anything was ever written there, up to the state that was read last."""
        assert self._state is not None
        return len(self._state.layers.between(region.offset, region.end)) > 0

    def _state_at(self, machine_id: str, disk: DiskRecord, lsn: int) -> DiskState:
        known, self._state = self._state, None
        is_base = known is not None and self._machine_id == machine_id and known.lsn <= lsn
        base = {known.disk.slot: known} if known is not None and is_base and known.disk.id == disk.id else None
        state = build_states(self._history, machine_id, lsn, [disk], base=base)[disk.slot]
        self._machine_id, self._state = machine_id, state
        return state


def runs_of(chosen: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Leaves that are chosen: first, and behind the last, of each run of them."""
    steps = np.diff(chosen, prepend=False, append=False)
    edges = np.flatnonzero(steps).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def leaf_digests(
    disk: PointDisk, region: Region, room: bytearray, runs: Sequence[tuple[int, int]] | None = None
) -> bytes:
    """Digests of all leaves of a region, of a disk that may be shorter or longer here; `NO_LEAF` where it cannot be
    read. `room`: memory for what was written of it, to be handed in again. With `runs` (first leaf, and behind the
    last) only of those; the others are as if of zeros."""
    runs = [(0, region.leaves)] if runs is None else runs
    try:
        return _digest(disk, region, runs, room)
    except IntegrityError:
        digests = bytearray(LeafDigester(region).finish())
        for leaf in (leaf for first, end in runs for leaf in range(first, end)):
            place = slice(leaf * TREE_DIGEST_BYTES, (leaf + 1) * TREE_DIGEST_BYTES)
            try:
                digests[place] = _digest(disk, region, [(leaf, leaf + 1)], room)[place]
            except IntegrityError:
                digests[place] = NO_LEAF
        return bytes(digests)


def _digest(disk: PointDisk, region: Region, runs: Sequence[tuple[int, int]], room: bytearray) -> bytes:
    """Digests of the region's leaves, those outside of the runs as if they were zeros."""
    digester = LeafDigester(region)
    for first, end in runs:
        begin, behind = region.offset + first * LEAF_BYTES, min(region.offset + end * LEAF_BYTES, region.end)
        for offset, content in disk.stored(begin, behind, room):
            digester.add(offset, content)
    return digester.finish()


def compared(wanted: Compare, region: Region, lsn: int, leaves: bytes) -> Compared:
    """The answer, from the digests of all leaves of the region here."""
    differing = different(wanted.digests, node_digests(leaves))
    step = NODE_LEAVES * TREE_DIGEST_BYTES
    return Compared(
        number=wanted.number,
        lsn=lsn,
        differs=bitmap_of(differing, region.nodes),
        leaves=b"".join(leaves[node * step : (node + 1) * step] for node in differing),
    )
