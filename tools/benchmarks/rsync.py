"""rsync as a peer of comparing: from one file to another of this machine, and to its own daemon over loopback.

The first has no network between and is the faster one; the second is what it is to another machine, unencrypted.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from lab import LabError

from .workbench import Workbench

LOCAL, DAEMON = "rsync", "rsync-daemon"
TITLES = {LOCAL: "rsync --inplace", DAEMON: "rsync --inplace, to its daemon"}
SECONDS_MAX = 900.0
_WORDS = ("rsync", "--inplace", "--no-whole-file", "--ignore-times", "--fsync", "--stats")


class Change(NamedTuple):
    """What bringing a copy up to date took."""

    seconds: float
    wire_bytes: int


@contextmanager
def peers(bench: Workbench, image: Path) -> Iterator[dict[str, Callable[[], Change]]]:
    """By key, what brings a copy of the image up to date; each has its own, which is made here."""
    directory = bench.directory("rsync")
    port = _free_port()
    configuration = directory / "rsyncd.conf"
    configuration.write_text(
        f"port={port}\naddress=127.0.0.1\nuse chroot=no\nuid=0\ngid=0\n"
        f"[copy]\npath={directory}\nread only=no\nlock file={directory}/lock\n"
    )
    targets = {LOCAL: str(directory / "local.raw"), DAEMON: f"rsync://127.0.0.1:{port}/copy/daemon.raw"}
    with ExitStack() as stack:
        words = ["rsync", "--daemon", "--no-detach", f"--config={configuration}"]
        bench.start(stack, words, lambda: _is_there(port))
        for target in targets.values():
            _bring(image, target)
        yield {key: lambda target=target: _bring(image, target) for key, target in targets.items()}  # type: ignore[misc]


def _bring(image: Path, target: str) -> Change:
    began = time.monotonic()
    done = subprocess.run(
        [*_WORDS, str(image), target], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise LabError(f"rsync ended with {done.returncode}: {done.stderr[-300:]}")
    counts = re.findall(r"Total bytes (?:sent|received): ([\d,]+)", done.stdout)
    return Change(seconds, sum(int(count.replace(",", "")) for count in counts))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _is_there(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
