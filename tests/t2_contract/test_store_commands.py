"""The command-line contract of `replica-store`: exit codes, one line on stderr, options anywhere, `--json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from replica_store.cli.main import run
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault, lock_descriptions


def test_bad_input_is_one_line_and_a_code_and_changes_nothing(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault = scratch / "vault"
    vault.mkdir()
    (vault / "somebody's").write_text("own")
    cases: list[tuple[Callable[[], object] | None, tuple[str, ...], int]] = [
        (None, ("init",), 4),
        (None, ("machine", "list"), 3),
        (None, ("serve",), 3),
        (None, ("token", "web1"), 3),
        (None, ("rebuild",), 3),
        ((vault / "somebody's").unlink, ("init", "--name", "../x"), 2),
        (lambda: run(["--vault", str(vault), "init"]), ("init",), 4),
        (None, ("token", ""), 2),
        (None, ("token", "x" * 64), 2),
        (None, ("token", "a%2Fb"), 2),
        (None, ("token", "web1", "--expires", "soon"), 2),
        (None, ("token", "web1", "--expires", "0s"), 2),
        (None, ("machine", "show", "nobody"), 3),
        (None, ("machine", "show", "../x"), 2),
        (None, ("machine", "revoke", "nobody"), 3),
        (None, ("machine", "revoke", "nobody", "--yes"), 3),
        (None, ("verify", "nobody"), 3),
        (None, ("serve", "--data-port", "70000"), 2),
        (None, ("serve", "--host", "192.0.2.1"), 4),
        (None, ("no-such-verb",), 2),
        (lambda: (vault / "vault.json").write_text("{"), ("machine", "list"), 5),
    ]
    for prepare, arguments, code in cases:
        if prepare is not None:
            prepare()
        capsys.readouterr()
        assert run([*arguments, "--vault", str(vault)]) == code, f"{arguments}: {capsys.readouterr().err}"
        error = capsys.readouterr().err
        assert error.startswith("asrfs: error: ") and error.count("\n") == 1, error


def test_global_options_go_anywhere_and_json_is_one_document(
    scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = str(scratch / "vault")
    assert run(["--vault", vault, "init", "--name", "site-b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "site-b"
    monkeypatch.setenv("REPLICA_STORE_VAULT", vault)
    for line in (["machine", "list", "--json"], ["machine", "--json", "list"], ["--json", "machine", "list"]):
        assert run(line) == 0
        assert json.loads(capsys.readouterr().out) == []
    assert run(["verify", "--json", f"--vault={vault}"]) == 0
    assert json.loads(capsys.readouterr().out)["damages"] == []
    assert run(["rebuild"]) == 0
    assert "machines" in capsys.readouterr().out
    assert run(["--vault"]) == 2
    assert run([]) == 2
    assert run(["--help"]) == 0


def test_the_vault_is_its_owners_alone(scratch: Path) -> None:
    vault = scratch / "vault"
    assert run(["--vault", str(vault), "init"]) == 0
    for path in (vault, *vault.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o077 == 0 or path.name == "vault.json", f"{path}: {mode:o}"


def test_nobody_revokes_while_the_catalog_is_made_anew_or_the_other_way_round(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is committed to a catalog that is about to be replaced would be lost, although it was said to be done."""
    root = str(scratch / "vault")
    assert run(["--vault", root, "init"]) == 0
    with Vault.open(root, writable=True) as vault, vault.catalog.transaction():
        vault.catalog.put_machine(MachineRow("1" * 32, "web1", 1, "a", False, 1, 1, b"sealed"))
    with lock_descriptions(root):
        for verb in (["machine", "revoke", "web1", "--yes"], ["rebuild"]):
            capsys.readouterr()
            assert run(["--vault", root, *verb]) == 4
            assert "try again when that is done" in capsys.readouterr().err
    with Vault.open(root) as vault:
        assert not vault.machine("web1").revoked
    assert run(["--vault", root, "machine", "revoke", "web1", "--yes"]) == 0
    with Vault.open(root) as vault:
        assert vault.machine("web1").revoked


def test_groups_on_the_command_line(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(scratch / "vault")
    assert run(["--vault", root, "init"]) == 0
    with Vault.open(root, writable=True) as vault, vault.catalog.transaction():
        for number, name in enumerate(("web1", "db1"), 1):
            vault.catalog.put_machine(MachineRow(f"{number:032x}", name, 1, "a", False, 1, 1, b"sealed"))

    def ask(*arguments: str) -> object:
        capsys.readouterr()
        assert run(["--vault", root, "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    for arguments, code in (
        (("create", "shop"), 2),
        (("create", "../x", "--member", "web1"), 2),
        (("create", "shop", "--member", "nobody"), 3),
        (("create", "web1", "--member", "db1"), 4),
        (("show", "shop"), 3),
        (("add", "shop", "db1"), 3),
        (("remove", "shop", "db1"), 3),
        (("delete", "shop", "--yes"), 3),
    ):
        capsys.readouterr()
        assert run(["--vault", root, "group", *arguments]) == code, arguments
        error = capsys.readouterr().err
        assert error.startswith("asrfs: error: ") and error.count("\n") == 1, error
    assert ask("group", "list") == []
    made = ask("group", "create", "shop", "--member", "web1")
    assert isinstance(made, dict)
    assert (made["name"], made["coordinator"], [each["name"] for each in made["members"]]) == ("shop", "web1", ["web1"])
    ask("group", "add", "shop", "db1")
    shown = ask("group", "remove", "shop", "web1")
    assert isinstance(shown, dict)
    assert (shown["coordinator"], shown["generation"] > made["generation"]) == ("db1", True)
    assert ask("group", "list") == [ask("group", "show", "shop")]
    assert run(["--vault", root, "group", "remove", "shop", "db1"]) == 4
    assert run(["--vault", root, "group", "delete", "shop"]) == 2
    assert ask("group", "delete", "shop", "--yes") == {"deleted": "shop"}
    assert run(["--vault", root, "group", "list"]) == 0
