"""Which filesystems are found, which are refused, and a watchdog that thaws whoever dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrfs.consistency.filesystems import Kernel, MountedFilesystem, parse_mount
from asrfs.consistency.freezing import open_filesystems
from asrfs.consistency.own_files import file_of_ours, program_of_ours
from asrfs.consistency.watchdog import FREEZE, THAWED, Watchdog
from asrfs.errors import RefusedError
from asrfs.storage.system_clock import SystemClock
from tests.waiting import wait_until


class FakeKernel:
    """/sys and /proc below a scratch directory."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "sys", root / "proc"
        (self.sys / "block").mkdir(parents=True)
        self.proc.mkdir()
        self.kernel = Kernel(self.sys, self.proc)

    def block(self, name: str, device: str, *, file: str | None = None, holders: tuple[str, ...] = ()) -> None:
        """A device, or a partition `disk/part`."""
        entry = self.sys / "block" / name
        (entry / "holders").mkdir(parents=True)
        (entry / "dev").write_text(f"{device}\n")
        for holder in holders:
            (entry / "holders" / holder).touch()
        if file is not None:
            (entry / "loop").mkdir()
            (entry / "loop/backing_file").write_bytes(os.fsencode(f"{file}\n"))

    def process(self, pid: str, mounts: list[str], words: tuple[str, ...] = ("init",), namespace: str = "1") -> None:
        entry = self.proc / pid
        (entry / "ns").mkdir(parents=True)
        (entry / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
        (entry / "mountinfo").write_bytes(os.fsencode("".join(f"{line}\n" for line in mounts)))
        (entry / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
        for kind in ("fd", "fdinfo"):
            (entry / kind).mkdir()

    def opened(self, pid: str, fd: str, path: str, mount_id: int) -> None:
        (self.proc / pid / "fd" / fd).symlink_to(path)
        (self.proc / pid / "fdinfo" / fd).write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mount_id}\n")


def mount(number: int, device: str, directory: str, kind: str = "ext4", source: str = "/dev/x") -> str:
    return f"{number} 1 {device} / {directory} rw,relatime shared:1 - {kind} {source} rw"


ROOT = mount(1, "253:0", "/", "ext4", "/dev/vda")


@pytest.fixture
def fake(scratch: Path) -> FakeKernel:
    return FakeKernel(scratch)


def names(fake: FakeKernel, directory: str = "/disks") -> list[tuple[str, int]]:
    return [(each.mounts[0].directory, each.level) for each in fake.kernel.filesystems_on(directory)]


def test_loop_devices_partitions_offsets_and_stacks_are_found_and_no_others(fake: FakeKernel) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.block("loop1", "7:1", file="/disks/data.img")
    fake.block("loop1/loop1p1", "259:0")
    fake.block("loop1/loop1p2", "259:1", holders=("dm-0",))
    fake.block("loop2", "7:2", file="/elsewhere/root.img")
    fake.block("loop3", "7:3", file="/disks/root.img", holders=("md0",))  # at an offset
    fake.block("loop4", "7:4", file="/disks2/root.img")
    fake.block("dm-0", "252:0")
    fake.block("md0", "9:0")
    lines = [ROOT, mount(2, "7:0", "/a"), mount(3, "259:0", "/b"), mount(4, "252:0", "/c", "xfs")]
    lines += [mount(5, "7:2", "/not-ours"), mount(6, "9:0", "/d"), mount(7, "7:4", "/nor-this"), mount(8, "7:0", "/a2")]
    fake.process("self", lines)
    assert sorted(names(fake)) == [("/a", 0), ("/b", 0), ("/c", 0), ("/d", 0)]
    (first,) = (each for each in fake.kernel.filesystems_on("/disks") if each.device == "7:0")
    assert [each.directory for each in first.mounts] == ["/a", "/a2"], "one filesystem, wherever it is mounted"


def test_filesystems_in_files_of_filesystems_come_first(fake: FakeKernel) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.block("loop1", "7:1", file="/vm/images/inner.img")
    fake.block("loop2", "7:2", file="/inner/most.img")
    fake.block("loop3", "7:3", file="/vm2/other.img")
    lines = [ROOT, mount(2, "7:0", "/vm"), mount(3, "7:1", "/inner"), mount(4, "7:2", "/most"), mount(5, "7:3", "/no")]
    fake.process("self", lines)
    assert names(fake) == [("/most", 2), ("/inner", 1), ("/vm", 0)]


def test_all_that_stands_on_the_disks_of_a_mount_is_known_by_its_number(fake: FakeKernel) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img", holders=("dm-0",))
    fake.block("loop0/loop0p1", "259:0")
    fake.block("loop1", "7:1", file="/vm/inner.img")
    fake.block("loop2", "7:2", file="/elsewhere/root.img")
    fake.block("dm-0", "252:0")
    fake.process("self", [ROOT, mount(2, "252:0", "/vm"), mount(3, "7:1", "/inner"), mount(4, "7:2", "/no")])
    assert fake.kernel.devices_on("/disks") == {"7:0", "259:0", "252:0", "7:1"}


def test_btrfs_is_found_by_any_of_its_members(fake: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.block("loop9", "7:9", file="/elsewhere")
    devices = fake.sys / "fs/btrfs/uuid/devices"
    for name, number in (("loop0", "7:0"), ("loop9", "7:9")):
        (devices / name).mkdir(parents=True)
        (devices / name / "dev").write_text(number)
    monkeypatch.setattr("asrfs.consistency.filesystems.device_of", {"/dev/loop9": "7:9"}.get)
    fake.process("self", [ROOT, mount(2, "0:50", "/pool", "btrfs", "/dev/loop9"), mount(3, "0:51", "/tmp", "tmpfs")])
    assert names(fake) == [("/pool", 0)]


def test_mounts_of_containers_count(fake: FakeKernel) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.process("self", [ROOT])
    fake.process("1", [ROOT])
    fake.process("77", [ROOT, mount(9, "7:0", "/srv")], namespace="2")
    (found,) = fake.kernel.filesystems_on("/disks")
    assert found.mounts[0].path == f"{fake.proc}/77/root/srv"


def test_names_with_odd_characters_are_read_as_they_are() -> None:
    found = parse_mount(mount(5, "7:0", "/a\\040b\\134c", source="/dev/x\\011y"))
    assert (found.directory, found.source) == ("/a b\\c", "/dev/x\ty")


def test_places_of_others_that_are_no_text_or_look_like_the_end_of_a_line_disturb_nothing(fake: FakeKernel) -> None:
    """Whoever may mount anything, in a container or through FUSE, chooses the name."""
    odd = [os.fsdecode(name) for name in (b"/\xff\xfe", "/a\u2028b".encode(), "/a\x85b".encode(), b"/a\rb\x0cc\x1cd")]
    fake.block("loop0", "7:0", file="/disks/root.img")
    for number, name in enumerate(odd, 1):
        fake.block(f"loop{number}", f"7:{number}", file=f"{name}/file")
    elsewhere = [mount(20 + number, f"0:{20 + number}", name) for number, name in enumerate(odd)]
    fake.process("self", [ROOT, *elsewhere, mount(5, "7:0", odd[0])])
    fake.process("77", elsewhere, namespace="2")
    assert names(fake) == [(odd[0], 0)]


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_a_filesystem_with_files_of_this_project_is_refused_by_name(fake: FakeKernel) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.process("self", [ROOT, mount(2, "7:0", "/srv")])
    fake.process("50", [], ("/usr/bin/python3", "-m", "replica_store.cli.main", "--vault", "/srv/v", "serve"))
    fake.process("51", [], ("/usr/bin/python3", "-m", "http.server"))
    found = fake.kernel.filesystems_on("/disks")
    fake.opened("51", "3", "/srv/log", 2)
    fake.opened("50", "3", "/var/log/x", 1)
    assert file_of_ours(fake.kernel, found, []) is None, "others' files do not matter, ours elsewhere neither"
    fake.opened("50", "4", "/srv/v/catalog.sqlite3", 2)
    why = str(file_of_ours(fake.kernel, found, []))
    assert "/srv (ext4) holds /srv/v/catalog.sqlite3" in why and "process 50" in why


def test_the_machines_own_directories_are_looked_at_by_where_they_really_lie(scratch: Path) -> None:
    kernel = Kernel()
    (scratch / "state").mkdir()
    fd = os.open(scratch, os.O_RDONLY)
    (mounted,) = (each for each in kernel.mounts() if each.id == kernel.mount_id_of("self", str(fd)))
    os.close(fd)
    found = [MountedFilesystem(mounted.device, mounted.kind, 0, [mounted])]
    said = str(file_of_ours(kernel, found, [("journal", str(scratch / "state"))]))
    assert "holds the journal of this machine" in said and str(scratch) in said
    (scratch / "proc").mkdir()
    assert file_of_ours(Kernel(proc=scratch / "proc"), found, [("journal", str(scratch / "nowhere"))]) is None


@pytest.mark.parametrize(
    ("words", "is_ours"),
    [
        (("/usr/bin/python3", "-m", "asrfs.daemon.agent", "--state", "/x"), True),
        (("/opt/venv/bin/python", "/opt/venv/bin/asrfs", "serve", "--mount", "/x"), True),
        (("python", "/usr/bin/replica-store", "--vault", "/x", "serve"), True),
        (("python", "/usr/bin/asrfs", "point", "create"), False),
        (("vi", "asrfs.daemon"), False),
        (("grep", "asrfs"), False),
        ((), False),
    ],
)
def test_daemons_of_this_project_are_known(fake: FakeKernel, words: tuple[str, ...], is_ours: bool) -> None:
    fake.process("5", [], words)
    assert bool(program_of_ours(fake.kernel, "5")) == is_ours


def test_a_filesystem_that_is_hidden_below_another_mount_is_not_mistaken_for_it(
    fake: FakeKernel, scratch: Path
) -> None:
    fake.block("loop0", "7:0", file="/disks/root.img")
    fake.process("self", [ROOT, mount(2, "7:0", str(scratch))])
    found = fake.kernel.filesystems_on("/disks")
    with pytest.raises(RefusedError, match="hidden below another mount"):
        open_filesystems(fake.kernel, found)


# ---- the watchdog -------------------------------------------------------------------------------------------------


class Frozen:
    """A freezer whose filesystem is frozen or not, from any thread."""

    def __init__(self) -> None:
        self.frozen = threading.Event()
        self.thaws = 0

    def sync(self, fd: int) -> None: ...

    def freeze(self, fd: int) -> None:
        self.frozen.set()

    def thaw(self, fd: int) -> None:
        self.thaws += 1
        if not self.frozen.is_set():
            raise OSError(errno.EINVAL, "not frozen")
        self.frozen.clear()


class Watched:
    """A watchdog in a thread, and a process that stands for the one that freezes."""

    def __init__(self) -> None:
        self.freezer = Frozen()
        self.process = subprocess.Popen(["sleep", "1000"])
        ours, self.tell = os.pipe()
        self._fds = [ours, os.pidfd_open(self.process.pid)]
        dog = Watchdog(ours, self._fds[1], [3], self.freezer, SystemClock())
        self.thread = threading.Thread(target=dog.run)
        self.thread.start()

    def say(self, text: bytes) -> None:
        os.write(self.tell, text)

    def freezing(self, seconds: float) -> float:
        deadline = time.monotonic() + seconds
        self.say(FREEZE + f"{deadline!r}\n".encode())
        return deadline

    def hang_up(self) -> None:
        os.close(self.tell)
        self.tell = -1

    def close(self) -> None:
        if self.tell >= 0:
            self.hang_up()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.thread.join(10)
        assert not self.thread.is_alive()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


def test_the_watchdog_ends_when_all_is_thawed_and_has_thawed_nothing(watched: Watched) -> None:
    watched.freezing(60)
    watched.freezer.freeze(3)
    watched.freezer.thaw(3)
    watched.say(THAWED + b"\n")
    watched.thread.join(10)
    assert not watched.thread.is_alive() and watched.freezer.thaws == 1


def test_the_watchdog_thaws_at_the_deadline_and_never_before(watched: Watched) -> None:
    deadline = watched.freezing(0.3)
    watched.freezer.freeze(3)
    wait_until(lambda: not watched.freezer.frozen.is_set(), 10, "the thaw")
    assert deadline <= time.monotonic() < deadline + 1
    watched.freezer.freeze(3)  # one that was under way
    wait_until(lambda: not watched.freezer.frozen.is_set(), 10, "the second thaw")
    watched.say(THAWED + b"\n")
    watched.thread.join(10)
    assert not watched.thread.is_alive()


def test_the_watchdog_thaws_at_once_when_who_freezes_dies_and_until_its_last_freeze_is_over(watched: Watched) -> None:
    watched.freezing(60)
    watched.freezer.freeze(3)
    watched.hang_up()
    wait_until(lambda: not watched.freezer.frozen.is_set(), 10, "the thaw")
    watched.freezer.freeze(3)  # a call that the death did not interrupt
    wait_until(lambda: not watched.freezer.frozen.is_set(), 10, "the second thaw")
    assert watched.thread.is_alive(), "the process is not gone yet"
    watched.freezer.freeze(3)
    watched.process.kill()
    watched.thread.join(10)
    assert not watched.thread.is_alive() and not watched.freezer.frozen.is_set()


def test_the_watchdog_thaws_nothing_of_others_when_nothing_was_frozen(watched: Watched) -> None:
    watched.freezer.freeze(3)  # somebody else
    watched.hang_up()
    watched.thread.join(10)
    assert not watched.thread.is_alive() and watched.freezer.frozen.is_set()
