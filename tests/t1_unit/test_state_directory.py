"""The state directory: what makes one, its small files, its locks."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from asrfs.daemon.settings import DEFAULT_TEXTS, Settings, parse_overrides
from asrfs.daemon.state import Served, StateDirectory, next_slot
from asrfs.errors import BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.model.machine import SLOT_MAX, DiskConfig, MachineConfig
from asrfs.model.positions import Cursor, Positions
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.journal_world import load_positions
from tests.fakes.state_world import on_double


@pytest.fixture
def state(scratch: Path) -> StateDirectory:
    return StateDirectory.create(str(scratch / "state"), "web1")


def disk(slot: int) -> DiskConfig:
    return DiskConfig(slot=slot, id=f"{slot:032x}", name=f"disk{slot}", size_bytes=1 << 20)


def test_new_state_directory_is_ours_alone(state: StateDirectory) -> None:
    machine = StateDirectory.open(state.root).load_machine()
    assert machine.name == "web1"
    assert machine.disks == ()
    for directory, _, files in os.walk(state.root):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        for name in files:
            assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600


def test_what_cannot_become_a_state_directory(scratch: Path, state: StateDirectory) -> None:
    with pytest.raises(RefusedError, match="already the state directory"):
        StateDirectory.create(state.root, "web2")
    (scratch / "full").mkdir()
    (scratch / "full" / "letter").touch()
    with pytest.raises(RefusedError, match="not empty"):
        StateDirectory.create(str(scratch / "full"), "web1")
    with pytest.raises(RefusedError, match="not a directory"):
        StateDirectory.create(str(scratch / "full" / "letter"), "web1")
    with pytest.raises(BadInputError):
        StateDirectory.create(str(scratch / "new"), "../x")
    assert not (scratch / "new").exists()
    with pytest.raises(NotFoundError, match="asrfs init"):
        StateDirectory.open(str(scratch / "full"))


def test_init_that_was_interrupted_can_be_repeated(state: StateDirectory) -> None:
    os.unlink(state.path("machine.json"))
    StateDirectory.create(state.root, "web1")


def test_edit_that_fails_changes_nothing(state: StateDirectory) -> None:
    def change(machine: MachineConfig) -> MachineConfig:
        raise RefusedError("no")

    before = state.load_machine()
    with pytest.raises(RefusedError):
        state.edit_machine(change)
    assert state.load_machine() == before
    edited = state.edit_machine(lambda machine: msgspec.structs.replace(machine, disks=(disk(0),)))
    assert state.load_machine() == edited != before


def test_slots_are_never_used_again(state: StateDirectory) -> None:
    machine = state.load_machine()
    assert next_slot(machine) == 0
    gone = msgspec.structs.replace(disk(7), removed=True)
    assert next_slot(msgspec.structs.replace(machine, disks=(disk(0), gone))) == 8
    with pytest.raises(RefusedError, match="used up"):
        next_slot(msgspec.structs.replace(machine, disks=(disk(SLOT_MAX),)))


def test_corrupt_file_is_named(state: StateDirectory) -> None:
    Path(state.path("machine.json")).write_text('{"id": 5}')
    with pytest.raises(IntegrityError, match=r"machine\.json"):
        state.load_machine()


def test_positions_and_served_survive(state: StateDirectory) -> None:
    assert state.load_positions() == Positions()
    positions = Positions(epoch=3, applied=Cursor(lsn=5, segment=1, offset=4096), last_digest="ab")
    state.save_positions(positions)
    assert state.load_positions() == positions
    assert state.load_served() is None
    state.save_served(Served(mount="/m", kernel_flags=1 << 39, has_resend=True))
    assert state.load_served() == Served(mount="/m", kernel_flags=1 << 39, has_resend=True)


def test_image_is_sparse_and_never_overwritten(state: StateDirectory) -> None:
    state.make_image(disk(1))
    status = os.stat(state.image_path(disk(1)))
    assert (status.st_size, status.st_blocks) == (1 << 20, 0)
    assert stat.S_IMODE(status.st_mode) == 0o600
    with pytest.raises(Exception, match="cannot make an image"):
        state.make_image(disk(1))


def test_settings_are_taken_all_or_none(state: StateDirectory) -> None:
    by_text = parse_overrides({key: text for key, text in DEFAULT_TEXTS.items() if key != "point_alarm"})
    assert state.load_settings() == Settings() == by_text
    settings = state.change_settings({"object_size": "1M", "journal_quota": "2G", "compression": "none"})
    assert settings == state.load_settings()
    assert (settings.object_size, settings.compression, settings.quota_bytes(1 << 50, 1 << 60)) == (
        1 << 20,
        False,
        2 << 30,
    )
    for bad in ({"object_age": "2s", "colour": "red"}, {"object_age": "soon"}, {"journal_quota": "1M"}):
        with pytest.raises(BadInputError):
            state.change_settings(bad)
        assert state.load_settings() == settings
    state.change_settings({"object_size": "", "journal_quota": "10%"})
    assert state.load_overrides() == {"journal_quota": "10%", "compression": "none"}
    assert state.load_settings().quota_bytes(100 << 30, 1 << 60) == 10 << 30


@pytest.mark.parametrize(
    "assignment",
    [
        "object_size=1K", "object_size=1G", "object_age=0s", "journal_quota=0%", "journal_quota=-5%",
        "journal_quota=x%", "bandwidth_limit=12", "compression=maybe", "group_deadline=1h", "=1", "object_size=",
    ],
)  # fmt: skip
def test_bad_settings_name_key_and_value(assignment: str) -> None:
    key, _, text = assignment.partition("=")
    with pytest.raises(BadInputError) as caught:
        parse_overrides({key: text})
    assert key in str(caught.value)


def test_role_belongs_to_one_process_until_it_ends(state: StateDirectory) -> None:
    assert state.lock_holder("agent") is None
    lock = state.take_lock("agent")
    assert lock is not None
    assert state.lock_holder("agent") == os.getpid()
    assert state.take_lock("agent") is None
    assert state.take_lock("disk_server") is not None, "each role by itself"
    assert not state.wait_lock_free("agent", 0.05)
    lock.close()
    assert state.wait_lock_free("agent", 0.05)


def test_role_is_free_after_sigkill(state: StateDirectory) -> None:
    program = (
        "import sys; from asrfs.daemon.state import StateDirectory\n"
        "lock = StateDirectory(sys.argv[1]).take_lock('agent'); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, state.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert state.lock_holder("agent") == holder.pid
        assert state.take_lock("agent") is None
        holder.kill()
    lock = state.take_lock("agent")
    assert lock is not None
    lock.close()


@pytest.mark.parametrize("settles", [False, True])
def test_i4_a_start_relies_on_no_name_that_a_power_loss_takes_back(
    settles: bool, scratch: Path, rng: random.Random
) -> None:
    """Positions whose writer was killed before its last step are found by the next start, and stay found."""
    storage = CrashStorage()
    looks: list[CrashStorage] = []
    with on_double(scratch / "state", storage) as state:
        state.save_positions(Positions(applied=Cursor(lsn=1)))
        storage.after_operation = lambda kind, name: looks.append(storage.killed())
        state.save_positions(Positions(applied=Cursor(lsn=2)))
    found = looks[-2]
    assert load_positions(found).applied.lsn == 2
    with on_double(scratch / "state", found) as state:
        if settles:
            state.settle()
    assert load_positions(found.crash(Fate.LOST, rng)).applied.lsn == (2 if settles else 1)
