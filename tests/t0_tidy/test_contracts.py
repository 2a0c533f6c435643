"""The import contracts of pyproject.toml turn red on a planted import, each for its own reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PLANTED = [
    ("asrfs/storage/planted.py", "import asrfs.disk", "asrfs imports downwards only"),
    ("asrfs/fuse/planted.py", "import asrfs.journal", "asrfs imports downwards only"),
    ("asrfs/attic/__init__.py", "", "asrfs imports downwards only"),
    ("replica_store/vault/planted.py", "import replica_store.points", "replica_store imports downwards only"),
    ("asrfs/daemon/planted.py", "import replica_store", "asrfs never imports replica_store"),
    (
        "replica_store/ingest/planted.py",
        "import asrfs.journal",
        "replica_store imports only the shared floor of asrfs",
    ),
    ("replica_store/api/planted.py", "import asrfs.fuse", "of replica_store, only points uses asrfs.fuse"),
    (
        "asrfs/model/planted.py",
        "import os",
        "model, format and protocol do no I/O, read no clock, draw no randomness",
    ),
    ("asrfs/daemon/planted.py", "import sqlite3", "SQL lives in replica_store.vault alone"),
    ("replica_store/points/planted.py", "import pyfuse3", "pyfuse3 is known to asrfs.fuse alone"),
    ("asrfs/replication/planted.py", "import ssl", "rooms that move data know no socket and no TLS"),
]


def lint(tree: Path) -> list[str]:
    """Names of the contracts that import-linter calls broken."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "NO_COLOR": "1"}
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    assert "Contracts:" in ran.stdout, ran.stdout + ran.stderr
    broken = [line.removesuffix(" BROKEN") for line in ran.stdout.splitlines() if line.endswith(" BROKEN")]
    assert bool(broken) == bool(ran.returncode), ran.stdout
    return broken


@pytest.mark.parametrize(("path", "source", "contract"), PLANTED)
def test_a_planted_import_breaks_its_contract(scratch: Path, path: str, source: str, contract: str) -> None:
    (scratch / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for init in [*ROOT.glob("asrfs/**/__init__.py"), *ROOT.glob("replica_store/**/__init__.py")]:
        room = scratch / init.relative_to(ROOT)
        room.parent.mkdir(parents=True, exist_ok=True)
        room.write_text('"""Only the shape of the tree matters here."""\n')
    assert lint(scratch) == []
    planted = scratch / path
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(f'"""Planted."""\n\n{source}\n')
    assert lint(scratch) == [contract]


def test_every_contract_has_a_planted_import() -> None:
    named = {
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("name = ")
    }
    assert {contract for _, _, contract in PLANTED} == named - {"asrfs"}
    assert shutil.which("lint-imports", path=str(Path(sys.executable).parent)) is not None
