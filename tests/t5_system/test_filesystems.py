"""Real filesystems under load while the disk server is killed: nobody above notices, and space comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrfs.daemon import control
from asrfs.daemon.loop_devices import QUEUE
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from tests.proof.kernel.filesystems import mounted_copy
from tests.waiting import wait_until
from tools.lab import Lab, run

KILLS = 5


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store and an enrolled, served machine with one disk of 1 GiB."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "1G")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_fio_with_verification_while_the_disk_server_is_killed_five_times(lab: Lab, kind: str) -> None:
    where = lab.root / "fs"
    where.mkdir()
    device = lab.attach("root", "--format", kind, "--on", where)
    log = lab.root / "fio.log"
    with log.open("w") as output:
        fio = subprocess.Popen(
            [
                *("fio", "--name=verify", f"--directory={where}", "--size=48M", "--numjobs=2", "--rw=randwrite"),
                *("--bsrange=4k-64k", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--fsync=32"),
                *(
                    "--verify=crc32c",
                    "--verify_state_save=0",
                    "--verify_fatal=1",
                    "--do_verify=1",
                    "--loops=100",
                    "--runtime=20",
                ),
                *("--time_based", "--verify_backlog=512"),
            ],
            stdout=output,
            stderr=output,
        )
    try:
        for kill in range(KILLS):
            assert kill_under_load(lab, fio), f"fio ended before kill {kill}: {log.read_text()}"
        assert fio.wait(timeout=120) == 0, log.read_text()
    finally:
        fio.kill()
        fio.wait()
    assert "verify: bad" not in log.read_text()
    give_space_back(lab, where)
    lab.asrfs("detach", "root")
    check_filesystem(lab, device, kind)


def kill_under_load(lab: Lab, load: subprocess.Popen[bytes]) -> bool:
    """SIGKILL the disk server once it is writing, and wait for the next one; False if the load had ended."""
    state = StateDirectory(str(lab.state))

    def appended() -> int:
        with contextlib.suppress(TemporaryError):
            return int(control.call(state.socket_path("disk_server"), "positions")["appended"])
        return 0

    before = wait_until(appended, what="the disk server")
    wait_until(lambda: appended() > before + 500 or load.poll() is not None, 60, what="load")
    if load.poll() is not None:
        return False
    killed = state.lock_holder("disk_server")
    assert killed
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: state.lock_holder("disk_server") not in (None, 0, killed), 60, what="the next disk server")
    return True


def give_space_back(lab: Lab, where: Path) -> None:
    """`fstrim` after deleting everything returns space to the image, and to the journal once it is at the store."""
    for path in where.glob("verify*"):
        path.unlink()
    run(["sync", "-f", str(where)])
    lab.asrfs("drain", "--timeout", "120s")
    image = Path(lab.asrfs("disk", "list")[0]["image"])
    settled(lab)
    before = image.stat().st_blocks
    assert before * 512 > 48 << 20, "there was something to give back"
    run(["fstrim", str(where)])
    run(["sync", "-f", str(where)])
    settled(lab)
    assert image.stat().st_blocks < before / 2
    wait_until(lambda: lab.status()["journal"]["bytes"] <= 3 * (64 << 20), 60, "the journal to be trimmed")


@pytest.mark.timeout(120)
def test_an_attached_disk_has_its_queue_and_its_filesystem_sizes_set(lab: Lab) -> None:
    """Requests are what one FUSE request carries, and nothing smaller than a journaled block is written."""
    lab.asrfs("disk", "add", "small", "--size", "400M")  # so small that mkfs.ext4 would take blocks of 1 KiB
    device = lab.attach("small", "--format", "ext4")
    queue = Path("/sys/block", Path(device).name, "queue")
    found = {name: (queue / name).read_text().strip() for name in QUEUE}
    assert found == QUEUE | {"scheduler": f"[{QUEUE['scheduler']}] {found['scheduler'].partition('] ')[2]}"}
    assert "Block size:               4096" in output_of(["dumpe2fs", "-h", device])
    lab.asrfs("detach", "small")
    device = lab.attach("small", "--format", "xfs", "--yes")
    assert output_of(["xfs_db", "-r", "-c", "sb 0", "-c", "print sectsize", device]) == "sectsize = 4096\n"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_mounted_disk_grows_and_old_points_keep_their_shape(lab: Lab, kind: str) -> None:
    """I9: the filesystem is grown on the live disk; a point from before is as long as the disk was, and sound."""
    where = lab.root / "fs"
    where.mkdir()
    device = lab.attach("root", "--format", kind, "--on", where)
    (where / "before").write_bytes(b"before" * 100_000)
    run(["sync", "-f", str(where)])
    lab.asrfs("point", "create", "--consistency", "filesystem", "--name", "small", "--wait", "--timeout", "60s")
    grown = lab.asrfs("disk", "resize", "root", "1536M")
    assert grown["loops"] == [device]
    assert output_of(["blockdev", "--getsize64", device]).strip() == str(1536 << 20)
    grow_filesystem(kind, device, where)
    state = os.statvfs(where)
    assert state.f_blocks * state.f_frsize > 1200 << 20
    (where / "after").write_bytes(b"after" * 100_000)
    run(["sync", "-f", str(where)])
    lab.asrfs("point", "create", "--consistency", "filesystem", "--name", "large", "--wait", "--timeout", "60s")
    for name, size_bytes in (("small", 1 << 30), ("large", 1536 << 20)):
        exported = lab.root / f"{name}.img"
        lab.replica_store("export", lab.machine, "root", "--point", name, "--output", exported)
        assert exported.stat().st_size == size_bytes
        with mounted_copy(exported, lab.root / "copy", kind, "nouuid" if kind == "xfs" else "noatime") as copy:
            assert (copy / "before").read_bytes() == b"before" * 100_000
            assert (copy / "after").exists() is (name == "large")
        run(["e2fsck", "-fn", str(exported)] if kind == "ext4" else ["xfs_repair", "-n", "-f", str(exported)])
    assert lab.status()["state"] == "protected"
    lab.asrfs("detach", "root")
    check_filesystem(lab, device, kind)


def grow_filesystem(kind: str, device: str, where: Path) -> None:
    if kind == "xfs":
        run(["xfs_growfs", str(where)])
        return
    run(["umount", str(where)])  # resize2fs of a mounted one needs CAP_SYS_RESOURCE, which containers seldom have
    run(["e2fsck", "-fp", device])
    run(["resize2fs", device])
    run(["mount", device, str(where)])


def output_of(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


def settled(lab: Lab) -> None:
    lab.asrfs("drain", "--timeout", "120s")
    appended = lab.status()["lsn"]["appended"]
    wait_until(lambda: lab.status()["lsn"]["applied"] >= appended, 60, "everything to be applied")


def check_filesystem(lab: Lab, device: str, kind: str) -> None:
    """fsck of the disk through a fresh loop device, and of its export."""
    exported = lab.root / "exported.img"
    lab.asrfs("drain", "--timeout", "60s")
    lab.replica_store("export", lab.machine, "root", "--point", "latest", "--output", exported)
    device = lab.attach("root")
    for target in (device, str(exported)):
        run(["e2fsck", "-fn", target] if kind == "ext4" else ["xfs_repair", "-n", "-f", target])
    compared = subprocess.run(["cmp", device, exported], capture_output=True, text=True, timeout=120)
    assert compared.returncode == 0, compared.stdout
