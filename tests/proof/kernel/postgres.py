"""A PostgreSQL server in a private directory, and clients that know which transactions it acknowledged.

It refuses to run as root and may not be able to walk to the test's directory otherwise, so it runs as `postgres` with
one capability: to search directories.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import wait_until

USER = "postgres"
AS_USER = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
START_SECONDS_MAX = 60.0


def program(name: str) -> str:
    """The newest installed one; Debian keeps them apart by version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return str(found[-1]) if found else name


class Postgres:
    """The cluster in `directory`, which lies on the filesystem under test. `sockets`: a short path elsewhere."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.sockets = sockets
        self.process: subprocess.Popen[bytes] | None = None
        self.address: tuple[str, ...] = ("-h", str(sockets))
        """Words by which clients find it; `within`: a command that runs them, such as in another network."""
        self.within: tuple[str, ...] = ()
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, USER)
        self.log = sockets / "postgres.log"

    def create(self) -> None:
        """A new cluster."""
        self.directory.mkdir(mode=0o700)
        shutil.chown(self.directory, USER)
        arguments = ("initdb", "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C", "--data-checksums", "-D")
        self.run(*arguments, self.directory)

    def start(self) -> None:
        """Start the server and wait until it has recovered and answers."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.sockets),
            "shared_buffers": "16MB",
            "checkpoint_timeout": "30s",
            "max_wal_size": "32MB",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*AS_USER, program("postgres"), "-D", str(self.directory), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        wait_until(self._answers, START_SECONDS_MAX, f"PostgreSQL: {self.log}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        done = subprocess.run(
            [program("pg_isready"), "-q", "-h", self.sockets], check=False, timeout=10, stdin=subprocess.DEVNULL
        )
        return done.returncode == 0

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(60)

    def run(self, name: str, *arguments: str | Path, seconds_max: float = 120.0) -> str:
        """A program of PostgreSQL as its user, which must succeed; its output."""
        done = subprocess.run(
            [*self.within, *AS_USER, program(name), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=seconds_max,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd="/",
        )
        assert done.returncode == 0, f"{name} {arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def client(self, name: str, *arguments: str | Path) -> str:
        """A client program of the server in its database `postgres`."""
        return self.run(name, *self.address, "-U", USER, *arguments)

    def query(self, text: str) -> str:
        return self.client("psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", text).strip()

    def check(self) -> None:
        """`pg_amcheck` finds every table and index whole."""
        said = self.client("pg_amcheck", "--install-missing", "--all", "--heapallindexed", "--rootdescend")
        assert not said.strip(), said


@contextlib.contextmanager
def second_server(directory: Path, sockets: Path) -> Iterator[Postgres]:
    """Another server on a copy of a cluster: it recovers, as after a crash."""
    (directory / "postmaster.pid").unlink(missing_ok=True)
    server = Postgres(directory, sockets)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGQUIT)


class AcknowledgedRows:
    """Rows 1, 2, 3, … through one psql, each a transaction; `acknowledged`: the last one the server said yes to."""

    def __init__(self, server: Postgres) -> None:
        server.query("CREATE TABLE acknowledged (number bigint PRIMARY KEY, content text NOT NULL)")
        self.acknowledged = 0
        self._stop = threading.Event()
        self._client = subprocess.Popen(
            [program("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", str(server.sockets), "-U", USER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End the writing; the last row that was acknowledged."""
        self._stop.set()
        self._thread.join()
        self._client.communicate()
        return self.acknowledged

    def check_alive(self) -> None:
        assert self._error is None, f"I2/I8: a transaction failed: {self._error}"

    def _run(self) -> None:
        assert self._client.stdin is not None and self._client.stdout is not None
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                self._client.stdin.write(
                    f"INSERT INTO acknowledged VALUES ({number}, repeat(md5('{number}'), 20)) RETURNING number;\n"
                )
                self._client.stdin.flush()
                answer = self._client.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer != f"{number}\n":
                self._error = f"row {number}: {answer!r}"
                return
            self.acknowledged = number


def check_rows(server: Postgres, at_least: int) -> int:
    """Rows 1 to some n, each as it was written, n not below `at_least`; n."""
    said = server.query(
        "SELECT count(*), coalesce(max(number), 0), count(*) FILTER (WHERE content <> repeat(md5(number::text), 20)) "
        "FROM acknowledged"
    )
    count, last, wrong = map(int, said.split("|"))
    assert count == last and wrong == 0, f"{count} rows up to number {last}, {wrong} of them wrong"
    assert last >= at_least, f"I2: transaction {at_least} was acknowledged, the server has {last}"
    return last
