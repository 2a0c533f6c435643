"""A recovered machine under QEMU: started so that it outlives who started it, found again, ended.

    DIRECTORY/control   QMP: whoever answers there is the machine; nobody: it does not run
    DIRECTORY/console   its serial console, for one who wants to type     DIRECTORY/console.log   all it ever said
    DIRECTORY/qemu.log  QEMU's own complaints

Starting one that runs changes nothing, so that whoever died in between starts again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError, foreign_line
from asrfs.model.boot import BootSettings
from replica_store.boot.health import Place, wait_until_healthy
from replica_store.boot.qemu_command import (
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    CONTROL_SOCKET,
    FIRMWARE_VARIABLES,
    Accelerator,
    Forward,
    chosen_drives,
    qemu_command,
    takes_forward,
)

QEMU_LOG = "qemu.log"
FORWARD_FILE = "forward.json"
START_S_MAX = 30.0
POWER_DOWN_S = 60.0
_END_S_MAX = 10.0
_CONTROL_S_MAX = 10.0
_LOOK_INTERVAL_S = 0.02
_UEFI_FILES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)


_children: list[subprocess.Popen[bytes]] = []
"""Started by this process and left running: kept, so that each is waited for once it has ended."""


class QemuMachine:
    """The machine whose files are in `directory`. `variables`: environment it and its health check get."""

    def __init__(self, directory: Path, *, variables: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self._variables = dict(os.environ if variables is None else variables)
        self._child: subprocess.Popen[bytes] | None = None

    def start(
        self,
        name: str,
        settings: BootSettings,
        disks: Mapping[str, str],
        *,
        is_test: bool,
        accelerators: Sequence[Accelerator] = ("kvm", "tcg"),
    ) -> float:
        """Start it and wait until it runs; seconds that took, until QEMU was there where no health check is wanted.

        `disks`: by name, where each is. `accelerators` are tried in this order: a KVM may be there and be of no use.
        Raises NotFoundError, TemporaryError, AsrfsError; then it may still run, for somebody to look at its console.
        """
        assert settings.qemu is not None
        begin = time.monotonic()
        forward = self._running_forward() if self.is_running() else None
        if not self.is_running():
            forward = _free_forward(settings, is_test=is_test)
            self._prepare()
            drives = chosen_drives(settings.qemu, disks)
            firmware = self._firmware() if settings.qemu.firmware == "uefi" else None
            commands = [
                qemu_command(
                    name,
                    settings.qemu,
                    drives,
                    is_test=is_test,
                    accelerator=each,
                    firmware=firmware,
                    forward=forward,
                )
                for each in accelerators
                if each != "kvm" or _has_kvm()
            ]
            self._launch(commands, forward)
        if settings.health is not None:
            address = None if forward is None else ("127.0.0.1", forward.host_port)
            place = Place(str(self.directory / CONSOLE_LOG), address, self._variables)
            wait_until_healthy(settings.health, place, self._how_it_ended)
        return time.monotonic() - begin

    def is_running(self) -> bool:
        """Whether it answers."""
        try:
            self._ask("query-status")
        except (OSError, ValueError, AsrfsError):
            return False
        return True

    def stop(self, *, gently_s: float = POWER_DOWN_S) -> None:
        """Press its power button, and after `gently_s` take its power. Nothing happens if it does not run."""
        if gently_s and self._tell("system_powerdown"):
            self._wait_for_end(gently_s)
        if self._tell("quit"):
            self._wait_for_end(_END_S_MAX)
        if self.is_running():
            raise TemporaryError(f"the machine in {self.directory} does not end: try again")
        self._reap()

    def kill(self) -> None:
        """As a loss of power, for a machine that this very object has started."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGKILL)
        self._reap()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        for left in (CONTROL_SOCKET, CONSOLE_SOCKET, CONSOLE_LOG, QEMU_LOG):
            (self.directory / left).unlink(missing_ok=True)

    def _launch(self, commands: Sequence[Sequence[str]], forward: Forward | None) -> None:
        """The first of the commands that gets QEMU to answer."""
        assert commands
        (self.directory / FORWARD_FILE).write_text(json.dumps(forward))
        for command in commands:
            self._spawn(command)
            deadline = time.monotonic() + START_S_MAX
            while (how := self._how_it_ended()) is None and not self.is_running():
                if time.monotonic() > deadline:
                    self.kill()
                    raise TemporaryError(f"QEMU was not there within {START_S_MAX:g} s")
                time.sleep(_LOOK_INTERVAL_S)
            if how is None:
                return
            self._reap()
        raise AsrfsError(f"QEMU did not start: {how}")

    def _spawn(self, command: Sequence[str]) -> None:
        _children[:] = [child for child in _children if child.poll() is None]
        with (self.directory / QEMU_LOG).open("ab") as log:
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                    env=self._variables,
                    start_new_session=True,
                )
            except FileNotFoundError:
                raise NotFoundError("QEMU is not installed: install the Debian package qemu-system-x86") from None
        _children.append(self._child)

    def _firmware(self) -> str:
        for code, variables in _UEFI_FILES:
            if os.path.exists(code) and os.path.exists(variables):
                shutil.copyfile(variables, self.directory / FIRMWARE_VARIABLES)
                return code
        raise NotFoundError("there is no UEFI for QEMU: install the Debian package ovmf, or set firmware to bios")

    def _running_forward(self) -> Forward | None:
        try:
            saved = json.loads((self.directory / FORWARD_FILE).read_text())
        except (OSError, ValueError):
            return None
        return Forward(*saved) if saved else None

    def _how_it_ended(self) -> str | None:
        """None while it runs."""
        if self._child is not None:
            if self._child.poll() is None:
                return None
        elif self.is_running():
            return None
        lines = (self.directory / QEMU_LOG).read_text(errors="replace").splitlines()
        said = [line for line in lines if line.strip()]
        return foreign_line(said[-1]) if said else "QEMU ended without a word"

    def _tell(self, command: str) -> bool:
        """Whether it was there to be told."""
        try:
            self._ask(command)
        except (OSError, ValueError, AsrfsError):
            return False
        return True

    def _ask(self, command: str) -> Any:
        """One QMP command. Raises OSError where nobody answers, ValueError, AsrfsError."""
        with self._control() as connection, connection.makefile("rwb") as stream:
            stream.readline()  # its greeting
            for each in ("qmp_capabilities", command):
                stream.write(json.dumps({"execute": each}).encode() + b"\n")
                stream.flush()
                answer = _answer(stream.readline)
            return answer

    def _control(self) -> socket.socket:
        """Connected. However long the directory's path is, that of the socket is short. Raises OSError."""
        directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_CONTROL_S_MAX)
            connection.connect(f"/proc/self/fd/{directory}/{CONTROL_SOCKET}")
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(directory)
        return connection

    def _wait_for_end(self, seconds: float) -> None:
        """Until it has ended: the control socket is closed with it."""
        deadline = time.monotonic() + seconds
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
            return
        with contextlib.suppress(OSError), self._control() as connection:
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
                if not connection.recv(4096):
                    return

    def _reap(self) -> None:
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_S_MAX)
            self._child = None


def _has_kvm() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _answer(readline: Any) -> Any:
    """The next answer; events in between are passed over."""
    while line := readline():
        said = json.loads(line)
        if "error" in said:
            raise AsrfsError(f"QEMU refuses: {foreign_line(str(said['error'].get('desc')))}")
        if "return" in said:
            return said["return"]
    return None


def _free_forward(settings: BootSettings, *, is_test: bool) -> Forward | None:
    """Where the port that the health check asks for will be found, if the guest is behind QEMU's own network."""
    assert settings.qemu is not None
    health = settings.health
    if health is None or health.port is None or not takes_forward(settings.qemu, is_test=is_test):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return Forward(probe.getsockname()[1], health.port)
