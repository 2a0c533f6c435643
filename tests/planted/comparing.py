"""Bugs of comparing: a record on its way counts as a difference, or a difference is not seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from asrfs.model.digest_tree import Region
from asrfs.model.machine import DiskConfig
from asrfs.protocol.messages import Compare, Compared
from asrfs.replication import comparer
from asrfs.replication.comparer import Comparer, Comparison
from asrfs.replication.exact_images import ExactImages
from replica_store.points import digests
from tests.planted import Plant

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

    async def differing(self: Comparer, disk: DiskConfig, region: Region, leaves: bytes, lsn: int) -> list[int]:
        return await sound(self, disk, region, leaves, 0)

    patch.setattr(Comparer, "_differing", differing)


def broken_span_counts_as_none(patch: pytest.MonkeyPatch) -> None:
    """Images are taken to be where the position says, although a span that failed has written more."""

    @asynccontextmanager
    async def applying(self: ExactImages, until_lsn: int) -> AsyncIterator[None]:
        async with self._turn:
            yield

    patch.setattr(ExactImages, "applying", applying)


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


PLANTS: tuple[Plant, ...] = (
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
