"""Which map checkpoints are made, kept and removed, and that they save what they are for."""

from __future__ import annotations

import random

import pytest

from asrfs.errors import RefusedError
from replica_store.points import map_maker
from replica_store.points.builder import build_states
from replica_store.points.map_maker import is_due, leave_runs, make_maps, prune
from replica_store.points.point_disk import FrameCache, PointDisk
from replica_store.points.run import OBJECT_WEIGHT
from tests.fakes.memory_history import MemoryHistory

BLOCK = 4096


@pytest.fixture(autouse=True)
def four_objects_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_maker, "UNIT", 4 * (OBJECT_WEIGHT + 2) - 1)


def grow(history: MemoryHistory, rng: random.Random, objects: int, slots: int = 1) -> None:
    """Objects of two writes each; disks are made where there are none."""
    for slot in range(slots):
        if slot not in history.model:
            history.disk(slot, f"disk{slot}", 64 * BLOCK)
            history.seal()
    for _ in range(objects):
        for _ in range(2):
            history.write(rng.randrange(slots), rng.randrange(64) * BLOCK, rng.randbytes(BLOCK))
        history.seal()


def spans(history: MemoryHistory, slot: int = 0) -> list[tuple[int, int]]:
    return sorted((n.after_lsn, n.lsn) for n in history.maps.names(history.id) if n.slot == slot)


def check(history: MemoryHistory, lsn: int) -> int:
    """Every disk at the LSN is the model's; indexes read for that."""
    history.indexes_read = 0
    states = build_states(history, history.id, lsn, history.disks_at(history.id, lsn))
    for slot, content in history.state_at(lsn).items():
        assert PointDisk(states[slot], FrameCache(history)).read(0, len(content)) == content
    return history.indexes_read


def test_no_point_needs_more_than_a_unit_of_indexes(rng: random.Random) -> None:
    history = MemoryHistory()
    grow(history, rng, 3)
    for _ in range(40):
        grow(history, rng, 1)
        due = is_due(history, history.id)
        assert bool(make_maps(history, history.id).written) == due
        assert not is_due(history, history.id)
    for lsn in range(1, history.lsn + 1):
        assert check(history, lsn) <= 4
    assert len(spans(history)) <= 11, "one for every unit"
    assert (0, spans(history)[-1][1]) in spans(history) or len(spans(history)) > 1


def test_all_at_once_is_as_little_by_little(rng: random.Random) -> None:
    history = MemoryHistory()
    grow(history, rng, 33)
    made = make_maps(history, history.id)
    assert len(made.written) == 8
    # Four objects a unit; the first one holds the disk's record alone.
    assert [span for span in spans(history) if span[0] == 0] == [(0, 7), (0, 15), (0, 31), (0, 63)]
    for lsn in range(1, history.lsn + 1):
        assert check(history, lsn) <= 4


def test_a_disk_that_comes_later_needs_nothing_from_before(rng: random.Random) -> None:
    history = MemoryHistory()
    grow(history, rng, 9)
    make_maps(history, history.id)
    grow(history, rng, 9, slots=2)
    history.indexes_read = 0
    make_maps(history, history.id)
    assert history.indexes_read <= 12
    assert spans(history, 1)[0][0] == 0
    assert check(history, history.lsn) <= 4


def test_a_disk_that_lost_its_checkpoints_is_read_from_its_beginning(rng: random.Random) -> None:
    history = MemoryHistory()
    grow(history, rng, 12, slots=2)
    make_maps(history, history.id)
    for name in history.maps.names(history.id):
        if name.slot == 1:
            history.maps.remove(history.id, name)
    grow(history, rng, 6, slots=2)
    make_maps(history, history.id)
    for lsn in range(1, history.lsn + 1):
        check(history, lsn)
    assert check(history, history.lsn) <= 4


def test_readers_leave_what_they_painted(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    history = MemoryHistory()
    grow(history, rng, 20)
    lsn = history.lsn - 1  # within an object
    state = build_states(history, history.id, lsn, history.disks_at(history.id, lsn))[0]
    assert not leave_runs(history, history.id, 0, state.runs).written, "nobody else can use it"
    state = build_states(history, history.id, history.lsn, history.disks_at(history.id, history.lsn))[0]
    assert len(leave_runs(history, history.id, 0, state.runs).written) == 1
    assert check(history, history.lsn) == 0
    again = build_states(history, history.id, history.lsn, history.disks_at(history.id, history.lsn))[0]
    assert not leave_runs(history, history.id, 0, again.runs).written

    def busy() -> None:
        raise RefusedError("somebody has it")

    for name in history.maps.names(history.id):
        history.maps.remove(history.id, name)
    monkeypatch.setattr(history.maps, "lock", busy)
    assert not leave_runs(history, history.id, 0, state.runs).written
    monkeypatch.undo()


def test_a_full_disk_gets_no_checkpoint(rng: random.Random) -> None:
    history = MemoryHistory()
    grow(history, rng, 20)
    history.maps.free = map_maker.SPACE_BYTES_FREE - 1
    assert not is_due(history, history.id)
    assert not make_maps(history, history.id).written
    history.maps.free = map_maker.SPACE_BYTES_FREE
    history.maps.refuses = True
    with pytest.raises(OSError, match="no space"):
        make_maps(history, history.id)
    state = build_states(history, history.id, history.lsn, history.disks_at(history.id, history.lsn))[0]
    assert not leave_runs(history, history.id, 0, state.runs).written


def test_old_short_ones_go_when_there_are_too_many(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_maker, "SPACE_BYTES_LEAST", 0)
    monkeypatch.setattr(map_maker, "SPACE_SHARE", 2)
    history = MemoryHistory()
    grow(history, rng, 3)
    removed = 0
    for _ in range(60):
        grow(history, rng, 1)
        removed += make_maps(history, history.id).removed
        assert check(history, history.lsn) <= 4, "the newest state keeps its own"
    assert removed > 0
    sizes = [history.maps.size(history.id, name) for name in history.maps.names(history.id)]
    assert sum(sizes) <= 2 * sum(sorted(sizes)[-4:])
    left = spans(history)
    assert (0, 7) not in left, "the oldest of the shortest went first"


def test_those_of_another_history_go_and_those_ahead_stay(rng: random.Random) -> None:
    ours, theirs = MemoryHistory(), MemoryHistory()
    theirs.maps = ours.maps
    for history in (ours, theirs):
        grow(history, rng, 20)
    make_maps(theirs, theirs.id)
    count = len(ours.maps.files)
    assert count
    ours.hidden_after = 9
    behind = sum(name.lsn <= 9 for name in ours.maps.names(ours.id))
    assert 0 < behind < count
    assert prune(ours, ours.id, 0) == behind
    ours.hidden_after = None
    prune(ours, ours.id, 0)
    assert not ours.maps.files
