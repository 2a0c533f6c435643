"""A machine that goes on from a recovery point, on the real kernel: disks that can be used at once and are hydrated.

The oracle is the base with what was written over it, byte for byte (I9), whoever is killed meanwhile.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from ctypes import CDLL, c_int, c_int64, get_errno
from pathlib import Path
from typing import Any

import pytest

from asrfs.model.recovered import RecoveredDisk, RecoveredMachine, encode_recovered
from asrfs.storage.directory import open_path
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.mount_program import DISKS, make_history
from tests.t5_system.test_full_disks import SmallFilesystem
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(120)
BLOCK = 4096
MIB = 1 << 20
HYDRATION_S_MAX = 60.0
_PUNCH = 0x02 | 0x01
_libc = CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)


@pytest.fixture
def host(scratch: Path) -> Iterator[HostUnderTest]:
    host = HostUnderTest(scratch, name="db1")
    yield host
    host.close()


def recover(host: HostUnderTest, base: Path, size_bytes: int, *, hydration: str = "on") -> None:
    """Make the machine of one disk `data` over `base`."""
    disk = RecoveredDisk(slot=1, id="d" * 32, name="data", size_bytes=size_bytes, base=str(base))
    machine = RecoveredMachine(machine_id="a" * 32, name="db1", epoch=2, lsn=700, time_ns=10**18, disks=(disk,))
    (host.root / "db1.json").write_bytes(encode_recovered(machine))
    host.asrfs("init", "db1", "--recovered", host.root / "db1.json")
    host.asrfs("set", f"hydration={hydration}")


def hydration_of(host: HostUnderTest) -> dict[str, Any] | None:
    found: dict[str, Any] | None = host.asrfs("status")["disks"][0]["hydration"]
    return found


def wait_hydrated(host: HostUnderTest) -> None:
    wait_until(lambda: hydration_of(host) is None, HYDRATION_S_MAX, what="the end of hydration")
    assert host.state.load_machine().disk("data").base is None


class Guest:
    """Writes to the disk as a guest would, and to what it must be."""

    def __init__(self, host: HostUnderTest, content: bytes | bytearray, rng: random.Random) -> None:
        self.path = host.mount / "data.img"
        self.content = bytearray(content)
        self._rng = rng

    def change(self, count: int) -> None:
        """Whole blocks, shares of blocks, discards."""
        fd = os.open(self.path, os.O_RDWR)
        size = len(self.content)
        try:
            for _ in range(count):
                length = self._rng.choice((512, BLOCK, 8 * BLOCK, self._rng.randint(1, 3 * BLOCK)))
                offset = self._rng.randrange(size - length)
                if self._rng.random() < 0.5:
                    offset -= offset % BLOCK
                if self._rng.random() < 0.2:
                    punch(fd, offset, length)
                    self.content[offset : offset + length] = bytes(length)
                else:
                    piece = self._rng.randbytes(length)
                    assert os.pwrite(fd, piece, offset) == length
                    self.content[offset : offset + length] = piece
            os.fsync(fd)
        finally:
            os.close(fd)

    def check(self) -> None:
        assert self.path.read_bytes() == self.content, "I9: the disk is not its base with what was written"


def punch(fd: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, _PUNCH, offset, length):
        raise OSError(get_errno(), os.strerror(get_errno()))


def scattered(path: Path, size_bytes: int, rng: random.Random, *, runs: int = 30, run_blocks: int = 64) -> bytes:
    """A sparse file with some content; its bytes."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for _ in range(runs):
            length = rng.randint(1, run_blocks) * BLOCK
            file.seek(rng.randrange((size_bytes - length) // BLOCK) * BLOCK)
            file.write(rng.randbytes(length))
    return path.read_bytes() if size_bytes <= 256 * MIB else b""


def test_i9_writes_and_kills_while_it_is_hydrated(host: HostUnderTest, scratch: Path, rng: random.Random) -> None:
    size_bytes = 32 * MIB + 1536
    content = scattered(scratch / "base", size_bytes, rng, runs=60, run_blocks=256)
    recover(host, scratch / "base", size_bytes, hydration="off")
    host.asrfs("set", "hydration_limit=1M")
    host.serve()
    guest = Guest(host, content, rng)
    guest.check()
    guest.change(100)
    guest.check()
    shown = host.asrfs("status")
    assert shown["state"] == "recovered"
    assert "LSN 700" in shown["reason"]
    host.asrfs("set", "hydration=on")
    for round in range(4):
        wait_until(lambda: (hydration_of(host) or {}).get("state") in (None, "running"), what="hydration")
        if round == 3:
            host.kill("supervisor")
            for role in ("agent", "disk_server"):
                if host.pid(role):  # type: ignore[arg-type]
                    host.kill(role)  # type: ignore[arg-type]
            host.serve()
        else:
            killed = host.kill(("agent", "disk_server")[round % 2])  # type: ignore[arg-type]
            host.wait_for_next(("agent", "disk_server")[round % 2], killed)  # type: ignore[arg-type]
        guest.change(50)
        guest.check()
    assert host.state.load_machine().disk("data").base is not None, "it was over before anybody was killed"
    host.asrfs("set", "hydration_limit=none")
    while hydration_of(host) is not None:
        guest.change(20)
        guest.check()
    (scratch / "base").unlink()
    guest.change(50)
    guest.check()
    host.kill("disk_server")
    guest.check()
    assert host.stop() == 0
    assert host.image("data").read_bytes() == guest.content


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_filesystem_of_the_base_is_used_at_once(
    host: HostUnderTest, scratch: Path, rng: random.Random, kind: str
) -> None:
    base, where = scratch / "base", scratch / "fs"
    where.mkdir()
    with base.open("wb") as file:
        file.truncate(320 * MIB)
    run_tool(f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else []), base)
    run_tool("mount", "-o", "loop", base, where)
    kept = {f"file{i}": rng.randbytes(rng.randint(1, 300_000)) for i in range(40)}
    for name, piece in kept.items():
        (where / name).write_bytes(piece)
    run_tool("umount", where)
    recover(host, base, 320 * MIB)
    host.asrfs("set", "hydration_limit=4M")
    host.serve()
    host.asrfs("attach", "data", "--on", where)
    for name, piece in kept.items():
        assert (where / name).read_bytes() == piece
    for i in range(20):
        kept[f"file{2 * i}"] = rng.randbytes(50_000)
        (where / f"file{2 * i}").write_bytes(kept[f"file{2 * i}"])
    host.kill("disk_server")
    host.kill("agent")
    run_tool("sync", "-f", where)
    host.asrfs("set", "hydration_limit=none")
    wait_hydrated(host)
    base.unlink()
    run_tool("umount", where)
    loop = run_tool("losetup", "-j", host.mount / "data.img").split(":")[0]
    run_tool(*(["e2fsck", "-f", "-n"] if kind == "ext4" else ["xfs_repair", "-n"]), loop)
    run_tool("mount", loop, where)
    for name, piece in kept.items():
        assert (where / name).read_bytes() == piece
    run_tool("umount", where)
    host.asrfs("detach", "data")


class PointsTree:
    """The tree of recovery points, mounted by a process of its own; `base` is a disk in it."""

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self._scratch = scratch
        self._seed = rng.randrange(1 << 30)
        self.history = make_history(self._seed)
        (scratch / "points").mkdir()
        (scratch / "shown").write_text(str(self.history.lsn))
        self.lsn = self.history.lsn - 2
        self.base = scratch / "points" / self.history.name / f"lsn:{self.lsn}" / "root.img"
        self._program: subprocess.Popen[str] | None = None

    def mount(self) -> None:
        words = ["-m", "tests.t5_system.mount_program", self._scratch / "points", self._scratch / "shown"]
        self._program = subprocess.Popen(
            [sys.executable, *map(str, words), str(self._seed)], stdout=subprocess.PIPE, text=True
        )
        assert self._program.stdout is not None
        assert self._program.stdout.readline() == "ready\n"

    def end(self) -> None:
        if self._program is not None:
            self._program.terminate()
            assert self._program.wait(20) == 0
            self._program.stdout.close()  # type: ignore[union-attr]
            self._program = None


@pytest.fixture
def tree(scratch: Path, rng: random.Random) -> Iterator[PointsTree]:
    tree = PointsTree(scratch, rng)
    tree.mount()
    yield tree
    tree.end()


def test_base_in_the_tree_of_points_that_goes_and_comes(
    host: HostUnderTest, tree: PointsTree, rng: random.Random
) -> None:
    size_bytes = DISKS["root"]
    content = bytes(tree.history.state_at(tree.lsn)[0])
    recover(host, tree.base, size_bytes, hydration="off")
    host.serve()
    guest = Guest(host, content, rng)
    with guest.path.open("rb") as file:
        assert file.read(10 * BLOCK) == content[: 10 * BLOCK]
    tree.end()
    here, there = 300 * BLOCK, 700 * BLOCK  # what was read, or read ahead, the kernel has
    fd = os.open(guest.path, os.O_RDWR)
    try:
        piece = rng.randbytes(BLOCK)
        assert os.pwrite(fd, piece, here) == BLOCK
        guest.content[here : here + BLOCK] = piece
        assert os.pread(fd, BLOCK, here) == piece
        places = range(there, size_bytes - BLOCK, BLOCK)
        absent = next(at for at in places if guest.content[at : at + BLOCK] == content[at : at + BLOCK])
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.pread(fd, BLOCK, absent)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError, match="Input/output error"):
                os.pwrite(fd, b"x" * 512, absent + 512)
        os.fsync(fd)
    finally:
        os.close(fd)
    wait_until(lambda: host.asrfs("status")["lsn"]["applied"] == host.asrfs("status")["lsn"]["durable"], what="applied")
    host.asrfs("set", "hydration=on")
    wait_until(lambda: "hydration" in {each["id"] for each in host.asrfs("status")["alarms"]}, what="the alarm")
    tree.mount()
    guest.check()
    wait_hydrated(host)
    assert not host.asrfs("status")["alarms"]
    tree.end()
    guest.change(20)
    guest.check()


def test_points_say_where_their_content_is(tree: PointsTree) -> None:
    from asrfs.storage.content import content_of

    content = bytes(tree.history.state_at(tree.lsn)[0])
    file = open_path(str(tree.base))
    try:
        said = list(content_of(file))
        assert next(content_of(file, said[0][0] + 100)) == (said[0][0] + 100, said[0][1] - 100)
    finally:
        file.close()
    rest = bytearray(content)
    for offset, length in said:
        rest[offset : offset + length] = bytes(length)
    assert not any(rest), "content where none was said to be"
    assert sum(length for _, length in said) < len(content)


def test_terabyte_with_little_in_it_is_there_at_once(host: HostUnderTest, scratch: Path, rng: random.Random) -> None:
    base = scratch / "base"
    scattered(base, 1 << 40, rng, runs=200, run_blocks=16)
    has = next(iter(open_extents(base)))[0]
    recover(host, base, 1 << 40)
    started = time.monotonic()
    host.serve()
    fd = os.open(host.mount / "data.img", os.O_RDWR)
    try:
        with base.open("rb") as file:
            file.seek(has)
            assert os.pread(fd, BLOCK, has) == file.read(BLOCK)
        assert time.monotonic() - started < 5
        wait_until(lambda: host.state.load_machine().disk("data").base is None, HYDRATION_S_MAX, what="hydration")
        assert os.stat(host.image("data")).st_blocks * 512 < 64 * MIB
    finally:
        os.close(fd)


def open_extents(path: Path) -> list[tuple[int, int]]:
    file = open_path(str(path))
    try:
        return list(file.data_extents())
    finally:
        file.close()


def test_discard_of_a_terabyte_while_it_has_a_base(host: HostUnderTest, scratch: Path, rng: random.Random) -> None:
    base = scratch / "base"
    scattered(base, 1 << 40, rng, runs=50, run_blocks=16)
    extents = open_extents(base)
    recover(host, base, 1 << 40, hydration="off")
    host.serve()
    wait_until(lambda: (hydration_of(host) or {}).get("bytes_total", 1 << 40) < 1 << 30, what="the survey")
    fd = os.open(host.mount / "data.img", os.O_RDWR)
    try:
        punch(fd, 0, 1 << 40)
        os.fsync(fd)
        for _ in range(2):
            for offset, length in extents:
                assert not any(os.pread(fd, length, offset)), "what was discarded is zeros"
            wait_until(lambda: host.asrfs("status")["lsn"]["applied"] >= 702, what="applied")
        host.asrfs("set", "hydration=on")
        wait_hydrated(host)
        assert os.stat(host.image("data")).st_blocks * 512 < 64 * MIB
        for offset, length in extents:
            assert not any(os.pread(fd, length, offset))
    finally:
        os.close(fd)


def test_i8_too_little_space_lets_hydration_wait_and_writes_go_on(scratch: Path, rng: random.Random) -> None:
    base, size_bytes = scratch / "base", 256 * MIB
    with base.open("wb") as file:
        for i in range(256):
            file.write(i.to_bytes(4, "big") * (MIB // 4))
    small = SmallFilesystem(scratch / "small", 720 * MIB)
    try:
        small.fill(spare_bytes=380 * MIB)
        host = HostUnderTest(small.path, name="db1")
        try:
            recover(host, base, size_bytes)
            host.serve()
            wait_until(
                lambda: (hydration_of(host) or {}).get("state") == "space",
                HYDRATION_S_MAX,
                what="hydration waiting for space",
            )
            alarms = {each["id"]: each for each in host.asrfs("status")["alarms"]}
            assert alarms["hydration"]["severity"] == "warning"
            guest = Guest(host, base.read_bytes(), rng)
            guest.change(200)
            guest.check()
            small.make_space()
            wait_hydrated(host)
            guest.change(50)
            guest.check()
            assert "hydration" not in {each["id"] for each in host.asrfs("status")["alarms"]}
        finally:
            host.close()
    finally:
        small.make_space()
        small.close()
