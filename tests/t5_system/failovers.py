"""Failovers of one vault, driven by the command, and everything that one can leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replica_store.cli import main
from replica_store.failover import undoing
from replica_store.vault.operations import operations
from replica_store.vault.vault import Vault
from tests import sweep

COMMAND_S_MAX = 100.0


class FailoversUnderTest:
    """`replica-store failover …` on the vault at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Any verb of `replica-store`, to its end."""
        return _run([sys.executable, "-m", "replica_store.cli.main", "--vault", self.root, "--json", *words])

    def ask(self, *words: str | Path) -> Any:
        """`failover …`, which must succeed; its document."""
        done = self.run("failover", *words)
        assert done.returncode == 0, f"failover {words} ended with {done.returncode}: {done.stderr}"
        return json.loads(done.stdout)

    def refused(self, code: int, *words: str | Path) -> str:
        """`failover …`, which must end with this exit code and one line; the line.

        Within this process, which is faster, where it is refused before anything is started.
        """
        said, complained = io.StringIO(), io.StringIO()
        if code in (2, 3, 4):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                ended = main.run(["--vault", str(self.root), "--json", "failover", *map(str, words)])
        else:
            done = self.run("failover", *words)
            ended = done.returncode
            complained.write(done.stderr)
        line = complained.getvalue()
        assert ended == code, f"failover {words} ended with {ended}: {said.getvalue()}{line}"
        assert line.startswith("asrfs: error: ") and line.count("\n") == 1, line
        return line

    def killed(self, step: str, verb: str, *words: str) -> None:
        """The same, killed just before a step."""
        program = [sys.executable, "-m", "tests.t5_system.failover_program", self.root, step, verb, *words]
        done = _run(program)
        assert done.returncode == -9, f"{verb} never came to {step}: {done.stdout}{done.stderr}"

    def leftovers(self) -> str:
        """What is there of any failover: processes, mounts, loop devices, networks, directories."""
        found = sweep.find(self.root / "failover")
        networks = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        with Vault.open(str(self.root)) as vault:
            ours = {f"asrfs-{each.id[:12]}" for each in operations(vault.catalog)}
        directory = self.root / "failover"
        parts = [str(found) if found else "", *sorted(ours & set(networks))]
        return " ".join([*filter(None, parts), *(sorted(os.listdir(directory)) if directory.is_dir() else [])])

    def discard(self) -> None:
        """Take away whatever is left, so that the next test has nothing of this one."""
        with Vault.open(str(self.root)) as vault:
            found = operations(vault.catalog)
        for each in found:
            undoing.discard(each)


@contextmanager
def failovers_of(root: Path) -> Iterator[FailoversUnderTest]:
    failovers = FailoversUnderTest(root)
    try:
        yield failovers
    finally:
        failovers.discard()


def contents(document: dict[str, Any]) -> dict[str, bytes]:
    """The disks of a recovered machine, by name."""
    return {disk["name"]: Path(disk["path"]).read_bytes() for disk in document["disks"]}


def _run(words: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        stdin=subprocess.DEVNULL,
        check=False,
    )
