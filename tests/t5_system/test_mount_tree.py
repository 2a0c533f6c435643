"""The tree of recovery points on the real kernel: what it lists, what it resolves, and every byte it gives (I9)."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.quantities import format_time
from replica_store.points.mount import check_mount_point
from tests.fakes.memory_history import MemoryHistory
from tests.t5_system.mount_program import DISKS, SLOW_DISK, make_history

pytestmark = pytest.mark.timeout(60)
END_SECONDS_MAX = 15.0


@dataclass(repr=False)
class Tree:
    """Mounts of one history, each by a process of its own."""

    scratch: Path
    history: MemoryHistory
    seed: int
    programs: list[subprocess.Popen[str]]

    @property
    def shown(self) -> Path:
        return self.scratch / "shown"

    def show(self, lsn: int) -> None:
        """Let the store have received the history up to `lsn`."""
        fresh = self.scratch / "shown.new"
        fresh.write_text(str(lsn))
        fresh.rename(self.shown)

    def mount(self, name: str) -> Path:
        """Mount and wait for `ready`; returns the machine's directory."""
        directory = self.scratch / name
        directory.mkdir()
        with (self.scratch / f"{name}.err").open("w") as errors:
            program = subprocess.Popen(
                [sys.executable, "-m", "tests.t5_system.mount_program", directory, self.shown, str(self.seed)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.programs.append(program)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n", (self.scratch / f"{name}.err").read_text()
        return directory / self.history.name

    def end(self, number: int = -1, by: signal.Signals = signal.SIGTERM) -> int:
        """Ask a program to end; its exit code."""
        self.programs[number].send_signal(by)
        return self.programs[number].wait(END_SECONDS_MAX)


@pytest.fixture
def tree(scratch: Path, rng: random.Random) -> Iterator[Tree]:
    seed = rng.randrange(1 << 30)
    history = make_history(seed)
    tree = Tree(scratch, history, seed, [])
    tree.show(history.lsn)
    yield tree
    for program in tree.programs:
        if program.poll() is None:
            program.terminate()
            assert program.wait(END_SECONDS_MAX) == 0
        assert program.stdout is not None
        program.stdout.close()


def test_listing_shows_machines_points_and_disks(tree: Tree) -> None:
    machine = tree.mount("tree")
    history = tree.history
    points = history.points(history.id)
    assert os.listdir(machine.parent) == [history.name]
    assert sorted(os.listdir(machine)) == sorted({p.id for p in points} | {p.name for p in points if p.name})
    for point in points[:3]:
        directory = machine / point.id
        assert sorted(os.listdir(directory)) == sorted(f"{name}.img" for name in DISKS)
        status = os.stat(directory / "data.img")
        assert stat.S_IMODE(status.st_mode) == 0o400
        assert (status.st_size, status.st_mtime_ns) == (DISKS["data"], point.time_ns)
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o500
    assert stat.S_IMODE(os.stat(machine.parent).st_mode) == 0o500
    assert not list((machine / "lsn:1").glob("data*")), "the second disk does not exist before its record"


def test_i9_points_lsns_and_times_read_as_the_model(tree: Tree, rng: random.Random) -> None:
    machine = tree.mount("tree")
    history = tree.history
    points = history.points(history.id)
    newest = {point.name: point for point in points}
    places = {point.id: point.lsn for point in points} | {str(name): p.lsn for name, p in newest.items()}
    for lsn in rng.sample(range(2, history.lsn), 8):
        places |= {f"lsn:{lsn}": lsn, f"time:{format_time(history.time_at(lsn))}": lsn, f"before-lsn:{lsn}": lsn}
    for place, lsn in places.items():
        for slot, name in enumerate(DISKS):
            assert (machine / place / f"{name}.img").read_bytes() == history.state_at(lsn)[slot], place


def test_names_that_mean_nothing_are_not_there(tree: Tree) -> None:
    machine = tree.mount("tree")
    last = tree.history.lsn
    for name in (
        "nothing", "f" * 32, "lsn:0", f"lsn:{last + 1}", "lsn:x", "time:yesterday", "time:1999-01-01T00:00:00Z",
        "latest-application", "%2F", "x" * 200,
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError):
            os.stat(machine / name)
    for name in ("../nobody", "latest/nothing.img", "latest/root", "latest/.img", "lsn:1/data.img"):
        with pytest.raises(FileNotFoundError):
            os.stat(machine / name)


def test_points_appear_as_they_come(tree: Tree) -> None:
    history = tree.history
    first, second = history.points(history.id)[:2]
    tree.show(first.lsn)
    machine = tree.mount("tree")
    assert (machine / first.id).is_dir()
    assert second.id not in os.listdir(machine)
    for name in (second.id, f"lsn:{second.lsn}"):
        assert not (machine / name).exists(), "asked before it is there, which must not be remembered"
    assert (machine / "latest" / "root.img").read_bytes() == history.state_at(first.lsn)[0]
    tree.show(history.lsn)
    for name in (second.id, f"lsn:{second.lsn}"):
        assert (machine / name / "root.img").read_bytes() == history.state_at(second.lsn)[0]
    assert second.id in os.listdir(machine)


def test_nothing_can_be_changed(tree: Tree) -> None:
    machine = tree.mount("tree")
    image = machine / "latest" / "root.img"
    for call in (
        lambda: os.open(image, os.O_RDWR),
        lambda: os.open(image, os.O_WRONLY | os.O_TRUNC),
        lambda: os.open(machine / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.truncate(image, 0),
        lambda: os.unlink(image),
        lambda: os.rename(image, machine / "x"),
        lambda: os.mkdir(machine / "x"),
        lambda: os.rmdir(machine / "latest"),
        lambda: os.chmod(image, 0o600),
        lambda: os.utime(image),
        lambda: os.symlink("x", machine / "x"),
        lambda: os.link(image, machine / "x"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS


def test_i9_many_disks_open_at_once_in_several_mounts(tree: Tree, rng: random.Random) -> None:
    history = tree.history
    machines = [tree.mount(f"tree{i}") for i in range(3)]
    lsns = rng.sample(range(2, history.lsn), 6)

    contents = {lsn: history.state_at(lsn)[0] for lsn in lsns}  # the model is one thread's

    def read(machine: Path, lsn: int, seed: int) -> int:
        own, content = random.Random(seed), contents[lsn]
        fd = os.open(machine / f"lsn:{lsn}" / "root.img", os.O_RDONLY)
        try:
            for _ in range(40):
                at, length = own.randrange(len(content)), own.choice((1, 512, 4096, 131072, 1 << 20, 4 << 20))
                assert os.pread(fd, length, at) == content[at : at + length]
            assert os.pread(fd, 1, len(content)) == b""
        finally:
            os.close(fd)
        return 1

    with ThreadPoolExecutor(12) as pool:
        runs = [pool.submit(read, m, lsn, rng.randrange(1 << 30)) for m in machines for lsn in lsns]
        assert sum(run.result(timeout=40) for run in runs) == len(runs)


def test_a_loop_device_reads_it(tree: Tree) -> None:
    image = tree.mount("tree") / "latest" / "root.img"
    done = subprocess.run(
        ["losetup", "--read-only", "--find", "--show", image], capture_output=True, text=True, timeout=20, check=True
    )
    loop = done.stdout.strip()
    try:
        assert Path(loop).read_bytes() == tree.history.state_at(tree.history.lsn)[0]
    finally:
        subprocess.run(["losetup", "--detach", loop], timeout=20, check=True)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_even_with_files_open(tree: Tree, by: signal.Signals) -> None:
    machine = tree.mount("tree")
    fd = os.open(machine / "latest" / "root.img", os.O_RDONLY)
    try:
        assert tree.end(by=by) == 0
        assert not os.path.ismount(machine.parent)
        assert os.listdir(machine.parent) == []
        with pytest.raises(OSError, match="not connected"):
            os.pread(fd, 1, 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert tree.mount("again").is_dir()


def test_a_read_that_never_returns_does_not_keep_the_mount(tree: Tree) -> None:
    machine = tree.mount("tree")
    reader = subprocess.Popen(
        ["cat", machine / "latest" / f"{SLOW_DISK}.img"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # The program says that the read has reached it: the kernel's stack of the reader need not name FUSE while it waits.
    assert tree.programs[-1].stdout.readline() == "slow\n"  # type: ignore[union-attr]
    assert reader.poll() is None, "it waits"
    assert tree.end() == 0
    assert reader.wait(END_SECONDS_MAX) == 1, "it got an error"
    assert not os.path.ismount(machine.parent)


def test_unmounting_ends_the_program(tree: Tree) -> None:
    machine = tree.mount("tree")
    subprocess.run(["umount", machine.parent], timeout=20, check=True)
    assert tree.programs[0].wait(END_SECONDS_MAX) == 0


def test_where_it_cannot_be_mounted(tree: Tree) -> None:
    mounted = tree.mount("tree").parent
    with pytest.raises(RefusedError, match="mounted on"):
        check_mount_point(mounted)
    with pytest.raises(NotFoundError):
        check_mount_point(tree.scratch / "nowhere")
    with pytest.raises(BadInputError):
        check_mount_point(tree.shown)
    with pytest.raises(RefusedError, match="not empty"):
        check_mount_point(tree.scratch)
    tree.programs[0].kill()
    tree.programs[0].wait(END_SECONDS_MAX)
    with pytest.raises(RefusedError, match="umount"):
        check_mount_point(mounted)
    subprocess.run(["umount", mounted], timeout=20, check=True)
    check_mount_point(mounted)
