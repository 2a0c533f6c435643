"""A store and a host on this machine, driven by the two commands as a person would, for the demo and the benchmarks.

Everything lives below one scratch directory and is gone when `Lab.close` returns: mounts, loop devices, processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

READY_SECONDS_MAX = 30.0


class LabError(Exception):
    """A command of the demonstration or benchmark failed; the text says which and how."""


class Lab:
    """One vault, one machine.

    `store_nice`: priority of the store, which in earnest is another computer. `parent`: where the scratch directory is
    made; the system's own place for such if None. `site`: where the vault is made instead, and the words that stand
    before each command there.
    """

    def __init__(
        self,
        *,
        machine: str = "web1",
        store_nice: int = 0,
        parent: Path | None = None,
        site: tuple[Path, Sequence[str]] | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="asrfs-lab-", dir=parent))
        self.machine = machine
        self.state = self.root / "state"
        self.vault = (self.root if site is None else site[0]) / "vault"
        self._before_store = () if site is None else site[1]
        self.disks = self.root / "disks"
        self.disks.mkdir()
        self._store_nice = store_nice
        self._daemons: list[subprocess.Popen[str]] = []
        self._closers: list[Callable[[], object]] = []
        self.manage = self.data = ""
        self.store: subprocess.Popen[str] | None = None
        self.host: subprocess.Popen[str] | None = None

    # ---- the two commands ----

    def asrfs(self, *arguments: str | Path) -> Any:
        """Run `asrfs …`; its JSON answer."""
        return run_json(command("asrfs.cli.main", "--state", self.state, "--json", *arguments))

    def replica_store(self, *arguments: str | Path) -> Any:
        """Run `replica-store …`; its JSON answer."""
        return run_json(self._at_store("--json", *arguments))

    def _at_store(self, *arguments: str | Path) -> list[str]:
        return [*self._before_store, *command("replica_store.cli.main", "--vault", self.vault, *arguments)]

    # ---- starting ----

    def start_store(self) -> None:
        """Serve the vault, made if it is not there, on loopback: on free ports first, then on the same ones again."""
        if not self.vault.exists():
            self.replica_store("init", "--name", "site-b")
        ports = ["--data-port", port_of(self.data), "--manage-port", port_of(self.manage)]
        serve = self._at_store("serve", "--host", "127.0.0.1", *ports)
        line, self.store = self._start(serve, "store.log", nice=self._store_nice)
        addresses = dict(word.split("=", 1) for word in line.split() if "=" in word)
        self.data, self.manage = addresses["data"], addresses["manage"]

    def kill_store(self) -> None:
        """SIGKILL the store."""
        assert self.store is not None
        self.store.kill()
        self.store.wait()

    def enroll(self, *options: str) -> None:
        """A token of the store for the machine, and the machine's use of it."""
        token = run(self._at_store("token", self.machine)).strip()
        enroll = ("enroll", "--store", self.manage, "--token", "-", *options)
        run(command("asrfs.cli.main", "--state", self.state, *enroll), told=token)

    def start_host(self, *, wait_for_agent: bool = True) -> None:
        """Serve the machine's disks; returns when they can be used, or when the agent runs too."""
        serve = command("asrfs.cli.main", "--state", self.state, "serve", "--mount", self.disks)
        _, self.host = self._start(serve, "host.log")
        if wait_for_agent:
            wait_until(lambda: bool(self.status()["processes"]["agent"]), "the start of the agent")

    def stop_host(self) -> int:
        """SIGTERM the supervisor and wait; its exit code."""
        assert self.host is not None
        self.host.terminate()
        return self.host.wait(timeout=120)

    def attach(self, disk: str, *arguments: str | Path) -> str:
        """Attach a disk as a loop device, to be detached at the end; the device."""
        device = str(self.asrfs("attach", disk, *arguments)["device"])
        self._closers.append(lambda: self._detach(disk))
        return device

    def mount_points(self, directory: Path) -> None:
        """The read-only tree of recovery points at `directory`."""
        directory.mkdir()
        self._start(self._at_store("mount", directory), f"{directory.name}.log")

    # ---- seeing and waiting ----

    def status(self) -> Any:
        return self.asrfs("status")

    def pid(self, role: str) -> int:
        """The process of a role; 0 while there is none."""
        return int(self.status()["processes"][role] or 0)

    def kill(self, role: str) -> int:
        """SIGKILL a process of the host; its pid."""
        wait_until(lambda: self.pid(role) != 0, f"the start of the {role}")
        pid = self.pid(role)
        os.kill(pid, signal.SIGKILL)
        return pid

    def at_close(self, closer: Callable[[], object]) -> None:
        """Something more to undo at the end, before everything that came earlier."""
        self._closers.append(closer)

    # ---- ending ----

    def close(self) -> None:
        """Undo everything, newest first. Says what could not be undone."""
        for closer in reversed(self._closers):
            try:
                closer()
            except (LabError, OSError) as error:
                print(f"cleaning up: {error}", file=sys.stderr)
        for daemon in reversed(self._daemons):
            stop(daemon)
        if any(line.split()[4] == str(self.disks) for line in Path("/proc/self/mountinfo").read_text().splitlines()):
            subprocess.run(["umount", "--lazy", str(self.disks)], check=False, timeout=60)  # its host was killed
        shutil.rmtree(self.root, ignore_errors=True)

    def _start(self, arguments: list[str], log: str, nice: int = 0) -> tuple[str, subprocess.Popen[str]]:
        """Start a daemon that prints `ready …`; that line, and the daemon."""
        with (self.root / log).open("a") as errors:
            daemon = subprocess.Popen(
                ["nice", "-n", str(nice), *arguments] if nice else arguments,
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C is for us, who end it in its turn
            )
        self._daemons.append(daemon)
        assert daemon.stdout is not None
        for line in daemon.stdout:
            if line.startswith("ready"):
                return line.strip(), daemon
        daemon.wait()
        raise LabError(f"{' '.join(arguments)} ended without `ready`: {(self.root / log).read_text().strip()}")

    def _detach(self, disk: str) -> None:
        with contextlib.suppress(LabError):
            self.asrfs("detach", disk)


def port_of(address: str) -> str:
    """The port of `HOST:PORT`; 0, any free one, if there is no address yet."""
    return address.rpartition(":")[2] or "0"


def command(module: str, *arguments: str | Path) -> list[str]:
    """A program of the project by this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(arguments: list[str], *, told: str = "", timeout: float = 300.0) -> str:
    """Run to the end with `told` on stdin; stdout. Raises LabError with the program's own words."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, input=told, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise LabError(f"{' '.join(arguments)} ended with {done.returncode}: {words[-2000:]}")
    return done.stdout


def run_json(arguments: list[str]) -> Any:
    """Run to the end; the JSON document on stdout."""
    return json.loads(run(arguments) or "null")


def stop(daemon: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL if it does not end."""
    if daemon.poll() is None:
        daemon.terminate()
        try:
            daemon.wait(timeout=READY_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            print(f"process {daemon.pid} did not end on SIGTERM", file=sys.stderr)
            daemon.kill()
            daemon.wait()
    if daemon.stdout is not None:
        daemon.stdout.close()


def wait_until(condition: Callable[[], bool], what: str, seconds_max: float = 30.0) -> None:
    """Poll until `condition` holds. Raises LabError that names `what`."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what} did not happen within {seconds_max:.0f} s")
        time.sleep(0.02)
