"""Runs a module of the product with the next strike armed: `python -m tests.proof.kernel.struck MODULE …`.

A strike is a file `ROLE-NNN.strike` in the directory that `STRIKES` names, holding a system call and a number n: the
process is killed as it enters the n-th such call of any one of its threads. A process takes the first strike of its
role, so whoever is started next takes the next one. strace writes `ROLE-NNN.trace`, which proves that it struck.

Without MODULE it is `asrfs` itself: whatever that starts is started this way too. Nobody waits long here: a process
that keeps dying young is started again at once, and an agent that lost its store tries again soon.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from asrfs.daemon import processes
from asrfs.transport.backoff import Backoff
from tests.proof.kernel import plants, witness

STRIKES = "ASRFS_PROOF_STRIKES"
ROLES = {
    "asrfs.daemon.disk_server": "disk_server",
    "asrfs.daemon.agent": "agent",
    "replica_store.cli.main": "store",
}
BACKOFF_S_MAX = 0.3
_ATTACH_SECONDS_MAX = 10.0
_tracers: list[subprocess.Popen[bytes]] = []


def start_others_this_way() -> None:
    """Let `processes.spawn` of this process start its roles by this program, and at once."""

    def popen(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        executable, flag, *rest = arguments
        return subprocess.Popen([executable, flag, "tests.proof.kernel.struck", *rest], **options)

    processes.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    processes.RestartPace.DELAY_S_MAX = 0.0


def try_again_soon() -> None:
    """Bound the pauses between an agent's tries to reach its store."""
    assert Backoff.__init__.__kwdefaults__ is not None
    Backoff.__init__.__kwdefaults__["ceiling_s"] = BACKOFF_S_MAX


def take_strike(role: str) -> tuple[str, int, Path] | None:
    """The next strike of a role, taken so that no other process takes it: call, number, where to write the trace."""
    directory = os.environ.get(STRIKES)
    if not directory:
        return None
    for path in sorted(Path(directory).glob(f"{role}-*.strike")):
        try:
            path.rename(path.with_suffix(".taken"))
        except FileNotFoundError:
            continue
        call, number = path.with_suffix(".taken").read_text().split()
        path.with_suffix(".pid").write_text(str(os.getpid()))
        return call, int(number), path.with_suffix(".trace")
    return None


def arm(call: str, number: int, trace: Path) -> None:
    """Have strace kill this process at that call; returns once it watches."""
    calls = f"/^{call}"  # pwritev is pwritev2 to some kernels, rename renameat2
    tracer = subprocess.Popen(
        [
            *("strace", "-f", "-q", "-p", str(os.getpid()), "-o", str(trace)),
            *("-e", f"trace={calls}", "-e", "signal=KILL", "-e", f"inject={calls}:signal=SIGKILL:when={number}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    _tracers.append(tracer)
    deadline = time.monotonic() + _ATTACH_SECONDS_MAX
    while "\nTracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"strace did not attach: {tracer.returncode}")
        time.sleep(0.002)  # sleep: strace tells nobody when it has attached


def main() -> None:
    """Run the module named first, or `asrfs`, with the words behind it."""
    if sys.argv[1].startswith("-"):
        sys.argv.insert(1, "asrfs.cli.main")
    module = sys.argv[1]
    plants.apply_named()
    if module == "asrfs.cli.main":
        start_others_this_way()
    if module == "asrfs.daemon.agent":
        try_again_soon()
    if module == "replica_store.cli.main":
        witness.apply_named()
    if module in ROLES and (strike := take_strike(ROLES[module])) is not None:
        arm(*strike)
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
