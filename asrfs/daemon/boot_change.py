"""Changing how a machine is started where it is recovered, whether it is being served or not.

check  →  machine.json  →  tell the disk server, which appends DISK records that carry it
"""

from __future__ import annotations

import msgspec

from asrfs.daemon.processes import tell
from asrfs.daemon.state import StateDirectory
from asrfs.model.boot import BootSettings
from asrfs.model.machine import MachineConfig


def change_boot(state: StateDirectory, settings: BootSettings) -> None:
    """Raises NotFoundError for a disk the machine does not have, RefusedError while a point is copied back."""

    def edit(machine: MachineConfig) -> MachineConfig:
        state.check_not_promoting()
        for name in settings.disk_names():
            machine.disk(name)
        return msgspec.structs.replace(machine, boot=settings)

    state.edit_machine(edit)
    tell(state, "disk_server", "disks")
