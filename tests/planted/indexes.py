"""Bugs of segment indexes: made too early, or believed where they are not those of their segment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrfs.errors import FormatError
from asrfs.format import segment_index
from asrfs.format.record import READS_AS_ZEROS, RECORD_HEADER_BYTES
from asrfs.format.segment import SegmentHeader
from asrfs.journal import recovery
from asrfs.journal.segments import index_name
from asrfs.journal.writer import Journal
from asrfs.storage.interface import read_whole
from tests.planted import Plant

_STALE_INDEX_TEST = (
    "tests/t1_unit/test_journal_index.py::test_an_index_that_is_not_that_of_its_segment_is_as_good_as_none"
)


def index_before_its_segment(patch: pytest.MonkeyPatch) -> None:
    """The index of a sealed segment is written while the segment may still be lost."""
    sound = Journal._commit

    def commit(self: Journal) -> OSError | None:
        with self.lock:
            known = list(self._sealed)
            self._sealed.clear()
        self.when_sealed(known)
        return sound(self)

    patch.setattr(Journal, "_commit", commit)


def torn_index_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(segment_index, "crc32c", lambda content: 0)


def stale_index_believed(patch: pytest.MonkeyPatch) -> None:
    """Whatever index lies under the segment's name is its own."""

    def read_index(
        self: recovery._Recovery, segment: SegmentHeader
    ) -> tuple[segment_index.SealedSegment, list[segment_index.DiskColumns]] | None:
        name = index_name(segment.number)
        try:
            return segment_index.decode_segment_index(read_whole(self._storage, name), name)
        except (OSError, FormatError):
            return None

    patch.setattr(recovery._Recovery, "_read_index", read_index)


def index_is_no_claim_to_who_reads(patch: pytest.MonkeyPatch) -> None:
    """Only who takes an index for the records believes that they were durable."""
    sound = recovery._Recovery._take_index

    def take_index(self: recovery._Recovery, segment: SegmentHeader) -> int:
        return sound(self, segment) if self._by_indexes else 0

    patch.setattr(recovery._Recovery, "_take_index", take_index)


def records_are_where_their_payload_is(patch: pytest.MonkeyPatch) -> None:
    """The byte behind a record's header says of which segment it is, also where the next number begins."""
    sound = recovery.Recovered.records

    def records(self: recovery.Recovered) -> Iterator[recovery.RecoveredRecord]:
        for record in sound(self):
            moved = RECORD_HEADER_BYTES if record.kind in READS_AS_ZEROS else 0
            yield record._replace(position=record.position + moved)

    patch.setattr(recovery.Recovered, "records", records)


PLANTS: tuple[Plant, ...] = (
    Plant(
        "index-is-no-claim",
        "who reads the records does not believe what an index shows",
        "tests/t1_unit/test_journal_index.py::test_who_reads_the_records_all_the_same_believes_what_an_index_shows",
        1,
        index_is_no_claim_to_who_reads,
        "DID NOT RAISE",
    ),
    Plant(
        "position-of-the-next-segment",
        "a record that ends with its segment is counted to the next",
        "tests/t1_unit/test_segment_end.py::test_a_record_that_ends_with_its_segment_is_recovered_as_one_of_it",
        1,
        records_are_where_their_payload_is,
        "assert",
    ),
    Plant(
        "index-early",
        "an index is made before its segment is durable",
        "crash",
        20_000,
        index_before_its_segment,
        "I9:|I2:|although .* shows that LSN .* was durable",
        ("ship_and_acknowledge",),
    ),
    *(
        Plant(name, text, _STALE_INDEX_TEST, 1, apply, "a stale index was believed")
        for name, text, apply in (
            ("index-torn", "an index is believed without its checksum", torn_index_believed),
            ("index-stale", "an index of another segment is believed", stale_index_believed),
        )
    ),
)
