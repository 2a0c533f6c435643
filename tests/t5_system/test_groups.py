"""Points of groups of real machines, each in its own network: ping-pong writes, faults, what the store lists."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.proof.kernel.filesystems import mounted_copy
from tests.proof.kernel.postgres import USER, Postgres, program, second_server
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.site import DISK, GROUP, PingPong, Site
from tests.waiting import wait_until

POINTS = 24


@pytest.fixture
def make_site(scratch: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(size: int, **options: str) -> Site:
        site = Site(scratch, size, **options)
        sites.append(site)
        site.start()
        return site

    yield make
    for site in sites:
        site.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 4])
def test_no_effect_without_its_cause(size: int, make_site: Callable[..., Site]) -> None:
    site = make_site(size)
    game = PingPong([machine.mount / f"{DISK}.img" for machine in site.machines], players=4)
    made = []
    with game.playing():
        for turn in range(POINTS):
            goal = sum(game.done) + 20
            wait_until(lambda goal=goal: sum(game.done) >= goal, what="writes between points")
            point = site.create(site.machines[turn % size])
            assert point, "nothing went wrong"
            made.append(point)
    site.check_points(game, made)


@pytest.mark.timeout(300)
def test_members_that_die_or_are_cut_off_void_the_point_and_hold_nobody_for_long(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(3)
    coordinator = site.coordinator()
    others = [machine for machine in site.machines if machine is not coordinator]
    game = PingPong([machine.mount / f"{DISK}.img" for machine in site.machines], players=3)
    made = []
    with game.playing():

        def go_on(what: str) -> None:
            goal = [done + 3 for done in game.done]
            wait_until(lambda: all(done >= at for done, at in zip(game.done, goal, strict=True)), 30, what=what)

        made.append(site.create(coordinator))
        others[0].kill("agent", signal.SIGSTOP)
        assert site.create(coordinator) is None, "a member that does not answer"
        go_on("writes while a member's agent stands still")
        others[0].kill("agent", signal.SIGCONT)
        site.wait_until_joined()
        made.append(site.create(others[0], "--wait", "--timeout", "60s"))

        site.cut_off(site.machines.index(others[1]))
        assert site.create(coordinator) is None, "a member that is cut off"
        go_on("writes while a member is cut off")
        site.heal(site.machines.index(others[1]))
        site.wait_until_joined()
        made.append(site.create(coordinator))

        others[0].kill("disk_server")
        go_on("writes after the death of a disk server")
        site.wait_until_joined()
        made.append(site.create(coordinator))

        coordinator.kill("agent")
        go_on("writes after the death of the coordinator")
        site.wait_until_joined()
        made.append(site.create(others[1]))
    assert all(made)
    site.check_points(game, [point for point in made if point])


@pytest.mark.timeout(300)
def test_another_member_coordinates_when_the_coordinator_is_gone_and_members_come_and_go(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(3)
    coordinator = site.coordinator()
    rest = [machine for machine in site.machines if machine is not coordinator]
    game = PingPong([machine.mount / f"{DISK}.img" for machine in rest], players=2)
    with game.playing():
        coordinator.stop()
        wait_until(lambda: site.coordinator() is not coordinator, 30, what="another coordinator")
        assert site.create(rest[0]) is None, "not all members are there"
        site.store.ask("group", "remove", GROUP, coordinator.name)
        site.wait_until_joined(rest)
        first = site.create(rest[0], "--name", "without")
        site.store.ask("policy", "set", "loose", "partial_points=yes")
        site.store.ask("policy", "assign", "loose", GROUP)
        site.store.ask("group", "add", GROUP, coordinator.name)
        wait_until(lambda: site.standing(rest[0]).get("members") == 3, 30, what="the changed group")
        second = wait_until(lambda: site.create(rest[0], "--name", "some"), 30, what="a point of those that are there")
    for machine in rest:
        machine.asrfs("drain", "--timeout", "60s")
    at = site.machines.index(rest[0])
    points = site.listed()[at]
    assert (points[first]["ready"], len(points[first]["members"])) == (2, 2)
    assert (points[second]["ready"], len(points[second]["members"])) == (2, 3)
    assert site.listed()[site.machines.index(coordinator)] == {}


@pytest.mark.timeout(300)
def test_filesystem_points_of_a_group_need_no_replay_on_any_member(make_site: Callable[..., Site]) -> None:
    site = make_site(2, disk_size="32M")
    places = []
    for machine in site.machines:
        place = machine.root / "fs"
        place.mkdir()
        machine.asrfs("attach", DISK, "--format", "ext4", "--on", place)
        places.append(place)
    ended = threading.Event()
    written = [0]

    def write() -> None:
        """A file here, then one there, each for the one before it."""
        while not ended.is_set():
            number = written[0]
            (places[number % 2] / f"file-{number % 400}").write_bytes(f"{number:08} ".encode() * 100)
            written[0] = number + 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = []
        for turn in range(3):
            goal = written[0] + 20
            wait_until(lambda goal=goal: written[0] >= goal, what="files between points")
            made.append(site.create(site.machines[turn % 2], "--consistency", "filesystem"))
    finally:
        ended.set()
        writer.join()
        for machine in site.machines:
            machine.asrfs("detach", DISK)
    assert all(made)
    for machine, points in zip(site.machines, site.drained_and_listed(), strict=True):
        for point in made:
            assert points[point]["consistency"] == "filesystem"
            output = site.scratch / f"{machine.name}-{point}.raw"
            site.store.ask("export", machine.name, DISK, "--point", point, "--output", output)
            run_tool("e2fsck", "-fn", output)
            assert "needs_recovery" not in run_tool("dumpe2fs", "-h", output)


class Transactions:
    """Row 1 on one server, row 2 on another, …: each is begun when the one before it was acknowledged."""

    def __init__(self, servers: list[Postgres]) -> None:
        self.done = 0
        self._servers = servers
        self._stop = threading.Event()
        self._error: BaseException | None = None
        for server in servers:
            server.query("CREATE TABLE turns (number bigint PRIMARY KEY)")
        self._clients = [
            subprocess.Popen(
                [program("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", str(server.sockets), "-U", USER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for server in servers
        ]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def go_on(self, count: int) -> int:
        """Until so many more were acknowledged; how many are."""
        goal = self.done + count
        wait_until(lambda: self.done >= goal or self._error is not None, 60, what="transactions")
        assert self._error is None, f"I8: a transaction failed: {self._error!r}"
        return self.done

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for client in self._clients:
            client.communicate()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                number = self.done + 1
                client = self._clients[number % len(self._clients)]
                assert client.stdin is not None and client.stdout is not None
                client.stdin.write(f"INSERT INTO turns VALUES ({number}) RETURNING number;\n")
                client.stdin.flush()
                answer = client.stdout.readline()
                assert answer == f"{number}\n", answer
                self.done = number
        except BaseException as error:
            self._error = error


def check_turns(images: list[Path], scratch: Path, at_least: int) -> None:
    """Servers on the copies have all rows up to one, which are not fewer than were acknowledged before the cut."""
    rows: list[int] = []
    for number, image in enumerate(images):
        with (
            mounted_copy(image, scratch / "copy", "ext4") as copy,
            second_server(copy / "pg", scratch / "pg-copy") as server,
        ):
            found = [int(row) for row in server.query("SELECT number FROM turns ORDER BY number").split()]
            assert all(row % len(images) == number for row in found)
            rows += found
    assert sorted(rows) == list(range(1, len(rows) + 1)), "an effect without its cause"
    assert len(rows) >= at_least, f"transaction {at_least} was acknowledged before the point, which has {len(rows)}"


def add_hook(machine: HostUnderTest, phase: str, text: str, *options: str) -> None:
    path = machine.root / f"hook-{len(list(machine.root.glob('hook-*')))}.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    machine.asrfs("hooks", "add", phase, str(path), *options)


@pytest.mark.timeout(300)
def test_i5_application_points_of_a_group_have_each_transaction_and_its_cause(make_site: Callable[..., Site]) -> None:
    """A PostgreSQL on each of two machines, each transaction caused by one on the other."""
    site = make_site(2, disk_size="192M")
    servers = []
    try:
        for number, machine in enumerate(site.machines):
            (machine.root / "fs").mkdir()
            machine.asrfs("attach", DISK, "--format", "ext4", "--on", machine.root / "fs")
            servers.append(Postgres(machine.root / "fs/pg", site.scratch / f"pg{number}"))
            servers[-1].create()
            servers[-1].start()
            machine.asrfs("hooks", "add", "pre", f"postgresql -h {servers[-1].sockets} -U {USER}", "--timeout", "60s")
            add_hook(machine, "post", f"echo $ASRFS_PHASE $ASRFS_FAILED >> {machine.root}/log", "--name", "note")
        turns = Transactions(servers)
        acknowledged: dict[str, int] = {}
        try:
            for number in range(2):
                before = turns.go_on(20)
                point = site.create(site.machines[number], "--consistency", "application")
                assert point, "nothing went wrong"
                acknowledged[point] = before
            # A lock that is lost on one machine while the other one is still getting ready.
            add_hook(site.machines[0], "hold", "echo holding; sleep 0.2; exit 1", "--name", "keep", "--order", "90")
            add_hook(site.machines[1], "pre", "sleep 1.5", "--name", "slow", "--order", "91")
            turns.go_on(20)
            lost = site.create(site.machines[1], "--consistency", "application")
            assert lost
            turns.go_on(5)
        finally:
            turns.stop()
    finally:
        for server in servers:
            server.stop()
        for machine in site.machines:
            machine.asrfs("detach", DISK)
    listed = site.drained_and_listed()
    for machine, points in zip(site.machines, listed, strict=True):
        own = {point["id"]: point for point in machine.asrfs("point", "list")}
        for point in acknowledged:
            for said in (points[point], own[point]):
                assert (said["consistency"], said["failed"], said["unfinished"]) == ("application", None, False), said
                assert [(each["phase"], each["exit_code"]) for each in said["hooks"]] == [("pre", 0), ("post", 0)]
                assert 0 < said["freeze_ms"] <= said["hold_ms"], said
        assert (machine.root / "log").read_text().splitlines()[:2] == ["post", "post"]
    kept, other = (points[lost] for points in listed)
    assert (kept["consistency"], kept["wanted"]) == ("crash", "application") and "hook keep" in kept["failed"], kept
    assert (other["consistency"], other["failed"]) == ("application", None), other
    for point, at_least in acknowledged.items():
        images = []
        for machine in site.machines:
            images.append(site.scratch / f"{machine.name}.raw")
            words = ("export", machine.name, DISK, "--point", point, "--output", images[-1], "--force")
            site.store.ask(*words)
        check_turns(images, site.scratch, at_least)
