"""The runbook of failing over and coming home, as it is printed: its commands are run, its words are held to."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import replica_store
from tests.t5_system.networks import Disks, NetworkSite, at_home, two_sites

pytestmark = pytest.mark.timeout(300)
TEXT = (Path(replica_store.__file__).parents[1] / "docs/failover.md").read_text()
MACHINE = "db1"
NEXT = ("failover commit", "reprotect", "failback", "reprotect", "failover cleanup")
"""What each command must say comes next."""


class Row(NamedTuple):
    """A line of the circle's table."""

    number: int
    where: str
    command: str
    state: str


def circle() -> list[Row]:
    rows = re.findall(r"^\| (\d) \| (home|there) \| `replica-store ([^`]+)` \| `([a-z-]+)`.*\|$", TEXT, re.MULTILINE)
    return [Row(int(number), where, command, state) for number, where, command, state in rows]


def test_it_begins_with_what_must_not_be_run_and_why() -> None:
    sections = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert sections[:2] == ["What must not be run, and why", "The circle"]
    warnings = TEXT.partition("## What must not")[2].partition("\n## ")[0]
    before = TEXT.partition("## What must not")[0]
    assert "replica-store failover" not in before, "nothing to be run comes before it"
    forbidden = re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- |\Z)", warnings, re.MULTILINE | re.DOTALL)
    assert len(forbidden) >= 7
    for what, why in forbidden:
        assert what.startswith(("Not", "No ")) and len(why.split()) >= 8, f"{what}: it does not say why"


def test_the_circle_has_five_commands() -> None:
    assert [row.number for row in circle()] == [1, 2, 3, 4, 5]


class Reader:
    """Somebody who has the runbook beside them."""

    def __init__(self, home: NetworkSite, there: NetworkSite) -> None:
        self.sites = {"home": home, "there": there}
        self.ids: dict[str, str] = {}

    def run(self, row: Row) -> dict[str, Any]:
        """The command of a row, with what stands for something put in its place."""
        site = self.sites[row.where]
        other = self.sites["home" if row.where == "there" else "there"]
        meant = {"store.home:9444": self.sites["home"].manage, "store.there:9444": self.sites["there"].manage}
        words = []
        for word in row.command.split():
            if word in ("T", "T2"):
                word = other.token(MACHINE)
            elif word == "ID":
                word = self.ids[row.where]
            elif word.startswith("/"):
                word = f"{site.scratch}{word}"
            words.append(meant.get(word, word))
        document: dict[str, Any] = site.ask(*words)
        self.ids[row.where] = document["id"]
        return document


@pytest.fixture
def sites(scratch: Path) -> Iterator[tuple[NetworkSite, NetworkSite]]:
    with two_sites(scratch) as sites:
        yield sites


def test_i7_and_i9_the_commands_of_the_circle(sites: tuple[NetworkSite, NetworkSite], rng: random.Random) -> None:
    home, there = sites
    reader, disks = Reader(home, there), Disks(rng)
    with at_home(home, there, MACHINE, disks) as host:
        there.ask("policy", "set", "gold", "crash_interval=24h", "application_interval=0", "retention=9d")
        there.ask("policy", "assign", "gold", MACHINE)
        refused = there.refused(4, "failback", MACHINE)
        assert "runs at home" in refused
        mount = host.mount
        for row, following in zip(circle(), NEXT, strict=True):
            if row.number in (1, 4):
                disks.change(mount)
            document = reader.run(row)
            assert following in document["next"], f"step {row.number} says {document['next']!r} comes next"
            assert reader.sites[row.where].ask("machine", "show", MACHINE)["state"] == row.state
            if row.number in (1, 4):
                disks.check(mount, Path(document["mount"]))
                mount = Path(document["mount"])
            if row.number == 2:
                own = there.refused(4, "reprotect", MACHINE, "--store", there.manage, "--token", there.token(MACHINE))
                assert "this very store" in own
            if row.number == 3:
                shown = home.ask("machine", "show", MACHINE)
                assert (shown["state"], shown["policy"]) == ("protected", "gold")
                assert "in the other direction" in there.refused(4, "failback", MACHINE)
        shown = there.ask("machine", "show", MACHINE)
        assert (shown["state"], shown["policy"]) == ("protected", "gold")
        disks.change(mount)
        assert [each["state"] for each in there.ask("failover", "list")] == ["returned"]
        there.ask("failover", "cleanup", reader.ids["there"], "--yes")
        assert "runs at home" in there.refused(4, "failback", MACHINE)
