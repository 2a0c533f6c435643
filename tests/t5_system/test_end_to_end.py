"""A replicated disk, end to end, on the real kernel: stamped writes while every process is killed in turn.

The oracle is bytes: every export must be, block for block on all disks at once, the state after the first k writes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica_store.vault.vault import Vault
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until
from tools.lab import Lab, LabError

BLOCKS = 512
DISKS = ("root", "data")


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store and an enrolled, served machine with two disks of 2 MiB."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        for disk in DISKS:
            lab.asrfs("disk", "add", disk, "--size", "2M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")  # points come when the tests say so
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


class Load:
    """Writes in the background while the block runs; an error of a write fails the test."""

    def __init__(self, writer: StampWriter) -> None:
        self._writer = writer
        self._stop = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self._failed, f"a write failed: {self._failed[0]!r}"

    def go_on(self, count: int, when: str) -> None:
        """Wait until `count` more writes are done."""
        goal = self._writer.done + count
        wait_until(lambda: self._writer.done >= goal or self._failed, what=f"{count} writes {when}")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._writer.write(20)
        except BaseException as error:
            self._failed.append(error)


def writer_of(lab: Lab, seed: int) -> StampWriter:
    stamper = Stamper(seed, len(DISKS), BLOCKS)
    return StampWriter(stamper, [lab.disks / f"{disk}.img" for disk in DISKS])


def export(lab: Lab, selector: str) -> list[Path]:
    """Both disks, cut at one LSN: a selector that moves is resolved once."""
    outputs = []
    for disk in DISKS:
        output = lab.root / f"{disk}-{len(list(lab.root.glob('*.export')))}.export"
        done = lab.replica_store("export", lab.machine, disk, "--point", selector, "--output", output)
        selector = f"lsn:{done['lsn']}"
        outputs.append(output)
    return outputs


def check_exports(lab: Lab, writer: StampWriter, rng: random.Random, exact: dict[str, int]) -> None:
    """Every kind of selector, and LSNs at random, each compared block for block."""
    lab.asrfs("drain", "--timeout", "60s")
    assert writer.stamper.check(export(lab, "latest")) == writer.done
    for selector, k in exact.items():
        writer.stamper.check(export(lab, selector), exactly=k)
    last = lab.status()["lsn"]["acknowledged"]
    for _ in range(6):
        writer.stamper.check(export(lab, f"lsn:{state_at(lab, rng.randint(len(DISKS), last))}"))


def state_at(lab: Lab, lsn: int) -> int:
    """The LSN itself, or where a long backlog was folded over it, the next one at which there is a state."""
    with Vault.open(str(lab.vault)) as vault:
        row = vault.catalog.object_with(vault.machine(lab.machine).id, lsn)
    assert row is not None, f"LSN {lsn} is not here"
    return row.last_lsn if row.is_stretch else lsn


@pytest.mark.timeout(300)
def test_i9_every_export_is_a_prefix_while_each_process_is_killed(lab: Lab, rng: random.Random) -> None:
    writer = writer_of(lab, rng.randrange(1 << 30))
    exact: dict[str, int] = {}
    for victim in ("disk_server", "agent", "store", "disk_server", "supervisor", "agent", "store"):
        with Load(writer) as load:
            load.go_on(100, "before the kill")
            kill(lab, victim)
            revive(lab, victim)
            load.go_on(100, f"after the kill of the {victim}")
        flushed = writer.fsync()
        name = f"after-{len(exact)}-{victim.replace('_', '-')}"
        point = lab.asrfs("point", "create", "--name", name, "--wait", "--timeout", "60s")
        exact[name] = flushed
        exact[point["id"]] = flushed
        exact[f"lsn:{point['lsn']}"] = flushed
        exact[f"time:{point['time']}"] = flushed
    listed = lab.replica_store("point", "list", lab.machine)
    assert [each["name"] for each in listed] == [name for name in exact if name.startswith("after-")]
    exact["latest-processed"] = writer.done
    check_exports(lab, writer, rng, exact)
    writer.close()
    assert lab.stop_host() == 0
    images = [Path(disk["image"]) for disk in lab.asrfs("disk", "list")]
    assert writer.stamper.check(images) == writer.done, "after a clean stop the raw images are up to date"


def kill(lab: Lab, victim: str) -> None:
    if victim == "store":
        lab.kill_store()
    elif victim == "supervisor":
        assert lab.host is not None
        lab.host.kill()
        lab.host.wait()
    else:
        killed = lab.kill(victim)
        wait_until(lambda: not Path(f"/proc/{killed}").exists(), what=f"the end of {victim} {killed}")


def revive(lab: Lab, victim: str) -> None:
    """What a person or systemd does: start what was started by hand; the rest must come back by itself."""
    if victim == "store":
        lab.start_store()
    elif victim == "supervisor":
        lab.start_host()


def test_i2_and_i8_all_processes_killed_at_once_lose_nothing_acknowledged(lab: Lab, rng: random.Random) -> None:
    writer = writer_of(lab, rng.randrange(1 << 30))
    writer.write(200)
    durable = writer.fsync()
    writer.write(50)
    processes = lab.status()["processes"]
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)
    assert lab.host is not None
    lab.host.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes.values()), what="their end")
    with pytest.raises(OSError):
        writer.write(1)
    with contextlib.suppress(OSError):  # the flush that closing is finds nobody
        writer.close()
    lab.start_host()
    served = [lab.disks / f"{disk}.img" for disk in DISKS]
    k = writer.stamper.check(served, at_least=durable)
    lab.asrfs("drain", "--timeout", "60s")
    assert writer.stamper.check(export(lab, "latest")) == k


def test_i8_writes_go_on_while_the_store_is_away(lab: Lab, rng: random.Random) -> None:
    writer = writer_of(lab, rng.randrange(1 << 30))
    writer.write(100)
    lab.asrfs("drain", "--timeout", "60s")
    lab.kill_store()
    writer.write(300)
    writer.fsync()
    behind = lab.status()["lsn"]
    assert behind["durable"] > behind["acknowledged"]
    with pytest.raises(LabError, match="ended with 1"):
        lab.asrfs("drain", "--timeout", "300ms")
    lab.start_store()
    lab.asrfs("drain", "--timeout", "60s")
    assert writer.stamper.check(export(lab, "latest")) == writer.done
    writer.close()


def test_i5_and_i9_a_host_set_back_to_a_backup_adds_nothing_to_the_history(lab: Lab, rng: random.Random) -> None:
    """Also once it has written more than the store holds: same numbers, other records."""
    writer = writer_of(lab, rng.randrange(1 << 30))
    writer.write(50)
    writer.fsync()
    lab.asrfs("drain", "--timeout", "60s")
    writer.close()
    assert lab.stop_host() == 0
    backup = lab.root / "state.backup"
    subprocess.run(["cp", "-a", "--sparse=always", lab.state, backup], check=True, timeout=60)
    lab.start_host()
    later = StampWriter(writer.stamper, [lab.disks / f"{disk}.img" for disk in DISKS])
    later.write(50)
    exact = later.fsync()
    point = lab.asrfs("point", "create", "--name", "before", "--wait", "--timeout", "60s")
    later.close()
    assert lab.stop_host() == 0
    shutil.rmtree(lab.state)
    backup.rename(lab.state)
    lab.start_host()
    other = writer_of(lab, rng.randrange(1 << 30))
    other.write(200)
    other.fsync()
    for again in range(2):
        assert lab.status()["lsn"]["durable"] > point["lsn"]
        with pytest.raises(LabError, match="ended with 1"):
            lab.asrfs("drain", "--timeout", "2s")
        assert "diverged" in [alarm["id"] for alarm in lab.status()["alarms"]]
        if not again:
            lab.kill("agent")
            wait_until(lambda: lab.pid("agent") and lab.status()["link"] == "refused", what="the next agent's try")
    other.close()
    machine = lab.replica_store("machine", "show", lab.machine)
    assert machine["acknowledged_lsn"] == point["lsn"]
    writer.stamper.check(export(lab, "latest"), exactly=exact)


def test_several_mounts_and_exports_while_ingest_goes_on(lab: Lab, rng: random.Random) -> None:
    writer = writer_of(lab, rng.randrange(1 << 30))
    writer.write(200)
    exact = writer.fsync()
    point = lab.asrfs("point", "create", "--name", "early", "--wait", "--timeout", "60s")
    for name in ("tree1", "tree2"):
        lab.mount_points(lab.root / name)
    with Load(writer):
        for tree in ("tree1", "tree2"):
            for place in ("early", point["id"], f"lsn:{point['lsn']}", f"time:{point['time']}"):
                directory = lab.root / tree / lab.machine / place
                writer.stamper.check([directory / f"{disk}.img" for disk in DISKS], exactly=exact)
            with pytest.raises(OSError, match="Read-only"):
                (lab.root / tree / lab.machine / "early" / "root.img").write_bytes(b"x")
        writer.stamper.check(export(lab, "early"), exactly=exact)
        writer.stamper.check(export(lab, "latest"), at_least=exact)
    qcow2 = lab.root / "root.qcow2"
    lab.replica_store("export", lab.machine, "root", "--point", "early", "--output", qcow2, "--format", "qcow2")
    raw = export(lab, "early")[0]
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2], capture_output=True, text=True, timeout=60
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    writer.close()
