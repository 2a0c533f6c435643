"""A machine is served, attached and stopped wherever it is called from: cron, containers, callers with odd habits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from asrfs.daemon.loop_devices import loop_devices_below
from tests.t5_system.machine import HostUnderTest
from tests.waiting import wait_until

CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
"""All standard streams."""
DEAF = (
    *(sys.executable, "-c"),
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    "for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(each, signal.SIG_IGN)\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); os.execvp(sys.argv[1], sys.argv[1:])",
)
"""Every signal blocked, those that matter ignored."""
BARE = ("env", "--ignore-environment", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}")
"""Nothing in the environment, so no PATH either."""
UNLOCKED = ("sh", "-c", 'ulimit -l 64; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock "$@"', "sh")
"""Little memory may be locked, and being root does not help: as in most containers."""


@pytest.mark.parametrize("caller", [CLOSED, DEAF, BARE, UNLOCKED], ids=["closed", "deaf", "bare", "unlocked"])
def test_a_machine_is_served_and_stopped_whoever_calls(caller: Sequence[str], scratch: Path) -> None:
    host = HostUnderTest(scratch)
    host.init(root="16M")
    words = [*caller, sys.executable, "-m", "asrfs.cli.main", "--state", host.path, "serve", "--mount", host.mount]
    said = scratch / "said"
    with said.open("wb") as output:
        serving = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until(lambda: os.path.exists(host.mount / "root.img") or serving.poll() is not None, what="the disk")
        if caller is not CLOSED:
            wait_until(lambda: "ready" in said.read_text() or serving.poll() is not None, what="its word")
        assert serving.poll() is None, said.read_text()
        with (host.mount / "root.img").open("r+b") as disk:
            disk.write(b"content")
            os.fsync(disk.fileno())
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0, said.read_text()
    finally:
        serving.kill()
        serving.wait()
    assert host.image("root").read_bytes()[:7] == b"content"
    assert "Traceback" not in Path(host.state.log_path("disk_server")).read_text()


def test_the_tools_of_the_system_are_found_without_a_path(scratch: Path) -> None:
    host = HostUnderTest(scratch, within=BARE)
    host.init(root="16M")
    host.serve()
    try:
        assert host.asrfs("attach", "root", "--format", "ext4")["format"] == "ext4"
        host.asrfs("detach", "root")
    finally:
        assert host.stop() == 0


def test_a_tool_that_failed_is_not_taken_for_one_that_did_its_work(scratch: Path) -> None:
    """While SIGCHLD is ignored, which is inherited, the kernel tells nobody how a child ended."""
    host = HostUnderTest(scratch, within=DEAF)
    host.init(root="16M")
    host.serve()
    try:
        refused = host.run("attach", "root", "--format", "xfs")  # for which it is too small
        assert (refused.returncode, "mkfs.xfs" in refused.stderr) == (4, True), refused
        assert loop_devices_below(str(host.mount)) == []
    finally:
        assert host.stop() == 0
