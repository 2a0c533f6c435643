"""Verbs that scripts call by the thousand load nothing that takes longer than they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"asyncio", "cryptography.x509", "numpy", "rich", "ssl", "starlette", "structlog", "trio"}
"""Each takes 30 ms or more to load, where Python itself starts in 20."""

_RUN = """
import json, sys
from {package}.cli.main import run
heavy = sys.argv.pop(1)
code = run(sys.argv[1:])
print(json.dumps([code, sorted(set(sys.modules) & set(heavy.split()))]), file=sys.stderr)
"""


def loaded(package: str, *words: str) -> set[str]:
    """Which of the heavy modules a verb that succeeds has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN.format(package=package), " ".join(HEAVY), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "state"
    loaded("asrfs", "--state", str(path), "init", "web1")
    loaded("asrfs", "--state", str(path), "disk", "add", "root", "--size", "1M")
    return path


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "vault"
    loaded("replica_store", "--vault", str(path), "init")
    return path


@pytest.mark.parametrize("verb", ["disk list", "disk add more --size 1M", "settings", "hooks list", "boot show"])
def test_a_host_answers_with_little(state: Path, verb: str) -> None:
    assert loaded("asrfs", "--state", str(state), "--json", *verb.split()) == set()


@pytest.mark.parametrize("verb", ["machine list", "group list", "policy show"])
def test_a_store_answers_with_little(vault: Path, verb: str) -> None:
    assert loaded("replica_store", "--vault", str(vault), "--json", *verb.split()) == set()


def test_a_table_needs_what_draws_it(state: Path) -> None:
    assert loaded("asrfs", "--state", str(state), "disk", "list") == {"rich"}
