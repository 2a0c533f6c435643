"""A machine that goes on from a recovery point: its description, and the state directory that is made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.daemon.state import MACHINE_FILE, StateDirectory
from asrfs.errors import FormatError, RefusedError
from asrfs.model.boot import NO_BOOT
from asrfs.model.names import id_bytes
from asrfs.model.recovered import RecoveredDisk, RecoveredMachine, decode_recovered, encode_recovered
from asrfs.storage.directory import DirectoryStorage

ID = "5" * 32


def disk(slot: int = 0, **changes: Any) -> RecoveredDisk:
    values = {"id": f"{slot:032x}", "name": f"d{slot}", "size_bytes": 1 << 20, "base": f"/points/db1/p/d{slot}.img"}
    return RecoveredDisk(**({"slot": slot} | values | changes))


def machine(**changes: Any) -> RecoveredMachine:
    values: dict[str, Any] = {"machine_id": ID, "name": "db1", "epoch": 3, "lsn": 900, "time_ns": 10**18}
    return RecoveredMachine(**(values | {"disks": (disk(), disk(4))} | changes))


@given(
    st.builds(
        machine,
        epoch=st.integers(1, (1 << 32) - 1),
        lsn=st.integers(0, 1 << 60),
        disks=st.lists(st.integers(0, 0xFFFE).map(disk), max_size=5, unique_by=lambda each: each.slot).map(tuple),
        boot=st.sampled_from((None, NO_BOOT)),
    )
)
def test_what_is_written_is_read(described: RecoveredMachine) -> None:
    assert decode_recovered(encode_recovered(described)) == described


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "../x"},
        {"machine_id": "5"},
        {"epoch": 0},
        {"lsn": -1},
        {"point": "a\nb"},
        {"point": "p" * 201},
        {"disks": (disk(), disk(name="e"))},
        {"disks": (disk(), disk(1, name="d0"))},
        {"disks": (disk(base="points/d0.img"),)},
        {"disks": (disk(base="/points/\0"),)},
        {"disks": (disk(base=""),)},
        {"disks": (disk(base="/" + "x" * 4096),)},
        {"disks": (disk(removed=True),)},
        {"disks": (disk(size_bytes=1000),)},
        {"disks": (disk(size_bytes=0),)},
        {"disks": (disk(id="no"),)},
        {"disks": (disk(slot=0xFFFF),)},
        {"unknown": 1},
    ],
)
def test_what_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    document = json.loads(msgspec.json.encode(machine())) | json.loads(msgspec.json.encode(bad))
    with pytest.raises(FormatError):
        decode_recovered(json.dumps(document).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"format": 2}'])
def test_what_is_no_description_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        decode_recovered(content)


def test_state_directory_goes_on_behind_the_point(scratch: Path) -> None:
    gone = disk(7, base="", removed=True)
    described = machine(disks=(disk(), disk(4), gone), point="before-upgrade")
    state = StateDirectory.create_recovered(str(scratch / "state"), described)
    config = state.load_machine()
    assert (config.id, config.name) == (ID, "db1")
    assert [(each.slot, each.base, each.removed, each.released) for each in config.disks] == [
        (0, "/points/db1/p/d0.img", False, False),
        (4, "/points/db1/p/d4.img", False, False),
        (7, None, True, True),
    ]
    for each in config.live_disks():
        status = os.stat(state.image_path(each))
        assert (status.st_size, status.st_blocks) == (each.size_bytes, 0)
    positions = state.load_positions()
    assert (positions.epoch, positions.applied.lsn, positions.acknowledged.lsn) == (3, 900, 900)
    assert state.load_recovered() == described
    assert "point before-upgrade, LSN 900 of 2001-09-09T01:46:40" in described.described()
    with pytest.raises(RefusedError):
        StateDirectory.create_recovered(str(scratch / "state"), described)


def test_journal_begins_behind_the_point_in_its_epoch(scratch: Path) -> None:
    from asrfs.journal.recovery import recover
    from asrfs.journal.writer import Journal
    from asrfs.storage.system_clock import SystemClock

    state = StateDirectory.create_recovered(str(scratch / "state"), machine())
    storage = DirectoryStorage(state.journal)
    recovered = recover(storage, state.load_positions(), id_bytes(ID))
    journal = Journal(storage, id_bytes(ID), recovered, SystemClock())
    try:
        assert (journal.epoch, journal.appended_lsn) == (3, 900)
    finally:
        journal.close()


def test_init_that_died_can_be_repeated_and_is_no_other_machine(scratch: Path) -> None:
    root = str(scratch / "state")
    state = StateDirectory.create_recovered(root, machine())
    os.unlink(state.path(MACHINE_FILE))
    with open(state.path("images", f"{0:032x}.img"), "r+b") as image:
        image.write(b"left by who died")
    with pytest.raises(RefusedError):
        StateDirectory.create(root, "db2")
    state = StateDirectory.create_recovered(root, machine(lsn=901))
    assert os.stat(state.path("images", f"{0:032x}.img")).st_blocks == 0
    assert state.load_positions().applied.lsn == 901


def test_machine_without_a_point_has_none(scratch: Path) -> None:
    assert StateDirectory.create(str(scratch / "state"), "db1").load_recovered() is None
