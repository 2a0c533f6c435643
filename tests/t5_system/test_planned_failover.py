"""Planned failover with real programs: writes under load until the host makes way, nothing lost, the way back, and
whoever dies or is away meanwhile."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.failovers import FailoversUnderTest, contents, failovers_of
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until
from tools.lab import Lab

pytestmark = pytest.mark.timeout(300)
BLOCKS = 512
MIB = 1 << 20
SLOWLY = "scan_rate=8M"
"""Comparing takes seconds, so that somebody can die meanwhile."""


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store, and an enrolled, served machine with two disks."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "files", "--size", "32M")
        lab.asrfs("disk", "add", "plain", "--size", "2M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


@pytest.fixture
def failovers(lab: Lab) -> Iterator[FailoversUnderTest]:
    with failovers_of(lab.vault) as failovers:
        yield failovers


class Load:
    """Writes stamps to disk `plain` until it is refused, each of them flushed."""

    def __init__(self, lab: Lab, rng: random.Random) -> None:
        self.stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
        self.writer = StampWriter(self.stamper, [lab.disks / "plain.img"])
        self.durable = 0
        self.ended_by: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.writer.write(1)
                self.durable = self.writer.fsync()
        except OSError as error:
            self.ended_by = error.errno

    def finish(self) -> int:
        """Wait until it was refused; how many writes were acknowledged."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "it was never refused"
        self.writer.close()
        assert self.ended_by == errno.EROFS
        return self.durable


def fill(lab: Lab, rng: random.Random) -> None:
    with (lab.disks / "files.img").open("r+b") as disk:
        for number in range(16):
            disk.seek(number * 2 * MIB)
            disk.write(rng.randbytes(MIB))
        os.fsync(disk.fileno())
    lab.asrfs("drain", "--timeout", "60s")


def of_host(lab: Lab) -> dict[str, bytes]:
    """The disks of the old primary, as it serves them."""
    return {name: (lab.disks / f"{name}.img").read_bytes() for name in ("files", "plain")}


def images_of_host(lab: Lab) -> dict[str, bytes]:
    """And as they lie in its state directory."""
    return {disk["name"]: Path(disk["image"]).read_bytes() for disk in lab.status()["disks"]}


def write(lab: Lab, content: bytes) -> None:
    """Raises OSError."""
    fd = os.open(lab.disks / "plain.img", os.O_RDWR)
    try:
        os.pwrite(fd, content, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def is_refused(lab: Lab) -> bool:
    try:
        write(lab, b"late" * 1024)
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def alarms(lab: Lab) -> list[str]:
    return [alarm["id"] for alarm in lab.status()["alarms"]]


def planned(failovers: FailoversUnderTest, lab: Lab, *words: str) -> Any:
    return failovers.ask("planned", lab.machine, "--point", "latest", *words)


def check_nothing_lost(lab: Lab, document: dict[str, Any]) -> None:
    proof = document["proof"]
    assert document["state"] == "commit-pending" and document["data_loss_seconds"] == 0.0
    assert (proof["lsn"], proof["chunks_different"]) == (document["lsn"], 0)
    assert proof["chunks_compared"] == (32 + 2) * MIB // 65536
    recovered = contents(document)
    assert recovered == of_host(lab) == images_of_host(lab), "byte for byte"


def test_i6_and_i9_a_machine_is_handed_over_under_load_and_nothing_is_lost(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    fill(lab, rng)
    load = Load(lab, rng)
    document = planned(failovers, lab, "--check", 'test -s "$ASRFS_MOUNT/plain.img"')
    acknowledged = load.finish()
    assert acknowledged > 0
    check_nothing_lost(lab, document)
    load.stamper.check([Path(document["disks"][1]["path"])], at_least=acknowledged)
    assert "handed-over" in alarms(lab) and lab.status()["link"] == "connected"
    names = [point["name"] for point in lab.replica_store("point", "list", lab.machine)]
    assert f"handover-{document['id'][:12]}" in names
    assert "failed-over: planned-failover is refused" in failovers.refused(
        4, "planned", lab.machine, "--point", "latest"
    )
    with Path(document["disks"][1]["path"]).open("r+b") as disk:
        disk.write(b"new home" * 512)
        os.fsync(disk.fileno())
    assert failovers.ask("commit", document["id"])["epoch"] == 2
    wait_until(lambda: "fenced" in alarms(lab), seconds_max=30.0, what="the old primary is told")
    assert "handed-over" not in alarms(lab) and is_refused(lab)
    assert failovers.refused(4, "cancel", document["id"])
    lab.stop_host()
    lab.start_host()
    assert is_refused(lab), "fenced for good"
    machine = lab.replica_store("machine", "show", lab.machine)
    assert (machine["state"], machine["epoch"]) == ("committed", 2)


def add_hook(lab: Lab, name: str, script: str) -> None:
    path = lab.root / f"{name}.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    lab.asrfs("hooks", "add", "handover", path, "--name", name)


def test_a_machine_is_stopped_before_it_is_handed_over_and_started_again_when_it_is_back(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    fill(lab, rng)
    (lab.root / "mounted").mkdir()
    device = lab.attach("files", "--format", "ext4", "--on", lab.root / "mounted")
    (lab.root / "mounted" / "file").write_text("content")
    said = lab.root / "said"
    stop = f"umount {lab.root}/mounted"
    start = f"mount {device} {lab.root}/mounted"
    add_hook(lab, "files", f'echo "$ASRFS_PHASE" >> {said}; [ $ASRFS_PHASE = handover ] && {stop} || {start}')
    document = planned(failovers, lab)
    assert said.read_text() == "handover\n" and not (lab.root / "mounted" / "file").exists()
    assert document["disks"][0]["name"] == "files"
    check_nothing_lost(lab, document)
    failovers.ask("cancel", document["id"])
    wait_until(lambda: (lab.root / "mounted" / "file").exists(), seconds_max=30.0, what="it is mounted again")
    assert said.read_text() == "handover\ntake-back\n"
    (lab.root / "mounted" / "file").write_text("and it goes on")
    os.sync()
    add_hook(lab, "stubborn", "[ $ASRFS_PHASE = take-back ]")
    line = failovers.refused(1, "planned", lab.machine, "--point", "latest")
    assert "hook stubborn: exit code 1" in line
    assert (lab.root / "mounted" / "file").read_text() == "and it goes on"
    lab.asrfs("detach", "files")


def test_a_cancelled_handover_gives_the_machine_back_and_the_next_one_loses_nothing_either(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    fill(lab, rng)
    document = planned(failovers, lab)
    assert is_refused(lab)
    lab.stop_host()
    lab.start_host()
    assert is_refused(lab) and "handed-over" in alarms(lab), "whoever was started again keeps it"
    wait_until(lambda: lab.status()["link"] == "connected", seconds_max=30.0, what="its store")
    with Path(document["disks"][1]["path"]).open("r+b") as disk:
        disk.write(b"given up" * 512)
        os.fsync(disk.fileno())
    cancelled = failovers.ask("cancel", document["id"])
    assert (cancelled["state"], cancelled["handover"]["taken_back"]) == ("cancelled", True)
    assert failovers.leftovers() == ""
    write(lab, b"at home" * 512)
    lab.asrfs("drain", "--timeout", "60s")
    status = lab.status()
    assert (status["state"], status["epoch"]) == ("protected", 1) and alarms(lab) == []
    assert lab.replica_store("machine", "show", lab.machine)["state"] == "protected"
    again = planned(failovers, lab)
    check_nothing_lost(lab, again)
    assert contents(again)["plain"].startswith(b"at home")
    failovers.ask("commit", again["id"])


def test_i7_a_person_can_have_the_host_go_on_and_then_nothing_is_committed(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    """Whoever cannot reach the store's command line."""
    fill(lab, rng)
    document = planned(failovers, lab)
    assert is_refused(lab)
    lab.asrfs("resync", "--full-scan")
    write(lab, b"at home" * 512)
    lab.asrfs("drain", "--timeout", "60s")
    assert "has taken its machine back" in failovers.refused(4, "commit", document["id"])
    failovers.ask("cancel", document["id"])
    status = lab.status()
    assert (status["state"], status["epoch"]) == ("protected", 2) and "handed-over" not in alarms(lab)
    check_nothing_lost(lab, planned(failovers, lab))


def test_what_differs_is_found_and_the_host_writes_on(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    fill(lab, rng)
    images_of_host(lab)  # all of it is applied
    image = next(Path(disk["image"]) for disk in lab.status()["disks"] if disk["name"] == "files")
    lab.stop_host()
    with image.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(b"somebody else's")
    lab.start_host()
    wait_until(lambda: lab.status()["link"] == "connected", seconds_max=30.0, what="its store")
    line = failovers.refused(5, "planned", lab.machine, "--point", "latest")
    assert "1 of 544 chunks differ" in line and "--full-scan" in line
    (ended,) = failovers.ask("list", "--all")
    assert (ended["state"], ended["proof"]) == ("cancelled", None)
    write(lab, b"at home" * 512)
    assert failovers.leftovers() == "" and "handed-over" not in alarms(lab)
    lab.asrfs("resync", "--full-scan")
    check_nothing_lost(lab, planned(failovers, lab))


def test_a_host_that_is_away_is_refused_or_given_up_in_time(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    fill(lab, rng)
    agent = lab.pid("agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        done = failovers.run("failover", "planned", lab.machine, "--point", "latest", "--timeout", "3s")
    finally:
        os.kill(agent, signal.SIGCONT)
    assert done.returncode == 1 and "was not handed over" in done.stderr, done.stderr
    wait_until(lambda: not is_refused(lab), seconds_max=60.0, what="the host writes again")
    (ended,) = failovers.ask("list", "--all")
    assert ended["state"] == "cancelled" and failovers.leftovers() == ""
    lab.stop_host()
    wait_until(
        lambda: lab.replica_store("machine", "show", lab.machine)["link"] != "up", seconds_max=30.0, what="the end"
    )
    assert "is not connected to this store" in failovers.refused(4, "planned", lab.machine, "--point", "latest")
    lab.start_host()
    wait_until(lambda: lab.status()["link"] == "connected", seconds_max=30.0, what="its store")
    check_nothing_lost(lab, planned(failovers, lab))


@pytest.mark.parametrize("role", ["agent", "disk_server", "supervisor", "store"])
def test_i2_and_i6_whoever_is_killed_while_host_and_store_are_compared(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random, role: str
) -> None:
    fill(lab, rng)
    lab.asrfs("set", SLOWLY)
    load = Load(lab, rng)
    words = ["--vault", str(lab.vault), "--json", "failover", "planned", lab.machine, "--point", "latest"]
    path = lab.root / "planned.log"
    with path.open("w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "replica_store.cli.main", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    acknowledged = load.finish()
    if role == "store":
        lab.kill_store()
        lab.start_store()
    elif role == "supervisor":
        assert lab.host is not None
        lab.host.kill()
        lab.host.wait()
        lab.start_host()
    else:
        lab.kill(role)
    assert is_refused(lab)
    code = command.wait(timeout=120)
    assert code == 0, path.read_text()
    (document,) = failovers.ask("list")
    check_nothing_lost(lab, document)
    load.stamper.check([Path(document["disks"][1]["path"])], at_least=acknowledged)
    assert failovers.ask("cancel", document["id"])["handover"]["taken_back"]
    write(lab, b"at home" * 512)


@pytest.mark.parametrize("step", ["resolve", "handover", "point", "clear", "state", "tree", "serve", "check", "report"])
def test_a_command_that_is_killed_is_carried_on_with(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random, step: str
) -> None:
    fill(lab, rng)
    failovers.killed(step, "planned", lab.machine, "latest")
    found = failovers.ask("list")
    document = planned(failovers, lab)
    assert not found or document["id"] == found[0]["id"]
    check_nothing_lost(lab, document)
    with pytest.raises(OSError, match="Read-only"):
        write(lab, b"late" * 1024)
    failovers.ask("cancel", document["id"])
    write(lab, b"at home" * 512)
