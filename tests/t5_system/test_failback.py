"""Out and home again, over and over: planned failover and failback between two sites with a network each.

What each disk must hold is kept beside it; after every handover both sides are compared with that, byte for byte.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.networks import NetworkSite, two_sites

pytestmark = pytest.mark.timeout(600)
MACHINE = "web1"
LOOPS = 20
SIZES = {"files": 4 << 20, "log": 1 << 20}
WRITES = 12


class Disks:
    """What the machine's disks hold, wherever it runs."""

    def __init__(self, rng: random.Random) -> None:
        self.content = {name: bytearray(size) for name, size in SIZES.items()}
        self._rng = rng

    def change(self, mount: Path) -> None:
        """Check all of it, and write: to every disk, in any order, each write of any sectors."""
        self.check(mount)
        files = {name: os.open(mount / f"{name}.img", os.O_RDWR) for name in self.content}
        try:
            for name in [*self.content, *self._rng.choices(sorted(self.content), k=WRITES)]:
                content = self.content[name]
                length = self._rng.randrange(1, 64) * 512
                offset = self._rng.randrange((len(content) - length) // 512) * 512
                piece = self._rng.randbytes(length) if self._rng.random() < 0.9 else bytes(length)
                assert os.pwrite(files[name], piece, offset) == length
                content[offset : offset + length] = piece
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)

    def check(self, *mounts: Path) -> None:
        for mount in mounts:
            for name, content in self.content.items():
                assert (mount / f"{name}.img").read_bytes() == content, f"I9: disk {name} in {mount}"


class Circle:
    """A machine that goes to and fro. `mount` and `site`: where it runs now, `protector`: whose store protects it."""

    def __init__(self, site: NetworkSite, protector: NetworkSite, mount: Path, disks: Disks) -> None:
        self.site, self.protector, self.mount, self.disks = site, protector, mount, disks
        self.runs_by: str | None = None
        """The failover by which it runs, at the store of `site`."""

    def go(self, *verb: str) -> dict[str, Any]:
        """One handover, and protection from there."""
        self.disks.change(self.mount)
        document: dict[str, Any] = self.protector.ask(*verb, MACHINE)
        assert document["state"] == "commit-pending" and document["data_loss_seconds"] == 0.0
        assert document["proof"]["chunks_different"] == 0 and document["proof"]["lsn"] == document["lsn"]
        here = Path(document["mount"])
        self.disks.check(self.mount, here)
        self.protector.ask("failover", "commit", document["id"])
        self.disks.change(here)
        site, self.site, self.protector = self.site, self.protector, self.site
        words = ("--store", self.protector.manage, "--token", self.protector.token(MACHINE), "--wait")
        done = self.site.ask("reprotect", MACHINE, *words, "--timeout", "60s")
        assert done["protection"] == "protected"
        if self.runs_by is not None:
            site.ask("failover", "cleanup", self.runs_by, "--yes")
        self.runs_by, self.mount = document["id"], here
        return document


@pytest.fixture
def sites(scratch: Path) -> Iterator[tuple[NetworkSite, NetworkSite]]:
    with two_sites(scratch) as sites:
        yield sites


@pytest.fixture
def circle(sites: tuple[NetworkSite, NetworkSite], rng: random.Random) -> Iterator[Circle]:
    home, there = sites
    host = home.host(MACHINE)
    host.init(**{name: str(size) for name, size in SIZES.items()})
    host.asrfs("set", "crash_interval=24h", "application_interval=off")
    host.asrfs("enroll", "--store", there.manage, "--token", there.token(MACHINE))
    host.serve()
    try:
        disks = Disks(rng)
        disks.change(host.mount)
        host.asrfs("drain", "--timeout", "60s")
        yield Circle(home, there, host.mount, disks)
    finally:
        host.close()


def test_i6_i7_and_i9_twenty_times_out_and_home_again(circle: Circle) -> None:
    home, there = circle.site, circle.protector
    for _ in range(LOOPS):
        circle.go("failover", "planned", "--point", "latest")
        assert (circle.site, circle.protector) == (there, home)
        circle.go("failback")
    assert there.ask("failover", "list") == [], "what came back has left nothing"
    assert [each["state"] for each in home.ask("failover", "list")] == ["committed"]
    assert home.ask("machine", "show", MACHINE)["epoch"] >= 4 * LOOPS
