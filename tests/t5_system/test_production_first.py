"""I8: whatever becomes of agent, link and store, writes keep their speed and none fails."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.t5_system.stamps import Stamper, StampWriter
from tools.lab import Lab

BLOCKS = 512
WRITES = 200
MIB = 1 << 20
LARGE_MIB = 150
"""More than two journal segments: the disk server needs new ones while there is no spare and nobody makes one."""
SLOWER_MAX = 4.0
SLACK_S = 1.0
WATCHDOG_S = 40.0


@pytest.fixture(scope="module")
def lab(make_scratch: Callable[[str], Path]) -> Iterator[Lab]:
    """A store and an enrolled, served machine with a small disk and a large one."""
    lab = Lab(parent=make_scratch("production-first"))
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "disk", "--size", f"{BLOCKS * 4096}")
        lab.asrfs("disk", "add", "large", "--size", f"{LARGE_MIB}M")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def write_large(path: Path) -> None:
    """All of it, in order, past the page cache."""
    buffer = mmap.mmap(-1, MIB)
    buffer[:] = random.Random(1).randbytes(MIB)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for number in range(LARGE_MIB):
            assert os.pwrite(fd, buffer, number * MIB) == MIB
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("fault", ["agent hangs", "store hangs", "both hang", "store is dead"])
def test_i8_writes_keep_their_speed_and_never_fail(lab: Lab, fault: str, rng: random.Random) -> None:
    """SIGSTOP: connections stay open and nobody answers, neither on the link nor on a control socket."""
    writer = StampWriter(Stamper(rng.randrange(1 << 30), 1, BLOCKS), [lab.disks / "disk.img"])

    def write() -> None:
        for _ in range(WRITES // 20):
            writer.write(20)
            writer.fsync()

    wipe(lab.disks / "disk.img")
    write()
    usual_s = max(seconds(write) for _ in range(2))
    assert lab.store is not None and lab.host is not None
    disk_server = lab.pid("disk_server")
    pids = {"agent hangs": [lab.pid("agent")], "store hangs": [lab.store.pid], "store is dead": []}.get(
        fault, [lab.pid("agent"), lab.store.pid]
    )
    if fault == "store is dead":
        lab.kill_store()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    watchdog = threading.Timer(WATCHDOG_S, end_all, [(lab.host.pid, disk_server)])
    watchdog.start()
    try:
        slow_s = min(seconds(write) for _ in range(3))
        if fault == "both hang":
            for spare in (lab.state / "journal").glob("[sf][pr]*-*"):
                spare.unlink()
            write_large(lab.disks / "large.img")
            slow_s = max(slow_s, min(seconds(write) for _ in range(2)))
        durable = writer.fsync()
    finally:
        watchdog.cancel()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert slow_s <= SLOWER_MAX * usual_s + SLACK_S, f"{usual_s:.3f} s before, {slow_s:.3f} s while {fault}"
    if fault == "store is dead":
        lab.start_store()
    lab.asrfs("drain", "--timeout", "60s")
    output = lab.root / f"export-{fault.replace(' ', '-')}"
    lab.replica_store("export", lab.machine, "disk", "--point", "latest", "--output", output)
    assert writer.stamper.check([output]) == durable
    writer.close()


def end_all(pids: Sequence[int]) -> None:
    """Whoever waits for a disk that never answers gets an I/O error, and the test its failure."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wipe(path: Path) -> None:
    """No stamps of an earlier test."""
    with path.open("r+b") as file:
        file.write(bytes(BLOCKS * 4096))
