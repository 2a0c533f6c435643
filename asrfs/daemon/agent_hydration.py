"""What an agent does about disks with a base: composition of the hydrator, and what status says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import trio

from asrfs.daemon.agent_images import StateImages, base_of
from asrfs.daemon.agent_status import space_of
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.hydrator import Hydrator, Rules
from asrfs.replication.progress import Progress
from asrfs.storage.directory import OpenFile, open_path

RESERVE_BYTES_MIN = 128 << 20
"""Two segments of the journal."""
RESERVE_BYTES_MAX = 1 << 30
RESERVE_SHARE = 10


class AgentHydration:
    """`recovered`: the point from which the machine goes on, or None."""

    def __init__(
        self,
        state: StateDirectory,
        images: StateImages,
        applier: ApplierTask,
        settings: Callable[[], Settings],
        agent: tuple[DiskServer, Progress, Alarms, trio.CapacityLimiter],
    ) -> None:
        self.recovered = state.load_recovered()
        server, progress, alarms, threads = agent

        def rules() -> Rules:
            current = settings()
            return Rules(current.hydration, current.hydration_limit, _reserve_bytes(state))

        def open_map(disk: DiskConfig) -> OpenFile:
            return open_path(state.image_path(disk))

        self._hydrator = Hydrator(
            server=server,
            progress=progress,
            exact=applier.exact,
            images=images,
            alarms=alarms,
            threads=threads,
            machine=state.load_machine,
            drop_base=lambda slot: state.edit_machine(lambda machine: without_base(machine, slot)),
            open_map=open_map,
            open_base=base_of,
            rules=rules,
            free_bytes=lambda: space_of(state.path("images"))[1],
            is_recovered=self.recovered is not None,
        )

    async def run(self) -> None:
        """Until no disk has a base."""
        await self._hydrator.run()

    def standing(self) -> dict[int, dict[str, Any]]:
        """By slot, of disks that have one."""
        return self._hydrator.standing()


def without_base(machine: MachineConfig, slot: int) -> MachineConfig:
    """The machine with all of a disk in its image."""
    change = msgspec.structs.replace
    disks = tuple(change(disk, base=None) if disk.slot == slot else disk for disk in machine.disks)
    return change(machine, disks=disks)


def _reserve_bytes(state: StateDirectory) -> int:
    total_bytes, _ = space_of(state.path("images"))
    return max(RESERVE_BYTES_MIN, min(RESERVE_BYTES_MAX, total_bytes // RESERVE_SHARE))
