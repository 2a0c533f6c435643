"""Bugs of giving up and healing: an order changed, a mark taken back too early."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asrfs.daemon.housekeeping import Housekeeping
from asrfs.format.record import Kind
from asrfs.model.dirty_map import DirtyMap, GivenUp
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig, decode_disk
from asrfs.model.positions import Cursor
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.filler import Filler
from asrfs.replication.quota import Quota
from tests.planted import Plant

_GIVING_UP = ("given_up_and_healed", "given_up_again_while_it_heals", "given_up_although_its_gap_was_closing")


def frees_before_the_map_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up counts at once, and the map is saved by whoever saves next."""
    real = DirtyMapFile.save

    def save(file: DirtyMapFile, given_up: GivenUp | None = None) -> None:
        if given_up is None:
            real(file)
        file._given_up = given_up or file._given_up

    monkeypatch.setattr(DirtyMapFile, "save", save)


def leaves_a_closing_record_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are given up only to before one that closes an older gap: it closes the new one, too."""
    real = Quota._mark

    def mark(
        asked: Quota, start: Cursor, until_lsn: int, machine: MachineConfig
    ) -> tuple[Cursor, tuple[DiskRecord, ...]]:
        records = asked.reader.read(start, until_lsn, 1 << 30).records
        closing = [
            header.lsn
            for header, payload in records
            if start.lsn and header.kind == Kind.DISK and not decode_disk(bytes(payload)).gap
        ]
        return real(asked, start, min([lsn - 1 for lsn in closing if lsn > start.lsn + 1] or [until_lsn]), machine)

    monkeypatch.setattr(Quota, "_mark", mark)


def frees_without_marking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch of records only the last is marked."""
    real = DirtyMap.mark_all

    def mark_all(dirty: DirtyMap, slot: int, offsets: object, lengths: object) -> None:
        real(dirty, slot, offsets[-1:], lengths[-1:])  # type: ignore[index]

    monkeypatch.setattr(DirtyMap, "mark_all", mark_all)


def marks_clean_what_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk leaves the map although the record that has its content was given up meanwhile."""

    async def take_from_map(filler: Filler, disk: DiskConfig, filled: list[tuple[int, int, int]]) -> None:
        async with filler.dirty.turn:
            for _, offset, length in filled:
                if disk.slot in filler.dirty.map:
                    filler.dirty.map.clear(disk.slot, offset, length)
            await filler._in_thread(filler.dirty.save)

    monkeypatch.setattr(Filler, "_take_from_map", take_from_map)


def gives_up_by_an_old_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are given up by what room there was when somebody looked last."""
    monkeypatch.setattr(Housekeeping, "__post_init__", lambda housekeeping: None)


def goes_on_from_what_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map begins where the store is, although a start would not know yet that it is there."""

    async def acknowledged(quota: Quota) -> Cursor:
        return quota.positions.current.acknowledged

    monkeypatch.setattr(Quota, "_acknowledged", acknowledged)
    monkeypatch.setattr(GivenUp, "known_from", lambda given_up, lsn: given_up._replace(since_lsn=given_up.through.lsn))


def _plant(
    name: str, apply: Callable[[pytest.MonkeyPatch], None], level: str, cases: int, shows: str, *only: str
) -> Plant:
    return Plant(name, (apply.__doc__ or "").strip(), level, cases, apply, shows, only)


PLANTS: tuple[Plant, ...] = (
    _plant("map-saved-late", frees_before_the_map_is_saved, "crash", 20_000, "I[0-9]:|LSN|missing", *_GIVING_UP),
    _plant("closing-record-kept", leaves_a_closing_record_behind, "crash", 20_000, "I[59]:", _GIVING_UP[2]),
    _plant(
        "old-look",
        gives_up_by_an_old_look,
        "tests/t1_unit/test_short_segments.py::test_what_was_allowed_a_moment_ago_counts_before_anything_is_given_up",
        1,
        "assert",
    ),
    _plant(
        "map-of-what-is-not-saved",
        goes_on_from_what_is_not_saved,
        "tests/t4_sim/test_resync.py::test_i4_what_was_saved_last_leads_over_what_was_freed",
        1,
        "lost to the replica",
    ),
    _plant("marked-in-part", frees_without_marking, "sim", 5_000, "I4:|I9:"),
    _plant(
        "mark-clean-given-up",
        marks_clean_what_was_given_up,
        "tests/t4_sim/test_resync.py::test_a_fill_that_is_given_up_is_marked_again",
        1,
        "I9",
    ),
)
