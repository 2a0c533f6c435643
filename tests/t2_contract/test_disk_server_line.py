"""One contract for the agent's way to its disk server: the control socket, and the simulation's line in memory."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from asrfs.daemon.control import ControlServer, Fields
from asrfs.daemon.control_trio import serve_control
from asrfs.daemon.disk_server_client import DiskServerClient
from asrfs.errors import BadInputError, TemporaryError
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Positions
from asrfs.replication.disk_server import DiskServer, HostPositions
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.journal_world import MACHINE_ID, StepClock
from tests.proof.sim.agent import DiskServerLine
from tests.proof.sim.determinism import deterministic
from tests.proof.sim.disk_server import DiskServerLife
from tests.proof.sim.machine_model import BLOCK, MachineModel
from tests.proof.sim.processes import Process
from tests.proof.sim.watch import Watch

SEGMENT_BYTES = 64 * BLOCK
MARKER = encode_marker(MarkerRecord(id="1" * 32))


def _life(storage: CrashStorage) -> DiskServerLife:
    storage.make_directory("images")
    file = storage.create("images/0")
    file.write_at([bytes(8 * BLOCK)], 0)
    machine = MachineConfig(
        id=MACHINE_ID.hex(), name="web1", disks=(DiskConfig(slot=0, id="1" * 32, name="d0", size_bytes=8 * BLOCK),)
    )
    model = MachineModel((bytes(8 * BLOCK),))
    storage.make_directory("journal")
    return DiskServerLife(
        storage, MACHINE_ID, Positions(), lambda: machine, StepClock(), model, random.Random(1), SEGMENT_BYTES
    )


def _positions(found: HostPositions) -> Fields:
    durable = found.durable
    return {
        "appended": found.appended_lsn,
        "durable": durable.lsn,
        "epoch": found.epoch,
        "segment": durable.segment,
        "offset": durable.offset,
        "time_ns": durable.time_ns,
        "failed": found.failed,
    }


@asynccontextmanager
async def _over_socket(path: str, life: DiskServerLife) -> AsyncIterator[tuple[DiskServer, Callable[[], Any]]]:
    async def marker(request: Fields) -> Fields:
        lsn, time_ns = life.marker(bytes(request["payload"]))
        return {"lsn": lsn, "time_ns": time_ns}

    async def fill(request: Fields) -> Fields:
        return {"lsn": life.fill(request["slot"], request["offset"], request["length"])}

    async def sync(request: Fields) -> Fields:
        return _positions(life.sync())

    async def positions(request: Fields) -> Fields:
        return _positions(life.positions())

    async def applied(request: Fields) -> Fields:
        life.applied(request["lsn"], request["segment"])
        return {}

    handlers = {"marker": marker, "fill": fill, "sync": sync, "positions": positions, "applied": applied}
    client = DiskServerClient(path)
    scope = trio.CancelScope()

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await serve_control(path, handlers, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield client, scope.cancel
        scope.cancel()
    client.close()


@asynccontextmanager
async def _in_memory(path: str, life: DiskServerLife) -> AsyncIterator[tuple[DiskServer, Callable[[], Any]]]:
    process = Process("disk server", "web1")
    host = SimpleNamespace(
        server=life, server_process=process, agent_process=Process("agent", "web1"), watch=Watch(),
        loses_answers=0.0, holds_maps=False, rng=random.Random(1),
    )  # fmt: skip
    yield DiskServerLine(cast(Any, host)), process.kill


@pytest.fixture(params=[_over_socket, _in_memory], ids=["socket", "memory"])
async def line(request: pytest.FixtureRequest, scratch: Path) -> AsyncIterator[Any]:
    """The way, the storage behind it, and what ends the disk server."""
    storage = CrashStorage()
    with deterministic(random.Random(1), segment_bytes=SEGMENT_BYTES, slow=0.0, on_work=lambda *_: None):
        async with request.param(str(scratch / "disk.sock"), _life(storage)) as (server, end):
            yield server, storage, end


async def test_verbs_are_answered(line: Any) -> None:
    server, _, _ = line
    first = await server.positions()
    assert first.durable.lsn < first.appended_lsn
    assert first.failed is None
    assert (await server.sync()).durable.lsn == first.appended_lsn
    lsn, time_ns = await server.marker(MARKER)
    last = await server.positions()
    assert (lsn, time_ns) == (last.durable.lsn, last.durable.time_ns)
    assert await server.fill(0, 0, BLOCK) == lsn + 1
    await server.applied(lsn, 0)


async def test_what_it_refuses_is_raised_here_and_the_line_stays_good(line: Any) -> None:
    server, _, _ = line
    with pytest.raises(BadInputError):
        await server.fill(0, 7 * BLOCK, 2 * BLOCK)
    assert await server.fill(0, 7 * BLOCK, BLOCK)


async def test_an_error_of_its_disk_is_worth_another_try(line: Any) -> None:
    server, storage, _ = line
    fault = storage.inject(Fault(0, errno.ENOSPC, kinds=frozenset(("write",))))
    with pytest.raises(TemporaryError):
        await server.marker(MARKER)
    assert fault.fired == 1
    assert await server.marker(MARKER)


async def test_one_that_died_is_away(line: Any) -> None:
    server, _, end = line
    await server.positions()
    end()
    for verb in (server.positions, server.sync, lambda: server.applied(1, 0)):
        with pytest.raises(TemporaryError):
            await verb()


async def test_a_hold_that_takes_its_time_holds_up_no_other_task_for_long(scratch: Path) -> None:
    """The agent stops for it, for a moment; then only the share that asked for it waits on."""
    path, went_on = str(scratch / "disk.sock"), threading.Event()
    asked, released = list[Fields](), list[Fields]()

    def arm(request: Fields) -> Fields:
        asked.append(request)
        return {}

    def hold(request: Fields) -> Fields:
        assert went_on.wait(20), "nobody else could do anything"
        return {"lsn": 7, "time_ns": 8, "epoch": 1}

    def release(request: Fields) -> Fields:
        released.append(request)
        return {"holding": True, "hold_ms": 1.5}

    async def go_on() -> None:
        went_on.set()

    server = ControlServer(path, {"arm": arm, "hold": hold, "release": release})
    server.start()
    client = DiskServerClient(path)
    try:
        await client.arm("1" * 32, MARKER, 0.5, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            assert await client.hold("1" * 32) == (7, 8, 1)
        client.let_go("1" * 32, 0.01)
        assert await client.release("1" * 32, 0.01) == (True, 1.5)
        assert await client.release("1" * 32, 0.01) == (True, 1.5), "who was not told to let go yet is told now"
        assert released == [{"verb": "release", "id": "1" * 32, "quiet_s": 0.01}] * 2
        assert asked == [{"verb": "arm", "id": "1" * 32, "payload": MARKER, "seconds": 0.5, "not_after": None}]
    finally:
        client.close()
        server.close()
