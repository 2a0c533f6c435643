"""Bugs of comparing: a record on its way counts as a difference, or a difference is not seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from asrfs.daemon.digesting import ScanRate
from asrfs.format.kept_leaves import LeavesHeader
from asrfs.model.digest_tree import Region, numbers_of
from asrfs.model.dirty_map import DirtyMap, GivenUp
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig
from asrfs.model.positions import Positions
from asrfs.protocol.messages import Compare, Compared
from asrfs.replication import comparer, lost_map
from asrfs.replication.comparer import Comparer, Comparison
from asrfs.replication.exact_images import ExactImages
from asrfs.replication.filler import Filler
from asrfs.replication.lost_map import Found
from asrfs.storage.interface import Storage
from replica_store.points import digests, kept_leaves
from replica_store.points.kept_leaves import ChangedLeaves, Chosen
from tests.planted import Plant

_CASES = 5_000
_SIM = "tests/t4_sim/test_comparing.py::"


def what_lags_differs(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks again."""

    async def settle(
        self: Comparer, disks: Sequence[DiskConfig], found: Comparison, step: Callable[[int, int], None] = print
    ) -> Comparison:
        return found

    patch.setattr(Comparer, "settle", settle)


def looks_again_at_two_moments(patch: pytest.MonkeyPatch) -> None:
    """The second look, too, takes the store's newest state, whatever the image was when it was read."""
    sound = Comparer._differing

    async def differing(
        self: Comparer, disk: DiskConfig, region: Region, leaves: bytes, lsn: int, by_kept: bool = False
    ) -> list[int]:
        return await sound(self, disk, region, leaves, 0)

    patch.setattr(Comparer, "_differing", differing)


def broken_span_counts_as_none(patch: pytest.MonkeyPatch) -> None:
    """Images are taken to be where the position says, although a span that failed has written more."""

    @asynccontextmanager
    async def applying(self: ExactImages, until_lsn: int) -> AsyncIterator[None]:
        async with self._turn:
            yield

    patch.setattr(ExactImages, "applying", applying)


def gives_way_to_nobody(patch: pytest.MonkeyPatch) -> None:
    """Images are read at full speed beside whoever uses the disks."""

    async def now(self: ScanRate) -> int:
        return self._chosen() or 0

    patch.setattr(ScanRate, "now", now)


def one_chunk_of_a_node(patch: pytest.MonkeyPatch) -> None:
    """Of the chunks of a node that differs only the first is named."""
    sound = comparer.chunks_in

    def chunks_in(answer: Compared, region: Region, leaves: bytes) -> list[int]:
        return sound(answer, region, leaves)[:1]

    patch.setattr(comparer, "chunks_in", chunks_in)


def first_region_alone(patch: pytest.MonkeyPatch) -> None:
    """The store says of everything that it is equal, but of the first node."""
    sound = digests.compared

    def compared(wanted: Compare, region: Region, lsn: int, leaves: bytes) -> Compared:
        answer = sound(wanted, region, lsn, leaves)
        if answer.differs[:1] in (b"", b"\x01", b"\x00"):
            return answer
        return Compared(number=wanted.number, lsn=lsn, differs=bytes(len(answer.differs)))

    patch.setattr(digests, "compared", compared)


def whole_nodes_differ(patch: pytest.MonkeyPatch) -> None:
    """Of a node that differs all chunks are sent."""

    def chunks_in(answer: Compared, region: Region, leaves: bytes) -> list[int]:
        return [
            region.first_leaf + leaf
            for node in numbers_of(answer.differs)
            for leaf in comparer._leaves_of(region, node)
        ]

    patch.setattr(comparer, "chunks_in", chunks_in)


def lost_map_is_empty(patch: pytest.MonkeyPatch) -> None:
    """A map that cannot be read is taken for one in which nothing is marked."""

    def unknown(journal: Storage, machine: MachineConfig, positions: Positions, why: str) -> Found:
        return Found(DirtyMap(), GivenUp(), why)

    patch.setattr(lost_map, "_unknown", unknown)


def missing_map_is_empty(patch: pytest.MonkeyPatch) -> None:
    """A map that is gone is taken for one that was never needed."""
    patch.setattr(lost_map, "_is_missed", lambda journal, machine, positions: False)


def unknown_counts_as_whole(patch: pytest.MonkeyPatch) -> None:
    """A disk of which nothing is marked is closed, although nothing is known of it."""

    sound = Filler.find_out

    async def nothing(_disks: Sequence[DiskConfig]) -> dict[int, list[int]]:
        return {}

    async def find_out(self: Filler, disks: Sequence[DiskConfig]) -> None:
        self.compare = nothing
        await sound(self, disks)

    patch.setattr(Filler, "find_out", find_out)


def what_is_gone_is_expected(patch: pytest.MonkeyPatch) -> None:
    """What the journal has freed is not given up when the map that said so is lost."""
    patch.setattr(lost_map, "_what_is_gone", lambda machine, positions: GivenUp())


def what_was_written_since_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    """Kept digests are taken whatever was written since they were made."""

    def between(self: ChangedLeaves, after_lsn: int, until_lsn: int, region: Region) -> Chosen:
        return np.zeros(region.leaves, bool)

    patch.setattr(ChangedLeaves, "between", between)


def kept_by_another_history(patch: pytest.MonkeyPatch) -> None:
    """Kept digests are believed whatever history they were made of."""
    patch.setattr(kept_leaves, "is_of_history", lambda history, machine_id, lsn, digest: True)


def kept_of_another_disk(patch: pytest.MonkeyPatch) -> None:
    """Kept digests are believed although a disk ended elsewhere when they were made."""
    sound = kept_leaves.decode_leaves_header

    def decode(buffer: bytes, where: str) -> LeavesHeader:
        header = sound(buffer, where)
        return header._replace(end=_Anything(header.end))

    patch.setattr(kept_leaves, "decode_leaves_header", decode)


class _Anything(int):
    """A number that is equal to each."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def proof_by_kept(patch: pytest.MonkeyPatch) -> None:
    """What must be read anew is answered by kept digests."""
    sound = digests.Comparer._leaves

    def leaves(
        self: digests.Comparer, machine_id: str, disk: DiskRecord, region: Region, lsn: int, by_kept: bool
    ) -> bytes:
        return sound(self, machine_id, disk, region, lsn, True)

    patch.setattr(digests.Comparer, "_leaves", leaves)


def _in_sim(apply: Callable[[pytest.MonkeyPatch], None], shows: str) -> Plant:
    name = f"sim: {apply.__name__.replace('_', ' ')}"
    return Plant(name, (apply.__doc__ or "").strip(), "sim", _CASES, apply, shows)


def _of_a_lost_map(apply: Callable[[pytest.MonkeyPatch], None], shows: str, lost: str) -> Plant:
    name = apply.__name__.replace("_", "-")
    test = f"tests/t4_sim/test_lost_map.py::test_what_the_map_would_have_said_is_found_by_comparing[{lost}]"
    return Plant(name, (apply.__doc__ or "").strip(), test, 1, apply, shows)


_LOST_MAPS = (
    _of_a_lost_map(lost_map_is_empty, "assert", "away_and_over-flipped"),
    _of_a_lost_map(missing_map_is_empty, "assert", "half_filled-gone"),
    _of_a_lost_map(unknown_counts_as_whole, "I9", "half_filled-flipped"),
    _of_a_lost_map(what_is_gone_is_expected, "TooSlowError", "away_and_over-flipped"),
)
_KEPT = "tests/t3_model/test_kept_leaves.py::"
_KEPT_PLANTS = tuple(
    Plant(apply.__name__.replace("_", "-"), (apply.__doc__ or "").strip(), _KEPT + test, 1, apply, shows)
    for apply, test, shows in (
        (what_was_written_since_is_overlooked, "test_kept_digests_are_used_and_strange_ones_are_there", "I9: leaves"),
        (kept_by_another_history, "test_kept_digests_are_used_and_strange_ones_are_there", "I9: leaves|assert"),
        (kept_of_another_disk, "test_i9_a_disk_that_grows_has_no_kept_end", "I9: leaves|assert|shapes"),
        (proof_by_kept, "test_damage_is_found_by_a_proof_and_then_by_everybody", "a proof reads"),
    )
)
_SIM_PLANTS = (
    _in_sim(one_chunk_of_a_node, "I9: chunk .* was found equal"),
    _in_sim(whole_nodes_differ, "I9: chunk .* was found different"),
)

PLANTS: tuple[Plant, ...] = (
    *_SIM_PLANTS,
    *_KEPT_PLANTS,
    *_LOST_MAPS,
    Plant(
        "lag-is-a-difference",
        "what is on its way to the store counts as different",
        _SIM + "test_a_difference_is_found_under_writes_and_nothing_else",
        1,
        what_lags_differs,
        "a record on its way is no difference",
    ),
    Plant(
        "compared-at-two-moments",
        "the second look is at another LSN on either side",
        _SIM + "test_a_difference_is_found_under_writes_and_nothing_else",
        1,
        looks_again_at_two_moments,
        "where LSN|a record on its way is no difference",
    ),
    Plant(
        "broken-span-is-exact",
        "an image is held for exact that holds records of a span which failed",
        _SIM + "test_images_that_a_broken_span_has_passed_are_not_taken_for_exact",
        1,
        broken_span_counts_as_none,
        "the images hold more than the position says",
    ),
    Plant(
        "scan-beside-users",
        "comparing reads at full speed whoever uses the disks",
        "tests/t4_sim/test_scan_rate.py::test_disks_that_are_used_are_read_slowly_until_nobody_has_used_them_for_a_while",
        1,
        gives_way_to_nobody,
        "assert",
    ),
    Plant(
        "difference-not-seen",
        "of several chunks that differ in one node one is named",
        _SIM + "test_a_flipped_byte_is_exactly_its_chunk",
        1,
        one_chunk_of_a_node,
        "assert",
    ),
    Plant(
        "nodes-not-compared",
        "the store compares the first node of a region",
        _SIM + "test_a_flipped_byte_is_exactly_its_chunk",
        1,
        first_region_alone,
        "assert",
    ),
)
