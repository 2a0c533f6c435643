"""Boot kind `mount`: filesystems at paths, commands, health; undone in reverse, whatever died in between."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.model.boot import BootSettings, Filesystem, Health, MountBoot, encode_boot
from replica_store.boot.mounted_machine import MountedMachine
from tests.t5_system.machine import run_tool
from tests.waiting import wait_until

SIZE = 40 << 20
SECOND = 16384
"""First sector of the second partition."""


@pytest.fixture
def disks(scratch: Path) -> dict[str, str]:
    """`data`: ext4 on the whole disk; `parted`: ext4 on its second partition."""
    data, parted = scratch / "data.img", scratch / "parted.img"
    for path in (data, parted):
        path.write_bytes(b"")
        os.truncate(path, SIZE)
    run_tool("mkfs.ext4", "-q", data)
    places = ((2048, 8192), (SECOND, SIZE // 512 - SECOND))
    with parted.open("r+b") as file:
        file.seek(446)
        file.write(b"".join(struct.pack("<4xB3xII", 0x83, *place) for place in places) + bytes(32) + b"\x55\xaa")
    run_tool("mkfs.ext4", "-q", "-E", f"offset={SECOND * 512}", parted, f"{(SIZE - SECOND * 512) // 1024}k")
    return {"data": str(data), "parted": str(parted)}


def settings(scratch: Path, *, health: Health | None = None, start: tuple[str, ...] = ()) -> BootSettings:
    note = 'echo "$1 $ASRFS_ROOT" >> "$0"'
    log = str(scratch / "said")
    return BootSettings(
        kind="mount",
        mount=MountBoot(
            filesystems=(
                Filesystem(disk="data", path="/srv", options="noatime"),
                Filesystem(disk="parted", path="/srv/deep", partition=2),
            ),
            start=(start or ("/bin/sh", "-c", note, log, "start"),),
            stop=(("/bin/sh", "-c", note, log, "stop"),),
        ),
        health=health,
    )


def mounts_below(path: Path) -> list[str]:
    return [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(path) in line.split()[4]
    ]


def loops_over(disks: dict[str, str]) -> list[str]:
    backed = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [path for path in backed if path in disks.values()]


def test_started_below_a_root_and_undone_in_reverse(scratch: Path, disks: dict[str, str]) -> None:
    root, machine = scratch / "root", MountedMachine(scratch / "m")
    healthy = Health(command=("/usr/bin/test", "-d", f"{root}/srv/deep/lost+found"), timeout="10s")
    assert machine.start(settings(scratch, health=healthy), disks, root=str(root), is_test=True) > 0
    assert mounts_below(root) == [f"{root}/srv", f"{root}/srv/deep"]
    (root / "srv/deep/file").write_text("kept")
    other = MountedMachine(scratch / "m")
    assert other.is_started()
    other.stop()
    assert not mounts_below(root) and not loops_over(disks) and not other.is_started()
    assert (scratch / "said").read_text() == f"start {root}\nstop {root}\n"
    other.stop()
    machine.start(settings(scratch), disks, root=str(root), is_test=True)
    assert (root / "srv/deep/file").read_text() == "kept"
    machine.start(settings(scratch), disks, root=str(root), is_test=True)
    assert len(loops_over(disks)) == 2, "starting again begins by undoing"
    machine.stop()


def test_what_fails_is_undone(scratch: Path, disks: dict[str, str]) -> None:
    root, machine = scratch / "root", MountedMachine(scratch / "m")
    sick = Health(command=("/bin/false",), timeout="300ms")
    cases: list[tuple[BootSettings, type[AsrfsError], str]] = [
        (settings(scratch, start=("/bin/false",)), AsrfsError, "ended with 1"),
        (settings(scratch, start=("/no/such/program",)), AsrfsError, "not there"),
        (settings(scratch, health=sick), TemporaryError, "a good end of /bin/false"),
    ]
    for each, kind, words in cases:
        with pytest.raises(kind, match=words):
            machine.start(each, disks, root=str(root), is_test=True)
        assert not mounts_below(root) and not loops_over(disks) and not machine.is_started()


def test_what_is_somebody_elses_is_left_alone(scratch: Path, disks: dict[str, str]) -> None:
    root, machine = scratch / "root", MountedMachine(scratch / "m")
    device = run_tool("losetup", "--find", "--show", disks["data"]).strip()
    try:
        with pytest.raises(RefusedError, match=device):
            machine.start(settings(scratch), disks, root=str(root), is_test=True)
        assert loops_over(disks) == [disks["data"]]
    finally:
        run_tool("losetup", "--detach", device)
    (root / "srv").mkdir(parents=True)
    run_tool("mount", "-t", "tmpfs", "tmpfs", root / "srv")
    try:
        with pytest.raises(RefusedError, match="mounted"):
            machine.start(settings(scratch), disks, root=str(root), is_test=True)
        machine.stop()
        assert mounts_below(root) == [f"{root}/srv"]
    finally:
        run_tool("umount", root / "srv")


def test_a_start_that_is_killed_is_undone_by_the_next(scratch: Path, disks: dict[str, str]) -> None:
    root = scratch / "root"
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from asrfs.model.boot import decode_boot
        from replica_store.boot.mounted_machine import MountedMachine
        directory, root, document, data, parted = sys.argv[1:]
        disks = {"data": data, "parted": parted}
        MountedMachine(Path(directory)).start(decode_boot(document.encode()), disks, root=root, is_test=True)
        """
    )
    waiting = settings(scratch, start=("/bin/sh", "-c", f"touch {scratch}/begun; sleep 600"))  # sleep: is killed
    words = [scratch / "m", root, encode_boot(waiting).decode(), disks["data"], disks["parted"]]
    child = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], start_new_session=True)
    try:
        wait_until(lambda: (scratch / "begun").exists(), what="the start of the command")
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert len(mounts_below(root)) == 2
    machine = MountedMachine(scratch / "m")
    machine.start(settings(scratch), disks, root=str(root), is_test=True)
    assert len(mounts_below(root)) == 2 and len(loops_over(disks)) == 2
    machine.stop()
    assert not mounts_below(root) and not loops_over(disks)
