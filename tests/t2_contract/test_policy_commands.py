"""`replica-store policy`: what it changes, what it refuses and says, and that a rebuilt catalog has it all again."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.policy import DEFAULT_TEXTS
from asrfs.storage.system_clock import SystemClock
from replica_store.cli.main import run
from replica_store.vault.books import BOOKS_KEPT
from replica_store.vault.catalog import Catalog
from replica_store.vault.configuration import configuration_of
from replica_store.vault.policies import Assigned, Assignment, PolicyBook, assigned, read_book
from replica_store.vault.policy_changes import POLICY_BOOKS, set_policy
from replica_store.vault.vault import CATALOG_FILE, Vault, lock_descriptions
from tests.fakes.rebuild_world import REVOKED, SUPERSEDED, add_restricted_machines


@pytest.fixture
def root(scratch: Path, rng: random.Random) -> str:
    root = str(scratch / "vault")
    vault = Vault.create(root, "site-b", SystemClock())
    add_restricted_machines(vault, rng)
    vault.close()
    return root


class Commands:
    """`replica-store` on one vault."""

    def __init__(self, root: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._root = root
        self._capsys = capsys

    def json(self, *words: str) -> Any:
        assert run(["--vault", self._root, "--json", *words]) == 0, self._capsys.readouterr().err
        return json.loads(self._capsys.readouterr().out)

    def refused(self, code: int, *words: str) -> str:
        before = state(self._root)
        self._capsys.readouterr()
        assert run(["--vault", self._root, *words]) == code
        error = self._capsys.readouterr().err
        assert error.startswith("asrfs: error: ") and error.count("\n") == 1, error
        assert state(self._root) == before, "what is refused changes nothing"
        return error

    def text(self, *words: str) -> str:
        assert run(["--vault", self._root, *words]) == 0
        return self._capsys.readouterr().out


@pytest.fixture
def store(root: str, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(root, capsys)


def state(root: str) -> tuple[PolicyBook, int]:
    with Vault.open(root) as vault:
        return read_book(vault.catalog), len(vault.objects.list(POLICY_BOOKS.prefix))


def test_there_is_always_a_default_policy_and_everybody_has_it(store: Commands) -> None:
    (default,) = store.json("policy", "show")
    assert default["name"] == "default"
    assert default["keys"] == DEFAULT_TEXTS
    assert default["set"] == {}
    assert default["machines"] == [{"machine": name, "by": "default"} for name in sorted((REVOKED, SUPERSEDED))]
    assert store.json("policy", "show", "default") == default
    assert store.json("policy", "set", "default", "crash_interval=60s")["keys"]["crash_interval"] == "60s"
    assert store.json("policy", "set", "default", "crash_interval=default") == default
    assert "all at their defaults" in store.text("policy", "show")


def test_setting_adds_and_takes_back_and_is_all_or_nothing(root: str, store: Commands) -> None:
    made = store.json("policy", "set", "gold", "crash_interval=10s", "bandwidth_limit=08:00-18:00 20M; else 200M")
    assert made["set"] == {"crash_interval": "10s", "bandwidth_limit": "08:00-18:00 20M; else 200M"}
    assert made["keys"] == DEFAULT_TEXTS | made["set"]
    store.refused(2, "policy", "set", "gold", "retention=2d", "crash_interval=0")
    changed = store.json("policy", "set", "gold", "retention=2d", "crash_interval=")
    assert changed["set"] == {"bandwidth_limit": "08:00-18:00 20M; else 200M", "retention": "2d"}
    before = state(root)
    store.json("policy", "set", "gold", "retention=2d")
    assert state(root) == before, "what changes nothing tells nobody"


def test_what_is_refused_says_all_of_it_at_once(store: Commands) -> None:
    said = store.refused(
        2, "policy", "set", "gold", "crash_intervall=1s", "retention=500d", "on_failure=x", "colr=default"
    )
    for part in ("did you mean crash_interval?", "retention=500d: from 1s to 365d", "on_failure=x", "'colr'"):
        assert part in said, said
    assert "not shorter than retention" in store.refused(
        2, "policy", "set", "gold", "application_interval=24h", "retention=24h"
    )
    said = store.refused(
        2, "policy", "set", "gold", "junk", "retention=1d", "retention=2d", "crash_intervall=1s", "point_alarm=0"
    )
    for part in (
        "'junk' is not KEY=VALUE",
        "retention is given twice",
        "did you mean crash_interval?",
        "point_alarm=0:",
    ):
        assert part in said, said
    store.refused(2, "policy", "set", "../gold", "retention=1d")
    store.refused(2, "policy", "set", "gold")
    store.refused(3, "policy", "show", "gold")
    store.refused(3, "policy", "assign", "gold", SUPERSEDED)
    store.refused(3, "policy", "assign", "default", "nobody")
    store.refused(3, "policy", "unassign", "nobody")
    store.refused(3, "policy", "delete", "gold")
    assert "there is no policy" in store.refused(3, "policy", "show", "gold")


def test_assigning_changes_what_one_machine_is_told(root: str, store: Commands) -> None:
    store.json("policy", "set", "gold", "crash_interval=10s")
    shown = store.json("policy", "assign", "gold", SUPERSEDED)
    assert shown["machines"] == [{"machine": SUPERSEDED, "by": "machine"}]
    assert [each["name"] for each in shown["assigned"]] == [SUPERSEDED]
    with Vault.open(root) as vault:
        told = configuration_of(vault.catalog, vault.machine(SUPERSEDED).id)
        other = configuration_of(vault.catalog, vault.machine(REVOKED).id)
    assert (told.policy, told.keys) == ("gold", {"crash_interval": "10s"})
    assert (other.policy, other.keys) == ("default", {})
    assert "is assigned" in store.refused(4, "policy", "delete", "gold")
    store.json("policy", "unassign", SUPERSEDED)
    (default,) = store.json("policy", "delete", "gold")
    assert {each["machine"] for each in default["machines"]} == {REVOKED, SUPERSEDED}


def test_who_was_given_a_policy_is_shown_also_where_no_machine_has_it_by_that(store: Commands) -> None:
    store.json("policy", "set", "gold", "crash_interval=10s")
    store.json("policy", "set", "own", "crash_interval=20s")
    store.json("group", "create", "shop", "--member", SUPERSEDED)
    store.json("policy", "assign", "gold", "shop")
    store.json("policy", "assign", "own", SUPERSEDED)
    assert "see `replica-store policy show gold`" in store.refused(4, "policy", "delete", "gold")
    lines = [line.split() for line in store.text("policy", "show", "gold").splitlines()]
    assert ["group", "shop"] in lines
    assert ["machine", SUPERSEDED] in [line.split() for line in store.text("policy", "show", "own").splitlines()]


def test_a_machines_own_policy_wins_over_its_groups_and_the_first_group_over_the_others() -> None:
    machine, shop, archive = "1" * 32, "2" * 32, "3" * 32
    book = PolicyBook(
        policies={"gold": {}, "silver": {}, "own": {}},
        assignments=(
            Assignment("group", shop, "gold"),
            Assignment("group", archive, "silver"),
            Assignment("machine", machine, "own"),
        ),
    )
    groups = {"shop": shop, "archive": archive, "bare": "4" * 32}
    assert assigned(book, machine, groups) == Assigned("own", "machine")
    assert assigned(book, "9" * 32, groups) == Assigned("silver", "group archive")
    assert assigned(book, "9" * 32, {"shop": shop}) == Assigned("gold", "group shop")
    assert assigned(book, "9" * 32, {"bare": "4" * 32}) == Assigned("default", "default")


@pytest.mark.parametrize("is_lost", [False, True], ids=["over-the-old-one", "lost"])
def test_a_rebuilt_catalog_has_every_policy_and_assignment(root: str, store: Commands, is_lost: bool) -> None:
    for number in range(1, 6):
        store.json("policy", "set", "gold", f"crash_interval={number}s")
    store.json("policy", "assign", "gold", SUPERSEDED)
    before, objects = state(root)
    assert objects == BOOKS_KEPT, "older ones do not pile up"
    if is_lost:
        os.unlink(os.path.join(root, CATALOG_FILE))
    assert store.json("rebuild")["damages"] == []
    after, _ = state(root)
    assert (after.policies, after.assignments) == (before.policies, before.assignments)
    assert after.generation > before.generation, "hosts are told again"
    store.json("policy", "set", "gold", "crash_interval=9s")
    assert store.json("rebuild")["damages"] == []
    assert store.json("policy", "show", "gold")["set"] == {"crash_interval": "9s"}


def test_a_damaged_object_is_told_and_an_older_one_holds(
    root: str, store: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    store.json("policy", "set", "gold", "crash_interval=1s")
    (first,) = (Path(root) / "objects" / "policies").glob("book-*.obj")
    store.json("policy", "set", "gold", "crash_interval=2s")
    (newest,) = set((Path(root) / "objects" / "policies").glob("book-*.obj")) - {first}
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert run(["--vault", root, "rebuild"]) == 5
    assert newest.name in capsys.readouterr().err
    assert store.json("policy", "show", "gold")["set"] == {"crash_interval": "1s"}


def test_a_change_that_died_before_its_commit_is_superseded_by_the_next(
    root: str, store: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.json("policy", "set", "gold", "crash_interval=1s")

    def die(*_: object) -> None:
        raise TemporaryError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr("replica_store.vault.policy_changes.write_book", die)
        with Vault.open(root, writable=True) as vault, pytest.raises(AsrfsError):
            set_policy(vault, "gold", {"crash_interval": "2s"})
    assert store.json("policy", "show", "gold")["set"] == {"crash_interval": "1s"}
    store.json("policy", "set", "gold", "crash_interval=3s")
    with Vault.open(root) as vault:
        newest, damages = POLICY_BOOKS.newest(vault.objects, vault.sealer)
    assert damages == []
    assert newest == state(root)[0], "the catalog's is the newest among the objects, too"


def test_nobody_changes_a_policy_while_the_catalog_is_made_anew(
    root: str, store: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica_store.cli.policy.LOCK_S_MAX", 0.1)
    with lock_descriptions(root):
        assert "try again" in store.refused(4, "policy", "set", "gold", "crash_interval=1s")
        store.text("policy", "show")


def test_damaged_rows_are_named_and_a_rebuild_mends_them(root: str, store: Commands) -> None:
    store.json("policy", "set", "gold", "crash_interval=1s")
    catalog = Catalog(os.path.join(root, CATALOG_FILE), writable=True)
    with catalog.transaction():
        catalog.change("UPDATE policies SET keys = '[1'")
    catalog.close()
    assert run(["--vault", root, "policy", "show"]) == 5
    store.json("rebuild")
    assert store.json("policy", "show", "gold")["set"] == {"crash_interval": "1s"}
