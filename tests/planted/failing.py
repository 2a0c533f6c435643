"""Bugs that only a failing disk shows: what came short is taken for whole, what a catalog refused for done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from ctypes import get_errno

import pytest

from asrfs.errors import NoSpaceError, TemporaryError
from asrfs.storage import directory
from asrfs.storage.directory import OpenFile
from asrfs.storage.interface import Bytes
from replica_store.ingest.ingester import Ingester
from replica_store.vault.rows import Entry
from tests.fakes.rebuild_world import FileCatalog
from tests.planted import Plant

_CASES = 10_000
_WRONG_BYTES = "I1:|I2:|I9:|IntegrityError|not for the caller: .* ends at"


def catalog_not_folded(patch: pytest.MonkeyPatch) -> None:
    """The new catalog takes the old one's place whether or not all of it got to its file."""
    patch.setattr(FileCatalog, "fold", lambda self: None)


def catalog_errors_ignored(patch: pytest.MonkeyPatch) -> None:
    """What the catalog could not take is acknowledged all the same."""
    sound = Ingester._catalogue

    def catalogue(self: Ingester, entries: Sequence[Entry]) -> None:
        with suppress(TemporaryError, NoSpaceError):
            sound(self, entries)

    patch.setattr(Ingester, "_catalogue", catalogue)


def short_write_taken_for_whole(patch: pytest.MonkeyPatch) -> None:
    def write_at(self: OpenFile, buffers: Sequence[Bytes], offset: int) -> None:
        directory.os.pwritev(self.fd, buffers, offset)

    patch.setattr(OpenFile, "write_at", write_at)


def short_read_taken_for_whole(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenFile, "read_at", lambda self, length, offset: directory.os.pread(self.fd, length, offset))
    patch.setattr(OpenFile, "read_into", lambda self, buffer, offset: directory.os.preadv(self.fd, [buffer], offset))


def interruption_taken_for_an_error(patch: pytest.MonkeyPatch) -> None:
    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if directory._libc.fallocate(fd, mode, offset, length) != 0:
            raise OSError(get_errno(), os.strerror(get_errno()))

    patch.setattr(directory, "_fallocate", fallocate)


PLANTS: tuple[Plant, ...] = (
    Plant(
        "unfolded",
        "a rebuilt catalog is believed to be in its file",
        "errors",
        _CASES,
        catalog_not_folded,
        "I3: the new catalog is not whole",
        ("rebuild E",),
    ),
    Plant(
        "catalog-errors",
        "what the catalog did not take is acknowledged",
        "errors",
        _CASES,
        catalog_errors_ignored,
        "I3",
        ("ingest SQLITE",),
    ),
    Plant(
        "short-write",
        "a write that came short is taken for whole",
        "errors",
        _CASES,
        short_write_taken_for_whole,
        _WRONG_BYTES,
        ("unaligned_writes below short call once",),
    ),
    Plant(
        "short-read",
        "a read that came short is taken for whole",
        "errors",
        _CASES,
        short_read_taken_for_whole,
        _WRONG_BYTES,
        ("unaligned_writes below short call for ever",),
    ),
    Plant(
        "interrupted",
        "an interrupted call is taken for a failed one",
        "errors",
        _CASES,
        interruption_taken_for_an_error,
        "not for the caller",
        ("zeros_and_discards below interrupted",),
    ),
)
