"""Histories that are compared as they grow, by digests that are kept: what is answered is what the model has.

Two histories have a beginning in common and then go apart (`map_histories.fork`), and share the place where digests are
kept: a store that was set back, and one that another side took over, find what was made of what they do not have.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

from asrfs.format import kept_leaves as format_kept
from asrfs.format.kept_leaves import LEAVES_HEADER_BYTES
from asrfs.model import digest_tree
from asrfs.model.digest_tree import LeafDigester, Region, node_digests, regions_of
from asrfs.model.machine import DiskRecord
from asrfs.protocol.messages import Compare
from replica_store.points import digests
from replica_store.points import kept_leaves as points_kept
from replica_store.points.digests import Comparer
from tests.fakes.map_histories import fork
from tests.fakes.memory_history import MemoryHistory

LEAF, NODE_LEAVES, REGION_NODES = 4096, 2, 3
ALL_KEPT, SOME_KEPT, FOREIGN, LATER = "all kept", "some kept", "kept by another history", "kept of later"
EVENTS = (ALL_KEPT, SOME_KEPT, FOREIGN, LATER)


@contextmanager
def small_regions() -> Iterator[None]:
    """Leaves of a block, nodes of two, regions of three, for disks of some dozen blocks."""
    node_bytes = NODE_LEAVES * LEAF
    values: list[tuple[Any, dict[str, Any]]] = [
        (
            digest_tree,
            {
                "LEAF_BYTES": LEAF,
                "NODE_LEAVES": NODE_LEAVES,
                "NODE_BYTES": node_bytes,
                "REGION_NODES_MAX": REGION_NODES,
                "ZERO_LEAF": digest_tree.digest_of(bytes(LEAF)),
            },
        ),
        (digests, {"LEAF_BYTES": LEAF, "NODE_LEAVES": NODE_LEAVES}),
        (points_kept, {"LEAF_BYTES": LEAF, "REGION_NODES_MAX": REGION_NODES}),
        (format_kept, {"NODE_BYTES": node_bytes, "REGION_NODES_MAX": REGION_NODES}),
    ]
    with ExitStack() as stack:
        for room, names in values:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(room, name, value))
        yield


def check_kept(steps: Sequence[str], seed: int, frame_bytes: int) -> Counter[str]:
    """I9: at every LSN, and whatever is kept, digests are those of the disks; what happened."""
    rng = random.Random(seed)
    events: Counter[str] = Counter()
    with small_regions(), _counted(events):
        histories = fork(steps, seed, frame_bytes, rng)
        comparers: dict[int, Comparer] = {}
        for _ in range(12):
            number = rng.randrange(2)
            history = histories[number]
            if rng.random() < 0.5 or number not in comparers:
                comparers[number] = Comparer(history)
            _compare_all(history, comparers[number], rng)
            if rng.random() < 0.3:
                _strike(history, rng)
        for number, history in enumerate(histories):
            _compare_every_lsn(history, comparers.get(number) or Comparer(history), rng)
    return events


@contextmanager
def _counted(events: Counter[str]) -> Iterator[None]:
    load, between = digests.load_leaves, points_kept.ChangedLeaves.between

    def loaded(history: MemoryHistory, machine_id: str, disk: DiskRecord, region: Region) -> points_kept.Kept | None:
        found = load(history, machine_id, disk, region)  # type: ignore[arg-type]
        there = points_kept.LeavesName(disk.slot, region.first) in history.leaves.names(machine_id)
        events[FOREIGN] += found is None and there
        return found

    def asked(self: points_kept.ChangedLeaves, after: int, until: int, region: Region) -> points_kept.Chosen | None:
        chosen = between(self, after, until, region)
        assert chosen is not None
        events[SOME_KEPT if np.any(chosen) else ALL_KEPT] += 1
        events[LATER] += until > after
        return chosen

    with (
        mock.patch.object(digests, "load_leaves", loaded),
        mock.patch.object(points_kept.ChangedLeaves, "between", asked),
    ):
        yield


def _compare_all(history: MemoryHistory, comparer: Comparer, rng: random.Random) -> None:
    """All disks, as a host does: of a history that grows meanwhile."""
    rows = history.objects_of(history.id, history.lsn)
    history.hidden_after = rng.choice(rows).last_lsn
    try:
        for disk in history.disks_at(history.id, history.received_lsn(history.id)):
            for region in () if disk.removed else regions_of(disk.size_bytes):
                if rng.random() < 0.2:
                    later = [row.last_lsn for row in rows if row.last_lsn >= history.hidden_after]
                    history.hidden_after = rng.choice(later[:3])
                lsn = history.received_lsn(history.id)
                if disk in history.disks_at(history.id, lsn):
                    check_region(history, comparer, disk, region, lsn, by_kept=rng.random() < 0.8)
    finally:
        history.hidden_after = None


def _compare_every_lsn(history: MemoryHistory, comparer: Comparer, rng: random.Random) -> None:
    for lsn in rng.sample(range(1, history.lsn + 1), min(history.lsn, 20)):
        if history.nearest(lsn) == [lsn]:
            for disk in history.disks_at(history.id, lsn):
                size = disk.size_bytes if rng.random() < 0.8 else rng.randint(1, 90) * 512
                for region in () if disk.removed else regions_of(size):
                    check_region(history, comparer, disk, region, lsn, by_kept=True)


def check_region(
    history: MemoryHistory, comparer: Comparer, disk: DiskRecord, region: Region, lsn: int, *, by_kept: bool
) -> None:
    """The digests that are asked about are those of nothing, so all of them are answered."""
    wanted = Compare(
        number=1,
        slot=disk.slot,
        disk_id=disk.id,
        size_bytes=region.size_bytes,
        first=region.first,
        digests=node_digests(bytes(region.leaves * 32)),
        lsn=0 if lsn == history.received_lsn(history.id) else lsn,
        by_kept=by_kept,
    )
    answer = comparer.answer(history.id, wanted)
    content = replica_at(history, lsn, disk).ljust(region.size_bytes, b"\0")
    digester = LeafDigester(region)
    digester.add(region.offset, content[region.offset : region.end])
    expected = digester.finish()
    assert (answer.exit_code, answer.lsn) == (0, lsn), answer.text
    wrong = [leaf for leaf in range(region.leaves) if answer.leaves[32 * leaf :][:32] != expected[32 * leaf :][:32]]
    assert not wrong, f"I9: leaves {wrong} from {region.first_leaf} on of slot {disk.slot} at LSN {lsn} are others"


def replica_at(history: MemoryHistory, lsn: int, disk: DiskRecord) -> bytes:
    """What the log objects make of a disk: in a gap that is not what the host has."""
    content = history.state_at(lsn).get(disk.slot, b"")
    if history.gap_at(history.id, lsn) is None:
        return content
    fresh = Comparer(history)
    states = fresh._state_at(history.id, disk, lsn)
    point = digests.PointDisk(states, fresh._frames)
    return point.read(0, point.size_bytes)


def _strike(history: MemoryHistory, rng: random.Random) -> None:
    """A file is gone, torn, damaged, another one's, or nothing can be written for now."""
    files = history.leaves.files
    history.leaves.refuses = rng.random() < 0.2
    if not files:
        return
    key = rng.choice(sorted(files, key=str))
    chance = rng.random()
    if chance < 0.2:
        del files[key]
    elif chance < 0.4:
        files[key] = files[key][: rng.randrange(len(files[key]))]
    elif chance < 0.6:
        files[key] = rng.choice(list(files.values()))
    else:
        changed = bytearray(files[key])
        at = rng.randrange(min(LEAVES_HEADER_BYTES if rng.random() < 0.5 else len(changed), len(changed)) or 1)
        changed[at : at + 1] = bytes(each ^ 1 << rng.randrange(8) for each in changed[at : at + 1])
        files[key] = bytes(changed)
