"""A store and an enrolled machine of the installed programs, each process started so that it can be struck."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asrfs.cli import main as asrfs_main
from asrfs.daemon.state import Role
from tests.proof.kernel import struck
from tests.t5_system.machine import HostUnderTest, mounts_below
from tests.t5_system.store import StoreUnderTest
from tests.waiting import wait_until

PROGRAM = "tests.proof.kernel.struck"
DYING_S_MAX = 30.0
QUOTA = "64G"
"""Each disk server begins a segment: many deaths come to the quota of small disks, and records are given up."""


class StruckStore(StoreUnderTest):
    """A store that takes strikes."""

    def command(self, *arguments: str | Path) -> list[str]:
        first, flag, module, *rest = super().command(*arguments)
        return [first, flag, PROGRAM, module, *rest]


def ask_asrfs(state: Path, *words: str | Path) -> Any:
    """`asrfs --json …` within this process, which is faster; it must succeed. Its document."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = asrfs_main.run(["--state", str(state), "--json", *map(str, words)])
    assert code == 0, f"asrfs {words} ended with {code}: {said.getvalue()}"
    return json.loads(said.getvalue() or "null")


class World:
    """`host` serves `disks` and ships to `store`. Strikes are dealt by `deal`, one for each later start of a role."""

    def __init__(self, scratch: Path, disks: dict[str, str]) -> None:
        self.root = scratch
        self.strikes = scratch / "strikes"
        self.strikes.mkdir()
        os.environ[struck.STRIKES] = str(self.strikes)
        self._dealt: dict[str, int] = {}
        self.store = StruckStore(scratch)
        self.store.ask("init", "--name", "site-b")
        self.store.serve()
        self.host = HostUnderTest(scratch, program=PROGRAM)
        self.host.init(**disks)
        self.asrfs("set", f"journal_quota={QUOTA}")
        self.asrfs("enroll", "--store", self.store.manage, "--token", self.store.token(self.host.name))
        self.host.serve()
        wait_until(lambda: self.host.pid("agent"), what="the agent")
        self.disks = [self.host.mount / f"{disk}.img" for disk in disks]
        self.names = list(disks)

    def asrfs(self, *words: str | Path) -> Any:
        """See `ask_asrfs`."""
        return ask_asrfs(self.host.path, *words)

    def acknowledged(self) -> int:
        """The LSN the host has been told is durable at the store, as it wrote it down."""
        return self.host.state.load_positions().acknowledged.lsn

    # ---- strikes --------------------------------------------------------------------------------------------------

    def deal(self, role: str, call: str, number: int) -> Path:
        """Arm the next start of a role that has no strike yet; the trace that will show it."""
        self._dealt[role] = count = self._dealt.get(role, 0) + 1
        strike = self.strikes / f"{role}-{count:03d}.strike"
        unseen = strike.with_suffix(".new")
        unseen.write_text(f"{call} {number}")
        unseen.rename(strike)
        return strike.with_suffix(".trace")

    def withdraw(self, trace: Path) -> bool:
        """Take back a strike that nobody has taken; whether there was one."""
        try:
            trace.with_suffix(".strike").unlink()
        except FileNotFoundError:
            return False
        return True

    # ---- lives ----------------------------------------------------------------------------------------------------

    def kill(self, role: Role) -> int:
        """SIGKILL; the next one is not waited for."""
        return self.host.kill(role)

    def kill_store(self) -> None:
        """SIGKILL; `revive_store` starts the next one."""
        self.store.stop(signal.SIGKILL)

    def revive_store(self) -> None:
        """Start the store again after its death; a strike may end the new one before it is ready."""
        while self.store.process is None or self.store.process.poll() is not None:
            self._forget_dead_store()
            try:
                self.store.serve()
            except AssertionError:
                assert self.store.process is not None
                if self.store.process.wait(timeout=10) != -signal.SIGKILL:
                    raise

    def wait_for_struck_store(self, trace: Path) -> None:
        """A strike is seen a moment before its process is gone, which would be taken for a living one."""
        process = self.store.process
        if process is not None and process.pid == int(trace.with_suffix(".pid").read_text()):
            process.wait(timeout=DYING_S_MAX)

    def _forget_dead_store(self) -> None:
        process, self.store.process = self.store.process, None
        if process is not None:
            assert process.stdout is not None
            process.stdout.close()

    def kill_one(self, victim: str) -> None:
        """SIGKILL it, and do what a person or systemd does: start what was started by hand, await the rest."""
        if victim == "store":
            self.kill_store()
            self.revive_store()
        elif victim == "supervisor":
            self.kill("supervisor")
            self.host.serve()
        else:
            role: Role = "agent" if victim == "agent" else "disk_server"
            self.host.wait_for_next(role, self.kill(role))

    def attach_bare(self, disk: str) -> str:
        """A loop device over a disk as it is; the device."""
        return str(self.asrfs("attach", disk)["device"])

    def drained(self) -> None:
        """Everything is at the store."""
        self.asrfs("drain", "--timeout", "60s")

    def export(self, selector: str, label: str) -> list[Path]:
        """All disks cut at one LSN, as files."""
        outputs = []
        for disk in self.names:
            output = self.root / f"{disk}-{label}.export"
            words = ("export", self.host.name, disk, "--point", selector, "--output", output, "--force")
            selector = f"lsn:{self.store.ask(*words)['lsn']}"
            outputs.append(output)
        return outputs

    def images(self) -> list[Path]:
        return [self.host.image(disk) for disk in self.names]

    def close(self) -> None:
        """End it all; what a violation left mounted above is taken away first, since nobody will do it any more."""
        for target in reversed(mounts_below(self.root)):
            if target != str(self.host.mount):
                subprocess.run(["umount", "--lazy", target], check=False, timeout=30, stdin=subprocess.DEVNULL)
        self.host.close()
        self.store.close()


@contextlib.contextmanager
def world(scratch: Path, **disks: str) -> Iterator[World]:
    """A world below `scratch`, ended afterwards. What cannot be ended is left to the sweep, which says so."""
    scratch.mkdir(parents=True)
    made = World(scratch, disks)
    try:
        yield made
    finally:
        os.environ.pop(struck.STRIKES, None)
        made.close()
