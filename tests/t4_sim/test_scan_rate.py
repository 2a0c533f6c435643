"""How fast comparing may read the images of disks that are used, and of those that are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.daemon import digesting
from asrfs.daemon.digest_process import Order, Reply
from asrfs.daemon.digesting import RATE_BESIDE_USE, USE_S, DigestProcess, ScanRate
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.digest_tree import Region
from asrfs.model.machine import DiskConfig
from asrfs.model.positions import Cursor
from asrfs.replication.disk_server import HostPositions
from tests.fakes.virtual_time import pass_time

REGION = Region(1 << 30, 0, 32)
DISK = DiskConfig(slot=0, id="1" * 32, name="root", size_bytes=1 << 30)
READ_S = 0.1
"""A region takes so long to read and digest."""


class Server:
    """Guests' requests have taken `served_s`."""

    def __init__(self) -> None:
        self.served_s = 500.0
        self.is_away = False

    async def positions(self) -> HostPositions:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise TemporaryError("the disk server is gone")
        return HostPositions(1, Cursor(lsn=1), 1, None, self.served_s)


def rate_of(server: Any, chosen: int | None = None) -> ScanRate:
    return ScanRate(server, lambda: chosen)


async def test_nobody_is_given_way_where_nobody_uses_the_disks(autojump_clock: trio.testing.MockClock) -> None:
    rate = rate_of(Server())
    await rate.begin()
    assert [await rate.now() for _ in range(3)] == [0, 0, 0], "what was served before it began is past"


async def test_disks_that_are_used_are_read_slowly_until_nobody_has_used_them_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    rate = rate_of(server)
    await rate.begin()
    server.served_s += 17e-6
    assert await rate.now() == RATE_BESIDE_USE
    await pass_time(USE_S / 2)
    assert await rate.now() == RATE_BESIDE_USE, "one request a second is use"
    await pass_time(USE_S)
    assert await rate.now() == 0


@pytest.mark.parametrize(
    "death", [lambda server: setattr(server, "is_away", True), lambda server: setattr(server, "served_s", 0.0)]
)
async def test_a_disk_server_that_was_replaced_counts_as_used(
    death: Callable[[Server], None], autojump_clock: trio.testing.MockClock
) -> None:
    server = Server()
    rate = rate_of(server)
    await rate.begin()
    death(server)
    assert await rate.now() == RATE_BESIDE_USE


@pytest.mark.parametrize("chosen", [0, 1 << 20])
async def test_a_rate_that_was_chosen_holds(chosen: int, autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    rate = rate_of(server, chosen)
    await rate.begin()
    server.served_s += 1
    assert await rate.now() == chosen


@pytest.mark.parametrize("used", [False, True])
async def test_what_is_read_comes_to_the_rate_and_not_below(
    used: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    region_bytes = REGION.end - REGION.offset

    class Worker:
        @classmethod
        async def start(cls, *_: object) -> Worker:
            await trio.lowlevel.checkpoint()
            return cls()

        async def ask(self, request: bytes) -> bytes:
            await pass_time(READ_S)
            server.served_s += used
            return msgspec.msgpack.encode(Reply(b"", region_bytes))

        async def close(self) -> None:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(digesting, "Worker", Worker)
    state = StateDirectory(str(tmp_path))
    began = trio.current_time()
    async with DigestProcess(state, rate_of(server)) as digester:
        for _ in range(11):
            await digester.pace()
            await digester.digest(DISK, REGION)
    took = trio.current_time() - began
    expected = 10 * max(READ_S, region_bytes / RATE_BESIDE_USE) + READ_S if used else 11 * READ_S
    assert math.isclose(took, expected, rel_tol=0.01)


@pytest.mark.parametrize(
    ("used", "chosen", "processors", "expected"),
    [(False, None, 4, 2), (False, None, 1, 1), (True, None, 4, 1), (False, 0, 4, 1), (False, 1 << 40, 4, 1)],
)
async def test_two_threads_digest_where_nobody_uses_the_disks(
    used: bool,
    chosen: int | None,
    processors: int,
    expected: int,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, threads = Server(), []

    class Worker:
        @classmethod
        async def start(cls, *_: object) -> Worker:
            await trio.lowlevel.checkpoint()
            return cls()

        async def ask(self, request: bytes) -> bytes:
            await trio.lowlevel.checkpoint()
            threads.append(msgspec.msgpack.decode(request, type=Order).threads)
            return msgspec.msgpack.encode(Reply(b"", 0))

        async def close(self) -> None:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(digesting, "Worker", Worker)
    monkeypatch.setattr(digesting.os, "sched_getaffinity", lambda pid: set(range(processors)))
    async with DigestProcess(StateDirectory(str(tmp_path)), rate_of(server, chosen)) as digester:
        server.served_s += used
        await digester.digest(DISK, REGION)
        await pass_time(2 * USE_S)
        await digester.digest(DISK, REGION)
    is_auto = chosen is None and processors > 1
    assert threads == [expected, 2 if is_auto else 1], "a guest has a processor for itself as soon as it asks"
