"""Random histories of several disks, and every LSN of them read back through real log objects."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from asrfs.errors import AsrfsError, NotFoundError, RefusedError
from asrfs.format.record import Kind
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.quantities import format_time
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache, PointDisk
from tests.fakes.memory_history import MemoryHistory, random_extent

SIZES = (512, 4096, 5 * 4096 + 1536, 16 * 4096, 40 * 4096 + 3584)
"""Among them disks whose last block is short."""


class HistoryWriter:
    """Turns drawn steps into a history that a host could have written."""

    def __init__(self, frame_bytes: int, seed: int) -> None:
        self.history = MemoryHistory(frame_bytes=frame_bytes)
        self._rng = random.Random(seed)
        self._next_slot = 0
        self.live: list[int] = []
        self._names: dict[int, str] = {}

    def add(self, size_bytes: int) -> None:
        """A disk under the first free of three names: one that was removed comes back as another slot."""
        name = next((name for name in ("a", "b", "c") if name not in map(self._names.get, self.live)), None)
        if name is not None:
            self.history.disk(self._next_slot, name, size_bytes)
            self._names[self._next_slot] = name
            self.live.append(self._next_slot)
            self._next_slot += 1

    def go_apart(self, side: int) -> None:
        """What is drawn from now on differs from that of a writer that went to another side."""
        self._rng.seed(f"{self._rng.random()} {side}")

    def step(self, what: str) -> None:
        rng = self._rng
        if what == "add" or not self.live:
            self.add(rng.choice(SIZES))
            return
        slot = rng.choice(self.live)
        size = len(self.history.model[slot])
        offset, length = random_extent(rng, size)
        if what in ("write", "fill"):
            content = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
            self.history.write(slot, offset, content, Kind.FILL if what == "fill" else Kind.WRITE)
        elif what in ("zero", "discard"):
            if rng.random() < 0.2:
                offset, length = 0, size
            self.history.zero(slot, offset, length, Kind.ZERO if what == "zero" else Kind.DISCARD)
        elif what == "remove":
            self.history.disk(slot, self._names[slot], size, removed=True, gap=self.history.has_gap(slot))
            self.live.remove(slot)
        elif what == "resize":
            self.history.disk(slot, self._names[slot], rng.choice(SIZES), gap=self.history.has_gap(slot))
        elif what == "restart":
            for each in self.live:
                gap = self.history.has_gap(each)
                self.history.disk(each, self._names[each], len(self.history.model[each]), gap=gap)
        elif what == "marker":
            self.history.marker()
        elif what == "fold":
            self.history.seal_folded()
        elif what == "give up":
            self.history.give_up()
        elif what == "heal":
            self.history.heal()
        else:
            self.history.seal()


STEPS = (
    *("write",) * 6,
    *("fill", "zero", "discard", "discard", "add", "remove", "resize", "restart", "marker", "seal", "seal"),
    *("fold", "give up", *("heal",) * 4),
)
FRAME_BYTES = (512, 4096, 12288, 131072)


READ_BACK, NO_STATE, IN_GAP = "LSN read back", "LSN inside a stretch refused", "LSN in a gap refused"
EVENTS = (READ_BACK, NO_STATE, IN_GAP)


def check_every_lsn(steps: Sequence[str], seed: int, frame_bytes: int) -> Counter[str]:
    """Play the steps, then read every LSN back that may be shown; what happened."""
    writer = HistoryWriter(frame_bytes, seed)
    writer.add(SIZES[seed % len(SIZES)])
    for what in steps:
        writer.step(what)
    history = writer.history
    history.heal()  # so that the end can be compared in any case
    history.seal()
    frames = FrameCache(history, 64 << 10)
    rng = random.Random(seed)
    check_points(history)
    events: Counter[str] = Counter()
    for lsn in range(1, history.lsn + 1):
        what = try_at(history, lsn)
        events[what] += 1
        if what == READ_BACK:
            check_at(history, lsn, rng, frames)
    return events


def check_points(history: MemoryHistory) -> None:
    """I5: every point that is listed has a state, and no gap lies under it."""
    for point in history.points(history.id):
        assert resolve(history, history.name, point.id).lsn == point.lsn
        assert history.nearest(point.lsn) == [point.lsn], "I5: a point inside a stretch"


def try_at(history: MemoryHistory, lsn: int) -> str:
    """Whether there is a state at an LSN that may be shown. Where there is none it is refused, and what is said of the
    nearest is true; a time then means the last state before."""
    text = f"lsn:{lsn}"
    nearest = history.nearest(lsn)
    if nearest != [lsn]:
        said = refused_with(NotFoundError, history, text)
        assert [int(each) for each in re.findall(r"LSN (\d+)", said)] == [lsn, *nearest]
        return NO_STATE
    if history.gap_at(history.id, lsn) is not None:
        assert "gap" in refused_with(RefusedError, history, text)
        return IN_GAP
    at_time = resolve_time(history, lsn)
    assert at_time is None or at_time == lsn
    return READ_BACK


def refused_with(error: type[AsrfsError], history: MemoryHistory, selector: str) -> str:
    try:
        cut = resolve(history, history.name, selector)
    except error as refused:
        return str(refused)
    raise AssertionError(f"I9: {selector} was taken for LSN {cut.lsn}, which has no state that may be shown")


def resolve_time(history: MemoryHistory, lsn: int) -> int | None:
    """What the time just before that of the next record means; None for the last, and where epochs overlap."""
    if lsn == history.lsn or history.time_at(lsn + 1) <= history.time_at(lsn) or history.epoch > 1:
        return None
    return resolve(history, history.name, f"time:{format_time(history.time_at(lsn + 1) - 1)}").lsn


def check_at(history: MemoryHistory, lsn: int, rng: random.Random, frames: FrameCache) -> dict[int, PointDisk]:
    """Every disk at an LSN, whole and in part, against the model."""
    cut = resolve(history, history.name, f"lsn:{lsn}")
    expected = history.state_at(lsn)
    disks = disks_of(history, cut)
    assert [disk.slot for disk in disks] == sorted(expected)
    opened = open_disks(history, cut, [disk.name for disk in disks], frames)
    for disk in disks:
        point, content = opened[disk.name], expected[disk.slot]
        assert point.size_bytes == len(content)
        assert point.read(0, len(content)) == content
        for _ in range(3):
            low, high = sorted(rng.randint(0, len(content)) for _ in range(2))
            assert point.read(low, high - low) == content[low:high]
        check_windows(point, content)
    return {disk.slot: opened[disk.name] for disk in disks}


def check_windows(point: PointDisk, content: bytes) -> None:
    for bytes_max in (BLOCK_BYTES, 3 * BLOCK_BYTES, 1 << 20):
        copy = bytearray(len(content))
        for window in point.windows(bytes_max):
            assert len(window.buffer) == int(window.lengths.sum()) <= bytes_max
            assert bool(np.all(window.offsets[1:] >= (window.offsets + window.lengths)[:-1])), "in order, disjoint"
            at = 0
            for offset, length in zip(window.offsets.tolist(), window.lengths.tolist(), strict=True):
                copy[offset : offset + length] = window.buffer[at : at + length]
                at += length
        assert copy == content
