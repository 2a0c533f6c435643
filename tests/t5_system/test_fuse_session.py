"""The direct session on the real kernel, over disks in memory: the programs that must be able to use a disk."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t5_system.machine import run_tool

SIZE = 64 << 20
SMALL = (1 << 20) + 512


@pytest.fixture
def mount(scratch: Path) -> Iterator[Path]:
    """`big.img` and `small.img` in memory; unmounted at the end, by which the server ends."""
    path = scratch / "disks"
    path.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.memory_server", str(path), f"big={SIZE}", f"small={SMALL}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield path
        run_tool("umount", path)
        assert server.wait(10) == 0


@pytest.fixture
def loop(mount: Path) -> Iterator[str]:
    device = run_tool("losetup", "--find", "--show", "--direct-io=on", mount / "big.img").strip()
    yield device
    run_tool("losetup", "--detach", device)


def test_directory_shows_the_disks_as_files_of_root(mount: Path) -> None:
    assert sorted(path.name for path in mount.iterdir()) == ["big.img", "small.img"]
    status = (mount / "small.img").stat()
    assert (status.st_size, status.st_mode, status.st_uid) == (SMALL, 0o100600, 0)
    assert mount.stat().st_mode & 0o777 == 0o700
    assert os.statvfs(mount).f_bsize == 4096


def test_cp_and_dd_with_every_kind_of_io(mount: Path, scratch: Path) -> None:
    source, disk, back = scratch / "source", mount / "small.img", scratch / "back"
    for flags in ([], ["oflag=direct"], ["conv=fsync,notrunc", "bs=1000"], ["oflag=dsync", "bs=64k"]):
        source.write_bytes(os.urandom(SMALL))
        run_tool("dd", f"if={source}", f"of={disk}", *(flags if "bs" in str(flags) else [*flags, "bs=512"]))
        run_tool("cmp", source, disk)
    source.write_bytes(os.urandom(SMALL))
    run_tool("cp", source, disk)
    run_tool("dd", f"if={disk}", f"of={back}", "bs=512", "iflag=direct")
    assert back.read_bytes() == source.read_bytes()
    run_tool("cp", "--sparse=always", disk, back)
    assert back.read_bytes() == source.read_bytes()


def test_disk_ends_like_a_block_device(mount: Path) -> None:
    fd = os.open(mount / "small.img", os.O_RDWR)
    try:
        assert os.pwrite(fd, b"x" * 4096, SMALL - 512) == 512
        with pytest.raises(OSError, match="No space left") as caught:
            os.pwrite(fd, b"x", SMALL)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(fd, 4096, SMALL - 512) == b"x" * 512
        assert os.pread(fd, 1, SMALL) == b""
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(fd, 4096)
        os.ftruncate(fd, SMALL)
    finally:
        os.close(fd)
    os.close(os.open(mount / "small.img", os.O_WRONLY | os.O_TRUNC))
    assert (mount / "small.img").stat().st_size == SMALL
    assert (mount / "small.img").read_bytes()[-512:] == b"x" * 512


def test_disks_do_not_come_or_go_by_file_operations(mount: Path) -> None:
    for attempt in (
        lambda: (mount / "big.img").unlink(),
        lambda: (mount / "big.img").rename(mount / "other.img"),
        lambda: (mount / "new.img").touch(),
        lambda: (mount / "new").mkdir(),
        lambda: (mount / "new").symlink_to("big.img"),
    ):
        with pytest.raises(PermissionError):
            attempt()


def test_mmap_reads_and_writes(mount: Path) -> None:
    fd = os.open(mount / "small.img", os.O_RDWR)
    try:
        os.pwrite(fd, b"before", 8192)
        with mmap.mmap(fd, 1 << 20, mmap.MAP_SHARED) as memory:
            assert memory[8192:8198] == b"before"
            memory[8192:8198] = b"mapped"
            memory.flush()
        assert os.pread(fd, 6, 8192) == b"mapped"
    finally:
        os.close(fd)


def test_qemu_reads_writes_discards_and_zeroes(mount: Path) -> None:
    disk = str(mount / "big.img")
    assert "virtual size: 64 MiB" in run_tool("qemu-img", "info", "-f", "raw", disk)
    commands = [
        "write -P 7 0 4M", "discard 1M 1M", "write -z 2M 64k", "aio_write -P 9 8M 1M", "aio_flush", "flush",
        "read -P 7 0 1M", "read -P 0 1M 1M", "read -P 0 2M 64k", "read -P 9 8M 1M",
    ]  # fmt: skip
    for cache in ("none", "writeback"):
        arguments = [word for command in commands for word in ("-c", command)]
        said = run_tool("qemu-io", "-f", "raw", "-t", cache, "-d", "unmap", *arguments, disk)
        assert "failed" not in said, said


def test_fallocate_of_the_shell(mount: Path) -> None:
    disk = mount / "big.img"
    disk.write_bytes(b"\xff" * (1 << 20))
    run_tool("fallocate", "--punch-hole", "--offset", "4096", "--length", "8192", disk)
    run_tool("fallocate", "--zero-range", "--offset", "65536", "--length", "4096", disk)
    run_tool("fallocate", "--length", str(SIZE), disk)
    content = disk.read_bytes()[: 1 << 20]
    expected = bytearray(b"\xff" * (1 << 20))
    expected[4096:12288] = bytes(8192)
    expected[65536:69632] = bytes(4096)
    assert content == expected


def test_loop_device_with_direct_io_verifies(loop: str) -> None:
    assert run_tool("losetup", "--noheadings", "--output", "DIO", loop).strip() == "1"
    run_tool(
        *("fio", "--name=verify", f"--filename={loop}", f"--size={SIZE}", "--rw=randrw", "--bsrange=512-256k"),
        *(
            "--bs_unaligned=0",
            "--ioengine=libaio",
            "--direct=1",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--fsync=64",
        ),
        *("--verify_fatal=1", "--blockalign=512"),
        seconds_max=60,
    )


def test_loop_device_discards(loop: str) -> None:
    queue = Path(f"/sys/block/{loop.removeprefix('/dev/')}/queue")
    assert (queue / "discard_granularity").read_text() == "4096\n"
    run_tool("dd", "if=/dev/urandom", f"of={loop}", "bs=1M", "count=4", "oflag=direct")
    run_tool("blkdiscard", "--offset", "1M", "--length", "2M", loop)
    run_tool("blkdiscard", "--zeroout", "--offset", "3M", "--length", "4096", loop)
    content = Path(loop).read_bytes()[: 4 << 20]
    assert content[1 << 20 : 3 << 20] == bytes(2 << 20)
    assert content[3 << 20 : (3 << 20) + 4096] == bytes(4096)
    assert any(content[: 1 << 20])
    assert any(content[(3 << 20) + 4096 :])


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_filesystem_on_a_loop_device(loop: str, scratch: Path, kind: str) -> None:
    if kind == "xfs":
        run_tool("mkfs.xfs", "-q", "-f", "-d", "agcount=2", "--unsupported", loop)
    else:
        run_tool("mkfs.ext4", "-q", "-F", loop)
    where = scratch / "fs"
    where.mkdir()
    run_tool("mount", loop, where)
    try:
        run_tool("cp", "-r", "/usr/include/linux", where)
        run_tool("sync", "-f", where)
        run_tool("diff", "-r", "/usr/include/linux", where / "linux")
        assert "trimmed" in run_tool("fstrim", "--verbose", where)
    finally:
        run_tool("umount", where)
    if kind == "xfs":
        run_tool("xfs_repair", "-n", loop)
    else:
        run_tool("e2fsck", "-fn", loop)
