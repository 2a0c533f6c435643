"""Host and store that share no history any more, on the real kernel: a vault set back or replaced, a host set back or
cloned. Healed into a new epoch; nothing that was there is touched, and whoever is superseded writes no more."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.lab import Lab, LabError, wait_until

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20
DISK_MIB = 64


class Writer:
    """Writes MiBs past the page cache, and remembers what a disk holds."""

    def __init__(self, lab: Lab, rng: random.Random, content: bytes = bytes(DISK_MIB * MIB)) -> None:
        self.rng = rng
        self.content = bytearray(content)
        self._buffer = mmap.mmap(-1, MIB)
        self._fd = os.open(lab.disks / "disk.img", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self._buffer[:] = self.rng.randbytes(MIB)
            assert os.pwrite(self._fd, self._buffer, number * MIB) == MIB
            self.content[number * MIB : (number + 1) * MIB] = self._buffer[:]
        os.fsync(self._fd)

    def read(self) -> bytes:
        content = bytearray()
        for number in range(DISK_MIB):
            assert os.preadv(self._fd, [self._buffer], number * MIB) == MIB
            content += self._buffer[:]
        return bytes(content)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def lab(make_scratch: Callable[[str], Path]) -> Iterator[Lab]:
    """A store and an enrolled, served machine."""
    lab = Lab(parent=make_scratch("rejoin"))
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "disk", "--size", f"{DISK_MIB}M")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True, timeout=120)


def export(lab: Lab, point: str) -> bytes:
    output = lab.root / f"export-{point.replace(':', '-')}"
    lab.replica_store("export", lab.machine, "disk", "--point", point, "--output", output)
    content = output.read_bytes()
    output.unlink()
    return content


def alarms(lab: Lab) -> list[str]:
    return [alarm["id"] for alarm in lab.status()["alarms"]]


def until_whole(lab: Lab, epoch: int) -> None:
    def is_whole() -> bool:
        status = lab.status()
        return bool(status["state"] == "protected" and status["epoch"] >= epoch and status["link"] == "connected")

    wait_until(is_whole, "the rejoined machine is protected", 90)
    lab.asrfs("drain", "--timeout", "60s")


def is_trimmed(lab: Lab) -> bool:
    """Whether the first records, which the store has, were freed here."""
    return not (lab.state / "journal" / f"{1:016x}.segment").exists()


def check_rebuilt(lab: Lab, expected: dict[str, bytes]) -> None:
    """A catalog that is made again from the objects says the same."""
    lab.kill_store()
    lab.replica_store("rebuild")
    for point, content in expected.items():
        assert export(lab, point) == content, f"I9: {point} after a rebuild"
    lab.start_store()


@pytest.mark.parametrize("kills", [False, True])
def test_i5_and_i9_a_vault_that_was_set_back_is_healed_without_a_person(
    lab: Lab, rng: random.Random, kills: bool
) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 10)
    before: dict[str, Any] = lab.asrfs("point", "create", "--name", "before", "--wait", "--timeout", "60s")
    kept = bytes(writer.content)
    lab.kill_store()
    backup = lab.root / "vault.backup"
    copy(lab.vault, backup)
    lab.start_store()
    for first in (5, 20):
        writer.write(first, 40)
    lost: dict[str, Any] = lab.asrfs("point", "create", "--name", "lost", "--wait", "--timeout", "60s")
    wait_until(lambda: is_trimmed(lab), "what the store has is freed", 60)
    lab.kill_store()
    shutil.rmtree(lab.vault)
    backup.rename(lab.vault)
    writer.write(60, 3)
    lab.start_store()
    for _ in range(8 if kills else 0):
        time.sleep(rng.uniform(0.0, 0.4))  # sleep: somewhere in the middle of it
        lab.kill(rng.choice(("agent", "disk_server")))
        if rng.random() < 0.3:
            lab.kill_store()
            lab.start_store()
    writer.write(0, 2)
    until_whole(lab, 2)
    assert export(lab, "latest") == bytes(writer.content), "I9"
    assert export(lab, before["id"]) == kept, "I5: a point from before stays exact"
    assert not {"store-lost", "diverged", "fenced"} & set(alarms(lab))
    listed = {point["name"]: point for point in lab.asrfs("point", "list")}
    assert listed["before"]["acknowledged"] and listed["lost"]["lost"]
    assert lost["id"] not in [point["id"] for point in lab.replica_store("point", "list", lab.machine)]
    writer.write(0, 1)
    after: dict[str, Any] = lab.asrfs("point", "create", "--name", "after", "--wait", "--timeout", "60s")
    check_rebuilt(lab, {after["id"]: bytes(writer.content), before["id"]: kept})
    assert writer.read() == writer.content
    writer.close()
    assert lab.stop_host() == 0
    assert Path(lab.status()["disks"][0]["image"]).read_bytes() == writer.content


def test_an_empty_vault_is_filled_again(lab: Lab, rng: random.Random) -> None:
    writer = Writer(lab, rng)
    for first in (0, 20):
        writer.write(first, 40)
    lab.asrfs("drain", "--timeout", "60s")
    wait_until(lambda: is_trimmed(lab), "what the store has is freed", 60)
    lab.kill_store()
    shutil.rmtree(lab.vault)
    lab.start_store()
    lab.enroll("--instead")
    until_whole(lab, 2)
    assert export(lab, "latest") == bytes(writer.content), "I9"
    writer.close()


def test_i7_a_host_that_was_set_back_goes_on_when_somebody_says_so(lab: Lab, rng: random.Random) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 10)
    lab.asrfs("drain", "--timeout", "60s")
    writer.close()
    assert lab.stop_host() == 0
    backup = lab.root / "state.backup"
    copy(lab.state, backup)
    at_backup = bytes(writer.content)
    lab.start_host()
    later = Writer(lab, rng, at_backup)
    later.write(5, 20)
    tail: dict[str, Any] = lab.asrfs("point", "create", "--name", "tail", "--wait", "--timeout", "60s")
    later.close()
    assert lab.stop_host() == 0
    shutil.rmtree(lab.state)
    backup.rename(lab.state)
    lab.start_host()
    other = Writer(lab, rng, at_backup)
    other.write(30, 5)
    wait_until(lambda: "diverged" in alarms(lab), "it is named", 30)
    (alarm,) = [alarm for alarm in lab.status()["alarms"] if alarm["id"] == "diverged"]
    assert alarm["severity"] == "critical" and "asrfs resync --full-scan" in alarm["text"]
    time.sleep(1)  # sleep: nothing of the kind begins by itself
    assert lab.status()["epoch"] == 1
    other.write(32, 5)
    document: dict[str, Any] = lab.asrfs("resync", "--full-scan", "--now", "--timeout", "120s")
    assert 0 < document["chunks_different"] <= 30 * 16, "only what differs is sent"
    until_whole(lab, 2)
    assert export(lab, "latest") == bytes(other.content), "I9"
    assert export(lab, tail["id"]) == bytes(later.content), "I7: what the other side had written is still there"
    assert export(lab, f"lsn:{tail['lsn']}") == bytes(later.content)
    check_rebuilt(lab, {"latest": bytes(other.content), tail["id"]: bytes(later.content)})
    other.close()


def test_i6_of_two_clones_the_one_that_rejoined_goes_on(
    lab: Lab, make_scratch: Callable[[str], Path], rng: random.Random
) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 10)
    lab.asrfs("drain", "--timeout", "60s")
    writer.close()
    assert lab.stop_host() == 0
    at_copy = bytes(writer.content)
    twin = Lab(parent=make_scratch("twin"))
    lab.at_close(twin.close)
    copy(lab.state, twin.state)
    lab.start_host()
    first = Writer(lab, rng, at_copy)
    first.write(0, 12)
    tail: dict[str, Any] = lab.asrfs("point", "create", "--name", "tail", "--wait", "--timeout", "60s")
    twin.start_host()
    second = Writer(twin, rng, at_copy)
    second.write(20, 5)
    wait_until(lambda: "diverged" in alarms(twin), "the clone is named", 30)
    twin.asrfs("resync", "--full-scan", "--now", "--timeout", "120s")
    until_whole(twin, 2)
    wait_until(lambda: "fenced" in alarms(lab), "the other one is fenced", 60)
    status = lab.status()
    assert status["state"] == "unprotected" and "superseded" in status["reason"]
    for _ in range(2):
        with pytest.raises(OSError) as refused:
            first.write(50, 1)
        assert refused.value.errno in (errno.EROFS, errno.EIO)
        assert first.read() == first.content, "reads go on"
        for role in ("agent", "disk_server"):
            lab.kill(role)
        wait_until(lambda: lab.pid("agent") != 0 and lab.pid("disk_server") != 0, "their next lives")
    first.close()
    assert lab.stop_host() == 0
    assert "fenced" in alarms(lab), "also while it is not served"
    lab.start_host()
    again = Writer(lab, rng, bytes(first.content))
    with pytest.raises(OSError):
        again.write(50, 1)
    with pytest.raises(LabError):
        lab.asrfs("drain", "--timeout", "2s")
    assert replica(lab) == bytes(second.content), "I6: the superseded side adds nothing"
    assert export(lab, tail["id"]) == bytes(first.content), "I7"
    # somebody decides for the other one after all
    lab.asrfs("resync", "--full-scan", "--now", "--timeout", "120s")
    until_whole(lab, 3)
    again.write(50, 1)
    lab.asrfs("drain", "--timeout", "60s")
    assert replica(lab) == bytes(again.content)
    wait_until(lambda: "fenced" in alarms(twin), "now the clone is fenced", 60)
    with pytest.raises(OSError):
        second.write(0, 1)
    second.close()
    again.close()


def replica(lab: Lab) -> bytes:
    return export(lab, "latest")
