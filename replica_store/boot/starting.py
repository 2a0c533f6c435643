"""Starting a recovered machine whatever its settings say, and ending it: the one door for who brings machines back.

Idempotent both ways: a machine that runs under QEMU is found again and left running; half a start of mounts is undone
and begun anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from asrfs.model.boot import BootSettings
from replica_store.boot.mounted_machine import MountedMachine
from replica_store.boot.qemu_machine import POWER_DOWN_S, QemuMachine


class RecoveredMachine:
    """Its files are in `directory`. `variables`: environment of what is started, and of all that that starts."""

    def __init__(self, directory: Path, *, variables: Mapping[str, str] | None = None) -> None:
        self._qemu = QemuMachine(directory, variables=variables)
        self._mounted = MountedMachine(directory, variables=variables)

    def start(
        self, name: str, settings: BootSettings, disks: Mapping[str, str], *, root: str = "", is_test: bool
    ) -> float | None:
        """Start it and wait until its health check holds; the seconds that took, None where nothing is to be started.

        `disks`: by name in the order of slots, where each is: a file, a device, for QEMU also `nbd://HOST:PORT/NAME`.
        `root`: below which filesystems are mounted. Raises AsrfsError.
        """
        if settings.kind == "qemu":
            return self._qemu.start(name, settings, disks, is_test=is_test)
        if settings.kind == "mount":
            return self._mounted.start(settings, disks, root=root, is_test=is_test)
        return None

    def is_running(self) -> bool:
        """Whether it answers, or anything is mounted or was begun."""
        return self._mounted.is_started() or self._qemu.is_running()

    def stop(self, *, gently_s: float = POWER_DOWN_S) -> None:
        """End it and undo what was done for it; nothing happens if it does not run. Raises TemporaryError."""
        self._mounted.stop()
        self._qemu.stop(gently_s=gently_s)
