"""Two sites, each with a network namespace of its own and a wire between them: a store at each, and its failovers.

Nothing of them is in this machine's own network. Commands of a site are carried out in its network, by a fork of this
process, which is faster than a new program. The namespaces bear the name of the test run's directory, so what an
aborted run left is swept with the rest of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from replica_store.cli import main
from replica_store.failover import undoing
from replica_store.vault.operations import operations
from replica_store.vault.vault import Vault
from tests import sweep
from tests.t5_system.machine import HostUnderTest, run_tool

COMMAND_S_MAX = 120.0
SIZES = {"files": 4 << 20, "log": 1 << 20}
WRITES = 12
CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class NetworkSite:
    """A site: its network, a vault below `scratch`, and who serves that."""

    def __init__(self, scratch: Path, name: str, address: str) -> None:
        self.scratch = scratch / name
        self.scratch.mkdir()
        self.name = name
        self.address = address
        self.vault = self.scratch / "vault"
        self.network = f"{sweep.run_directory(os.getpid()).name}-{name}"
        self.within = ("nsenter", f"--net=/run/netns/{self.network}")
        self.store: subprocess.Popen[str] | None = None
        self.data = self.manage = f"{address}:0"
        self._command: int | None = None
        self._turn = threading.Lock()

    # ---- commands -------------------------------------------------------------------------------------------------

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        """`replica-store --json …` to its end: exit code, what it printed, what it complained of."""
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    _enter(self.network)
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                        code = main.run(["--vault", str(self.vault), "--json", *map(str, words)])
                    said.flush()
                    complained.flush()
                finally:
                    os._exit(code)
            self._command = pid
            code = self._wait(pid, str(words))
            said.seek(0)
            complained.seek(0)
            return code, said.read(), complained.read()

    def _wait(self, pid: int, what: str) -> int:
        """The exit code of a child, which has so long; it is killed after that."""
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            has_ended = bool(poll.poll(COMMAND_S_MAX * 1000))
            if not has_ended:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            with self._turn:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                self._command = None
        finally:
            os.close(descriptor)
        assert has_ended, f"{what} did not end within {COMMAND_S_MAX:g} s"
        return code

    def kill_command(self) -> None:
        """The one that runs, if any does: from another thread."""
        with self._turn:
            if self._command is not None:
                os.kill(self._command, signal.SIGKILL)

    def ask(self, *words: str | Path) -> Any:
        """The same, which must succeed; its document."""
        code, said, complained = self.run(*words)
        assert code == 0, f"at {self.name}: replica-store {words} ended with {code}: {complained}"
        return json.loads(said)

    def refused(self, code: int, *words: str | Path) -> str:
        """The same, which must be refused in one line; the line."""
        ended, said, complained = self.run(*words)
        assert ended == code, f"at {self.name}: replica-store {words} ended with {ended}: {said}{complained}"
        assert complained.startswith("asrfs: error: ") and complained.count("\n") == 1, complained
        return complained

    def token(self, machine: str) -> str:
        return str(self.ask("token", machine)["token"])

    def host(self, machine: str) -> HostUnderTest:
        """A machine that is at home here, in the site's network."""
        root = self.scratch / machine
        root.mkdir()
        return HostUnderTest(root, name=machine, within=self.within)

    # ---- serving --------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve the vault, made if there is none, on the ports it had before if it had any."""
        if not self.vault.exists():
            self.ask("init", "--name", self.name)
        ports = [each.rpartition(":")[2] for each in (self.data, self.manage)]
        words = ("serve", "--host", self.address, "--data-port", ports[0], "--manage-port", ports[1])
        program = (sys.executable, "-m", "replica_store.cli.main", "--vault", str(self.vault))
        with (self.scratch / "store.log").open("a") as log:
            self.store = subprocess.Popen(
                [*self.within, *program, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.store.stdout is not None
        said = self.store.stdout.readline()
        assert said.startswith("ready "), f"serve said {said!r}: {(self.scratch / 'store.log').read_text()}"
        self.data, self.manage = (word.partition("=")[2] for word in said.split()[1:])

    def serve_again(self) -> None:
        """Where whoever served was killed."""
        if self.store is not None and self.store.poll() is not None:
            self.stop()
            self.serve()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Nothing happens if nobody serves."""
        if self.store is not None:
            store, self.store = self.store, None
            store.send_signal(number)
            store.wait(30)
            assert store.stdout is not None
            store.stdout.close()

    def close(self) -> None:
        """Whatever failovers left, and the store."""
        if self.vault.exists():
            with Vault.open(str(self.vault)) as vault:
                found = operations(vault.catalog)
            for each in found:
                if each.remains:
                    undoing.discard(each)
        self.stop()


@contextmanager
def two_sites(scratch: Path) -> Iterator[tuple[NetworkSite, NetworkSite]]:
    """Home, where a machine runs, and there, whose store protects it; both serve."""
    home, there = (
        NetworkSite(scratch, name, address) for name, address in (("home", "10.99.0.1"), ("there", "10.99.0.2"))
    )
    with ExitStack() as undo:
        for site in (home, there):
            run_tool("ip", "netns", "add", site.network)
            undo.callback(run_tool, "ip", "netns", "del", site.network)
        peer = ("peer", "name", "wire", "netns", there.network)
        run_tool("ip", "link", "add", "wire", "netns", home.network, "type", "veth", *peer)
        for site in (home, there):
            run_tool("ip", "-n", site.network, "addr", "add", f"{site.address}/24", "dev", "wire")
            for device in ("wire", "lo"):
                run_tool("ip", "-n", site.network, "link", "set", device, "up")
        for site in (home, there):
            undo.callback(site.close)
            site.serve()
        yield home, there


class Disks:
    """What the machine's disks hold, wherever it runs."""

    def __init__(self, rng: random.Random) -> None:
        self.content = {name: bytearray(size) for name, size in SIZES.items()}
        self._rng = rng

    def change(self, mount: Path) -> None:
        """Check all of it, and write: to every disk, in any order, each write of any sectors."""
        self.check(mount)
        files = {name: os.open(mount / f"{name}.img", os.O_RDWR) for name in self.content}
        try:
            for name in [*self.content, *self._rng.choices(sorted(self.content), k=WRITES)]:
                content = self.content[name]
                length = self._rng.randrange(1, 64) * 512
                offset = self._rng.randrange((len(content) - length) // 512) * 512
                piece = self._rng.randbytes(length) if self._rng.random() < 0.9 else bytes(length)
                assert os.pwrite(files[name], piece, offset) == length
                content[offset : offset + length] = piece
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)

    def check(self, *mounts: Path) -> None:
        for mount in mounts:
            for name, content in self.content.items():
                assert (mount / f"{name}.img").read_bytes() == content, f"I9: disk {name} in {mount}"


@contextmanager
def at_home(home: NetworkSite, there: NetworkSite, machine: str, disks: Disks) -> Iterator[HostUnderTest]:
    """A machine that runs at home; the store there protects it and has all of it."""
    host = home.host(machine)
    host.init(**{name: str(size) for name, size in SIZES.items()})
    host.asrfs("set", "crash_interval=24h", "application_interval=off")
    host.asrfs("enroll", "--store", there.manage, "--token", there.token(machine))
    host.serve()
    try:
        disks.change(host.mount)
        host.asrfs("drain", "--timeout", "60s")
        yield host
    finally:
        host.close()


def _enter(network: str) -> None:
    """This process goes into that network."""
    fd = os.open(f"/run/netns/{network}", os.O_RDONLY)
    if _LIBC.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns {network}")
    os.close(fd)
