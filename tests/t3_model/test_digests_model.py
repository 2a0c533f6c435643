"""What the store says of a disk by digests, against the bytes the model has: at any LSN, whatever was asked before."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrfs.format.record import Kind
from asrfs.model.digest_tree import (
    LEAF_BYTES,
    NO_LEAF,
    NODE_BYTES,
    NODE_LEAVES,
    LeafDigester,
    Region,
    bitmap_of,
    node_digests,
    regions_of,
)
from asrfs.protocol.messages import Compare, Compared
from replica_store.points.builder import build_states
from replica_store.points.digests import Comparer, leaf_digests
from replica_store.points.point_disk import FrameCache, PointDisk
from tests.fakes.memory_history import MemoryHistory, random_extent

SIZES = {0: 2 * NODE_BYTES + 3 * LEAF_BYTES + 512, 1: 40 * 4096}


def leaves_of(content: bytes, region: Region) -> bytes:
    digester = LeafDigester(region)
    digester.add(region.offset, content[region.offset : region.end])
    return digester.finish()


def ask(content: bytes, region: Region, *, slot: int = 0, lsn: int = 0) -> Compare:
    digests = node_digests(leaves_of(content, region))
    size_bytes, first = region.size_bytes, region.first
    return Compare(
        number=7, slot=slot, disk_id=f"{slot:032x}", size_bytes=size_bytes, first=first, digests=digests, lsn=lsn
    )


def scattered_history(rng: random.Random, records: int) -> MemoryHistory:
    """Writes and zeros all over two disks, of which one is inside a gap."""
    history = MemoryHistory(frame_bytes=8192)
    for slot, size in SIZES.items():
        history.disk(slot, f"disk{slot}", size, gap=slot == 1)
    for _ in range(records):
        slot = rng.choice((0, 0, 1))
        offset, length = random_extent(rng, SIZES[slot])
        if rng.random() < 0.8:
            history.write(slot, offset, rng.randbytes(length), rng.choice((Kind.WRITE, Kind.FILL)))
        else:
            history.zero(slot, offset, length)
        if rng.random() < 0.1:
            history.seal()
    history.seal()
    return history


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(seed=st.integers(0, 2**32 - 1), records=st.integers(0, 120))
def test_equal_content_is_equal_and_a_flipped_byte_is_exactly_its_chunk(seed: int, records: int) -> None:
    rng = random.Random(seed)
    history = scattered_history(rng, records)
    comparer = Comparer(history)
    for _ in range(8):
        slot = rng.choice((0, 1))
        lsn = rng.choice((0, history.lsn, rng.randint(2, history.lsn)))
        content = bytearray(history.state_at(lsn or history.lsn)[slot])
        region = rng.choice(list(regions_of(len(content))))
        same = comparer.answer(history.id, ask(bytes(content), region, slot=slot, lsn=lsn))
        assert same == Compared(number=7, lsn=lsn or history.lsn, differs=bitmap_of([], region.nodes)), "equal"
        at = rng.randrange(region.offset, region.end)
        content[at] ^= 1 << rng.randrange(8)
        differs = comparer.answer(history.id, ask(bytes(content), region, slot=slot, lsn=lsn))
        node = (at - region.offset) // NODE_BYTES
        assert differs.differs == bitmap_of([node], region.nodes)
        content[at] ^= 0xFF  # whatever was flipped, the store's leaves are those of what it has
        sound = leaves_of(history.state_at(lsn or history.lsn)[slot], region)
        assert differs.leaves == sound[node * NODE_LEAVES * 32 : (node + 1) * NODE_LEAVES * 32]


def test_what_the_store_has_not_is_an_answer_too(rng: random.Random) -> None:
    history = scattered_history(rng, 20)
    comparer = Comparer(history)
    content = history.state_at(history.lsn)[0]
    region = Region(len(content), 0, 1)
    small = ask(bytes(SIZES[1]), Region(SIZES[1], 0, 1), slot=1, lsn=1)
    asked = {
        0: ask(content, region),
        1: ask(content, region, lsn=history.lsn + 1),
        3: ask(content, region, slot=5),
    }
    assert {code: comparer.answer(history.id, wanted).exit_code for code, wanted in asked.items()} == {0: 0, 1: 1, 3: 3}
    assert comparer.answer(history.id, small).exit_code == 3, "before there was such a disk"


def test_within_a_stretch_there_is_nothing_to_compare(rng: random.Random) -> None:
    history = scattered_history(rng, 10)
    first = history.lsn + 1
    for _ in range(6):
        history.write(0, 0, rng.randbytes(4096))
    history.seal_folded()
    comparer = Comparer(history)
    content = history.state_at(history.lsn)[0]
    region = Region(len(content), 0, 1)
    for lsn in range(first, history.lsn):
        assert comparer.answer(history.id, ask(content, region, lsn=lsn)).exit_code == 3
    for lsn in (0, history.lsn):
        answer = comparer.answer(history.id, ask(content, region, lsn=lsn))
        assert (answer.exit_code, answer.differs) == (0, b"\0")


def test_a_disk_of_another_size_here_ends_in_zeros(rng: random.Random) -> None:
    """The host's disk has grown, and the record of that is on its way; or it is shorter than the store's."""
    history = scattered_history(rng, 60)
    content = history.state_at(history.lsn)[0]
    comparer = Comparer(history)
    for longer in (content + bytes(3 * NODE_BYTES), content[: NODE_BYTES + 1536]):
        for region in regions_of(len(longer)):
            answer = comparer.answer(history.id, ask(longer, region))
            assert (answer.exit_code, answer.leaves) == (0, b"")


def test_what_cannot_be_read_is_equal_to_nothing(rng: random.Random) -> None:
    history = MemoryHistory(frame_bytes=8192)
    history.disk(0, "root", 10 * LEAF_BYTES)
    for leaf in range(5):
        history.write(0, 2 * leaf * LEAF_BYTES, rng.randbytes(4096))
        history.seal()
    content = history.state_at(history.lsn)[0]
    (row,) = (row for row in history.objects_of(history.id, history.lsn) if row.first_lsn <= 4 <= row.last_lsn)
    history.damage(row, len(history.stored(row)) - 100)
    region = Region(len(content), 0, 1)
    disks = [disk for disk in history.disks_at(history.id, history.lsn) if disk.slot == 0]
    state = build_states(history, history.id, history.lsn, disks)[0]
    leaves = leaf_digests(PointDisk(state, FrameCache(history)), region, bytearray())
    sound = leaves_of(content, region)
    damaged = [leaf for leaf in range(10) if leaves[32 * leaf : 32 * leaf + 32] != sound[32 * leaf : 32 * leaf + 32]]
    assert damaged == [4]
    assert leaves[32 * 4 : 32 * 5] == NO_LEAF
    answer = Comparer(history).answer(history.id, ask(content, region))
    assert (answer.exit_code, answer.differs) == (0, b"\x01")


def test_a_region_without_content_costs_no_reading(rng: random.Random) -> None:
    history = MemoryHistory()
    size = 33 * NODE_BYTES
    history.disk(0, "root", size)
    history.write(0, size - 4096, rng.randbytes(4096))
    history.seal()
    region = Region(size, 0, 32)
    digests = node_digests(LeafDigester(region).finish())
    asked = Compare(number=1, slot=0, disk_id="0" * 32, size_bytes=size, first=0, digests=digests)
    answer = Comparer(history).answer(history.id, asked)
    assert (answer.exit_code, answer.leaves, history.frames_read) == (0, b"", 0)
