"""The whole circle on the real kernel: failed over, protected from there, failed back, protected as before.

Two sites with a store each. What a disk must hold is kept beside it, and compared byte for byte wherever it is.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.failovers import FailoversUnderTest, failovers_of
from tools.lab import Lab, command, run_json, wait_until

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20
DISK_MIB = 16


class Site:
    """A store, and the failovers of its vault."""

    def __init__(self, lab: Lab, failovers: FailoversUnderTest) -> None:
        self.lab = lab
        self.failovers = failovers

    def token(self, machine: str) -> str:
        return str(self.lab.replica_store("token", machine)["token"])

    def take_over(self, machine: str) -> dict[str, Any]:
        """Failed over to what is here, and committed."""
        document = self.failovers.ask("unplanned", machine, "--point", "latest")
        committed: dict[str, Any] = self.failovers.ask("commit", document["id"])
        return committed

    def reprotect(self, machine: str, other: Site, token: str, *options: str) -> dict[str, Any]:
        words = ("--store", other.lab.manage, "--token", token, "--timeout", "90s", *options)
        done = self.failovers.run("reprotect", machine, *words)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def export(self, machine: str) -> bytes:
        output = self.lab.root / "exported"
        self.lab.replica_store("export", machine, "disk", "--point", "latest", "--output", output, "--force")
        return output.read_bytes()

    def state(self, machine: str) -> str:
        return str(self.lab.replica_store("machine", "show", machine)["state"])


@pytest.fixture
def there(scratch: Path) -> Iterator[Site]:
    """The recovery site, whose store protects a machine that runs at the other site."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "disk", "--size", f"{DISK_MIB}M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        with failovers_of(lab.vault) as failovers:
            yield Site(lab, failovers)
    finally:
        lab.close()


@pytest.fixture
def home(scratch: Path) -> Iterator[Site]:
    """The site where the machine is at home, with a store of its own."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        with failovers_of(lab.vault) as failovers:
            yield Site(lab, failovers)
    finally:
        lab.close()


class Disk:
    """What the machine's disk holds, wherever it runs."""

    def __init__(self, rng: random.Random) -> None:
        self.content = bytearray(DISK_MIB * MIB)
        self._rng = rng

    def change(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            assert os.pread(fd, len(self.content), 0) == self.content, "I9"
            for _ in range(40):
                length = self._rng.randrange(1, 64) * 4096
                offset = self._rng.randrange((len(self.content) - length) // 512) * 512
                piece = self._rng.randbytes(length)
                assert os.pwrite(fd, piece, offset) == length
                self.content[offset : offset + length] = piece
            os.fsync(fd)
        finally:
            os.close(fd)


def host_of(document: dict[str, Any], *words: str) -> Any:
    return run_json(command("asrfs.cli.main", "--state", document["state_directory"], "--json", *words))


def is_fenced(status: dict[str, Any]) -> bool:
    return "fenced" in [alarm["id"] for alarm in status["alarms"]]


def is_read_only(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY)
    except OSError as error:
        return error.errno == errno.EROFS
    try:
        os.pwrite(fd, b"x" * 512, 0)
        os.fsync(fd)
    except OSError as error:
        return error.errno in (errno.EROFS, errno.EIO)
    finally:
        os.close(fd)
    return False


def test_i6_i7_and_i9_out_and_home_again(there: Site, home: Site, rng: random.Random) -> None:
    machine, disk = there.lab.machine, Disk(rng)
    disk.change(there.lab.disks / "disk.img")
    there.lab.asrfs("drain", "--timeout", "60s")
    there.lab.stop_host()

    out = there.take_over(machine)
    disk.change(Path(out["disks"][0]["path"]))
    assert there.state(machine) == "committed"
    other = there.reprotect(machine, home, home.token(machine), "--wait")
    assert other["protection"] == "protected" == there.state(machine) == home.state(machine)
    assert other["host"]["epoch"] > out["epoch"]
    refused = there.failovers.refused(4, "unplanned", machine, "--point", "latest")
    assert "in the other direction" in refused
    disk.change(Path(out["disks"][0]["path"]))
    host_of(out, "drain", "--timeout", "60s")
    assert home.export(machine) == disk.content

    back = home.take_over(machine)
    disk.change(Path(back["disks"][0]["path"]))
    wait_until(lambda: is_fenced(host_of(out, "status")), "the side that was left behind is fenced", 60)
    assert is_read_only(Path(out["disks"][0]["path"]))
    again = home.reprotect(machine, there, there.token(machine), "--wait")
    assert again["protection"] == "protected" == there.state(machine)
    assert [each["state"] for each in there.failovers.ask("list")] == ["returned"]
    disk.change(Path(back["disks"][0]["path"]))
    host_of(back, "drain", "--timeout", "60s")
    assert there.export(machine) == disk.content == Path(back["disks"][0]["path"]).read_bytes()

    there.lab.start_host()
    wait_until(lambda: is_fenced(there.lab.status()), "the old primary is fenced", 60)
    assert is_read_only(there.lab.disks / "disk.img")
    there.failovers.ask("cleanup", out["id"])
    assert there.failovers.leftovers() == ""
    assert there.failovers.ask("test", machine, "--point", "latest")["lsn"] > out["lsn"]


def test_the_old_disks_are_seeds(there: Site, home: Site, rng: random.Random) -> None:
    machine, disk = there.lab.machine, Disk(rng)
    disk.change(there.lab.disks / "disk.img")
    there.lab.asrfs("drain", "--timeout", "60s")
    there.lab.stop_host()
    out = there.take_over(machine)
    disk.change(Path(out["disks"][0]["path"]))

    token = home.token(machine)
    paused = there.reprotect(machine, home, token, "--paused")
    assert (paused["protection"], paused["host"]["link"]) == ("reprotecting", "paused")
    (old,) = (there.lab.state / "images").iterdir()
    home.lab.replica_store("seed", machine, "disk", "--image", old)
    host_of(out, "resume")
    again = there.reprotect(machine, home, token, "--wait")
    assert again["protection"] == "protected", "the token is used up, and not asked for again"
    host_of(out, "drain", "--timeout", "60s")
    assert home.export(machine) == disk.content
