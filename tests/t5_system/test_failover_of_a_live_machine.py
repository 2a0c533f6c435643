"""Failover while the protected machine lives: production does not notice a test, and an old primary is fenced."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica_store.vault.operations import operation
from replica_store.vault.vault import Vault
from tests.t5_system.failovers import FailoversUnderTest, contents, failovers_of
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until
from tools.lab import Lab, LabError

pytestmark = pytest.mark.timeout(300)
BLOCKS = 512
MIB = 1 << 20


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store, and an enrolled, served machine: a disk with a filesystem that is mounted, and a plain one."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "files", "--size", "64M")
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


def mount(lab: Lab, kind: str = "ext4") -> Path:
    directory = lab.root / "mounted"
    directory.mkdir()
    lab.attach("files", "--format", kind, "--on", directory)
    return directory


def point(lab: Lab, name: str, consistency: str = "crash") -> int:
    words = ("--consistency", consistency, "--name", name, "--wait", "--timeout", "60s")
    return int(lab.asrfs("point", "create", *words)["lsn"])


def exported(lab: Lab, lsn: int) -> dict[str, bytes]:
    found = {}
    for disk in ("files", "plain"):
        output = lab.root / f"{disk}-{lsn}.export"
        lab.replica_store("export", lab.machine, disk, "--point", f"lsn:{lsn}", "--output", output, "--force")
        found[disk] = output.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_i9_a_disk_as_a_crash_leaves_it_is_examined_and_not_a_byte_of_it_changes(
    lab: Lab, failovers: FailoversUnderTest, kind: str, rng: random.Random
) -> None:
    if kind == "xfs":
        lab.asrfs("disk", "resize", "files", "320M")
    directory = mount(lab, kind)
    (directory / "kept").write_bytes(rng.randbytes(MIB))
    os.sync()
    (directory / "just written").write_bytes(rng.randbytes(MIB))
    with (directory / "just written").open("rb") as file:
        os.fsync(file.fileno())
    lsn = point(lab, "crashed")
    document = failovers.ask("test", lab.machine, "--point", "crashed")
    files, plain = document["disks"]
    assert (files["filesystem"], files["fsck"], files["journal_replayed"]) == (kind, "clean", True)
    assert (plain["filesystem"], plain["fsck"]) == (None, "no filesystem")
    assert contents(document) == exported(lab, lsn)
    failovers.ask("cleanup", document["id"])
    assert failovers.leftovers() == ""


def test_a_damaged_filesystem_is_found_and_the_machine_is_left_to_be_looked_at(
    lab: Lab, failovers: FailoversUnderTest
) -> None:
    directory = mount(lab)
    for number in range(50):
        (directory / f"file-{number}").write_text("content")
    lab.asrfs("detach", "files")
    point(lab, "sound")
    assert failovers.ask("test", lab.machine, "--point", "sound")["disks"][0]["fsck"] == "clean"
    with (lab.disks / "files.img").open("r+b") as disk:
        for at in range(2 * MIB, 16 * MIB, 4096):  # whatever lies there: bitmaps, tables of inodes, directories
            disk.seek(at)
            disk.write(b"\xff" * 512)
    point(lab, "damaged")
    said = failovers.refused(5, "test", lab.machine, "--point", "damaged")
    assert "fsck found its ext4 damaged" in said
    found = failovers.ask("list")
    assert [each["disks"][0]["fsck"] for each in found] == ["clean", "damaged"]
    for each in found:
        failovers.ask("cleanup", each["id"])


def test_production_goes_on_during_a_test_failover(lab: Lab, failovers: FailoversUnderTest, rng: random.Random) -> None:
    stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
    writer = StampWriter(stamper, [lab.disks / "plain.img"])
    writer.write(300)
    exact = writer.fsync()
    point(lab, "before")
    points = lab.replica_store("point", "list", lab.machine)
    document = failovers.ask("test", lab.machine, "--point", "before")
    writer.write(300)
    writer.fsync()
    lab.asrfs("drain", "--timeout", "60s")
    recovered = Path(document["disks"][1]["path"])
    assert stamper.check([recovered], exactly=exact) == exact
    with recovered.open("r+b") as disk:
        disk.write(bytes(2 * MIB))
    later = point(lab, "after")
    assert stamper.check([lab.disks / "plain.img"]) == writer.done
    writer.close()
    assert recovered.read_bytes() == bytes(2 * MIB)
    assert exported(lab, later)["plain"] == (lab.disks / "plain.img").read_bytes()

    def shown() -> tuple[str, int, str]:
        machine = lab.replica_store("machine", "show", lab.machine)
        return machine["state"], machine["epoch"], machine["link"]

    wait_until(lambda: shown() == ("protected", 1, "up"), what="a connected, protected machine")  # it may come again
    assert lab.replica_store("point", "list", lab.machine)[:-1] == points
    failovers.ask("cleanup", document["id"])
    assert lab.status()["link"] == "connected"
    assert failovers.leftovers() == ""


def test_a_store_that_serves_ends_what_is_due(lab: Lab, failovers: FailoversUnderTest) -> None:
    point(lab, "one")
    document = failovers.ask("test", lab.machine, "--point", "one", "--ttl", "1s")

    def remains() -> bool:
        with Vault.open(str(lab.vault)) as vault:
            return operation(vault.catalog, document["id"]).remains

    wait_until(lambda: not remains(), seconds_max=60.0, what="the end of the test failover")
    assert failovers.leftovers() == ""


def test_i6_the_old_primary_ships_while_commit_is_pending_and_is_fenced_after(
    lab: Lab, failovers: FailoversUnderTest
) -> None:
    point(lab, "one")
    document = failovers.ask("unplanned", lab.machine, "--point", "one")
    assert contents(document) == exported(lab, document["lsn"])
    assert lab.replica_store("machine", "show", lab.machine)["state"] == "failed-over"
    point(lab, "it-still-writes")
    failovers.ask("cancel", document["id"])
    point(lab, "it-goes-on")
    assert lab.replica_store("machine", "show", lab.machine)["state"] == "protected"
    document = failovers.ask("unplanned", lab.machine, "--point", "one")
    acknowledged = lab.status()["lsn"]["acknowledged"]
    committed = failovers.ask("commit", document["id"])
    assert committed["epoch"] == 2
    with (lab.disks / "plain.img").open("r+b") as disk:
        disk.write(b"too late" * 512)
        os.fsync(disk.fileno())
    with pytest.raises(LabError):
        lab.asrfs("drain", "--timeout", "3s")
    wait_until(lambda: lab.status()["link"] == "refused", seconds_max=30.0, what="the refusal")
    assert "fenced" in [alarm["id"] for alarm in lab.status()["alarms"]]
    machine = lab.replica_store("machine", "show", lab.machine)
    assert (machine["state"], machine["epoch"], machine["acknowledged_lsn"]) == ("committed", 2, acknowledged)
