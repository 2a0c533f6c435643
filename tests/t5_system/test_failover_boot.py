"""A failed over machine is started as its history says: a test apart from everything, in earnest where it belongs."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replica_store.failover import processes
from tests.t5_system.failovers import FailoversUnderTest, failovers_of
from tools.lab import Lab, run, wait_until

pytestmark = pytest.mark.timeout(300)
SERVICE = """
import os, socket, sys
port, path = int(sys.argv[1]), os.environ["ASRFS_ROOT"] + sys.argv[2]
listening = socket.create_server(("127.0.0.1", port))
if os.fork():
    os._exit(0)
os.setsid()
for fd in range(3):
    os.dup2(os.open(os.devnull, os.O_RDWR), fd)
while True:
    connection, _ = listening.accept()
    connection.sendall(open(path, "rb").read())
    connection.close()
"""


class Production:
    """A machine with one filesystem, and a service on it that says what a file there says."""

    def __init__(self, scratch: Path) -> None:
        self.lab = Lab(parent=scratch)
        self.path = scratch / "production"
        self.port = _free_port()
        self.healthy = scratch / "healthy"

    def start(self) -> None:
        lab = self.lab
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "files", "--size", "64M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        where = lab.root / "mounted"
        where.mkdir()
        lab.asrfs("attach", "files", "--format", "ext4", "--on", where)
        (where / "words").write_text("it runs")
        os.sync()
        script, settings = lab.root / "service.py", lab.root / "boot.toml"
        script.write_text(SERVICE)
        command = [sys.executable, str(script), str(self.port), f"{self.path}/words"]
        settings.write_text(
            f'kind = "mount"\n[mount]\nstart = [{json.dumps(command)}]\n'
            f'[[mount.filesystems]]\ndisk = "files"\npath = "{self.path}"\n'
            f'[health]\nport = {self.port}\nexpect = "it runs"\ntimeout = "3s"\n'
            f'command = ["/usr/bin/test", "-e", "{self.healthy}"]\n'
        )
        lab.asrfs("boot", "set", settings)
        lab.asrfs("point", "create", "--name", "ready", "--wait", "--timeout", "60s")
        lab.asrfs("detach", "files")
        self.healthy.touch()

    def says(self) -> str:
        """What the service says to production; nothing where nobody answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return connection.recv(100).decode()
        except OSError:
            return ""

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].endswith(str(self.path))]


@pytest.fixture
def production(scratch: Path) -> Iterator[Production]:
    production = Production(scratch)
    try:
        production.start()
        yield production
    finally:
        production.lab.close()


@pytest.fixture
def failovers(production: Production) -> Iterator[FailoversUnderTest]:
    with failovers_of(production.lab.vault) as failovers:
        yield failovers


def test_a_drill_is_started_apart_and_one_in_earnest_where_it_belongs(
    production: Production, failovers: FailoversUnderTest
) -> None:
    machine = production.lab.machine
    drill = failovers.ask("test", machine, "--point", "ready")
    assert [step["name"] for step in drill["steps"]][-2:] == ["fsck", "boot"]
    assert drill["boot"] == {"kind": "mount", "runs": True, "failure": ""}
    assert drill["rto_seconds"] == pytest.approx(sum(step["seconds"] for step in drill["steps"]), abs=0.01)
    assert production.says() == "", "it is in a network of its own"
    inside = ["nsenter", f"--net=/run/netns/{drill['network']}", "--", sys.executable, "-c"]
    ask = f"import socket; print(socket.create_connection(('127.0.0.1', {production.port})).recv(100).decode())"
    assert run([*inside, ask]).strip() == "it runs"
    assert len(production.mounts()) == 1 and production.mounts() != [str(production.path)]
    assert schedulers(drill["id"]) == {os.SCHED_IDLE}, "production and the store come first"

    plain = failovers.ask("unplanned", machine, "--point", "ready", "--no-boot")
    assert plain["boot"] is None and production.says() == ""
    failovers.ask("cancel", plain["id"])
    earnest = failovers.ask("unplanned", machine, "--point", "ready")
    assert production.says() == "it runs" and str(production.path) in production.mounts()
    assert failovers.ask("resume", earnest["id"])["boot"]["runs"]
    assert schedulers(earnest["id"]) == {os.SCHED_OTHER}
    failovers.ask("cancel", earnest["id"])
    assert production.says() == "" and len(production.mounts()) == 1
    failovers.ask("cleanup", drill["id"])
    assert failovers.leftovers() == "" and production.mounts() == []


def test_what_does_not_run_takes_nothing_back(production: Production, failovers: FailoversUnderTest) -> None:
    machine = production.lab.machine
    production.healthy.unlink()
    said = failovers.refused(1, "unplanned", machine, "--point", "ready")
    assert "the disks of failover" in said and "the machine does not run" in said and "a good end of" in said
    (found,) = failovers.ask("list")
    assert (found["state"], found["boot"]["runs"], found["rto_seconds"]) == ("commit-pending", False, None)
    assert Path(found["disks"][0]["path"]).stat().st_size == 64 << 20 and production.mounts() == []
    production.healthy.touch()
    assert failovers.ask("resume", found["id"])["boot"] == {"kind": "mount", "runs": True, "failure": ""}
    assert production.says() == "it runs"
    failovers.ask("cancel", found["id"])
    assert failovers.leftovers() == ""


def test_a_death_while_it_is_started(production: Production, failovers: FailoversUnderTest) -> None:
    machine = production.lab.machine
    failovers.killed("boot", "unplanned", machine, "ready")
    found = failovers.ask("unplanned", machine, "--point", "ready")
    assert found["boot"]["runs"] and production.says() == "it runs"
    failovers.ask("cancel", found["id"])
    wait_until(lambda: not production.mounts(), "what was mounted is gone", 10)
    assert failovers.leftovers() == ""


def test_a_plan_brings_machines_back(production: Production, failovers: FailoversUnderTest, scratch: Path) -> None:
    machine, note, file = production.lab.machine, scratch / "note", scratch / "plan.toml"
    file.write_text(
        f'name = "all"\npoint = "ready"\n[[groups]]\nname = "one"\nmachines = [{{ name = "{machine}" }}]\n'
        f'post = [{{ name = "note", command = ["/usr/bin/touch", "{note}"] }}]\n'
        'pause_after = { text = "Look at it.", when = ["unplanned"] }\n'
    )
    assert failovers.run("plan", "create", file).returncode == 0
    drill: dict[str, Any] = failovers.ask("test", "all")
    assert drill["state"] == "done" and note.exists() and drill["machines"][0]["boot"]["runs"]
    failovers.ask("cleanup", drill["machines"][0]["id"])
    earnest = failovers.ask("unplanned", "all")
    assert (earnest["state"], earnest["waits_for"]) == ("paused", ["Look at it."]) and production.says() == "it runs"
    done = failovers.run("plan", "resume", earnest["id"])
    assert json.loads(done.stdout)["state"] == "done"
    assert failovers.run("plan", "resume", earnest["id"]).returncode == 4
    failovers.ask("cancel", earnest["machines"][0]["id"])
    assert production.mounts() == []


def schedulers(operation_id: str) -> set[int]:
    """By which rules the processes of a failover get a processor."""
    return {os.sched_getscheduler(each.pid) for each in processes.find(operation_id)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
