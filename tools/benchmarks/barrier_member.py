"""A member of a group for `barrier`, without a mount: `python -m benchmarks.barrier_member server|agent DIR`.

`server` is what a disk server is behind its FUSE session: journal, disk, control socket; in the place of the session
one thread writes now and then. `agent` is what an agent has of groups: the real groups over real TLS, and the disk
server's control socket. The coordinator's agent takes how many points to cut from its input, a line each time, and
prints what each was like. So sixty-four members need 128 processes that are idle between points, where whole machines
would need 192 that all look around four times a second.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.points import Point, PointLog
from asrfs.daemon.agent_groups import AgentGroups
from asrfs.daemon.control import ControlServer
from asrfs.daemon.disk_server_client import DiskServerClient
from asrfs.daemon.hardening import raise_file_limit
from asrfs.daemon.point_processes import PointProcesses
from asrfs.daemon.served_machine import ServedMachine
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import CONFIGURATION_FILE, POINTS_FILE, StateDirectory
from asrfs.disk.interface import HeldError
from asrfs.errors import AsrfsError
from asrfs.model.configuration import HostConfiguration, decode_configuration
from asrfs.replication.alarms import Alarms
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock

BLOCK = 4096
PORT_FILE = "port"
WRITES_PER_S = 20.0


def serve_disk(state: StateDirectory) -> None:
    """Until SIGTERM."""
    machine = ServedMachine(state, SystemClock())
    control = ControlServer(state.socket_path("disk_server"), machine.verbs())
    control.start()
    (disk,) = machine.volume.disks.values()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print("ready", flush=True)
    blocks = disk.size_bytes // BLOCK
    pace = random.Random(state.root)
    while not ended.wait(pace.random() * 2 / WRITES_PER_S):
        payload = random.randbytes(BLOCK)
        offset = pace.randrange(blocks) * BLOCK
        done = threading.Event()

        def write(offset: int = offset, payload: bytes = payload, done: threading.Event = done) -> None:
            disk.write(offset, payload)
            done.set()

        _as_a_session_does(write, machine.hold.keep, done)
    control.close()
    machine.flush()


def _as_a_session_does(
    write: Callable[[], None], keep: Callable[[Callable[[], None], int], bool], done: threading.Event
) -> None:
    while True:
        try:
            write()
        except HeldError:
            if not keep(write, BLOCK):
                continue
        done.wait()
        return


async def serve_groups(state: StateDirectory, configuration: HostConfiguration, port: int) -> None:
    """Until the input ends, cutting as many points as each line of it says, if this machine coordinates."""
    settings = msgspec.structs.replace(Settings(), group_port=port)
    client = DiskServerClient(state.socket_path("disk_server"))

    async def note(_point: Point) -> None:
        await trio.lowlevel.checkpoint()

    async def settled(_lsn: int) -> None:
        await trio.lowlevel.checkpoint()

    own = state.load_machine()
    maker = PointMaker(
        machine_name=own.name,
        quiescer=PointProcesses(state),
        mark=client.marker,
        note=note,
        epoch=lambda: 1,
        deadline_s=lambda: settings.freeze_deadline,
    )
    groups = AgentGroups(
        state,
        machine_id=own.id,
        server=client,
        maker=maker,
        alarms=Alarms(),
        settings=lambda: settings,
        settled=settled,
        threads=trio.CapacityLimiter(2),
        points=PointLog(DirectoryStorage(state.root), POINTS_FILE),
    )
    groups.follow(configuration)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(groups.run)
        print("ready", flush=True)
        await _obey(groups)
        nursery.cancel_scope.cancel()


async def _obey(groups: AgentGroups) -> None:
    while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
        (coordinator,) = groups.groups.coordinated()
        await coordinator.wait_until_complete()
        for _ in range(int(line)):
            started = time.monotonic()
            try:
                point = await coordinator.cut("crash")
            except AsrfsError as error:
                print(json.dumps({"void": str(error)}), flush=True)
                continue
            held = [share.hold_ms for share in point.shares]
            print(json.dumps({"held_ms": held, "ms": (time.monotonic() - started) * 1000}), flush=True)
            await trio.sleep(0.02)


def main() -> None:
    role, root = sys.argv[1:]
    raise_file_limit()
    # What is printed is for whoever started us.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    state = StateDirectory.open(root)
    if role == "server":
        serve_disk(state)
    else:
        place = Path(state.root)
        configuration = decode_configuration((place / CONFIGURATION_FILE).read_bytes())
        trio.run(serve_groups, state, configuration, int((place / PORT_FILE).read_text()))


if __name__ == "__main__":
    main()
