"""Exports to a real filesystem: whole or not there, and never over something that is not a plain file."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import AsrfsError, IntegrityError, NoSpaceError, NotFoundError, RefusedError
from replica_store.points import exporter
from replica_store.points.builder import open_disks, resolve
from replica_store.points.exporter import Exported, export_disk, export_disks
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from tests.fakes.memory_history import MemoryHistory, random_history

SIZE = 300 * 4096 + 1536


@pytest.fixture
def history(rng: random.Random) -> MemoryHistory:
    return random_history(rng.randrange(1 << 30), records=300, disks={"root": SIZE, "data": 4096})


@pytest.fixture
def disk(history: MemoryHistory) -> PointDisk:
    return open_disks(history, resolve(history, "web1", "latest"), ["root"], FrameCache(history))["root"]


@pytest.fixture
def content(history: MemoryHistory) -> bytes:
    return history.state_at(history.lsn)[0]


def test_i9_qcow2_holds_the_same_bytes(disk: PointDisk, content: bytes, scratch: Path) -> None:
    raw, qcow2 = scratch / "disk.img", scratch / "disk.qcow2"
    done = export_disks({raw: disk})
    assert raw.read_bytes() == content
    assert done[raw].size_bytes == SIZE
    export_disk(disk, qcow2, format_name="qcow2")
    assert sorted(os.listdir(scratch)) == ["disk.img", "disk.qcow2"]
    assert qcow2.read_bytes()[:4] == b"QFI\xfb"
    compared = subprocess.run(["qemu-img", "compare", raw, qcow2], capture_output=True, text=True, timeout=60)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert {path.stat().st_mode & 0o777 for path in (raw, qcow2)} == {0o600}, "what was private stays so"


def test_progress_reaches_the_whole(disk: PointDisk, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_WINDOW_BYTES", 16 * 4096)
    seen: list[tuple[int, int]] = []
    export_disk(disk, scratch / "x", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (disk.state.layers.bytes_max,) * 2


def test_a_large_disk_without_content_is_one_hole(scratch: Path) -> None:
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.write(0, 0, bytes(4096))
    history.seal()
    frames = FrameCache(history)
    state = open_disks(history, resolve(history, "web1", "latest"), ["root"], frames)["root"].state
    large = DiskState(msgspec.structs.replace(state.disk, size_bytes=1 << 40), 2, state.runs, history, history.id)
    assert export_disk(PointDisk(large, frames), scratch / "x") == Exported(1 << 40, 0)
    assert (scratch / "x").stat().st_blocks == 0


@pytest.mark.parametrize("force", [False, True])
def test_what_is_there_is_not_replaced_unasked(disk: PointDisk, content: bytes, scratch: Path, force: bool) -> None:
    output = scratch / "x"
    output.write_text("old")
    if force:
        export_disk(disk, output, force=True)
        assert output.read_bytes() == content
    else:
        with pytest.raises(RefusedError, match="--force"):
            export_disk(disk, output)
        assert output.read_text() == "old"
    assert os.listdir(scratch) == ["x"]


def test_a_file_that_appears_meanwhile_is_not_replaced(disk: PointDisk, scratch: Path) -> None:
    output = scratch / "x"

    def appear(done: int, total: int) -> None:
        output.write_text("mine")

    with pytest.raises(RefusedError):
        export_disk(disk, output, progress=appear)
    assert output.read_text() == "mine"
    assert os.listdir(scratch) == ["x"]


def test_only_plain_files_are_replaced(disk: PointDisk, scratch: Path) -> None:
    (scratch / "directory").mkdir()
    os.mkfifo(scratch / "fifo")
    for name in ("directory", "fifo", "/dev/null", "directory/.", "directory/.."):
        with pytest.raises(RefusedError):
            export_disk(disk, scratch / name, force=True)
    (scratch / "target").write_text("kept")
    (scratch / "link").symlink_to("target")
    export_disk(disk, scratch / "link", force=True)
    assert (scratch / "target").read_text() == "kept"
    assert not (scratch / "link").is_symlink()


def test_no_directory_to_write_to(disk: PointDisk, scratch: Path) -> None:
    with pytest.raises(NotFoundError, match="make it first"):
        export_disk(disk, scratch / "nowhere" / "x")
    (scratch / "file").write_text("")
    with pytest.raises(NotFoundError):
        export_disk(disk, scratch / "file" / "x")
    assert os.listdir(scratch) == ["file"]


def test_without_qemu_img_it_says_what_to_install(
    disk: PointDisk, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(AsrfsError, match="qemu-utils"):
        export_disk(disk, scratch / "x", format_name="qcow2")
    fake = scratch / "qemu-img"
    fake.write_text("#!/bin/sh\necho 'qemu-img: it is\nbroken' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(AsrfsError, match="it is broken"):
        export_disk(disk, scratch / "x", format_name="qcow2")
    assert os.listdir(scratch) == ["qemu-img"]


def test_a_damaged_object_leaves_nothing(history: MemoryHistory, disk: PointDisk, scratch: Path) -> None:
    for row in history.objects_of(history.id, history.lsn):
        header, _, table = history.object_head(row)
        for i in range(header.frame_count):
            history.damage(row, table.extent(i)[0])
    with pytest.raises(IntegrityError, match="LSN"):
        export_disk(disk, scratch / "x", force=True)
    assert os.listdir(scratch) == []


@pytest.fixture
def small_filesystem(scratch: Path) -> Iterator[Path]:
    mounted = scratch / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mounted], check=True, timeout=20)
    yield mounted
    subprocess.run(["umount", mounted], check=True, timeout=20)


def test_a_full_filesystem_leaves_nothing(small_filesystem: Path, disk: PointDisk) -> None:
    (small_filesystem / "x").write_text("old")
    with pytest.raises(NoSpaceError, match="full"):
        export_disk(disk, small_filesystem / "x", force=True)
    assert os.listdir(small_filesystem) == ["x"]
    assert (small_filesystem / "x").read_text() == "old"


def test_interrupted_it_leaves_nothing(disk: PointDisk, scratch: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    calls: list[Callable[[], object]] = [
        lambda: export_disk(disk, scratch / "x", progress=interrupt),
        lambda: export_disk(disk, scratch / "x", format_name="qcow2", progress=interrupt),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            call()
        assert os.listdir(scratch) == []
