"""Bugs on purpose for the kernel levels: whose processes are not ours, so each is named in their environment."""

from __future__ import annotations

import pytest

from asrfs.format.object_index import Index
from replica_store.points import builder
from replica_store.points.painting import MapPainter
from tests.planted import Plant
from tests.proof.kernel import plants


def answers_before_append(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk server answers a write that is in its memory only, until the next one comes."""
    monkeypatch.setenv(plants.PLANT, "answer-before-append")


def never_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is answered without fdatasync."""
    monkeypatch.setenv(plants.PLANT, "never-sync")


def names_never_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of a directory does nothing, at the host and at the store."""
    monkeypatch.setenv(plants.PLANT, "names-never-sync")


def name_of_next_segment_never_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next segment's file is made ahead without its name being durable."""
    monkeypatch.setenv(plants.PLANT, "name-of-next-segment-never-syncs")


def catalog_never_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's catalog has `PRAGMA synchronous = OFF`."""
    monkeypatch.setenv(plants.PLANT, "catalog-never-syncs")


def acknowledges_before_object_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store does not sync an object before it acknowledges it."""
    monkeypatch.setenv(plants.PLANT, "acknowledge-before-object-is-synced")


def points_lack_their_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery point ends one record before its LSN."""
    add = builder._add_object

    def add_all_but_one(to: MapPainter, index: Index, records: slice, slot: int, number: int) -> None:
        add(to, index, slice(records.start, records.stop - 1), slot, number)

    monkeypatch.setattr(builder, "_add_object", add_all_but_one)


PLANTS: tuple[Plant, ...] = (
    Plant(
        "kills-answers-before-append",
        "the disk server answers writes that it holds in memory",
        "kills",
        500,
        answers_before_append,
        shows="I[289]:",
    ),
    Plant(
        "syscalls-answers-before-append",
        "the disk server answers writes that it holds in memory",
        "syscalls",
        2_000,
        answers_before_append,
        shows="I[29]:",
    ),
    Plant(
        "power-never-syncs",
        "a flush is answered without fdatasync",
        "power",
        150,
        never_syncs,
        shows=r"I[123]|'verify',\) ended with 5",
        only=("pair ext4",),
    ),
    Plant(
        "power-names-never-sync",
        "fsync of a directory does nothing",
        "power",
        150,
        names_never_sync,
        shows=r"I[23]|'verify',\) ended with 5",
        only=("pair ext4",),
    ),
    Plant(
        "power-next-segment-has-no-durable-name",
        "the next segment is made ahead and its name not made durable",
        "power",
        450,
        name_of_next_segment_never_syncs,
        shows="I2",
        only=("pair ext4",),
    ),
    Plant(
        "power-catalog-never-syncs",
        "the store's catalog has PRAGMA synchronous=OFF",
        "power",
        150,
        catalog_never_syncs,
        shows=r"I[35]|'web1'\) ended with 3",
        only=("pair ext4",),
    ),
    Plant(
        "power-acknowledges-unsynced-objects",
        "the store acknowledges before the object is fsynced",
        "power",
        150,
        acknowledges_before_object_is_synced,
        shows=r"'verify',\) ended with 5",
        only=("pair ext4",),
    ),
    Plant(
        "prefixes-lack-their-last-record",
        "a recovery point ends one record before its LSN",
        "prefixes",
        1_000,
        points_lack_their_last_record,
        shows="I9: at LSN",
    ),
)
