"""An old primary that comes back after an unplanned failover, with real programs: it is fenced, and what it had written
and could not send is at the store, byte for byte, beside a history that does not show it (I7)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.failovers import FailoversUnderTest, contents, failovers_of
from tests.waiting import wait_until
from tools.lab import Lab, LabError

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20
DISKS = {"files": 32, "plain": 2}
TAIL = "tail-of-epoch-1"


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store, and an enrolled, served machine with two disks."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        for name, size in DISKS.items():
            lab.asrfs("disk", "add", name, "--size", f"{size}M")
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


def write(path: Path, rng: random.Random, count: int) -> None:
    """Pieces here and there, durable."""
    with path.open("r+b", buffering=0) as disk:
        size = path.stat().st_size
        for _ in range(count):
            disk.seek(rng.randrange(size // 4096 - 16) * 4096)
            disk.write(rng.randbytes(4096 * rng.randint(1, 16)))
        os.fsync(disk.fileno())


def of_host(lab: Lab) -> dict[str, bytes]:
    return {name: (lab.disks / f"{name}.img").read_bytes() for name in DISKS}


def exported(lab: Lab, selector: str) -> dict[str, bytes]:
    found = {}
    for disk in DISKS:
        output = lab.root / f"{disk}.export"
        lab.replica_store("export", lab.machine, disk, "--point", selector, "--output", output, "--force")
        found[disk] = output.read_bytes()
    return found


def points(lab: Lab) -> list[Any]:
    return [each for each in lab.replica_store("point", "list", lab.machine) if not each["tail"]]


def fenced_text(lab: Lab) -> str:
    return next((alarm["text"] for alarm in lab.status()["alarms"] if alarm["id"] == "fenced"), "")


def test_i6_and_i7_what_an_old_primary_could_not_send_becomes_a_point(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    for name in DISKS:
        write(lab.disks / f"{name}.img", rng, 40)
    for name in ("one", "two"):
        lab.asrfs("point", "create", "--name", name, "--wait", "--timeout", "60s")
        write(lab.disks / "plain.img", rng, 5)
    lab.asrfs("drain", "--timeout", "60s")
    lab.asrfs("pause")
    for name in DISKS:
        write(lab.disks / f"{name}.img", rng, 60)
    written = of_host(lab)
    for role in ("agent", "disk_server"):
        lab.kill(role)
    known = points(lab)
    before = {each["name"]: exported(lab, each["id"]) for each in known}
    received = lab.replica_store("machine", "show", lab.machine)["acknowledged_lsn"]

    document = failovers.ask("unplanned", lab.machine, "--point", "latest", "--no-boot")
    assert contents(document) == exported(lab, "latest") != written
    failovers.ask("commit", document["id"])
    for disk in document["disks"]:
        write(Path(disk["path"]), rng, 30)
    went_on = contents(document)

    lab.asrfs("resume")
    wait_until(lambda: TAIL in fenced_text(lab), seconds_max=60.0, what="the tail at the store")
    assert "this host's copy may be given up" in fenced_text(lab)
    with pytest.raises(OSError, match="Read-only"):
        write(lab.disks / "plain.img", rng, 1)
    assert of_host(lab) == written, "nothing of it is touched"

    (tail,) = [each for each in lab.replica_store("point", "list", lab.machine) if each["tail"]]
    assert (tail["name"], tail["epoch"], tail["protected"]) == (TAIL, 1, True)
    assert exported(lab, TAIL) == written, "I7: byte for byte"
    assert points(lab) == known and {each["name"]: exported(lab, each["id"]) for each in known} == before
    assert lab.replica_store("machine", "show", lab.machine)["acknowledged_lsn"] == received
    assert contents(document) == went_on, "nothing of the other side is touched"

    said = failovers.refused(4, "unplanned", lab.machine, "--point", TAIL)
    assert "cannot go on from there" in said
    tried = failovers.ask("test", lab.machine, "--point", TAIL)
    assert contents(tried) == written
    failovers.ask("cleanup", tried["id"])

    mounted = lab.root / "points"
    lab.mount_points(mounted)
    assert TAIL in os.listdir(mounted / lab.machine)
    assert {name: (mounted / lab.machine / TAIL / f"{name}.img").read_bytes() for name in DISKS} == written
    assert lab.replica_store("verify")["damages"] == []

    lab.kill("agent")  # it remembers what became of its tail
    wait_until(lambda: TAIL in fenced_text(lab), seconds_max=60.0, what="the alarm after a restart")
    lab.kill_store()
    lab.replica_store("rebuild")
    assert exported(lab, TAIL) == written and points(lab) == known


def test_i7_what_was_given_up_cannot_be_offered_and_the_host_says_where_it_is(
    lab: Lab, failovers: FailoversUnderTest, rng: random.Random
) -> None:
    write(lab.disks / "plain.img", rng, 5)
    lab.asrfs("drain", "--timeout", "60s")
    lab.asrfs("pause")
    lab.asrfs("set", "journal_quota=256M")
    buffer = rng.randbytes(MIB)
    for _ in range(12):
        with (lab.disks / "files.img").open("r+b", buffering=0) as disk:
            for _ in range(32):
                disk.write(buffer)
            os.fsync(disk.fileno())
    wait_until(lambda: lab.status()["state"] == "resync-required", seconds_max=60.0, what="the giving up")
    document = failovers.ask("unplanned", lab.machine, "--point", "latest", "--no-boot")
    failovers.ask("commit", document["id"])
    lab.asrfs("resume")
    wait_until(lambda: "cannot be offered" in fenced_text(lab), seconds_max=60.0, what="the word of the tail")
    assert "were given up" in fenced_text(lab) and "images/" in fenced_text(lab)
    assert not [each for each in lab.replica_store("point", "list", lab.machine) if each["tail"]]
    with pytest.raises(LabError):
        lab.replica_store("export", lab.machine, "plain", "--point", TAIL, "--output", lab.root / "none", "--force")
