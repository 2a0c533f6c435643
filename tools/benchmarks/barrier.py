"""`barrier`: for how long members of a group are held for a point, and what writers see of a point every second.

Members of `hold` are pairs of processes without a mount (`barrier_member.py`), each with a journal of its own, joined
by TLS over loopback; what is told of a point is its longest hold, from marker to release, on the clock of the disk
server that held. `writers` are two whole machines with mounts and a store, and one program that writes to each.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab import Lab, wait_until

from asrfs.daemon import control
from asrfs.daemon.disks import add_sized
from asrfs.daemon.enrolment import Enrolment, save_enrolment
from asrfs.daemon.state import CONFIGURATION_FILE, StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.configuration import GroupOrder, HostConfiguration, Member, encode_configuration
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.tls import Credential, make_authority, make_key_and_request, sign_request

from .barrier_member import PORT_FILE
from .benchmark import Run
from .results import Turn, Workload, percentile
from .workbench import Workbench

MEMBERS, MEMBERS_TINY = (2, 4, 8, 16, 64), (2, 3)
POINTS, POINTS_TINY = 200, 5
KEY = "asrfs"
SECONDS = 15.0
EVERY_S = 1.0
BLOCK = 4096
READY_S_MAX = 300.0


def run(bench: Workbench, name: str, command: str) -> Run:
    tiny = bench.options.tiny
    counts = bench.options.machines or (MEMBERS_TINY if tiny else MEMBERS)
    points = POINTS_TINY if tiny else POINTS
    seconds = bench.seconds(SECONDS)
    run = Run(bench, name, command, {"points": points, "seconds of writing": seconds})
    run.facts(KEY, "asrfs")
    run.outcome.notes += [
        "hold: the longest of any member of a point; members are pairs of processes on this one machine, without a "
        "mount, each writing twenty times a second.",
        f"writers: two whole machines with mounts; with points: one of the group every {EVERY_S:g} s.",
    ]
    for count in counts:
        workload = Workload(f"hold-{count}", f"hold of {count} members, p99 of points", "ms", less_is_better=True)
        run.outcome.workloads.append(workload)
        workload.add(KEY, _hold(bench, count, points))
        bench.say(f"{count} members done")
    for kind in ("without", "with"):
        title = f"write of 4 KiB {kind} points, p99"
        run.outcome.workloads.append(Workload(f"writers-{kind}", title, "µs", less_is_better=True))
    with _real_machines(bench) as labs:
        for _ in range(bench.options.turns):
            for kind in ("without", "with"):
                found = _write(labs, seconds, with_points=kind == "with")
                workload_of = run.outcome.workload(f"writers-{kind}")
                assert workload_of is not None
                workload_of.add(KEY, found)
    return run


# ---- hold ----------------------------------------------------------------------------------------------------------


def _hold(bench: Workbench, count: int, points: int) -> Turn:
    with bench.stack() as stack:
        coordinator = _members(bench, stack, count)
        assert coordinator.stdin is not None and coordinator.stdout is not None
        longest, whole, void = [], [], 0
        for wanted in (max(3, points // 20), points):  # the first are for warming up
            coordinator.stdin.write(f"{wanted}\n")
            coordinator.stdin.flush()
            said = [json.loads(coordinator.stdout.readline()) for _ in range(wanted)]
            longest = [max(each["held_ms"]) for each in said if "held_ms" in each]
            whole = [each["ms"] for each in said if "ms" in each]
            void = wanted - len(longest)
        if not longest:
            raise TemporaryError(f"no point of {count} members was made: {said[-1]}")
    also = {
        "p50_ms": percentile(longest, 50),
        "max_ms": max(longest),
        "cut_ms": percentile(whole, 50),
        "void": float(void),
    }
    return Turn(percentile(longest, 99), also)


def _members(bench: Workbench, stack: ExitStack, count: int) -> subprocess.Popen[str]:
    """Start them all; the agent that coordinates."""
    clock = SystemClock()
    authority = make_authority("bench", clock.time_ns())
    states = [_state(bench, number, authority) for number in range(count)]
    port = _free_port()
    members = tuple(
        Member(machine_id=state.load_machine().id, name=state.load_machine().name, address="127.0.0.1", port=port,
               serial=serial)
        for state, serial in states
    )  # fmt: skip
    order = GroupOrder(id="e" * 32, name="bench", coordinator=members[0].machine_id, members=members, generation=1)
    agents = []
    for state, _ in states:
        root = Path(state.root)
        (root / CONFIGURATION_FILE).write_bytes(encode_configuration(HostConfiguration(generation=1, groups=(order,))))
        (root / PORT_FILE).write_text(str(port))
        _start(stack, "server", root)
        agents.append(_start(stack, "agent", root))
    return agents[0]


def _state(bench: Workbench, number: int, authority: Credential) -> tuple[StateDirectory, str]:
    """A machine with one disk and a certificate, and that one's serial number."""
    name = f"m{number}"
    state = StateDirectory.create(str(bench.directory(name) / "state"), name)
    add_sized(state, "data", 1 << 20)
    machine_id = state.load_machine().id
    key, request = make_key_and_request(name, machine_id)
    certificate, identity = sign_request(authority, request, name, machine_id, SystemClock().time_ns())
    enrolment = Enrolment(
        store_id="0" * 32,
        server_name="bench",
        host="127.0.0.1",
        data_port=1,
        manage_port=1,
        payload_key="",
        index_key="",
    )
    save_enrolment(state, enrolment, key=key, certificate=certificate, authority=authority.certificate)
    return state, identity.serial


def _start(stack: ExitStack, role: str, root: Path) -> subprocess.Popen[str]:
    with (root / f"{role}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.barrier_member", role, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    stack.callback(_end, process)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise TemporaryError(f"a member did not start: {(root / f'{role}.log').read_text()[-300:]}")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(timeout=60)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


# ---- writers -------------------------------------------------------------------------------------------------------


@contextmanager
def _real_machines(bench: Workbench) -> Iterator[list[Lab]]:
    labs = [Lab(machine=f"web{number}", parent=bench.root) for number in (1, 2)]
    try:
        for lab in labs:
            if lab is labs[0]:
                lab.start_store()
            else:
                lab.vault, lab.manage, lab.data = labs[0].vault, labs[0].manage, labs[0].data
            lab.asrfs("init", lab.machine)
            lab.asrfs("disk", "add", "data", "--size", "16M")
            lab.asrfs("set", f"group_port={_free_port()}")
            lab.enroll()
            lab.start_host()
        labs[0].replica_store("group", "create", "bench", "--member", "web1", "--member", "web2")
        wait_until(lambda: _is_joined(labs), "the group", seconds_max=60)
        yield labs
    finally:
        for lab in reversed(labs):
            lab.close()


def _is_joined(labs: list[Lab]) -> bool:
    groups: list[dict[str, Any]] = [group for lab in labs for group in lab.status()["groups"]]
    return [each["connected"] for each in groups if each["role"] == "coordinator"] == [2] and not any(
        each["reason"] for each in groups
    )


def _write(labs: list[Lab], seconds: float, *, with_points: bool) -> Turn:
    ended = threading.Event()
    latencies: list[float] = []
    failures: list[BaseException] = []

    def write(path: Path) -> None:
        file = os.open(path, os.O_RDWR)
        places, payload = random.Random(str(path)), os.urandom(BLOCK)
        try:
            while not ended.is_set():
                started = time.perf_counter()
                os.pwrite(file, payload, places.randrange((16 << 20) // BLOCK) * BLOCK)
                latencies.append((time.perf_counter() - started) * 1e6)
                ended.wait(0.001)
        except OSError as error:
            failures.append(error)
        finally:
            os.close(file)

    writers = [threading.Thread(target=write, args=(lab.disks / "data.img",)) for lab in labs]
    for writer in writers:
        writer.start()
    points = 0
    agent = StateDirectory(str(labs[0].state)).socket_path("agent")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if with_points:
            control.call(agent, "point_create", group="bench", consistency="crash")
            points += 1
        ended.wait(min(EVERY_S, max(0.0, deadline - time.monotonic())))
    ended.set()
    for writer in writers:
        writer.join()
    if failures:
        raise failures[0]
    also = {"p50_us": percentile(latencies, 50), "max_us": max(latencies), "points": float(points)}
    return Turn(percentile(latencies, 99), also)
