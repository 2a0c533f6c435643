"""A store that is away for longer than the journal has room, on the real kernel: given up, healed, byte for byte."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.lab import Lab, command, wait_until

MIB = 1 << 20
DISK_MIB = 400
QUOTA_MIB = 256
WRITTEN_MIB = 320
SEGMENT_MIB = 64


@pytest.fixture
def lab(make_scratch: Callable[[str], Path]) -> Iterator[Lab]:
    """A store and an enrolled, served machine with the smallest quota there is."""
    lab = Lab(parent=make_scratch("resync"))
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "disk", "--size", f"{DISK_MIB}M")
        lab.asrfs("set", f"journal_quota={QUOTA_MIB}M")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


class Writer:
    """Writes MiBs of the disk past the page cache, and remembers what it wrote. `slowest_s`: of any write."""

    def __init__(self, lab: Lab, rng: random.Random) -> None:
        self.rng = rng
        self.content = bytearray(DISK_MIB * MIB)
        self.slowest_s = 0.0
        self._buffer = mmap.mmap(-1, MIB)
        self._fd = os.open(lab.disks / "disk.img", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self._buffer[:] = self.rng.randbytes(MIB)
            self.content[number * MIB : (number + 1) * MIB] = self._buffer[:]
            began = time.monotonic()
            assert os.pwrite(self._fd, self._buffer, number * MIB) == MIB
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def fails(lab: Lab, *arguments: str) -> tuple[int, str]:
    """Exit code and words of a command that must not succeed."""
    words = command("asrfs.cli.main", "--state", str(lab.state), *arguments)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode, done.stdout
    return done.returncode, done.stderr


def export(lab: Lab, point: str) -> bytes:
    output = lab.root / f"export-{point.replace(':', '-')}"
    lab.replica_store("export", lab.machine, "disk", "--point", point, "--output", output)
    content = output.read_bytes()
    output.unlink()
    return content


def is_state(lab: Lab, state: str) -> Callable[[], bool]:
    return lambda: bool(lab.status()["state"] == state)


@pytest.mark.parametrize("fault", ["store is killed", "store hangs"])
def test_given_up_and_healed(lab: Lab, fault: str, rng: random.Random) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 20)
    before: dict[str, Any] = lab.asrfs("point", "create", "--name", "before", "--wait")
    kept = bytes(writer.content)
    assert lab.store is not None
    if fault == "store is killed":
        lab.kill_store()
    else:
        os.kill(lab.store.pid, signal.SIGSTOP)
    try:
        writer.write(5, WRITTEN_MIB)
        wait_until(is_state(lab, "resync-required"), "what waits for the store is given up", 60)
        wait_until(lambda: lab.status()["journal"]["bytes"] <= QUOTA_MIB * MIB, "the journal is within its quota", 60)
        status = lab.status()
        assert "resync-required" in [alarm["id"] for alarm in status["alarms"]]
        assert status["resync"]["bytes_left"] >= (WRITTEN_MIB - QUOTA_MIB) * MIB
        assert writer.slowest_s < 5, "I8: no write waits for the store"
        code, said = fails(lab, "point", "create", "--name", "within", "--wait", "--timeout", "30s")
        assert code == 4 and "never be recoverable" in said
    finally:
        if fault == "store hangs":
            os.kill(lab.store.pid, signal.SIGCONT)
    if fault == "store is killed":
        lab.start_store()
    wait_until(lambda: lab.status()["state"] in ("resyncing", "protected"), "the resync begins by itself", 60)
    lab.kill("agent")
    writer.write(0, 5)
    lab.asrfs("resync", "--now", "--timeout", "120s")
    wait_until(is_state(lab, "protected"), "all is at the store", 60)
    lab.asrfs("drain", "--timeout", "60s")
    assert export(lab, "latest") == bytes(writer.content), "I9"
    assert export(lab, before["id"]) == kept, "I5: a point from before stays exact"
    listed = {point["name"]: point["acknowledged"] for point in lab.asrfs("point", "list")}
    assert listed["before"] and not listed["within"]
    names = [point["name"] for point in lab.replica_store("point", "list", lab.machine)]
    assert "before" in names and "within" not in names
    after: dict[str, Any] = lab.asrfs("point", "create", "--name", "after", "--wait")
    assert export(lab, after["id"]) == bytes(writer.content)
    writer.close()


def test_a_full_scan_sends_what_differs(lab: Lab, rng: random.Random) -> None:
    """A byte of the image is changed behind everybody's back: comparing finds it, and the replica has it then."""
    writer = Writer(lab, rng)
    writer.write(0, 4)
    lab.asrfs("drain", "--timeout", "60s")
    writer.close()
    image_path = lab.status()["disks"][0]["image"]
    assert lab.stop_host() == 0  # else the newest bytes are read from the journal
    with open(image_path, "r+b") as image:
        image.seek(3 * MIB + 5)
        changed = bytes([image.read(1)[0] ^ 1])
        image.seek(3 * MIB + 5)
        image.write(changed)
        image.flush()
        os.fsync(image.fileno())
    writer.content[3 * MIB + 5 : 3 * MIB + 6] = changed
    lab.start_host()
    document: dict[str, Any] = lab.asrfs("resync", "--full-scan", "--now", "--timeout", "120s")
    assert document["chunks_different"] == 1
    assert document["chunks_compared"] >= DISK_MIB * 16
    lab.asrfs("drain", "--timeout", "60s")
    assert export(lab, "latest") == bytes(writer.content)
    assert lab.status()["state"] == "protected"
