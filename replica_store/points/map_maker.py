"""Making map checkpoints as a history grows, so that a point of it never costs more than reading its last stretch.

    objects behind the last checkpoint ─▶ a run for each disk, every UNIT ─▶ merged with those before it while these
    are not twice as long ─▶ files; what is of no use any more, or too much, goes

So there are few checkpoints to read for the newest point, each record is written a few times in all, and the shorter
ones stay for points of the past while there is room. Whoever makes or removes them holds the lock of `maps/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from asrfs.errors import AsrfsError
from replica_store.points.builder import check_whole, paint_runs
from replica_store.points.extent_map import without_zeros
from replica_store.points.history import History, LogObject
from replica_store.points.kept_maps import following, is_of_history, keep_run, load_run, open_map
from replica_store.points.run import Run, merge_runs, weight_of
from replica_store.vault.map_files import MapName
from replica_store.vault.tails import is_tail_id

UNIT = 1 << 18
"""Weight of the shortest checkpoint: at most so much of a history is read from its indexes."""
SPACE_SHARE = 8
"""All checkpoints of a disk may have so many times the bytes of those that make up its newest state."""
SPACE_BYTES_LEAST = 16 << 20
"""So much they may have in any case."""
MERGE_BELOW = 1.5
"""A checkpoint is merged with the next when it is not longer than this many times that one: when both are alike."""
SPACE_BYTES_FREE = 1 << 30
"""Nothing is written when less is free: this space is for what hosts send."""


@dataclass(slots=True)
class Made:
    """`written`: names and bytes in all; `removed`: how many files went."""

    written: list[MapName] = field(default_factory=list)
    removed: int = 0


def is_due(history: History, machine_id: str) -> bool:
    """Whether a machine's history has grown enough for another checkpoint."""
    return not _is_full(history) and bool(_due(history, machine_id, _chains(history, machine_id)))


def make_maps(history: History, machine_id: str) -> Made:
    """Make all checkpoints that are due. Under the lock. Raises IntegrityError for a damaged index, OSError."""
    made = Made()
    history.maps.sweep(machine_id)
    chains = _chains(history, machine_id)
    rows = _due(history, machine_id, chains)
    after = {slot: chain.end for slot, chain in chains.items()}
    for painted in paint_runs(history, rows, after, rows[-1].last_lsn if rows else 0, UNIT):
        for slot, run in painted.items():
            if _is_full(history) or not chains[slot].add(history, machine_id, slot, run, made):
                return made
    for slot in {name.slot for name in history.maps.names(machine_id)}:
        made.removed += prune(history, machine_id, slot)
    return made


class _Chain:
    """The checkpoints that make up the newest state of a disk. `end`: up to which LSN."""

    def __init__(self, links: list[tuple[MapName, int]], end: int, is_new: bool) -> None:
        self.end = end
        self._links = links  # with their weights
        self._is_new = is_new

    def add(self, history: History, machine_id: str, slot: int, run: Run, made: Made) -> bool:
        """Write what goes on from here, as one with those before it that are not much longer; False when one of them
        turns out damaged and was removed."""
        if self._is_new and not self._links:
            run = Run(0, run.lsn, without_zeros(run.extents), run.objects, run.digest)  # nothing is older than the disk
        while self._links and self._links[-1][1] < MERGE_BELOW * run.weight:
            name, _ = self._links.pop()
            older = load_run(history, machine_id, name)
            if older is None:
                history.maps.remove(machine_id, name)
                return False
            run = merge_runs(older, run)
        name = keep_run(history, machine_id, slot, run)
        self._links.append((name, run.weight))
        self.end = run.lsn
        made.written.append(name)
        return True


def _chains(history: History, machine_id: str) -> dict[int, _Chain]:
    """Of each disk that the machine has now, by slot."""
    received = history.received_lsn(machine_id)
    slots = [disk.slot for disk in history.disks_at(machine_id, received) if not disk.removed]
    links = {slot: _links(history, machine_id, slot, received) for slot in slots}
    ends = {slot: found[-1][0].lsn if found else 0 for slot, found in links.items()}
    # A disk that came after all others had a checkpoint has nothing in what those hold.
    others = min((end for end in ends.values() if end), default=0)
    known = _before(history, machine_id, others)
    is_new = {slot: not ends[slot] and slot not in known for slot in slots}
    return {slot: _Chain(links[slot], others if is_new[slot] else ends[slot], is_new[slot]) for slot in slots}


def _before(history: History, machine_id: str, lsn: int) -> set[int]:
    """Slots of the disks there were up to `lsn`."""
    return {disk.slot for disk in history.disks_at(machine_id, lsn)}


def _links(history: History, machine_id: str, slot: int, lsn: int) -> list[tuple[MapName, int]]:
    names = [name for name in history.maps.names(machine_id) if name.slot == slot and name.lsn <= lsn]
    links: list[tuple[MapName, int]] = []
    while True:
        for name in following(names, links[-1][0].lsn if links else 0):
            if (sealed := open_map(history, machine_id, name)) is not None:
                links.append((name, weight_of(name.after_lsn, name.lsn, sealed.header.object_count)))
                break
        else:
            return links


def _due(history: History, machine_id: str, chains: Mapping[int, _Chain]) -> Sequence[LogObject]:
    """The log objects behind the shortest chain, as many as make whole units."""
    received = history.received_lsn(machine_id)
    begin = min((chain.end for chain in chains.values()), default=received)
    rows = history.objects_of(machine_id, received, begin)
    check_whole(rows, begin, received)
    weight = whole = 0
    for count, row in enumerate(rows, 1):
        weight += weight_of(row.first_lsn - 1, row.last_lsn, 1)
        if weight >= UNIT:
            weight, whole = 0, count
    return rows[:whole]


def prune(history: History, machine_id: str, slot: int) -> int:
    """Remove checkpoints of other histories, and the shortest, oldest ones when all take too much room. Under the
    lock. How many went. Those beyond what has been received stay: a catalog that was set back may catch up."""
    received = history.received_lsn(machine_id)
    names = [name for name in history.maps.names(machine_id) if name.slot == slot]
    here = [name for name in names if name.lsn <= received]
    going = [name for name in here if not is_of_history(history, machine_id, name.lsn, bytes.fromhex(name.digest))]
    chain = {name for name, _ in _links(history, machine_id, slot, received)}
    sizes = {name: history.maps.size(machine_id, name) for name in names if name not in going}
    room = SPACE_SHARE * sum(sizes[name] for name in chain) + SPACE_BYTES_LEAST - sum(sizes.values())
    for name in sorted(sizes.keys() - chain, key=lambda name: (name.lsn - name.after_lsn, name.lsn)):
        if room >= 0:
            break
        going.append(name)
        room += sizes[name]
    for name in going:
        history.maps.remove(machine_id, name)
    return len(going)


def _is_full(history: History) -> bool:
    return history.maps.free_bytes() < SPACE_BYTES_FREE


def leave_runs(history: History, machine_id: str, slot: int, runs: Sequence[Run]) -> Made:
    """Keep what somebody had to paint to read a disk, so that the next one need not. Takes the lock; where it cannot
    be had, or nothing can be written, nothing is."""
    made = Made()
    with suppress(OSError, AsrfsError):
        if is_tail_id(machine_id) or not any(_is_worth(run) for run in runs):
            return made  # what is of a tail alone would be taken for another history's
        present = set(history.maps.names(machine_id))
        with history.maps.lock():
            for run in runs:
                if run.digest is None or not _is_worth(run) or _is_full(history):
                    break
                if MapName.of(slot, run.after_lsn, run.lsn, run.digest) not in present:
                    made.written.append(keep_run(history, machine_id, slot, run))
            if made.written:
                made.removed = prune(history, machine_id, slot)
    return made


def _is_worth(run: Run) -> bool:
    return run.weight >= UNIT
