"""One protected machine without a store, driven by the `asrfs` command as a person would, for tests of the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrfs.daemon import control
from asrfs.daemon.disks import add_sized
from asrfs.daemon.state import Role, StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.quantities import parse_size
from tests.waiting import wait_until

COMMAND_SECONDS_MAX = 60.0


class HostUnderTest:
    """A state directory and a mount point below `scratch`; `program` is the module that is `asrfs`.

    `within`: a command that runs every other one, such as in another network.
    """

    def __init__(
        self, scratch: Path, *, name: str = "web1", program: str = "asrfs.cli.main", within: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.root = scratch
        self.path = scratch / "state"
        self.mount = scratch / "disks"
        self.mount.mkdir()
        self.state = StateDirectory(str(self.path))
        self.supervisor: subprocess.Popen[str] | None = None
        self._program = program
        self._within = list(within)
        self._errors = scratch / "serve.stderr"

    # ---- commands -------------------------------------------------------------------------------------------------

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `asrfs …` to its end, whatever that is."""
        return subprocess.run(
            self._command(*arguments),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def asrfs(self, *arguments: str | Path) -> Any:
        """Run `asrfs --json …`, which must succeed; its document."""
        done = self.run("--json", *arguments)
        assert done.returncode == 0, f"asrfs {arguments} ended with {done.returncode}: {done.stderr}"
        return json.loads(done.stdout or "null")

    def init(self, **disks: str) -> None:
        """Make the machine and its disks, by name and size, without starting a process for each."""
        StateDirectory.create(str(self.path), self.name)
        for disk, size in disks.items():
            add_sized(self.state, disk, parse_size(size))

    # ---- serving --------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start the supervisor and wait for `ready`."""
        with self._errors.open("a") as errors:
            self.supervisor = subprocess.Popen(
                self._command("serve", "--mount", self.mount),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.supervisor.stdout is not None
        said = self.supervisor.stdout.readline()
        assert said == "ready\n", f"serve said {said!r}: {self.said()}"

    def stop(self) -> int:
        """SIGTERM the supervisor; its exit code."""
        assert self.supervisor is not None
        self.supervisor.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end of the supervisor; its exit code."""
        assert self.supervisor is not None
        code = self.supervisor.wait(COMMAND_SECONDS_MAX)
        assert self.supervisor.stdout is not None
        self.supervisor.stdout.close()
        self.supervisor = None
        return code

    def said(self) -> str:
        """What supervisors wrote to stderr so far."""
        return self._errors.read_text()

    # ---- processes ------------------------------------------------------------------------------------------------

    def pid(self, role: Role) -> int | None:
        return self.state.lock_holder(role)

    def kill(self, role: Role, number: int = signal.SIGKILL) -> int:
        """Send a signal to the process that is `role`; its pid. After SIGKILL it has ended."""
        pid = wait_until(lambda: self.pid(role), what=f"a process that is {role}")
        assert pid
        os.kill(pid, number)
        if number == signal.SIGKILL:
            wait_until(lambda: self.pid(role) != pid, what=f"the end of {role} {pid}")
            if role == "supervisor" and self.supervisor is not None:
                assert self.wait() == -signal.SIGKILL
        return pid

    def wait_for_next(self, role: Role, previous: int) -> int:
        """Wait until another process than `previous` is `role` and answers."""

        def answers() -> int:
            pid = self.pid(role)
            if not pid or pid == previous:
                return 0
            try:
                control.call(self.state.socket_path(role), "positions" if role == "disk_server" else "status")
            except TemporaryError:
                return 0
            return pid

        return wait_until(answers, what=f"the next {role}")

    def image(self, disk: str) -> Path:
        return Path(self.state.image_path(self.state.load_machine().disk(disk)))

    def close(self) -> None:
        """Stop if it still serves."""
        if self.supervisor is not None:
            self.stop()

    def _command(self, *arguments: str | Path) -> list[str]:
        return [*self._within, sys.executable, "-m", self._program, "--state", str(self.path), *map(str, arguments)]


def run_tool(*arguments: str | Path, seconds_max: float = 30.0) -> str:
    """A program of the system, which must succeed; its output."""
    done = subprocess.run(
        list(map(str, arguments)),
        capture_output=True,
        text=True,
        timeout=seconds_max,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def mounts_below(path: Path) -> list[str]:
    """Mount points at or below `path`."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split(" ")[4] for line in lines]
    return [target for target in targets if target == str(path) or target.startswith(f"{path}/")]
