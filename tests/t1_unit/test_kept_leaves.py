"""The layout of kept leaves, and their files: what was kept comes back, and nothing that was changed does."""

from __future__ import annotations

import random

import numpy as np
import pytest

from asrfs.errors import FormatError
from asrfs.format.kept_leaves import (
    LEAVES_FILE_BYTES_MAX,
    LEAVES_HEADER_BYTES,
    LEAVES_VERSION,
    LeavesHeader,
    decode_leaves_header,
    derive_leaves_key,
    encode_leaves,
    open_leaves,
)
from asrfs.model.digest_tree import LEAF_BYTES, NO_LEAF, NODE_BYTES, REGION_NODES_MAX, Region, regions_of
from asrfs.model.machine import DiskRecord
from replica_store.points.changed_since import Changed
from replica_store.points.digests import runs_of
from replica_store.points.kept_leaves import (
    BYTES_FREE_LEAST,
    Kept,
    chosen_leaves,
    is_keepable,
    keep_leaves,
    load_leaves,
    sweep_leaves,
    unreadable,
)
from replica_store.vault.leaf_files import LeafFiles, LeavesName
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.memory_history import MemoryHistory

KEY = derive_leaves_key(bytes(32), bytes(16), bytes(32))
REGION_BYTES = REGION_NODES_MAX * NODE_BYTES
HEADER = LeavesHeader(
    machine_id=bytes(range(16)),
    version=LEAVES_VERSION,
    slot=3,
    reserved=0,
    salt=bytes(32),
    disk_id=bytes(16),
    lsn=77,
    digest=bytes(range(32)),
    begin=REGION_BYTES,
    end=REGION_BYTES + 5 * LEAF_BYTES + 512,
)
LEAVES = bytes(range(192))


def opened(content: bytes) -> tuple[LeavesHeader, bytes]:
    return decode_leaves_header(content, "x"), open_leaves(content, KEY, "x")


def test_what_was_kept_comes_back() -> None:
    assert opened(encode_leaves(HEADER, LEAVES, KEY)) == (HEADER, LEAVES)
    whole = HEADER._replace(end=2 * REGION_BYTES)
    assert len(encode_leaves(whole, bytes(whole.leaves_bytes), KEY)) == LEAVES_FILE_BYTES_MAX


def test_no_bit_can_be_changed_and_nothing_be_missing(rng: random.Random) -> None:
    content = encode_leaves(HEADER, LEAVES, KEY)
    for at in {*range(LEAVES_HEADER_BYTES), *rng.sample(range(len(content)), 50)}:
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError):
            opened(bytes(changed))
    for length in range(len(content)):
        with pytest.raises(FormatError):
            opened(content[:length])
    with pytest.raises(FormatError):
        opened(content + b"\0")


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2},
        {"lsn": 0},
        {"lsn": 1 << 63},
        {"begin": REGION_BYTES - NODE_BYTES},
        {"begin": REGION_BYTES, "end": REGION_BYTES},
        {"end": 2 * REGION_BYTES + 512},
    ],
    ids=str,
)
def test_a_header_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    header = HEADER._replace(**wrong)
    with pytest.raises(FormatError):
        decode_leaves_header(encode_leaves(header, bytes(header.leaves_bytes), KEY), "x")


def test_another_key_opens_nothing() -> None:
    with pytest.raises(FormatError):
        open_leaves(encode_leaves(HEADER, LEAVES, KEY), derive_leaves_key(bytes(32), bytes(16), b"\1" * 32), "x")


# ---- which are believed ----------------------------------------------------------------------------------------------


def history_of(size_bytes: int) -> tuple[MemoryHistory, DiskRecord]:
    history = MemoryHistory()
    history.disk(0, "root", size_bytes)
    for block in range(3):
        history.write(0, block * 4096, bytes([block + 1]) * 4096)
        history.seal()
    (disk,) = history.disks_at(history.id, history.lsn)
    return history, disk


def test_only_the_same_disk_of_the_same_history_is_believed() -> None:
    history, disk = history_of(10 * LEAF_BYTES)
    (region,) = regions_of(disk.size_bytes)
    made = Kept(3, bytes(range(32)) * 10)
    keep_leaves(history, history.id, disk, region, made)
    assert load_leaves(history, history.id, disk, region) == made
    longer = Region(11 * LEAF_BYTES, 0, 1)
    assert load_leaves(history, history.id, disk, longer) is None, "its last leaf is longer now"
    other = DiskRecord(slot=0, id="f" * 32, name="root", size_bytes=disk.size_bytes, removed=False, gap=False)
    assert load_leaves(history, history.id, other, region) is None, "another disk in the same slot"
    history.hidden_after = 2
    assert load_leaves(history, history.id, disk, region) is None, "a catalog that was set back"
    history.hidden_after = None
    theirs, _ = history_of(10 * LEAF_BYTES)
    theirs.leaves, theirs.time_ns = history.leaves, theirs.time_ns + 1
    theirs.write(0, 0, b"\7" * 4096)
    theirs.seal()
    assert load_leaves(theirs, theirs.id, disk, region) == made, "the same beginning"
    foreign, _ = history_of(10 * LEAF_BYTES)
    foreign.leaves = history.leaves
    foreign._rows[:] = [row for row in foreign._rows if row.last_lsn != 3]
    assert load_leaves(foreign, foreign.id, disk, region) is None


def test_nothing_is_kept_within_an_object_without_room_or_when_that_fails() -> None:
    history, disk = history_of(10 * LEAF_BYTES)
    for _ in range(2):
        history.write(0, 0, bytes(4096))
    history.seal()
    (region,) = regions_of(disk.size_bytes)
    keep_leaves(history, history.id, disk, region, Kept(history.lsn - 1, bytes(320)))
    history.leaves.free = BYTES_FREE_LEAST - 1
    keep_leaves(history, history.id, disk, region, Kept(history.lsn, bytes(320)))
    history.leaves.free, history.leaves.refuses = BYTES_FREE_LEAST, True
    keep_leaves(history, history.id, disk, region, Kept(history.lsn, bytes(320)))
    assert not history.leaves.files
    history.leaves.refuses = False
    keep_leaves(history, history.id, disk, region, Kept(history.lsn, bytes(320)))
    assert len(history.leaves.files) == 1


def test_only_regions_of_a_whole_comparison_are_kept() -> None:
    _, disk = history_of(2 * REGION_BYTES + 512)
    size = disk.size_bytes
    assert all(is_keepable(disk, region) for region in regions_of(size))
    assert not is_keepable(disk, Region(size, 1, 32)) and not is_keepable(disk, Region(size, 0, 31))
    assert not is_keepable(disk, Region(size + 512, 64, 1)), "its end is not at the store yet"
    assert is_keepable(disk, Region(size + 512, 32, 32)), "of what both have"


def test_what_is_of_no_disk_any_more_goes() -> None:
    history, _ = history_of(2 * REGION_BYTES)
    places = [LeavesName(0, 0), LeavesName(0, 32), LeavesName(0, 64), LeavesName(1, 0)]
    for name in places:
        history.leaves.put(history.id, name, b"x")
    sweep_leaves(history, history.id, history.lsn)
    assert history.leaves.names(history.id) == places[:2]


# ---- which leaves ----------------------------------------------------------------------------------------------------


def test_every_leaf_that_is_touched_is_chosen(rng: random.Random) -> None:
    size = REGION_BYTES + 40 * LEAF_BYTES + 512
    edges = sorted(rng.sample(range(size // 512), 60))
    starts, ends = edges[::2], edges[1::2]
    changed = Changed(np.array(starts) * 512, np.array(ends) * 512)
    for region in regions_of(size):
        found = chosen_leaves(changed, region).tolist()
        for leaf in range(region.leaves):
            begin = region.offset + leaf * LEAF_BYTES
            end = min(begin + LEAF_BYTES, region.end)
            expected = any(s * 512 < end and e * 512 > begin for s, e in zip(starts, ends, strict=True))
            assert found[leaf] == expected, leaf


def test_runs_and_what_was_unreadable() -> None:
    chosen = unreadable(b"\1" * 32 + NO_LEAF + NO_LEAF + b"\1" + bytes(31) + NO_LEAF)
    assert chosen.tolist() == [False, True, True, False, True]
    assert runs_of(chosen) == [(1, 3), (4, 5)]
    assert runs_of(~chosen) == [(0, 1), (3, 4)]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_are_replaced_read_listed_swept_and_removed() -> None:
    storage = CrashStorage()
    files = LeafFiles(storage)
    machine, name = "a" * 32, LeavesName(2, 64)
    assert files.names(machine) == []
    for content in (b"one", b"other"):
        files.put(machine, name, content)
    assert (files.names(machine), files.read(machine, name, 100)) == ([name], b"other")
    assert files.read(machine, name, 2) == b"ot"
    storage.create(f"leaves/{machine}/.left").close()
    files.sweep(machine)
    assert storage.names(f"leaves/{machine}") == [str(name)]
    files.remove(machine, name)
    files.remove(machine, name)
    assert files.names(machine) == []


def test_what_does_not_hold_any_more_does_not_come_back_with_the_power(rng: random.Random) -> None:
    storage = CrashStorage()
    files = LeafFiles(storage)
    machine, name = "a" * 32, LeavesName(2, 64)
    files.put(machine, name, b"one")
    for directory in ("", "leaves", f"leaves/{machine}"):
        storage.sync_directory(directory)
    assert LeafFiles(storage.crash(Fate.LOST, rng)).names(machine) == [name]
    files.remove(machine, name)
    assert LeafFiles(storage.crash(Fate.LOST, rng)).names(machine) == []
