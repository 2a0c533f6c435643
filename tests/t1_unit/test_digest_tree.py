"""The digest tree against digests computed naively, and its geometry: regions, nodes, leaves, short ends."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.errors import IntegrityError
from asrfs.model.digest_tree import (
    LEAF_BYTES,
    NO_LEAF,
    NODE_BYTES,
    NODE_LEAVES,
    REGION_NODES_MAX,
    ZERO_LEAF,
    LeafDigester,
    Region,
    bitmap_of,
    different,
    extents_of,
    leaf_count,
    node_count,
    node_digests,
    numbers_of,
    regions_of,
    regions_with,
)
from asrfs.protocol.messages import Compared
from asrfs.replication.comparer import chunks_in
from asrfs.replication.image_digests import digest_image, digest_in_threads, parts_of
from tests.fakes.crash_storage import CrashStorage

SIZES = (512, LEAF_BYTES, LEAF_BYTES + 512, NODE_BYTES - 512, NODE_BYTES, 3 * NODE_BYTES + 5 * LEAF_BYTES + 1024)


def naive(content: bytes, region: Region) -> bytes:
    here = content[region.offset : region.end]
    return b"".join(blake3(here[at : at + LEAF_BYTES]).digest() for at in range(0, len(here), LEAF_BYTES))


def region_within(rng: random.Random, size_bytes: int) -> Region:
    first = rng.randrange(node_count(size_bytes))
    return Region(size_bytes, first, rng.randint(1, node_count(size_bytes) - first))


def scattered(rng: random.Random, region: Region) -> list[tuple[int, bytes]]:
    """Pieces of content in the region, in order, with holes between them."""
    pieces = []
    at = region.offset + rng.choice((0, 512, 5 * LEAF_BYTES))
    while at < region.end:
        length = min(rng.choice((512, 4096, LEAF_BYTES, 3 * LEAF_BYTES + 512)), region.end - at)
        pieces.append((at, rng.randbytes(length)))
        at += length + rng.choice((0, 0, 512, LEAF_BYTES - 512, 70_000, 20 * LEAF_BYTES))
    return pieces


@given(seed=st.integers(0, 1 << 32), size=st.sampled_from(SIZES))
@settings(max_examples=100)
def test_leaves_are_what_hashing_everything_gives(seed: int, size: int) -> None:
    rng = random.Random(seed)
    region = region_within(rng, size)
    content = bytearray(size)
    digester = LeafDigester(region)
    for at, piece in scattered(rng, region):
        content[at : at + len(piece)] = piece
        digester.add(at, piece)
    leaves = digester.finish()
    assert leaves == naive(bytes(content), region)
    assert len(leaves) == 32 * region.leaves


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_of_which_nothing_was_written_is_one_of_zeros(size: int) -> None:
    for region in regions_of(size):
        written = LeafDigester(region)
        written.add(region.offset, bytes(region.end - region.offset))
        assert LeafDigester(region).finish() == written.finish() == naive(bytes(size), region)


@pytest.mark.parametrize("size", [*SIZES, 40 * NODE_BYTES + 512, 1 << 41])
def test_regions_cover_a_disk_once(size: int) -> None:
    at = leaves = 0
    for region in regions_of(size):
        assert region.is_possible()
        assert (region.offset, region.first_leaf) == (at, leaves)
        assert sum(region.leaves_in(node) for node in range(region.nodes)) == region.leaves
        at, leaves = region.end, leaves + region.leaves
    assert (at, leaves) == (size, leaf_count(size))


def test_regions_that_no_disk_has() -> None:
    size = 3 * NODE_BYTES + 512
    assert Region(size, 3, 1).is_possible()
    for first, nodes in ((0, 0), (0, 5), (4, 1), (-1, 1), (1 << 70, 1), (0, REGION_NODES_MAX + 1), (0, -1)):
        assert not Region(size, first, nodes).is_possible()
    assert not Region(1 << 62, 0, REGION_NODES_MAX + 1).is_possible()


@given(seed=st.integers(0, 1 << 32))
def test_regions_with_chunks_hold_each_of_them_and_few_others(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 100 * NODE_BYTES // 512) * 512
    chunks = sorted(rng.sample(range(leaf_count(size)), min(leaf_count(size), rng.randrange(40))))
    found = list(regions_with(chunks, size))
    nodes = [region.first + node for region in found for node in range(region.nodes)]
    assert all(region.is_possible() for region in found)
    assert nodes == sorted({chunk // NODE_LEAVES for chunk in chunks})


def test_nodes_are_digests_of_their_leaves() -> None:
    leaves = random.Random(3).randbytes(32 * (NODE_LEAVES + 3))
    assert node_digests(leaves) == blake3(leaves[: 32 * 64]).digest() + blake3(leaves[32 * 64 :]).digest()
    assert blake3(bytes(LEAF_BYTES)).digest() == ZERO_LEAF
    assert NO_LEAF != ZERO_LEAF


@given(numbers=st.sets(st.integers(0, 31)))
def test_a_bitmap_is_what_it_was_made_of(numbers: set[int]) -> None:
    assert numbers_of(bitmap_of(sorted(numbers), 32)) == sorted(numbers)
    assert len(bitmap_of(sorted(numbers), 32)) == 4


def test_chunks_as_extents() -> None:
    size = 10 * LEAF_BYTES + 512
    assert extents_of([], size) == []
    assert extents_of([1, 2, 5, 10], size) == [
        (LEAF_BYTES, 2 * LEAF_BYTES),
        (5 * LEAF_BYTES, LEAF_BYTES),
        (10 * LEAF_BYTES, 512),
    ]


def test_what_differs_is_numbered() -> None:
    ours = random.Random(1).randbytes(32 * 7)
    theirs = bytearray(ours)
    for number in (0, 3, 6):
        theirs[32 * number + 31] ^= 1
    assert different(ours, ours) == []
    assert different(ours, bytes(theirs)) == [0, 3, 6]


def test_an_image_is_read_where_it_has_content_and_only_there(rng: random.Random) -> None:
    size = 2 * NODE_BYTES + LEAF_BYTES + 512
    image = CrashStorage().create("image")
    content = bytearray(size)
    image.truncate(size)
    for at, length in ((0, 4096), (NODE_BYTES - 4096, 3 * 4096), (2 * NODE_BYTES + 4096, 8192), (size - 512, 512)):
        piece = rng.randbytes(length)
        content[at : at + length] = piece
        image.write_at([piece], at)
    for first, nodes in ((0, 3), (0, 1), (1, 1), (1, 2), (2, 1)):
        region = Region(size, first, nodes)
        digests = digest_image(image, region)
        assert digests.leaves == naive(bytes(content), region)
        assert digests.bytes_read < (region.end - region.offset) // 2
    assert digest_image(image, Region(size, 0, 3)).bytes_read < 16 * 4096


def test_chunks_come_from_the_leaves_of_the_nodes_that_differ() -> None:
    region = Region(40 * NODE_BYTES, 34, 3)
    leaves = random.Random(5).randbytes(32 * region.leaves)
    theirs = bytearray(leaves[32 * 64 :])
    for leaf in (2, 64 + 63):
        theirs[32 * leaf] ^= 1
    answer = Compared(number=1, lsn=9, differs=bitmap_of([1, 2], 3), leaves=bytes(theirs))
    assert chunks_in(answer, region, leaves) == [35 * 64 + 2, 36 * 64 + 63]
    assert chunks_in(Compared(number=1, lsn=9, differs=b"\0"), region, leaves) == []


@pytest.mark.parametrize(
    ("differs", "leaves"), [(b"\x08", bytes(64 * 32)), (b"\x01", b""), (b"\x01", bytes(63 * 32)), (b"", bytes(32))]
)
def test_an_answer_to_another_question_is_not_believed(differs: bytes, leaves: bytes) -> None:
    region = Region(3 * NODE_BYTES, 0, 3)
    with pytest.raises(IntegrityError):
        chunks_in(Compared(number=1, lsn=9, differs=differs, leaves=leaves), region, bytes(32 * region.leaves))


# ---- an image's regions in threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 40])
@pytest.mark.parametrize("size_bytes", [512, NODE_BYTES + 512, 33 * NODE_BYTES - 512])
def test_threads_make_the_same_digests(size_bytes: int, threads: int, rng: random.Random) -> None:
    with closing(CrashStorage().create("image")) as image:
        image.truncate(size_bytes)
        for _ in range(20):
            at = rng.randrange(size_bytes // 512) * 512
            image.write_at([rng.randbytes(512)], at)
        for region in regions_of(size_bytes):
            parts = parts_of(region, threads)
            assert [part.first for part in parts] == [region.first, *(p.first + p.nodes for p in parts[:-1])]
            assert sum(part.nodes for part in parts) == region.nodes and all(part.nodes for part in parts)
            assert digest_in_threads(image, region, threads) == digest_image(image, region)
