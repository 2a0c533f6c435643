"""What happens around a replica that falls behind, on the real kernel: whatever dies while it is healed, disks that
change while the store is away, and hosts that come back without anything to heal. The oracle is bytes, on the disk and
on the wire.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asrfs.replication.shipping_session import OBJECTS_UNACKNOWLEDGED_MAX
from tests.proof.kernel.flapping import Relay
from tests.t5_system.test_resync import DISK_MIB, MIB, SEGMENT_MIB, Writer, export, is_state
from tests.t5_system.test_resync import lab as lab
from tests.waiting import wait_until
from tools.lab import Lab, run

OTHER = 37 * MIB
OBJECT_MIB = 4
RUNS_REPEATED_MIB = 64
"""What filling may send again of each death: what was not taken from the map yet."""


@pytest.fixture
def link(lab: Lab) -> Iterator[Relay]:
    """Between agent and store. There is a second, small disk; nothing makes points by itself."""
    lab.asrfs("disk", "add", "other", "--size", str(OTHER))
    lab.asrfs("set", "crash_interval=24h", "application_interval=off")
    with Relay(int(lab.data.rpartition(":")[2])) as relay:
        path = lab.state / "keys" / "store.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_port": relay.port}))
        lab.kill("agent")
        wait_until(lambda: lab.status()["link"] == "connected", 60, what="a connection through the relay")
        yield relay


def write_other(lab: Lab, rng: random.Random, name: str = "other", at: int = 0, size: int = 3 * MIB) -> bytes:
    """Write to the small disk, durably; what it holds then."""
    path = lab.disks / f"{name}.img"
    with path.open("r+b") as disk:
        disk.seek(at)
        disk.write(rng.randbytes(size))
        disk.flush()
        os.fsync(disk.fileno())
    return path.read_bytes()


def exported(lab: Lab, disk: str, point: str = "latest") -> bytes:
    output = lab.root / "exported"
    lab.replica_store("export", lab.machine, disk, "--point", point, "--output", output)
    content = output.read_bytes()
    output.unlink()
    return content


def over_quota(lab: Lab, link: Relay, writer: Writer, first: int, count: int) -> None:
    """The link goes, and more is written than the journal may have."""
    link.cut()
    writer.write(first, count)
    wait_until(is_state(lab, "resync-required"), 60, what="what waits for the store to be given up")


def healed(lab: Lab, seconds: float = 120) -> None:
    wait_until(is_state(lab, "protected"), seconds, what="the replica to be whole")
    lab.asrfs("drain", "--timeout", "60s")


def some_done(lab: Lab, before: int, fault: str) -> int:
    """Bytes that are missing once these are less than `before`; the map is saved every 64 MiB."""
    wait_until(is_state(lab, "resyncing"), 60, what=f"healing, before the {fault} is struck")

    def look() -> int:
        left = int(lab.status()["resync"]["bytes_left"])
        assert left, f"all is sent before the {fault} is struck"
        return left if left < before else 0

    return wait_until(look, 60, what="some of it to be sent")


def strike(lab: Lab, link: Relay, fault: str) -> None:
    if fault in ("agent", "disk_server"):
        lab.kill(fault)
    elif fault == "store":
        lab.kill_store()
        lab.start_store()
    else:
        link.cut()
        time.sleep(0.5)  # sleep: how long a link is down is nobody's event
        link.mend()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("faults", [("agent", "store"), ("disk_server", "link")])
def test_whatever_dies_while_it_heals_it_goes_on_where_it_was(
    lab: Lab, link: Relay, faults: tuple[str, str], rng: random.Random
) -> None:
    """One when it has just begun, the other one when something is done."""
    writer = Writer(lab, rng)
    writer.write(0, 8)
    before = lab.asrfs("point", "create", "--name", "before", "--wait")
    kept = bytes(writer.content)
    over_quota(lab, link, writer, 4, 320)
    missing = int(lab.status()["resync"]["bytes_left"])
    lab.asrfs("set", "bandwidth_limit=10M")
    sent_before, written = link.bytes_sent, 0
    link.mend()
    left = missing + 1
    for fault in faults:
        left = some_done(lab, left, fault)
        strike(lab, link, fault)
        writer.write(380 + written, 2)
        written += 2
        again = lab.status()
        assert 0 < again["resync"]["bytes_left"] <= left + 2 * MIB, f"begun anew after {fault}: {again['resync']}"
    lab.asrfs("set", "bandwidth_limit=none")
    healed(lab)
    assert exported(lab, "disk") == bytes(writer.content), "I9"
    assert export(lab, before["id"]) == kept, "I5, I7: a point from before stays exact"
    assert writer.slowest_s < 5, "I8"
    sent = link.bytes_sent - sent_before
    assert sent <= 1.2 * (missing + written * MIB) + RUNS_REPEATED_MIB * MIB * len(faults), f"{sent} for {missing}"
    writer.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("behind", ["within the quota", "over the quota"])
def test_disks_that_change_while_the_store_is_away(lab: Lab, link: Relay, behind: str, rng: random.Random) -> None:
    """One grows, one is removed and another one gets its name. Points from before have the disks they had."""
    writer = Writer(lab, rng)
    writer.write(0, 4)
    old = write_other(lab, rng)
    before = lab.asrfs("point", "create", "--name", "before", "--wait")
    kept = bytes(writer.content)
    if behind == "over the quota":
        over_quota(lab, link, writer, 4, 320)
    else:
        link.cut()
        writer.write(4, 20)
    sent_before = link.bytes_sent
    lab.asrfs("disk", "resize", "disk", f"{DISK_MIB + 24}M")
    with (lab.disks / "disk.img").open("r+b") as disk:
        disk.seek((DISK_MIB + 8) * MIB)
        disk.write(grown := rng.randbytes(MIB))
        disk.flush()
        os.fsync(disk.fileno())
    write_other(lab, rng, at=5 * MIB)
    lab.asrfs("disk", "remove", "other", "--yes")
    lab.asrfs("disk", "add", "other", "--size", "11M")
    wait_until(lambda: (lab.disks / "other.img").stat().st_size == 11 * MIB, what="the new disk")
    new = write_other(lab, rng, at=MIB)
    states = set()
    link.mend()
    wait_until(lambda: states.add(lab.status()["state"]) or "protected" in states, 120, what="the replica to be whole")
    healed(lab)
    now = bytes(writer.content) + bytes(8 * MIB) + grown + bytes(15 * MIB)
    assert exported(lab, "disk") == now, "I9: the disk that grew"
    assert exported(lab, "other") == new, "I9: the disk that took the name"
    assert exported(lab, "disk", before["id"]) == kept, "an old point keeps its shape"
    assert exported(lab, "other", before["id"]) == old, "an old point keeps its disks"
    if behind == "within the quota":
        assert states == {"protected"}, "nothing is sent anew"
        assert link.bytes_sent - sent_before < (20 + 1 + 3 + 3 + 4) * MIB
    writer.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", ["a flipped bit", "gone"])
def test_i8_a_lost_dirty_map_stops_nobody_and_all_is_compared(
    lab: Lab, link: Relay, damage: str, rng: random.Random
) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 4)
    before = lab.asrfs("point", "create", "--name", "before", "--wait")
    kept = bytes(writer.content)
    over_quota(lab, link, writer, 4, 300)
    _power_off(lab)
    with contextlib.suppress(OSError):
        writer.close()
    map = lab.state / "dirty.map"
    content = bytearray(map.read_bytes())
    content[len(content) // 2] ^= 16
    if damage == "gone":
        map.unlink()
    else:
        map.write_bytes(content)
    assert lab.status()["state"] == "resync-required", "also for who looks while nothing runs"
    lab.start_host()
    (said,) = [alarm["text"] for alarm in lab.status()["alarms"] if alarm["id"] == "dirty-map"]
    assert (damage == "gone") != ("dirty.map.unreadable-1" in said)
    with (lab.disks / "disk.img").open("r+b") as disk:
        disk.write(new := rng.randbytes(MIB))
        disk.flush()
        os.fsync(disk.fileno())
    writer.content[:MIB] = new
    sent_before, connections = link.bytes_sent, link.connections
    link.mend()
    healed(lab)
    assert exported(lab, "disk") == bytes(writer.content), "I9"
    assert exported(lab, "disk", before["id"]) == kept, "I5, I7"
    lost = (link.connections - connections - 1) * OBJECTS_UNACKNOWLEDGED_MAX * OBJECT_MIB * MIB  # on a busy machine
    assert link.bytes_sent - sent_before - lost < 306 * MIB, "what the store has already is not sent"
    assert not lab.status()["alarms"]
    if damage != "gone":
        assert (lab.state / "dirty.map.unreadable-1").read_bytes() == content


def _power_off(lab: Lab) -> None:
    """No process of the host gets another instruction."""
    processes = lab.status()["processes"]
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)
    assert lab.host is not None
    lab.host.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes.values()), what="their end")
    subprocess.run(["umount", "--lazy", lab.disks], check=False, timeout=60)


def _reinstall(lab: Lab) -> None:
    """What a package owns and writes again: nothing of it says where the history stands."""
    for name in ("run", "log"):
        shutil.rmtree(lab.state / name)
        (lab.state / name).mkdir(mode=0o700)


@pytest.mark.timeout(300)
def test_what_was_overwritten_in_a_long_backlog_is_sent_once(lab: Lab, link: Relay, rng: random.Random) -> None:
    """900 MiB behind, the same 12 MiB of the disk again and again; from 512 MiB on every single write is sent."""
    writer = Writer(lab, rng)
    lab.asrfs("set", "journal_quota=4G")
    link.cut()
    points: list[tuple[str, bytes]] = []
    for _ in range(3):
        for _ in range(25):
            writer.write(0, 12)
        point = lab.asrfs("point", "create", "--name", f"point{len(points)}")
        points.append((point["id"], bytes(writer.content)))
    sent_before = link.bytes_sent
    link.mend()
    healed(lab)
    sent = link.bytes_sent - sent_before
    assert sent < 650 * MIB, f"{sent} bytes of 900 MiB were sent"
    for id, content in points:
        assert exported(lab, "disk", id) == content, "I5, I9: every point is there, and exact"
    writer.close()


@pytest.mark.timeout(300)
def test_a_disk_server_that_dies_often_does_not_use_the_quota_up(lab: Lab, link: Relay, rng: random.Random) -> None:
    """Each death begins another segment of 64 MiB; the quota is 256."""
    writer = Writer(lab, rng)
    link.cut()
    for number in range(8):
        writer.write(number, 1)
        killed = lab.kill("disk_server")
        wait_until(lambda killed=killed: lab.pid("disk_server") not in (0, killed), what="the next disk server")  # type: ignore[misc]
    writer.write(8, 1)
    status = lab.status()
    assert status["state"] == "protected", "nothing was given up"
    assert status["journal"]["bytes"] < 140 * MIB
    segments = (lab.state / "journal").glob("*.segment")
    assert sum(each.stat().st_blocks * 512 for each in segments) < 3 * SEGMENT_MIB * MIB, "so is the space"
    link.mend()
    lab.asrfs("drain", "--timeout", "60s")
    assert exported(lab, "disk") == bytes(writer.content)
    writer.close()


RETURNS: dict[str, Callable[[Lab], Any]] = {"forced off": lambda lab: None, "forced off and reinstalled": _reinstall}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", RETURNS)
def test_a_host_that_was_forced_off_sends_what_is_new_and_nothing_else(
    lab: Lab, link: Relay, how: str, rng: random.Random
) -> None:
    writer = Writer(lab, rng)
    writer.write(0, 150)
    lab.asrfs("drain", "--timeout", "60s")
    link.cut()
    writer.write(30, 5)
    _power_off(lab)
    with contextlib.suppress(OSError):
        writer.close()
    RETURNS[how](lab)
    sent_before = link.bytes_sent
    link.mend()
    lab.start_host()
    lab.asrfs("drain", "--timeout", "60s")
    status = lab.status()
    assert status["state"] == "protected" and not status["resync"]["bytes_left"]
    sent = link.bytes_sent - sent_before
    assert 5 * MIB <= sent < 6 * MIB, f"{sent} bytes were sent where five MiB were new"
    assert exported(lab, "disk") == bytes(writer.content) == (lab.disks / "disk.img").read_bytes(), "I2, I9"


@pytest.mark.timeout(300)
def test_what_is_large_waits_for_its_window(lab: Lab, link: Relay, rng: random.Random) -> None:
    """More than 1 GiB: 2 GiB of a third disk are discarded, which marks them and costs nothing to send."""
    lab.asrfs("disk", "add", "large", "--size", "3G")
    wait_until(lambda: (lab.disks / "large.img").exists(), what="the third disk")
    content = write_other(lab, rng, "large", at=5 * MIB)[: 8 * MIB]
    lab.asrfs("drain", "--timeout", "60s")
    hour = time.localtime().tm_hour
    lab.asrfs("set", f"resync_window={(hour + 3) % 24:02}:00-{(hour + 4) % 24:02}:00")
    link.cut()
    run(["fallocate", "--punch-hole", "--offset", str(8 * MIB), "--length", "2G", str(lab.disks / "large.img")])
    writer = Writer(lab, rng)
    over_quota(lab, link, writer, 4, 300)
    link.mend()
    wait_until(lambda: "asrfs resync --now" in lab.status()["reason"], 60, what="healing to wait for its window")
    lab.asrfs("drain", "--timeout", "60s")
    sent_before = link.bytes_sent
    writer.write(0, 3)
    lab.asrfs("drain", "--timeout", "60s")
    status = lab.status()
    assert status["state"] == "resync-required" and status["resync"]["bytes_left"] > 2 << 30
    assert link.bytes_sent - sent_before < 8 * MIB, "new writes are sent meanwhile, and nothing else"
    lab.asrfs("set", "resync_window=always")
    healed(lab)
    assert exported(lab, "disk") == bytes(writer.content), "I9"
    large = exported(lab, "large")
    assert large[: 8 * MIB] == content and not large[8 * MIB :].strip(b"\0"), "I9: the third disk"
    writer.close()


@pytest.mark.timeout(300)
def test_a_job_that_fails_is_tried_again_after_a_minute(lab: Lab, link: Relay, rng: random.Random) -> None:
    """The first copy of an adopted disk, whose image cannot be found when it is to be read."""
    image, elsewhere = lab.root / "adopted.raw", lab.root / "elsewhere.raw"
    image.write_bytes(content := rng.randbytes(3 * MIB) + bytes(5 * MIB))
    link.cut()
    lab.asrfs("disk", "add", "adopted", "--image", image)
    wait_until(lambda: (lab.disks / "adopted.img").exists(), what="the adopted disk")
    image.rename(elsewhere)
    link.mend()
    wait_until(lambda: str(image) in lab.status()["reason"], 60, what="the first try to fail")
    failed_at = time.monotonic()
    elsewhere.rename(image)
    healed(lab)
    assert 40 < time.monotonic() - failed_at < 100, "after one minute, and nobody asked for it"
    assert exported(lab, "adopted") == content, "I9"
