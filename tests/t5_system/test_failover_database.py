"""PostgreSQL brought back by its machine's boot settings: every transaction it acknowledged up to the point is there.

A drill runs beside the server that goes on, on the same paths below a root of its own and in a network of its own; then
the host loses its power, and the failover in earnest ends when the recovered server answers. What was acknowledged is
known from clients alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asrfs.daemon.control import call
from asrfs.daemon.state import ROLES, StateDirectory
from asrfs.errors import AsrfsError
from tests.proof.kernel.postgres import AS_USER, USER, AcknowledgedRows, Postgres, check_rows, program
from tests.t5_system.failovers import FailoversUnderTest, failovers_of
from tests.t5_system.machine import run_tool
from tests.waiting import wait_until
from tools.lab import Lab

DISK = "base"
START = """
set -e
data="$ASRFS_ROOT{data}"
rm -f "$data/postmaster.pid"  # of the server that was lost; its number may be somebody else's here
cd /
exec {as_user} {pg_ctl} start -w -t 60 -D "$data" -l {log} \
    -o "-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c shared_buffers=16MB"
"""
STOP = 'cd / && exec {as_user} {pg_ctl} stop -m fast -D "$ASRFS_ROOT{data}"\n'


class RecoveredServer(Postgres):
    """The server that a failover has started, reached by its port, `within` the network it is in."""

    def __init__(self, directory: Path, sockets: Path, port: int, within: tuple[str, ...] = ()) -> None:
        super().__init__(directory, sockets)
        self.address = ("-h", "127.0.0.1", "-p", str(port))
        self.within = within


class Noted:
    """Which transaction had been acknowledged before the host's history was so long: (number, LSN), in order."""

    def __init__(self, rows: AcknowledgedRows, state: StateDirectory) -> None:
        self._rows, self._socket = rows, state.socket_path("agent")
        self._stop = threading.Event()
        self._found: list[tuple[int, int]] = []
        self._thread = threading.Thread(target=self._note)
        self._thread.start()

    def last(self) -> int:
        return self._found[-1][0] if self._found else 0

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def due_at(self, lsn: int) -> int:
        """The last transaction that must be in the history up to this LSN."""
        return max((number for number, length in self._found if length <= lsn), default=0)

    def _note(self) -> None:
        while not self._stop.wait(0.05):
            number = self._rows.acknowledged
            try:
                lsn = call(self._socket, "status")["lsn"]["appended"]
            except AsrfsError:
                continue  # its power is being lost
            self._found.append((number, lsn))


class Production:
    """A machine with one filesystem, and PostgreSQL on it under two loads."""

    def __init__(self, lab: Lab, kind: str, scratch: Path) -> None:
        self.lab = lab
        self.scratch = scratch
        self.path = scratch / "production"
        self.path.mkdir()
        self.port = _free_port()
        self.state = StateDirectory(str(lab.state))
        self.device = str(lab.asrfs("attach", DISK, "--format", kind, "--on", self.path)["device"])
        self.server = Postgres(self.path / "pg", scratch / "pg")
        self.server.create()
        self._set_boot()
        self.server.start()
        self.server.client("pgbench", "-i", "-q", "-s", "2", "postgres")
        self.rows = AcknowledgedRows(self.server)
        self.noted = Noted(self.rows, self.state)
        self._bench = subprocess.Popen(
            [*AS_USER, program("pgbench"), *self.server.address, "-U", USER, "-n", "-c", "2", "-T", "600", "postgres"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def lose_power(self) -> None:
        """Every process of the host dies at once; the server above sees I/O errors."""
        pids = [pid for role in ROLES if (pid := self.state.lock_holder(role))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert self.lab.host is not None
        self.lab.host.wait(30)
        wait_until(lambda: not any(self.state.lock_holder(role) for role in ROLES), what="the end of the host")
        self.close()
        run_tool("umount", "--lazy", self.path)
        run_tool("losetup", "--detach", self.device)

    def close(self) -> None:
        """End the clients and the server as a power loss does."""
        self.noted.stop()
        self._bench.kill()
        self._bench.wait()
        with contextlib.suppress(BrokenPipeError):
            self.rows.stop()
        if self.server.process is not None:
            self.server.stop(signal.SIGQUIT)

    def _set_boot(self) -> None:
        words = {
            "data": self.server.directory,
            "as_user": " ".join(AS_USER),
            "pg_ctl": program("pg_ctl"),
            "log": self.server.sockets / "recovered.log",
            "port": self.port,
        }
        start, stop = self.scratch / "start.sh", self.scratch / "stop.sh"
        start.write_text(START.format(**words))
        stop.write_text(STOP.format(**words))
        ask = [program("psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-c", "SELECT 1", "postgres"]
        settings = self.scratch / "boot.toml"
        settings.write_text(
            f'kind = "mount"\n[mount]\nstart = [["/bin/sh", "{start}"]]\nstop = [["/bin/sh", "{stop}"]]\n'
            f'[[mount.filesystems]]\ndisk = "{DISK}"\npath = "{self.path}"\noptions = "noatime"\n'
            f'[health]\nport = {self.port}\ncommand = {json.dumps(ask)}\ntimeout = "60s"\n'
        )
        self.lab.asrfs("boot", "set", settings)


@pytest.fixture(params=["ext4", "xfs"])
def production(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Production]:
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", DISK, "--size", "512M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        production = Production(lab, request.param, scratch)
        try:
            yield production
        finally:
            production.close()
            if os.path.ismount(production.path):
                lab.asrfs("detach", DISK)
    finally:
        lab.close()


@pytest.fixture
def failovers(production: Production) -> Iterator[FailoversUnderTest]:
    with failovers_of(production.lab.vault) as failovers:
        yield failovers


@pytest.mark.timeout(300)
def test_i2_i9_a_database_comes_back_with_every_acknowledged_transaction(
    production: Production, failovers: FailoversUnderTest
) -> None:
    lab, rows = production.lab, production.rows
    wait_until(lambda: rows.acknowledged > 100, what="a hundred transactions")
    before = rows.acknowledged
    lab.asrfs("point", "create", "--name", "early", "--wait", "--timeout", "60s")
    drill(production, failovers, before, rows.acknowledged + 1)

    seen = production.noted.last()
    wait_until(lambda: production.noted.last() > seen + 100, what="a hundred more")
    rows.check_alive()
    production.lose_power()
    earnest = failovers.ask("unplanned", lab.machine, "--point", "latest")
    check_ready(earnest)
    server = RecoveredServer(production.path / "pg", production.server.sockets, production.port)
    due = production.noted.due_at(earnest["lsn"])
    assert due > before, "the store had next to nothing"
    assert check_rows(server, due) <= rows.acknowledged + 1
    server.check()
    server.query("INSERT INTO acknowledged VALUES (0, 'written here')")
    assert os.path.ismount(production.path)
    failovers.ask("cancel", earnest["id"])
    assert failovers.leftovers() == "" and not os.path.ismount(production.path) and not answers(production.port)


def drill(production: Production, failovers: FailoversUnderTest, at_least: int, at_most: int) -> None:
    """The server of a point beside the one that goes on: another network, the same port."""
    document = failovers.ask("test", production.lab.machine, "--point", "early")
    check_ready(document)
    with socket.create_server(("127.0.0.1", production.port)):
        pass  # nobody is here
    inside = ("nsenter", f"--net=/run/netns/{document['network']}", "--")
    root = Path(document["state_directory"]).parent / "boot/root"
    server = RecoveredServer(
        Path(f"{root}{production.path}/pg"), production.server.sockets, production.port, within=inside
    )
    assert check_rows(server, at_least) <= at_most
    server.check()
    server.query("TRUNCATE acknowledged")
    went_on = production.rows.acknowledged
    wait_until(lambda: production.rows.acknowledged > went_on + 10, what="production's own transactions")
    check_rows(production.server, went_on)
    production.rows.check_alive()
    failovers.ask("cleanup", document["id"])
    assert failovers.leftovers() == ""


def check_ready(document: dict[str, Any]) -> None:
    """The health check has ended the clock."""
    assert document["boot"] == {"kind": "mount", "runs": True, "failure": ""}
    assert document["steps"][-1]["name"] == "boot"
    assert document["rto_seconds"] == pytest.approx(sum(step["seconds"] for step in document["steps"]), abs=0.01)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
