"""Filesystems that fill up for real, below the journal, below an image and below the vault.

Each lies on a small ext4 in a file. Nothing acknowledged is lost, whoever still can goes on, and everything catches up
without a restart when there is space again; the oracle is stamped writes, compared block for block.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.t5_system.machine import run_tool
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until
from tools.lab import Lab, LabError, command

MIB = 1 << 20


class SmallFilesystem:
    """An ext4 of a few MiB mounted at `path`, and a ballast that takes what is left of it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._file = path.with_suffix(".ext4")
        self._ballast: list[Path] = []
        path.mkdir()
        with self._file.open("wb") as file:
            file.truncate(size_bytes)
        run_tool("mkfs.ext4", "-q", "-F", "-m", "0", self._file)
        run_tool("mount", "-o", "loop", self._file, path)

    def fill(self, spare_bytes: int = 0) -> None:
        """Take all but `spare_bytes`; all to the last block for 0."""
        status = os.statvfs(self.path)
        ballast = self.path / f"ballast{len(self._ballast)}"
        self._ballast.append(ballast)
        free = status.f_bavail * status.f_frsize
        with ballast.open("wb", buffering=0) as file:
            if spare_bytes:
                assert free > spare_bytes, "it is fuller than the test thinks"
                os.posix_fallocate(file.fileno(), 0, free - spare_bytes)
            for piece in (MIB, 4096) if not spare_bytes else ():
                with pytest.raises(OSError, match="No space left"):
                    while True:
                        file.write(bytes(piece))

    def make_space(self) -> None:
        for ballast in self._ballast:
            ballast.unlink()
        self._ballast.clear()

    def close(self) -> None:
        run_tool("umount", self.path)


@contextmanager
def lab_and_filesystem(scratch: Path, size_bytes: int) -> Iterator[tuple[Lab, SmallFilesystem]]:
    """Nothing started yet: each test puts one part of it on the small filesystem."""
    small = SmallFilesystem(scratch / "small", size_bytes)
    try:
        lab = Lab(parent=scratch)
        try:
            yield lab, small
        finally:
            small.make_space()
            lab.close()
    finally:
        small.close()


def alarms(lab: Lab) -> dict[str, str]:
    """Severity by alarm."""
    return {each["id"]: each["severity"] for each in lab.status()["alarms"]}


def wait_for_alarm(lab: Lab, id: str, severity: str) -> None:
    wait_until(lambda: alarms(lab).get(id) == severity, what=f"the alarm {id} to be {severity}")


def wait_for_peace(lab: Lab) -> None:
    wait_until(lambda: alarms(lab) == {}, what="all alarms to be over")


def export(lab: Lab, disk: str, selector: str) -> Path:
    output = lab.root / f"{disk}-{len(list(lab.root.glob('*.export')))}.export"
    lab.replica_store("export", lab.machine, disk, "--point", selector, "--output", output)
    return output


def write_until_full(writer: StampWriter) -> None:
    """The last write acknowledged is `writer.done`."""
    with pytest.raises(OSError, match="No space left"):
        writer.write(100_000)


@pytest.mark.timeout(180)
def test_full_below_the_journal(scratch: Path, rng: random.Random) -> None:
    with lab_and_filesystem(scratch, 640 * MIB) as (lab, small):
        lab.state = small.path / "state"
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "2M")
        lab.enroll()
        small.fill(spare_bytes=192 * MIB)
        lab.start_host()
        lab.asrfs("pause")
        served = lab.disks / "root.img"
        writer = StampWriter(Stamper(rng.randrange(1 << 30), 1, 512), [served])
        writer.write(50)
        wait_for_alarm(lab, "space", "warning")
        small.fill()
        wait_for_alarm(lab, "space", "critical")
        write_until_full(writer)
        assert writer.fsync() == writer.done, "I2: what was acknowledged can be made durable"
        writer.stamper.check([served], exactly=writer.done)
        with pytest.raises(LabError, match=r"ended with 1.*cannot write .*settings\.json.*[Nn]o space"):
            lab.asrfs("set", "object_age=1s")
        with pytest.raises(LabError, match=r"ended with 1.*[Nn]o space"):
            lab.asrfs("disk", "add", "data", "--size", "1M")
        assert len(lab.asrfs("disk", "list")) == len(os.listdir(lab.state / "images")) == 1
        assert not list(lab.state.glob(".*")), "nothing half-written is left"
        lab.asrfs("resume")
        lab.asrfs("drain", "--timeout", "60s")
        writer.stamper.check([export(lab, "root", "latest")], exactly=writer.done)
        agent = lab.pid("agent")
        small.make_space()
        writer.write(300)
        writer.fsync()
        wait_for_peace(lab)
        lab.asrfs("drain", "--timeout", "60s")
        assert writer.stamper.check([export(lab, "root", "latest")]) == writer.done
        assert lab.pid("agent") == agent
        wait_until(lambda: lab.status()["journal"]["bytes"] < 64 * MIB, what="the journal to be trimmed")
        writer.close()
        assert lab.stop_host() == 0
        image = Path(lab.asrfs("disk", "list")[0]["image"])
        assert writer.stamper.check([image]) == writer.done


@pytest.mark.timeout(180)
def test_full_below_an_image(scratch: Path, rng: random.Random) -> None:
    with lab_and_filesystem(scratch, 48 * MIB) as (lab, small):
        image = small.path / "adopted.img"
        with image.open("wb") as file:
            file.truncate(16 * MIB)
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--image", image)
        lab.enroll()
        small.fill(spare_bytes=MIB)
        lab.start_host()
        wait_until(lambda: lab.status()["disks"][0]["dirty_bytes"] == 0, what="the initial replication")
        served = lab.disks / "root.img"
        writer = StampWriter(Stamper(rng.randrange(1 << 30), 1, 4096), [served])
        writer.write(300)
        wait_for_alarm(lab, "apply", "critical")
        writer.write(1000)
        writer.fsync()
        lsn = lab.status()["lsn"]
        assert lsn["applied"] < lsn["durable"]
        lab.asrfs("drain", "--timeout", "60s")
        writer.stamper.check([served], exactly=writer.done)
        writer.stamper.check([export(lab, "root", "latest")], exactly=writer.done)
        agent = lab.pid("agent")
        small.make_space()
        wait_until(lambda: lab.status()["lsn"]["applied"] >= lsn["durable"], what="the applier to catch up")
        assert (lab.pid("agent"), alarms(lab)) == (agent, {})
        assert writer.stamper.check([image]) == writer.done
        small.fill(spare_bytes=MIB // 4)
        writer.write(3000)
        writer.fsync()
        wait_for_alarm(lab, "apply", "critical")
        writer.close()
        assert lab.stop_host() == 1, "it stops soon, and says that the image is behind"
        assert "not up to date" in (lab.root / "host.log").read_text()
        lab.start_host()
        writer.stamper.check([served], exactly=writer.done)
        small.make_space()
        assert lab.stop_host() == 0
        assert writer.stamper.check([image]) == writer.done


@pytest.mark.timeout(180)
def test_full_below_the_vault(scratch: Path, rng: random.Random) -> None:
    with lab_and_filesystem(scratch, 48 * MIB) as (lab, small):
        lab.vault = small.path / "vault"
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "2M")
        lab.enroll()
        lab.asrfs("set", "compression=none")
        lab.start_host()
        served = lab.disks / "root.img"
        writer = StampWriter(Stamper(rng.randrange(1 << 30), 1, 512), [served])
        early = writer.write(200)
        lab.asrfs("point", "create", "--name", "early", "--wait", "--timeout", "60s")
        small.fill(spare_bytes=MIB // 4)
        writer.write(300)
        wait_for_alarm(lab, "store-space", "critical")
        behind = lab.status()["lag"]["records"]
        assert behind > 0
        writer.write(200)
        writer.fsync()
        wait_until(lambda: lab.status()["lag"]["records"] >= behind + 200, what="the lag to grow")
        for _ in range(4):
            told = lab.status()["lsn"]["acknowledged"]
            held = lab.replica_store("machine", "show", lab.machine)["acknowledged_lsn"]
            assert told <= held, "I3: the host was told of records that are not in the vault"
        small.fill()
        for restarted in (False, True):
            if restarted:
                lab.kill_store()
                lab.start_store()
            assert [each["name"] for each in lab.replica_store("point", "list", lab.machine)] == ["early"]
            writer.stamper.check([export(lab, "root", "early")], exactly=early)
            assert lab.replica_store("verify")["damages"] == []
            assert lab.store is not None and lab.store.poll() is None
        done = subprocess.run(
            command("replica_store.cli.main", "--vault", lab.vault, "token", "db1"), capture_output=True, text=True
        )
        assert done.returncode == 0 or (done.returncode, done.stdout) == (1, ""), done
        small.make_space()
        lab.asrfs("drain", "--timeout", "60s")
        wait_for_peace(lab)
        writer.stamper.check([export(lab, "root", "early")], exactly=early)
        assert writer.stamper.check([export(lab, "root", "latest")]) == writer.done
        assert lab.replica_store("verify")["damages"] == []
        writer.close()
