"""Out and home again, over and over: planned failover and failback between two sites with a network each.

What each disk must hold is kept beside it; after every handover both sides are compared with that, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asrfs.daemon.state import StateDirectory
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.networks import SIZES, Disks, NetworkSite, at_home, two_sites

pytestmark = pytest.mark.timeout(900)
MACHINE = "web1"
LOOPS = 20
LOOPS_WITH_KILLS = 2
TRIES_MAX = 20
ROLES = ("command", "agent", "disk_server", "home", "there")


class Circle:
    """A machine that goes to and fro. `site`: where it runs now, by the state directory `state` with its disks at
    `mount`; `protector`: whose store protects it."""

    def __init__(self, site: NetworkSite, protector: NetworkSite, host: HostUnderTest) -> None:
        self.site, self.protector = site, protector
        self.state, self.mount = host.path, host.mount
        self.runs_by: str | None = None
        self.left_by: str | None = None
        """Failovers by which it runs, at the store of `site`, and by which it ran before, at that of `protector`."""

    def verb(self) -> tuple[str | Path, ...]:
        """The words that hand it over to the other site: there and back by turns."""
        words = ("failover", "planned", "--point", "latest") if self.site.name == "home" else ("failback",)
        return (*words, MACHINE)

    def hand_over(self) -> dict[str, Any]:
        return self.proven(self.protector.ask(*self.verb()))

    def proven(self, document: dict[str, Any]) -> dict[str, Any]:
        assert document["state"] == "commit-pending" and document["data_loss_seconds"] == 0.0
        assert document["proof"]["chunks_different"] == 0 and document["proof"]["lsn"] == document["lsn"]
        return document

    def arrive(self, document: dict[str, Any]) -> None:
        """From now on it runs where it was handed over to."""
        self.site, self.protector = self.protector, self.site
        self.left_by, self.runs_by = self.runs_by, document["id"]
        self.state, self.mount = Path(document["state_directory"]), Path(document["mount"])

    def protect(self, limit: str = "60s") -> tuple[str | Path, ...]:
        """The words that have it protected from where it runs now."""
        token = self.protector.token(MACHINE)
        return ("reprotect", MACHINE, "--store", self.protector.manage, "--token", token, "--wait", "--timeout", limit)

    def settle(self) -> None:
        """Protected, and what it left where it came from is gone."""
        assert self.site.ask("machine", "show", MACHINE)["state"] == "protected"
        if self.left_by is not None:
            self.protector.ask("failover", "cleanup", self.left_by, "--yes")

    def go(self, disks: Disks) -> None:
        """One handover, and protection from there."""
        disks.change(self.mount)
        document = self.hand_over()
        disks.check(self.mount, Path(document["mount"]))
        self.protector.ask("failover", "commit", document["id"])
        self.arrive(document)
        disks.change(self.mount)
        self.site.ask(*self.protect())
        self.settle()

    def asrfs(self, *words: str | Path) -> Any:
        """The host's program where the machine runs."""
        program = (sys.executable, "-m", "asrfs.cli.main", "--state", self.state, "--json")
        return json.loads(run_tool(*program, *words, seconds_max=60.0) or "null")


@pytest.fixture
def sites(scratch: Path) -> Iterator[tuple[NetworkSite, NetworkSite]]:
    with two_sites(scratch) as sites:
        yield sites


@pytest.fixture
def disks(rng: random.Random) -> Disks:
    return Disks(rng)


@pytest.fixture
def circle(sites: tuple[NetworkSite, NetworkSite], disks: Disks) -> Iterator[Circle]:
    home, there = sites
    with at_home(home, there, MACHINE, disks) as host:
        yield Circle(home, there, host)


def test_i6_i7_and_i9_twenty_times_out_and_home_again(circle: Circle, disks: Disks) -> None:
    home, there = circle.site, circle.protector
    for _ in range(LOOPS):
        circle.go(disks)
        assert (circle.site, circle.protector) == (there, home)
        circle.go(disks)
    disks.check(circle.mount)
    assert there.ask("failover", "list") == [], "what came back has left nothing"
    assert [each["state"] for each in home.ask("failover", "list")] == ["committed"]
    assert home.ask("machine", "show", MACHINE)["epoch"] >= 4 * LOOPS


def test_a_filesystem_goes_out_and_home_again(circle: Circle, scratch: Path) -> None:
    """Mounted where the machine runs, and unmounted by a hook of the handover; each file ever written is there."""
    written: dict[str, bytes] = {}
    old = circle.state
    for number in range(4):
        mounted = scratch / f"mounted-{number}"
        mounted.mkdir()
        circle.asrfs("attach", "files", *(() if number else ("--format", "ext4", "--yes")), "--on", mounted)
        found = {path.name: path.read_bytes() for path in mounted.iterdir() if path.is_file()}
        assert found == written
        written[f"file-{number}"] = os.urandom(200_000)
        (mounted / f"file-{number}").write_bytes(written[f"file-{number}"])
        hook = scratch / f"unmount-{number}.sh"
        hook.write_text(f"#!/bin/sh\n[ $ASRFS_PHASE = take-back ] || umount {mounted}\n")
        hook.chmod(0o700)
        circle.asrfs("hooks", "add", "handover", hook, "--name", "files")
        document = circle.hand_over()
        assert list(mounted.iterdir()) == [], "it was unmounted first"
        for name in SIZES:
            here = Path(document["mount"], f"{name}.img").read_bytes()
            assert here == (circle.mount / f"{name}.img").read_bytes()
        circle.asrfs("detach", "files")
        circle.protector.ask("failover", "commit", document["id"])
        circle.arrive(document)
        circle.site.ask(*circle.protect())
        circle.settle()
    assert circle.state != old


class Killer:
    """Kills somebody who has a part in it, at any moment while a command runs; the command again until it is done."""

    def __init__(self, circle: Circle, rng: random.Random) -> None:
        self.circle, self.rng = circle, rng
        self.killed: list[str] = []

    def run(self, site: NetworkSite, words: Callable[[], tuple[str | Path, ...]]) -> dict[str, Any]:
        """Its document, however often it must be begun again; a token that is used up is replaced then."""
        victim, after_s = self.rng.choice(ROLES), self.rng.uniform(0.05, 3.0)
        timer = threading.Timer(after_s, self._kill, (victim, site))
        timer.start()
        given = words()
        try:
            for _ in range(TRIES_MAX):
                code, said, complained = site.run(*given)
                for each in (self.circle.site, self.circle.protector):
                    each.serve_again()
                if code == 0:
                    return dict(json.loads(said))
                print(f"{given[0]} ended with {code} after {self.killed[-1:]}: {complained}")
                assert code in (1, 4, 6, -signal.SIGKILL), complained
                given = words() if code == 6 else given
        finally:
            timer.cancel()
            timer.join()
            for each in (self.circle.site, self.circle.protector):
                each.serve_again()
        raise AssertionError(f"{given} was never done; killed: {self.killed}")

    def _kill(self, victim: str, site: NetworkSite) -> None:
        if victim in ("home", "there"):
            for each in (self.circle.site, self.circle.protector):
                if each.name == victim and each.store is not None:
                    each.store.kill()
        elif victim == "command":
            site.kill_command()
        elif pid := StateDirectory(str(self.circle.state)).lock_holder(victim):  # type: ignore[arg-type]
            os.kill(pid, signal.SIGKILL)
        self.killed.append(victim)


def test_i6_and_i9_whoever_is_killed_on_the_way(circle: Circle, disks: Disks, rng: random.Random) -> None:
    killer = Killer(circle, rng)
    for _ in range(2 * LOOPS_WITH_KILLS):
        disks.change(circle.mount)
        document = circle.proven(killer.run(circle.protector, circle.verb))
        disks.check(circle.mount, Path(document["mount"]))
        circle.protector.ask("failover", "commit", document["id"])
        circle.arrive(document)
        disks.change(circle.mount)
        killer.run(circle.site, lambda: circle.protect("20s"))  # a store that was killed serves again after that
        circle.settle()
    disks.check(circle.mount)
    assert killer.killed
