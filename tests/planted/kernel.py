"""Bugs on purpose for the kernel levels: whose processes are not ours, so each is named in their environment."""

from __future__ import annotations

import pytest

from asrfs.format.log_object import Index
from replica_store.points import builder
from replica_store.points.extent_map import MapBuilder
from tests.planted import Plant
from tests.proof.kernel import plants


def answers_before_append(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk server answers a write that is in its memory only, until the next one comes."""
    monkeypatch.setenv(plants.PLANT, "answer-before-append")


def never_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is answered without fdatasync."""
    monkeypatch.setenv(plants.PLANT, "never-sync")


def points_lack_their_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery point ends one record before its LSN."""
    add = builder._add_object

    def add_all_but_one(to: MapBuilder, index: Index, records: slice, slot: int, number: int) -> None:
        add(to, index, slice(records.start, records.stop - 1), slot, number)

    monkeypatch.setattr(builder, "_add_object", add_all_but_one)


PLANTS: tuple[Plant, ...] = (
    Plant(
        "kills-answers-before-append",
        "the disk server answers writes that it holds in memory",
        "kills",
        24,
        answers_before_append,
    ),
    Plant(
        "syscalls-answers-before-append",
        "the disk server answers writes that it holds in memory",
        "syscalls",
        34,
        answers_before_append,
    ),
    Plant("power-never-syncs", "a flush is answered without fdatasync", "power", 10, never_syncs),
    Plant(
        "prefixes-lack-their-last-record",
        "a recovery point ends one record before its LSN",
        "prefixes",
        100,
        points_lack_their_last_record,
    ),
)
