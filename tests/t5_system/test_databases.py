"""Databases on replicated disks: every transaction they acknowledged is there, after deaths and in an export.

PostgreSQL runs under pgbench in a private directory; SQLite in both its journal modes. What they acknowledged is
known from their clients alone.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrfs.daemon.state import ROLES
from tests.proof.kernel.filesystems import check_filesystem, mounted_copy, open_filesystem
from tests.proof.kernel.loads import SqliteLoad
from tests.proof.kernel.postgres import USER, AcknowledgedRows, Postgres, check_rows, program, second_server
from tests.proof.kernel.world import World, world
from tests.t5_system.machine import run_tool
from tests.waiting import wait_until

KILLS = ("disk_server", "agent", "disk_server", "store", "disk_server", "supervisor", "agent", "disk_server")
PGBENCH_SECONDS = 15


@pytest.fixture
def made(scratch: Path) -> Iterator[World]:
    """A store and a served machine with one disk of 512 MiB."""
    with world(scratch / "w", root="512M") as made:
        (made.root / "fs").mkdir()
        yield made


def kill_some(made: World, rng: random.Random, count: int) -> None:
    """SIGKILL at random moments; each is replaced before the next."""
    for victim in KILLS[:count]:
        time.sleep(rng.uniform(0.0, 0.5))  # sleep: the moment of a death is nobody's event
        made.kill_one(victim)


def start_pgbench(server: Postgres) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(program("pgbench"), "-h", str(server.sockets), "-U", USER),
            *("-n", "-c", "4", "-j", "1", "-T", str(PGBENCH_SECONDS), "postgres"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def transactions(said: str) -> int:
    """How many pgbench was told are committed; it must have seen no failure."""
    assert "number of failed transactions: 0" in said, said
    found = re.search(r"number of transactions actually processed: (\d+)", said)
    assert found, said
    return int(found[1])


def kill_all(made: World) -> None:
    """SIGKILL of every process of the host at once: whoever is above sees I/O errors."""
    pids = [pid for role in ROLES if (pid := made.host.pid(role))]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert made.host.wait() == -signal.SIGKILL
    wait_until(lambda: not any(made.host.pid(role) for role in ROLES), what="the end of all")


def check_export(made: World, selector: str, sockets: Path, at_least: int) -> tuple[int, int]:
    """A second server on an exported, mounted copy: how many of our rows it has, and how many of pgbench's."""
    (exported,) = made.export(selector, "copy")
    with mounted_copy(exported, made.root / "copy", "ext4") as copy, second_server(copy / "pg", sockets) as server:
        rows = check_rows(server, at_least)
        server.check()
        return rows, int(server.query("SELECT count(*) FROM pgbench_history"))


@pytest.mark.timeout(240)
def test_i2_postgresql_keeps_every_acknowledged_transaction(made: World, rng: random.Random) -> None:
    where = made.root / "fs"
    device = open_filesystem(made, "root", "ext4", where)
    server = Postgres(where / "pg", made.root / "pg")
    server.create()
    server.start()
    server.client("pgbench", "-i", "-q", "-s", "2", "postgres")
    rows = AcknowledgedRows(server)
    bench = start_pgbench(server)
    try:
        kill_some(made, rng, len(KILLS))
        rows.check_alive()
        early = rows.acknowledged
        made.asrfs("point", "create", "--name", "early", "--wait", "--timeout", "60s")
        said, _ = bench.communicate(timeout=PGBENCH_SECONDS + 60)
        assert bench.returncode == 0, said
    finally:
        bench.kill()
        bench.wait()
        last = rows.stop()
    rows.check_alive()
    committed = transactions(said)
    assert early > 100 and committed > 100
    check_rows(server, last)
    assert int(server.query("SELECT count(*) FROM pgbench_history")) == committed
    server.check()
    kill_all(made)
    server.stop(signal.SIGQUIT)
    run_tool("umount", "--lazy", where)
    run_tool("losetup", "--detach", device)
    made.host.serve()
    run_tool("mount", "-o", "noatime", made.attach_bare("root"), where)
    (where / "pg" / "postmaster.pid").unlink(missing_ok=True)
    server.start()
    assert check_rows(server, last) == last
    assert int(server.query("SELECT count(*) FROM pgbench_history")) == committed
    server.check()
    server.stop()
    run_tool("umount", where)
    assert check_export(made, "early", made.root / "pg2", early)[0] <= last
    made.drained()
    assert check_export(made, "latest", made.root / "pg2", last) == (last, committed)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_i2_sqlite_keeps_every_acknowledged_row(made: World, rng: random.Random, kind: str, mode: str) -> None:
    where = made.root / "fs"
    open_filesystem(made, "root", kind, where)
    path = where / "rows.sqlite3"
    load = SqliteLoad(path, mode)
    try:
        load.go_on(20, "rows")
        kill_some(made, rng, 4)
        early = load.acknowledged
        made.asrfs("point", "create", "--name", "early", "--wait", "--timeout", "60s")
        load.go_on(20, "rows after the point")
        last = load.stop()
    finally:
        load.abandon()
    assert load.check(path, last) == last
    (exported,) = made.export("early", "early")
    with mounted_copy(exported, made.root / "copy", kind, "nouuid" if kind == "xfs" else "noatime") as copy:
        assert early <= load.check(copy / path.name, early) <= last
    check_filesystem(exported, kind)
