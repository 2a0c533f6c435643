"""What is left of records in a stretch: the disks behind them are the same, and what was overwritten is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.journal.columns import HEADER, Table
from asrfs.model.extents import BLOCK_BYTES
from asrfs.replication.folding import Room, fold
from tests.fakes import folding as model

SIZE = 12 * BLOCK_BYTES + 1536


@dataclass(frozen=True)
class Step:
    kind: Kind
    slot: int
    offset: int
    length: int
    payload: bytes


def write(slot: int, first: int, last: int, size: int = SIZE) -> Step:
    """Blocks `first` to `last`, the last one as short as the disk has it; its bytes say which record they are of."""
    offset, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, size)
    return Step(Kind.WRITE, slot, offset, end - offset, b"")


def filled(steps: Sequence[Step]) -> list[Step]:
    return [
        Step(each.kind, each.slot, each.offset, each.length, bytes([number + 1]) * each.length)
        if each.kind in CARRIES_EXTENT_BYTES
        else each
        for number, each in enumerate(steps)
    ]


def table_of(steps: Sequence[Step]) -> Table:
    headers = np.zeros(len(steps), HEADER)
    for name in ("kind", "slot", "offset", "length"):
        headers[name] = [getattr(each, name) for each in steps]
    headers["lsn"] = np.arange(1, len(steps) + 1)
    return headers


def kept_of(steps: Sequence[Step]) -> list[tuple[int, Step]]:
    """As the product leaves them, with their LSNs."""
    kept = fold(table_of(steps))
    found = []
    for number, offset, length, skipped in zip(*(column.tolist() for column in kept), strict=True):
        step = steps[number]
        assert offset == step.offset + skipped and offset + length <= step.offset + step.length
        payload = step.payload[skipped : skipped + length]
        found.append((number + 1, Step(step.kind, step.slot, offset, length, payload)))
    return found


def disks_after(steps: Sequence[Step]) -> list[bytes]:
    disks = [bytearray(b"\xff" * 2 * SIZE) for _ in range(2)]
    for step in steps:
        if step.kind not in (Kind.MARKER, Kind.DISK):
            disks[step.slot][step.offset : step.offset + step.length] = step.payload or bytes(step.length)
        elif step.kind == Kind.DISK:  # its length says how long the disk is: what lies behind is gone
            disks[step.slot][step.offset :] = bytes(2 * SIZE - step.offset)
    return [bytes(disk) for disk in disks]


extents = st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(0, 12)).filter(lambda each: each[1] <= each[2])
writes = extents.map(lambda each: write(*each))
zeros = extents.map(lambda each: Step(Kind.ZERO, each[0], write(*each).offset, write(*each).length, b""))
marks = st.just(Step(Kind.MARKER, 0xFFFF, 0, 0, b""))
sizes = st.tuples(st.integers(0, 1), st.integers(1, 25)).map(
    lambda each: Step(Kind.DISK, each[0], each[1] * 2048, 0, b"")
)
histories = st.lists(st.one_of(writes, writes, writes, zeros, marks, sizes), min_size=1, max_size=25)


@settings(max_examples=300)
@given(histories)
def test_i9_the_disks_behind_a_stretch_are_the_same(steps: list[Step]) -> None:
    """Also where a disk became shorter and longer within, and where its last block is short."""
    steps = filled(steps)
    kept = kept_of(steps)
    assert disks_after([step for _, step in kept]) == disks_after(steps)
    assert kept[-1][0] == len(steps), "the last record stays"
    lsns = [lsn for lsn, _ in kept]
    assert lsns == sorted(set(lsns))
    others = [lsn for lsn, step in enumerate(steps, 1) if step.kind not in CARRIES_EXTENT_BYTES]
    assert set(others) <= set(lsns)


@settings(max_examples=200)
@given(st.lists(extents.filter(lambda each: each[2] < 12).map(lambda each: write(*each)), min_size=1, max_size=25))
def test_of_whole_blocks_nothing_is_left_that_need_not_be(steps: list[Step]) -> None:
    steps = filled(steps)
    assert kept_of(steps) == model.folded(1, steps)


def test_what_is_no_block_of_a_disk_is_left_alone() -> None:
    odd = [
        Step(Kind.WRITE, 0, 512, BLOCK_BYTES, bytes(BLOCK_BYTES)),
        Step(Kind.WRITE, 0, 0, 512, bytes(512)),
        Step(Kind.WRITE, 0, 1 << 62, BLOCK_BYTES, bytes(BLOCK_BYTES)),
    ]
    assert [step for _, step in kept_of(odd + odd)] == odd + odd


@settings(max_examples=200)
@given(histories, st.integers(1, 6), st.integers(3, 12), st.integers(1, 7))
def test_as_much_is_taken_as_fits(steps: list[Step], blocks_max: int, records_max: int, batch: int) -> None:
    """In batches of any size: so many different whole blocks, and no more records left than may be."""
    headers = table_of(filled(steps))
    room, taken = Room(blocks_max * BLOCK_BYTES, records_max), 0
    for at in range(0, len(headers), batch):
        if not room.is_full:
            taken += room.add(headers[at : at + batch])
    fitting = [count for count in range(1, len(steps) + 1) if _fits(headers[:count], blocks_max, records_max)]
    expected = max([1, *fitting])
    assert taken == expected
    assert room.is_full == (taken < len(steps))
    assert expected == 1 or len(fold(headers[:expected]).number) <= records_max


def _fits(headers: Table, blocks_max: int, records_max: int) -> bool:
    blocks, others = set(), 0
    for header in headers:
        whole = int(header["length"]) // BLOCK_BYTES if int(header["kind"]) in CARRIES_EXTENT_BYTES else 0
        blocks |= {(int(header["slot"]), int(header["offset"]) // BLOCK_BYTES + nth) for nth in range(whole)}
        others += not whole or int(header["length"]) % BLOCK_BYTES != 0
    return len(blocks) <= blocks_max and len(blocks) + others <= records_max
