"""Histories with map checkpoints: made as they grow, by makers that were sound and left where others find them.

Two histories have a beginning in common and then go apart, as a store's does that was set back to a copy, or a machine
that was superseded. They share the place where checkpoints lie, so each finds what was made of the other.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from asrfs.format.map_checkpoint import MAP_HEADER_BYTES
from replica_store.points import map_maker, run
from replica_store.points.builder import build_states
from replica_store.points.map_maker import leave_runs, make_maps
from replica_store.points.point_disk import FrameCache, PointDisk
from tests.fakes.history_steps import SIZES, HistoryWriter
from tests.fakes.memory_history import MemoryHistory
from tests.fakes.memory_leaves import MemoryLeaves
from tests.fakes.memory_maps import MemoryMaps

USED, FOREIGN, DAMAGED = "map checkpoint used", "map checkpoint of another history", "map checkpoint damaged"
EVENTS = (USED, FOREIGN, DAMAGED)


@contextmanager
def short_checkpoints(rng: random.Random) -> Iterator[None]:
    """Of a few records each, so that a small history has many."""
    with (
        mock.patch.object(map_maker, "UNIT", rng.choice((1, 4, 12))),
        mock.patch.object(run, "OBJECT_WEIGHT", 1),
        mock.patch.object(map_maker, "SPACE_BYTES_LEAST", rng.choice((0, 1 << 20))),
        mock.patch.object(map_maker, "SPACE_SHARE", rng.choice((1, 3))),
    ):
        yield


def make_as_it_grows(history: MemoryHistory, rng: random.Random) -> None:
    """A maker looks now and then, at what had been received by then; readers leave theirs."""
    rows = history.objects_of(history.id, history.lsn)
    for at in sorted(rng.sample(range(len(rows)), min(len(rows), 5))):
        history.hidden_after = rows[at].last_lsn
        if rng.random() < 0.7:
            make_maps(history, history.id)
        else:
            lsn = history.nearest(rng.randint(1, rows[at].last_lsn))[-1]
            disks = history.disks_at(history.id, lsn)
            for slot, state in build_states(history, history.id, lsn, disks).items():
                leave_runs(history, history.id, slot, state.runs)
    history.hidden_after = None


def fork(steps: Sequence[str], seed: int, frame_bytes: int, rng: random.Random) -> list[MemoryHistory]:
    """Two histories that go apart after some of the steps, one place for their checkpoints and kept leaves."""
    maps, leaves = MemoryMaps(), MemoryLeaves()
    apart = rng.randint(0, len(steps))
    in_epoch = rng.random() < 0.3
    histories = []
    for side in range(2):
        writer = HistoryWriter(frame_bytes, seed)
        writer.history.maps, writer.history.leaves = maps, leaves
        writer.add(SIZES[seed % len(SIZES)])
        for at, what in enumerate(steps):
            if at == apart:
                writer.history.seal()
                writer.go_apart(side)
                if side and in_epoch:
                    writer.history.begin_epoch(writer.history.time_ns)
            writer.step(what)
        writer.history.seal()
        histories.append(writer.history)
    return histories


def check_with_maps(steps: Sequence[str], seed: int, frame_bytes: int) -> Counter[str]:
    """I9: every LSN of both histories is exact, whatever checkpoints lie about; what happened."""
    rng = random.Random(seed)
    events: Counter[str] = Counter()
    with short_checkpoints(rng):
        histories = fork(steps, seed, frame_bytes, rng)
        for history in histories:
            make_as_it_grows(history, rng)
        first, second = histories
        digests = {row.digest for row in second.objects_of(second.id, second.lsn)}
        events[FOREIGN] += sum(row.digest not in digests for row in first.objects_of(first.id, first.lsn))
        for history in histories:
            check_every_lsn_of(history, rng, events)
        maps = first.maps
        for key in rng.sample(sorted(maps.files, key=str), len(maps.files) // 2):  # some are gone then
            content = maps.files.pop(key)
            if rng.random() < 0.7:
                maps.files[key] = damaged(content, rng)
                events[DAMAGED] += 1
        for history in histories:
            if rng.random() < 0.5:
                make_maps(history, history.id)  # in place of what it finds damaged
            check_every_lsn_of(history, rng, Counter())
    return events


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A bit is flipped, or the end is missing."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    at = rng.randrange(MAP_HEADER_BYTES, len(content)) if rng.random() < 0.8 else rng.randrange(MAP_HEADER_BYTES)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def check_every_lsn_of(history: MemoryHistory, rng: random.Random, events: Counter[str]) -> None:
    frames = FrameCache(history, 64 << 10)
    for lsn in range(1, history.lsn + 1):
        if history.nearest(lsn) != [lsn] or history.gap_at(history.id, lsn) is not None:
            continue
        disks = [disk for disk in history.disks_at(history.id, lsn) if not disk.removed]
        history.indexes_read = 0
        states = build_states(history, history.id, lsn, disks)
        events[USED] += history.indexes_read < len(history.objects_of(history.id, lsn))
        for slot, content in history.state_at(lsn).items():
            point = PointDisk(states[slot], frames)
            assert point.read(0, len(content)) == content, f"I9: slot {slot} at LSN {lsn}"
