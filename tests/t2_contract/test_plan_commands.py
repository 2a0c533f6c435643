"""`replica-store plan`: plans are kept, shown, forgotten and tried without doing anything; what fails is one line."""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asrfs.errors import IntegrityError
from replica_store.cli.main import run
from replica_store.failover.plan_book import read_plans
from replica_store.failover.plan_facts import paths_in_use, ports_in_use
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import random_history

PLAN = """
name = "shop"
description = "All of it"
point = "latest"
[[groups]]
name = "databases"
pre = [{ name = "announce", command = ["/bin/true"] }]
machines = [{ name = "web1" }]
"""

Ask = Callable[..., Any]


@pytest.fixture
def vault(scratch: Path, rng: random.Random) -> Path:
    fill_vault(scratch / "vault", random_history(rng.randrange(1 << 30), records=60, disks={"root": 1 << 20}))
    return scratch / "vault"


@pytest.fixture
def ask(vault: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Its document, or with `code` the one line of a failure."""

    def ask(*words: str | Path, code: int = 0) -> Any:
        capsys.readouterr()
        got = run(["--vault", str(vault), "--json", "plan", *map(str, words)])
        said = capsys.readouterr()
        assert got == code, said.err
        if code:
            assert said.err.startswith("asrfs: error: ") and said.err.count("\n") == 1
            return said.err
        return json.loads(said.out)

    return ask


def test_plans_are_kept_and_forgotten_and_need_no_catalog(ask: Ask, vault: Path, scratch: Path) -> None:
    file = scratch / "shop.toml"
    file.write_text(PLAN)
    assert ask("list") == []
    created = ask("create", file)
    assert ask("show", "shop") == created and created["groups"][0]["machines"] == [{"name": "web1"}]
    assert ask("create", file) == created, "the same once more is nothing new"
    file.write_text(PLAN.replace("All of it", "More"))
    assert "--force" in ask("create", file, code=4)
    assert ask("create", file, "--force")["description"] == "More"
    for number in range(5):
        file.write_text(PLAN.replace('"shop"', f'"plan{number}"'))
        ask("create", file)
    assert [each["name"] for each in ask("list")] == [*(f"plan{n}" for n in range(5)), "shop"]
    assert len(list((vault / "objects/plans").iterdir())) == 3, "old books go"
    assert "--yes" in ask("delete", "plan0", code=2)
    ask("delete", "plan0", "--yes")
    ask("delete", "plan0", "--yes", code=3)
    ask("show", "plan0", code=3)
    for left in vault.glob("catalog.sqlite3*"):
        left.unlink()
    assert run(["--vault", str(vault), "rebuild"]) == 5, "this vault has no description of its machine"
    assert len(ask("list")) == 5 and ask("show", "shop")["description"] == "More"


def test_bad_input_changes_nothing(ask: Ask, scratch: Path) -> None:
    file = scratch / "bad.toml"
    ask("create", scratch / "none.toml", code=3)
    ask("create", scratch, code=2)
    for text, words in (
        ("", "name"),
        (PLAN.replace("[[groups]]", "[[groups]]\nafter = ['databases']"), "wait for each other"),
        (PLAN + '[[groups]]\nname = "x"\nmachines = [{ name = "web1" }]', "twice"),
    ):
        file.write_text(text)
        assert words in ask("create", file, code=2)
    file.write_bytes(b"\xff\xfe")
    ask("create", file, code=2)
    ask("show", "../x", code=2)
    ask("check", "none", code=3)
    assert ask("list") == []


def test_a_dry_run_says_what_stands_in_the_way(ask: Ask, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scratch / "shop.toml"
    file.write_text(PLAN)
    ask("create", file)
    assert ask("check", "shop", "--state", scratch / "not/yet") == {"plan": "shop", "kind": "test", "findings": []}
    for wrong, words in (
        (PLAN.replace("web1", "web2"), "no such machine"),
        (PLAN.replace('"latest"', '"lsn:999999"'), "no record 999999"),
        (PLAN.replace('"latest"', '"latest-application"'), "no application-consistent"),
        (PLAN.replace("/bin/true", "/bin/no-such-program"), "not a program"),
    ):
        file.write_text(wrong)
        ask("create", file, "--force")
        assert words in ask("check", "shop", code=4)
    file.write_text(PLAN)
    ask("create", file, "--force")
    used = shutil.disk_usage(scratch)
    monkeypatch.setattr("shutil.disk_usage", lambda path: used._replace(free=1000))
    assert "1000 B are free" in ask("check", "shop", code=4)


def test_books_that_cannot_be_read_are_not_taken_for_none(ask: Ask, vault: Path, scratch: Path) -> None:
    (scratch / "shop.toml").write_text(PLAN)
    ask("create", scratch / "shop.toml")
    (book,) = (vault / "objects/plans").iterdir()
    book.chmod(0o600)
    book.write_bytes(book.read_bytes()[:-1] + b"x")
    ask("list", code=5)
    with Vault.open(str(vault)) as opened, pytest.raises(IntegrityError, match="seal"):
        read_plans(opened)


def test_what_is_in_use_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert listening.getsockname()[1] in ports_in_use()
    assert "/proc" in paths_in_use() and "/no/such" not in paths_in_use()
