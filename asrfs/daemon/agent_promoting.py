"""What an agent does when a point is to be copied back over its disks: composition of `promoting.py`."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

import trio

from asrfs.consistency.maker import PointMaker
from asrfs.daemon.agent_verbs import through_a_restart
from asrfs.daemon.in_use import users_of
from asrfs.daemon.promoting import Promoter
from asrfs.daemon.state import StateDirectory
from asrfs.errors import RefusedError
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.replication.alarms import Alarms
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.progress import Progress
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.rewriter import Rewriter
from asrfs.replication.shipper import Shipper
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock


def make_promoter(
    state: StateDirectory,
    *,
    rejoiner: Rejoiner,
    shipper: Shipper,
    server: DiskServer,
    progress: Progress,
    alarms: Alarms,
    dirty: DirtyMapFile,
    maker: PointMaker,
    settled: Callable[[int], Awaitable[None]],
    threads: trio.CapacityLimiter,
) -> Promoter:
    """`settled` returns when the store has an LSN."""

    def check() -> None:
        if rejoiner.order is not None or rejoiner.fence is not None:
            raise RefusedError("this host makes way for another side of the machine, or goes on in a new epoch")
        if dirty.map.slots() or dirty.given_up.is_open:
            raise RefusedError("the replica is not whole: `asrfs status` says what is missing, heal it first")

    def users() -> list[str]:
        served = state.load_served()
        return users_of(served.mount) if served is not None else []

    async def drain() -> None:
        await settled((await through_a_restart(server.sync)).durable.lsn)

    async def mark(name: str, note: str) -> int:
        marker = MarkerRecord(id=uuid.uuid4().hex, name=name, note=note, hold_ms=0.0)
        return (await maker.mark(encode_marker(marker)))[0]

    outlet = shipper.source.outlet
    return Promoter(
        storage=DirectoryStorage(state.root),
        outlet=outlet,
        server=server,
        progress=progress,
        alarms=alarms,
        rewriter=Rewriter(outlet, server, progress),
        threads=threads,
        machine=state.load_machine,
        edit_machine=state.edit_machine,
        check=check,
        users=users,
        drain=drain,
        mark=mark,
        settle=settled,
        lacking=lambda: frozenset(dirty.map.slots()),
        now_ns=SystemClock().time_ns,
    )
