"""Comparing what the store has of a disk with what its host says of it, by digests (`asrfs.model.digest_tree`).

The received history counts, listed or not: a disk inside a gap can be compared, too, and that is when it matters. Of a
region only what was ever written is read, each stored frame about once, and no more than the region is in memory.
What the store cannot read differs from everything, so it is told as different and can be sent again.
"""

from __future__ import annotations

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

    def answer(self, machine_id: str, wanted: Compare) -> Compared:
        """What differs. Failures are answers, too."""
        try:
            region = region_of(wanted)
            disk = PointDisk(self._state_for(machine_id, wanted), self._frames)
            leaves = leaf_digests(disk, region, self._room)
        except (AsrfsError, OSError) as error:
            code = error.exit_code if isinstance(error, AsrfsError) else TemporaryError.exit_code
            return Compared(number=wanted.number, exit_code=code, text=" ".join(str(error).split())[:500])
        return compared(wanted, region, disk.state.lsn, leaves)

    def _state_for(self, machine_id: str, wanted: Compare) -> DiskState:
        received = self._history.received_lsn(machine_id)
        lsn = wanted.lsn or received
        if lsn > received:
            raise TemporaryError(f"LSN {lsn} has not been received yet: the store has {received}")
        if (row := self._history.object_with(machine_id, lsn)) is not None:
            check_exists(lsn, row)
        disk = self._disk(machine_id, wanted, lsn)
        known, self._state = self._state, None
        is_base = known is not None and self._machine_id == machine_id and known.lsn <= lsn
        base = {known.disk.slot: known} if known is not None and is_base and known.disk.id == disk.id else None
        state = build_states(self._history, machine_id, lsn, [disk], base=base)[disk.slot]
        self._machine_id, self._state = machine_id, state
        return state

    def _disk(self, machine_id: str, wanted: Compare, lsn: int) -> DiskRecord:
        for disk in self._history.disks_at(machine_id, lsn):
            if disk.slot == wanted.slot and disk.id == wanted.disk_id and not disk.removed:
                return disk
        raise NotFoundError(f"the store knows no such disk in slot {wanted.slot} at LSN {lsn}")


def leaf_digests(disk: PointDisk, region: Region, room: bytearray) -> bytes:
    """Digests of all leaves of a region, of a disk that may be shorter or longer here; `NO_LEAF` where it cannot be
    read. `room`: memory for what was written of it, to be handed in again."""
    try:
        return _digest(disk, region, region.offset, region.end, room)
    except IntegrityError:
        digests = bytearray()
        for leaf in range(region.leaves):
            begin = region.offset + leaf * LEAF_BYTES
            end = min(begin + LEAF_BYTES, region.end)
            try:
                whole = _digest(disk, region, begin, end, room)
                digests += whole[leaf * TREE_DIGEST_BYTES : (leaf + 1) * TREE_DIGEST_BYTES]
            except IntegrityError:
                digests += NO_LEAF
        return bytes(digests)


def _digest(disk: PointDisk, region: Region, begin: int, end: int, room: bytearray) -> bytes:
    """Digests of the region's leaves, those outside of `[begin, end)` as if they were zeros."""
    digester = LeafDigester(region)
    for offset, content in disk.stored(begin, end, room):
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
