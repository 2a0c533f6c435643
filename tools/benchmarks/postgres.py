"""A PostgreSQL server in a directory of its own, and pgbench on it.

The server refuses to run as root and may not be able to walk to the directory otherwise, so it runs as `postgres` with
one capability: to search directories. Its settings are those it comes with.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lab import LabError, run

from .workbench import Workbench

USER = "postgres"
_AS_USER = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
_STOP_SECONDS_MAX = 120.0


class Transactions(NamedTuple):
    """What pgbench reached."""

    per_s: float
    latency_ms: float
    operations: int


class Postgres:
    """The cluster in `directory`. `sockets`: a short path on another filesystem."""

    def __init__(self, bench: Workbench, directory: Path, sockets: Path) -> None:
        self._bench = bench
        self._directory = directory
        self._sockets = sockets

    def create(self) -> None:
        """A new cluster."""
        self._directory.mkdir(mode=0o700)
        shutil.chown(self._directory, USER)
        self._run("initdb", "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C", "-D", self._directory)

    def start(self, stack: ExitStack) -> None:
        """Start the server; the stack's end stops it and waits until its files are closed."""
        words = (*_AS_USER, program("postgres"), "-D", self._directory, "-c", "listen_addresses=")
        ready = (program("pg_isready"), "-q", "-h", str(self._sockets))

        def answers() -> bool:
            return subprocess.run(ready, check=False, timeout=10, stdin=subprocess.DEVNULL).returncode == 0

        process = self._bench.start(stack, (*words, "-c", f"unix_socket_directories={self._sockets}"), answers)
        stack.callback(self._bench.quietly, lambda: _stop(process))

    def fill(self, scale: int) -> None:
        """pgbench's tables: `scale` times 100,000 accounts."""
        self._client("pgbench", "--initialize", "--quiet", f"--scale={scale}")

    def measure(self, clients: int, seconds: int) -> Transactions:
        """pgbench's own mix of transactions, from a checkpoint on. Raises LabError if one failed."""
        self._client("psql", "-XqAt", "-c", "CHECKPOINT")
        said = self._client("pgbench", f"--client={clients}", f"--time={seconds}", "--no-vacuum", seconds_max=seconds)
        failed = _number(r"number of failed transactions: (\d+)", said)
        if failed:
            raise LabError(f"{failed:.0f} transactions failed")
        return Transactions(
            _number(r"tps = ([\d.]+)", said),
            _number(r"latency average = ([\d.]+) ms", said),
            int(_number(r"number of transactions actually processed: (\d+)", said)),
        )

    def _client(self, name: str, *words: str, seconds_max: float = 0) -> str:
        return self._run(name, "-h", self._sockets, "-U", USER, *words, USER, seconds_max=seconds_max)

    def _run(self, name: str, *words: str | Path, seconds_max: float = 0) -> str:
        return run([*_AS_USER, program(name), *map(str, words)], timeout=600 + seconds_max)


def program(name: str) -> str:
    """The newest installed one; Debian keeps them apart by version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return str(found[-1]) if found else name


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    process.wait(_STOP_SECONDS_MAX)


def _number(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise LabError(f"pgbench did not say {pattern!r}: {said[-300:]}")
    return float(found[1])
