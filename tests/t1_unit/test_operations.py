"""Failover operations in a vault: durable, found again by a rebuild, and what they make of a machine's protection."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import BadInputError, FencedError, IntegrityError, NotFoundError, RefusedError
from asrfs.model.protection_states import ProtectionState
from asrfs.storage.system_clock import SystemClock
from replica_store.vault.flaws import flaw_before, note_flaws
from replica_store.vault.operations import (
    ChosenPoint,
    Kind,
    Operation,
    OperationState,
    Places,
    begin,
    change,
    operation,
    operations,
    sealed_operation,
)
from replica_store.vault.protection import check_not_committed, protection_of
from replica_store.vault.rebuild import rebuild
from replica_store.vault.scrub import Damage
from replica_store.vault.standing import standing_of
from replica_store.vault.vault import CATALOG_FILE, Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory, random_history

ID = "ab" * 16


@pytest.fixture
def history(scratch: Path, rng: random.Random) -> MemoryHistory:
    history = random_history(rng.randrange(1 << 30), records=20, disks={"root": 16 * 4096})
    fill_vault(scratch / "vault", history)
    return history


@pytest.fixture
def root(scratch: Path, history: MemoryHistory) -> str:
    return str(scratch / "vault")


def made(history: MemoryHistory, kind: Kind = "unplanned", operation_id: str = ID, begun_ns: int = 7) -> Operation:
    return Operation(
        id=operation_id,
        machine_id=history.id,
        machine=history.name,
        kind=kind,
        state="preparing",
        point=ChosenPoint(selector="latest", lsn=history.lsn, epoch=1, time_ns=5),
        places=Places(directory="/srv/one", state="/srv/one/state", mount="/srv/one/disks"),
        begun_ns=begun_ns,
    )


def damages_after_rebuild(root: str) -> list[str]:
    """Of anything but the machine, which this vault has no description of."""
    return [text for text in rebuild(root).damages if "description" not in text]


def go(root: str, state: OperationState) -> Operation:
    return change(root, ID, lambda vault, before: before.to(state, 9, "so it was asked"))


def test_an_operation_is_there_after_its_catalog_was_lost(root: str, history: MemoryHistory) -> None:
    begin(root, lambda vault: made(history))
    begin(root, lambda vault: made(history, "test", "cd" * 16, begun_ns=8))
    last = go(root, "commit-pending")
    with Vault.open(root) as vault:
        before = vault.catalog.table("operations")
        assert operations(vault.catalog) == operations(vault.catalog, history.id)
        assert [each.id for each in operations(vault.catalog)] == [ID, "cd" * 16]
        assert operation(vault.catalog, ID[:6]) == last
        assert (last.generation, last.causes[0].text) == (2, "so it was asked")
    os.unlink(os.path.join(root, CATALOG_FILE))
    assert damages_after_rebuild(root) == []
    with Vault.open(root) as vault:
        assert vault.catalog.table("operations") == before
        assert operation(vault.catalog, ID) == last


def test_what_died_before_the_catalog_had_it_is_found_and_the_next_change_is_newer(
    root: str, history: MemoryHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    def die(*_: object) -> None:
        raise Died

    begin(root, lambda vault: made(history))
    with monkeypatch.context() as patched:
        patched.setattr("replica_store.vault.operations.write_operation", die)
        with pytest.raises(Died):
            go(root, "cancelled")
    with Vault.open(root) as vault:
        assert operation(vault.catalog, ID).state == "preparing", "nothing was reported, so nothing need be there"
    assert go(root, "commit-pending").generation == 3, "above what was sealed and not catalogued"
    rebuild(root)
    with Vault.open(root) as vault:
        assert operation(vault.catalog, ID).state == "commit-pending"


def test_names_of_operations(root: str, history: MemoryHistory) -> None:
    begin(root, lambda vault: made(history))
    begin(root, lambda vault: made(history, "test", "abababab" + "0" * 24))
    with Vault.open(root) as vault:
        with pytest.raises(BadInputError, match="2 failovers"):
            operation(vault.catalog, "abab")
        for text in ("", "ab", "0000", "x" * 8, "../../etc", "f" * 33):
            with pytest.raises(NotFoundError):
                operation(vault.catalog, text)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("preparing", ProtectionState.FAILED_OVER),
        ("commit-pending", ProtectionState.FAILED_OVER),
        ("committed", ProtectionState.COMMITTED),
        ("cancelled", ProtectionState.PROTECTED),
    ],
)
def test_a_failover_holds_its_machine_and_a_test_does_not(
    root: str, history: MemoryHistory, state: OperationState, expected: ProtectionState
) -> None:
    begin(root, lambda vault: made(history, "test", "cd" * 16))
    with Vault.open(root) as vault:
        assert protection_of(vault, vault.machine(history.name)) is ProtectionState.PROTECTED
    begin(root, lambda vault: made(history))
    go(root, state)
    with Vault.open(root) as vault:
        machine = vault.machine(history.name)
        assert protection_of(vault, machine) is expected
        standing = standing_of(vault, machine, SystemClock().time_ns())
        assert standing.state == str(expected)
        assert bool(standing.alarms) == (state != "committed"), "nothing is to come of who runs elsewhere"
        if state == "committed":
            with pytest.raises(FencedError, match="runs elsewhere"):
                check_not_committed(vault.catalog, machine)
        else:
            check_not_committed(vault.catalog, machine)


def test_a_machine_of_which_nothing_came_is_unprotected(scratch: Path) -> None:
    empty = MemoryHistory()
    fill_vault(scratch / "empty", empty)
    with Vault.open(str(scratch / "empty")) as vault:
        assert protection_of(vault, vault.machine(empty.name)) is ProtectionState.UNPROTECTED


def test_rows_that_cannot_be_are_damage(root: str, history: MemoryHistory) -> None:
    begin(root, lambda vault: made(history))
    good = msgspec.json.encode(made(history)).decode()
    for column, value in (
        ("content", "{}"),
        ("content", "not json"),
        ("content", good.replace('"/srv/one/disks"', '"../disks"')),
        ("state", "serving"),
        ("generation", 9),
    ):
        with Vault.open(root, writable=True) as vault, pytest.raises(IntegrityError, match="rebuild"):
            with vault.catalog.transaction():
                vault.catalog.change(f"UPDATE operations SET {column} = ?", (value,))
                operations(vault.catalog)


def test_nobody_acts_on_a_row_that_was_never_sealed(root: str, history: MemoryHistory) -> None:
    begin(root, lambda vault: made(history))
    good = msgspec.json.encode(msgspec.structs.replace(made(history), generation=1)).decode()
    with Vault.open(root, writable=True) as vault, vault.catalog.transaction():
        other = good.replace("/srv/one/state", "/srv/two/state")
        vault.catalog.change("UPDATE operations SET content = ?", (other,))
    with Vault.open(root) as vault:
        assert operation(vault.catalog, ID).places.state == "/srv/two/state"
        with pytest.raises(IntegrityError, match="rebuild"):
            sealed_operation(vault, ID)
    with pytest.raises(IntegrityError):
        go(root, "cancelled")
    rebuild(root)
    assert go(root, "cancelled").places.state == "/srv/one/state"


def test_a_broken_seal_is_said_and_leaves_the_state_before(root: str, history: MemoryHistory) -> None:
    begin(root, lambda vault: made(history))
    first = set(os.listdir(os.path.join(root, "objects", "operations")))
    go(root, "committed")
    (newest,) = set(os.listdir(os.path.join(root, "objects", "operations"))) - first
    path = os.path.join(root, "objects", "operations", newest)
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"damaged!")
    (damage,) = damages_after_rebuild(root)
    assert newest in damage
    with Vault.open(root) as vault:
        assert operation(vault.catalog, ID).state == "preparing"


def test_flaws_are_of_the_last_verification_and_of_what_lies_behind_them(root: str, history: MemoryHistory) -> None:
    damage = Damage(history.name, "file", 7, 5, 6, "file: digest")
    note_flaws(root, history.id, [damage, damage], 3)
    with Vault.open(root) as vault:
        assert flaw_before(vault.catalog, history.id, 4) is None
        for lsn in (5, 20):
            assert flaw_before(vault.catalog, history.id, lsn) == (5, 6, "file: digest")
        assert flaw_before(vault.catalog, "cd" * 16, 20) is None
    note_flaws(root, history.id, [], 4)
    with Vault.open(root) as vault:
        assert flaw_before(vault.catalog, history.id, 20) is None


def test_a_change_that_refuses_changes_nothing(root: str, history: MemoryHistory) -> None:
    def refuse(vault: Vault, before: Operation) -> Operation:
        raise RefusedError("no")

    begun = begin(root, lambda vault: made(history))
    with pytest.raises(RefusedError):
        change(root, ID, refuse)
    with Vault.open(root) as vault:
        assert operation(vault.catalog, ID) == begun
