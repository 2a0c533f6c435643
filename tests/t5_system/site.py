"""A store and machines that each have a network of their own: network namespaces on a bridge, real `asrfs serve`s.

The mounts are seen from outside, as only the network is another one. A machine is cut off by taking its link down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asrfs.errors import AsrfsError
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.store import StoreUnderTest
from tests.waiting import wait_until

BLOCK = 4096
DISK = "data"
GROUP = "shop"


class PingPong:
    """Players that write on one machine after another: each write is begun when the one before it was acknowledged.

    Player p has block p of every machine's disk; its k-th write is on machine k mod n, of a block full of k. So what a
    cut has of a player says which of its writes are in it, and they must be all up to one.
    """

    def __init__(self, paths: Sequence[Path], players: int) -> None:
        self.players = players
        self.done = [0] * players
        self.longest_s = 0.0
        self._files = [os.open(path, os.O_RDWR) for path in paths]
        self._stop = threading.Event()
        self._failed: list[BaseException] = []

    @contextmanager
    def playing(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._play, args=(player,)) for player in range(self.players)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            for file in self._files:
                os.close(file)
        assert not self._failed, f"a write failed: {self._failed[0]!r}"

    def _play(self, player: int) -> None:
        try:
            while not self._stop.is_set():
                number = self.done[player] + 1
                file = self._files[number % len(self._files)]
                os.pwrite(file, number.to_bytes(8, "little") * (BLOCK // 8), player * BLOCK)
                self.done[player] = number
        except BaseException as error:
            self._failed.append(error)

    def check(self, images: Sequence[Path], what: str) -> int:
        """Of each player the images have all writes up to one, and none behind it; how many writes in all."""
        total = 0
        contents = [image.open("rb") for image in images]
        try:
            for player in range(self.players):
                newest = []
                for content in contents:
                    content.seek(player * BLOCK)
                    block = content.read(BLOCK)
                    assert block == block[:8] * (BLOCK // 8), f"{what}: a block of player {player} is torn"
                    newest.append(int.from_bytes(block[:8], "little"))
                last = max(newest)
                for machine, number in enumerate(newest):
                    due = last - (last - machine) % len(images)
                    assert number == max(due, 0), (
                        f"{what}: player {player}: write {last} is in it, but of machine {machine} only {number}, "
                        f"not its cause {due}"
                    )
                total += last
        finally:
            for content in contents:
                content.close()
        return total


class Site:
    """`size` machines m0, m1, … with one disk each, enrolled and served, all members of one group."""

    def __init__(self, scratch: Path, size: int, *, disk_size: str = "1M") -> None:
        self.scratch = scratch
        self.disk_size = disk_size
        self.tag = f"{os.getpid() % 40000:x}"
        self.net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.store = StoreUnderTest(scratch)
        self.store.host = f"{self.net}.1"
        self.machines: list[HostUnderTest] = []
        self._size = size
        self._spaces: list[str] = []

    def start(self) -> None:
        run_tool("ip", "link", "add", self._bridge, "type", "bridge")
        run_tool("ip", "addr", "add", f"{self.net}.1/24", "dev", self._bridge)
        run_tool("ip", "link", "set", self._bridge, "up")
        self.store.ask("init", "--name", "site-b")
        self.store.serve()
        for number in range(self._size):
            self._add_machine(number)
        for machine in self.machines:  # where members are reached is told with the group, and again when it is known
            wait_until(lambda machine=machine: machine.asrfs("status")["link"] == "connected", what="its store")  # type: ignore[misc]
        members = [word for machine in self.machines for word in ("--member", machine.name)]
        self.store.ask("group", "create", GROUP, *members)
        self.wait_until_joined()

    def _add_machine(self, number: int) -> None:
        space, outer, inner = f"as{self.tag}-{number}", f"ao{self.tag}-{number}", f"ai{self.tag}-{number}"
        run_tool("ip", "netns", "add", space)
        self._spaces.append(space)
        run_tool("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        run_tool("ip", "link", "set", inner, "netns", space)
        run_tool("ip", "link", "set", outer, "master", self._bridge)
        run_tool("ip", "link", "set", outer, "up")
        run_tool("ip", "-n", space, "addr", "add", f"{self.net}.{10 + number}/24", "dev", inner)
        for device in (inner, "lo"):
            run_tool("ip", "-n", space, "link", "set", device, "up")
        root = self.scratch / f"m{number}"
        root.mkdir()
        machine = HostUnderTest(root, name=f"m{number}", within=("nsenter", f"--net=/run/netns/{space}"))
        machine.init(**{DISK: self.disk_size})
        machine.asrfs("enroll", "--store", self.store.manage, "--token", self.store.token(machine.name))
        machine.serve()
        self.machines.append(machine)

    @property
    def _bridge(self) -> str:
        return f"ab{self.tag}"

    # ---- the group --------------------------------------------------------------------------------------------------

    def standing(self, machine: HostUnderTest) -> dict[str, Any]:
        """What the machine says of the group; nothing while it knows of none."""
        done = machine.run("--json", "status")
        groups = json.loads(done.stdout)["groups"] if done.returncode == 0 else []
        return dict(groups[0]) if groups else {}

    def coordinator(self) -> HostUnderTest:
        name = self.store.ask("group", "show", GROUP)["coordinator"]
        return next(machine for machine in self.machines if machine.name == name)

    def wait_until_joined(self, machines: Sequence[HostUnderTest] | None = None) -> None:
        """Until every one of them knows that these are the group, and is connected to the coordinator, which says so
        too."""
        machines = self.machines if machines is None else machines

        def are_joined() -> bool:
            standings = [self.standing(machine) for machine in machines]
            connected = [standing.get("connected") for standing in standings if standing.get("role") == "coordinator"]
            known = {standing.get("members") for standing in standings}
            is_well = not any(standing.get("reason") for standing in standings)
            return known == {len(machines)} and connected == [len(machines)] and is_well

        wait_until(are_joined, 60, what="all members joined the group")

    def create(self, machine: HostUnderTest, *arguments: str) -> str | None:
        """A point of the group: its id; None if there is none."""
        done = machine.run("--json", "point", "create", "--group", GROUP, *arguments)
        if done.returncode != 0:
            assert done.returncode == 1, done.stderr
            return None
        return str(json.loads(done.stdout)["id"])

    def listed(self) -> list[dict[str, dict[str, Any]]]:
        """For each machine the group's points at the store, by id."""
        return [
            {point["id"]: point for point in self.store.ask("point", "list", machine.name) if point["group"]}
            for machine in self.machines
        ]

    def drained_and_listed(self) -> list[dict[str, dict[str, Any]]]:
        """`listed`, when the store has everything."""
        for machine in self.machines:
            machine.asrfs("drain", "--timeout", "60s")
        return self.listed()

    @contextmanager
    def tree(self) -> Iterator[Path]:
        """The tree of points, mounted."""
        path = self.scratch / "points"
        path.mkdir()
        command = self.store.command("mount", path)
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert program.stdout is not None
        try:
            assert program.stdout.readline().startswith("ready")
            yield path
        finally:
            program.send_signal(signal.SIGTERM)
            assert program.wait(60) == 0
            program.stdout.close()

    def check_points(self, game: PingPong, made: list[str]) -> None:
        """Every point that was made is listed; what is listed is for all, and no effect in it is without its cause.

        A point may be real although whoever asked for it lost the coordinator before it said so.
        """
        listed = self.drained_and_listed()
        for points in listed:
            assert set(points) >= set(made), f"listed {sorted(points)}, made {sorted(made)}"
            assert points.keys() == listed[0].keys(), "points are listed for some members"
            members = {(point["ready"], len(point["members"])) for point in points.values()}
            assert members == {(len(self.machines),) * 2}
        with self.tree() as tree:
            for point in listed[0]:
                images = [tree / machine.name / point / f"{DISK}.img" for machine in self.machines]
                assert game.check(images, f"point {point}") > 0

    # ---- the network ------------------------------------------------------------------------------------------------

    def cut_off(self, number: int) -> None:
        run_tool("ip", "link", "set", f"ao{self.tag}-{number}", "down")

    def heal(self, number: int) -> None:
        run_tool("ip", "link", "set", f"ao{self.tag}-{number}", "up")

    def close(self) -> None:
        for machine in self.machines:
            try:
                machine.close()
            except (AssertionError, AsrfsError, subprocess.TimeoutExpired) as error:
                print(f"{machine.name}: {error}")
        self.store.close()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, timeout=30)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True, timeout=30)
