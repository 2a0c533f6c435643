"""Out and home again, over and over: planned failover and failback between two sites with a network each.

What each disk must hold is kept beside it; after every handover both sides are compared with that, byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.networks import Disks, NetworkSite, at_home, two_sites

pytestmark = pytest.mark.timeout(600)
MACHINE = "web1"
LOOPS = 20


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
    disks = Disks(rng)
    with at_home(home, there, MACHINE, disks) as host:
        yield Circle(home, there, host.mount, disks)


def test_i6_i7_and_i9_twenty_times_out_and_home_again(circle: Circle) -> None:
    home, there = circle.site, circle.protector
    for _ in range(LOOPS):
        circle.go("failover", "planned", "--point", "latest")
        assert (circle.site, circle.protector) == (there, home)
        circle.go("failback")
    assert there.ask("failover", "list") == [], "what came back has left nothing"
    assert [each["state"] for each in home.ask("failover", "list")] == ["committed"]
    assert home.ask("machine", "show", MACHINE)["epoch"] >= 4 * LOOPS
