"""Bugs of seeds: too much is left out, or a host does not learn that it was too much."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from asrfs.format.log_object import ObjectHeader
from asrfs.replication import seeding
from asrfs.replication.seeding import Seeds
from replica_store.ingest import ingester
from tests.planted import Plant

_SIM = "tests/t4_sim/test_seeding.py::"


def a_frame_too_many(patch: pytest.MonkeyPatch) -> None:
    """A frame of which only the beginning is in chunks that match is left out, too."""
    sound = seeding.frames_within

    def frames_within(header: ObjectHeader, positions: Iterable[int]) -> list[int]:
        frames = sound(header, positions)
        more = {frame + 1 for frame in frames if frame + 1 < header.frame_count}
        return sorted({*frames, *more})

    patch.setattr(seeding, "frames_within", frames_within)


def never_useless(patch: pytest.MonkeyPatch) -> None:
    """The host leaves the same out again after it was told that the store has it not."""
    patch.setattr(Seeds, "is_useless", property(lambda self: False, lambda self, value: None))


def completed_without_a_digest(patch: pytest.MonkeyPatch) -> None:
    """What was completed is taken for what the host made."""
    sound = ingester.check_digest

    def check_digest(content: ingester.Bytes, where: str) -> bytes:
        return bytes(content[-32:]) if isinstance(content, memoryview) else sound(content, where)

    patch.setattr(ingester, "check_digest", check_digest)
    patch.setattr("replica_store.ingest.seeding.check_digest", check_digest)


PLANTS = (
    Plant(
        "left-out-too-much",
        "a frame that has other records, too, is left out of a log object",
        _SIM + "test_what_the_seed_has_does_not_travel",
        1,
        a_frame_too_many,
        "bytes_left_out|is_useless",
    ),
    Plant(
        "seed-never-useless",
        "a host goes on leaving out what the store cannot complete",
        _SIM + "test_a_seed_that_is_swapped_after_it_was_matched",
        1,
        never_useless,
        "TooSlowError|is_useless",
    ),
    Plant(
        "completed-without-a-digest",
        "a log object that was completed from a seed is not compared with its digest",
        _SIM + "test_a_seed_that_is_swapped_after_it_was_matched",
        1,
        completed_without_a_digest,
        "I9|is_useless|seal|digest",
    ),
)
