"""The installed program on the real kernel: every process of a host is killed, and what lies above never notices.

The oracle is bytes: what was written is compared block for block, in the mount while it is served and in the raw
images after a clean stop.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from asrfs.daemon import control
from asrfs.errors import TemporaryError
from tests.t5_system.machine import HostUnderTest, mounts_below, run_tool
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until

BLOCKS = 2048


@pytest.fixture
def host(scratch: Path) -> Iterator[HostUnderTest]:
    """A machine with one disk of 8 MiB, not served yet."""
    host = HostUnderTest(scratch)
    host.init(root="8M")
    yield host
    host.close()


@pytest.fixture
def served(host: HostUnderTest) -> HostUnderTest:
    host.serve()
    return host


class Load:
    """Stamped writes in the background while the block runs; an error of any of them fails the test."""

    def __init__(self, host: HostUnderTest, seed: int) -> None:
        self.stamper = Stamper(seed, 1, BLOCKS)
        self.writer = StampWriter(self.stamper, [host.mount / "root.img"])
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.writer.close()
        assert self._error is None, f"a write failed: {self._error!r}"

    def go_on(self, count: int = 100) -> None:
        """Wait until `count` more writes are done."""
        goal = self.writer.done + count
        wait_until(lambda: self.writer.done >= goal or self._error, what=f"{count} writes")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.writer.write(10)
                if self.writer.done % 200 == 0:
                    self.writer.fsync()
        except BaseException as error:
            self._error = error


def pattern(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def stamp(number: int) -> bytes:
    """A MiB that says its number."""
    return number.to_bytes(8, "little") * (1 << 17)


def write_through(path: Path, content: bytes, offset: int = 0) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, content, offset) == len(content)
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- start and stop ----------------------------------------------------------------------------------------------


def test_clean_stop_leaves_plain_current_images(host: HostUnderTest) -> None:
    content = pattern(1, 1 << 20)
    host.serve()
    write_through(host.mount / "root.img", content, 4096)
    assert host.stop() == 0
    assert host.said() == ""
    assert mounts_below(host.mount) == []
    assert host.image("root").read_bytes()[4096 : 4096 + len(content)] == content
    assert [host.pid(role) for role in ("supervisor", "disk_server", "agent")] == [None, None, None]
    host.serve()
    assert (host.mount / "root.img").read_bytes()[4096 : 4096 + len(content)] == content
    assert host.stop() == 0


def test_systemd_is_told_and_children_do_not_tell_it(
    host: HostUnderTest, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(scratch / "notify"))
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(scratch / "notify"))
        host.serve()
        assert listener.recv(100) == b"READY=1"
        environment = Path(f"/proc/{host.pid('disk_server')}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environment
        assert host.stop() == 0
        assert listener.recv(100) == b"STOPPING=1"


def test_mount_points_that_are_refused(host: HostUnderTest, scratch: Path) -> None:
    (scratch / "full").mkdir()
    (scratch / "full" / "letter").touch()
    for path, code, word in (
        (scratch / "full", 4, "not empty"),
        (scratch / "missing", 3, "does not exist"),
        (scratch / "full" / "letter", 4, "not a directory"),
        (Path("/proc"), 4, "mount point already"),
    ):
        done = host.run("serve", "--mount", path)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert word in done.stderr
        assert done.stderr.startswith("asrfs: error: ")
        assert done.stderr.count("\n") == 1
    assert mounts_below(scratch) == []


def test_state_directory_that_is_served_is_refused(served: HostUnderTest) -> None:
    done = served.run("serve", "--mount", served.mount)
    assert done.returncode == 4
    assert f"already served by process {served.pid('supervisor')}" in done.stderr
    assert (served.mount / "root.img").exists(), "nothing happened to the first"


def test_image_in_use_by_another_state_directory_is_refused(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    thief = HostUnderTest(make(scratch / "thief"), name="thief")
    thief.init(stolen="1M")
    stolen = thief.image("stolen")
    stolen.unlink()
    stolen.hardlink_to(host.image("root"))
    done = thief.run("serve", "--mount", thief.mount)
    assert done.returncode == 4
    assert "in use" in done.stderr
    assert mounts_below(thief.mount) == []


@pytest.mark.parametrize("while_serving", [False, True])
def test_corrupt_journal_ends_with_5_and_names_the_place(host: HostUnderTest, while_serving: bool) -> None:
    """Below the durable LSN nothing is cut: the disks answer errors, and nothing is changed."""
    host.serve()
    host.kill("agent", signal.SIGSTOP)
    agent = host.pid("agent")
    for seed in range(8):
        write_through(host.mount / "root.img", pattern(seed, 4096), seed * 4096)
    if not while_serving:
        host.kill("supervisor")
        host.kill("agent")
        host.kill("disk_server")
    segment = host.path / "journal" / f"{1:016x}.segment"
    with segment.open("r+b") as file:
        file.seek(4096 + 3 * 4096)
        file.write(b"rotten")
    before = segment.read_bytes()
    if while_serving:
        host.kill("disk_server")
        host.kill("agent", signal.SIGCONT)
        assert host.wait() == 5
        said = host.said()
    else:
        done = host.run("serve", "--mount", host.mount)
        assert (done.returncode, done.stdout) == (5, "")
        said = done.stderr
    assert f"asrfs: error: {host.path}/journal: {segment.name} offset" in said
    assert "LSN" in said
    assert segment.read_bytes() == before
    assert mounts_below(host.mount) == []
    assert host.pid("agent") != agent


def test_busy_mount_is_detached_and_said(served: HostUnderTest) -> None:
    content = pattern(2, 8192)
    fd = os.open(served.mount / "root.img", os.O_RDWR)
    try:
        os.pwrite(fd, content, 0)
        assert served.stop() == 0
        assert "still in use" in served.said()
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.pread(fd, 1, 0)
    finally:
        with suppress(OSError):  # the flush that closing is finds nobody
            os.close(fd)
    assert mounts_below(served.mount) == []
    assert served.image("root").read_bytes()[:8192] == content


def test_unmounting_from_outside_ends_everything_in_good_order(served: HostUnderTest) -> None:
    content = pattern(3, 8192)
    write_through(served.mount / "root.img", content)
    run_tool("umount", served.mount)
    assert served.wait() == 0
    assert "unmounted from outside" in served.said()
    assert served.image("root").read_bytes()[:8192] == content


def test_stop_releases_filesystems_on_loop_devices(scratch: Path) -> None:
    host = HostUnderTest(scratch)
    host.init(root="64M")
    host.serve()
    where = make(scratch / "fs")
    device = host.asrfs("attach", "root", "--format", "ext4", "--on", where)["device"]
    (where / "letter").write_bytes(pattern(4, 1 << 20))
    assert host.stop() == 0
    assert host.said() == ""
    assert mounts_below(scratch) == []
    assert not Path(f"/sys/block/{Path(device).name}/loop").exists()
    image = host.image("root")
    run_tool("e2fsck", "-fn", image)
    again = run_tool("debugfs", "-R", f"dump /letter {scratch / 'letter'}", image)
    assert (scratch / "letter").read_bytes() == pattern(4, 1 << 20), again


# ---- deaths ------------------------------------------------------------------------------------------------------


def test_sigkill_of_the_disk_server_under_load_is_a_pause(served: HostUnderTest, rng: random.Random) -> None:
    with Load(served, rng.randrange(1 << 30)) as load:
        for _ in range(5):
            load.go_on()
            served.wait_for_next("disk_server", served.kill("disk_server"))
        load.go_on()
    assert served.stop() == 0
    load.stamper.check([served.image("root")], exactly=load.writer.done)


def test_fio_verifies_through_kills_of_the_disk_server(served: HostUnderTest) -> None:
    """Depth 32: many requests are unanswered at each death, and each is sent again."""
    device = run_tool("losetup", "--find", "--show", "--direct-io=on", served.mount / "root.img").strip()
    fio = subprocess.Popen(
        [
            *("fio", "--name=verify", f"--filename={device}", "--size=8M", "--rw=randwrite", "--bsrange=4k-64k"),
            *(
                "--ioengine=libaio",
                "--direct=1",
                "--iodepth=32",
                "--verify=crc32c",
                "--verify_state_save=0",
                "--verify_fatal=1",
            ),
            *("--do_verify=1", "--loops=1000", "--runtime=6", "--time_based", "--output-format=terse"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        kills = 0
        while wrote_more(served, 300, fio):
            served.wait_for_next("disk_server", served.kill("disk_server"))
            kills += 1
        assert fio.stdout is not None
        assert fio.wait() == 0, fio.stdout.read()
        assert kills >= 3
    finally:
        fio.kill()
        fio.communicate()
        run_tool("losetup", "--detach", device)


def wrote_more(host: HostUnderTest, records: int, load: subprocess.Popen[str]) -> bool:
    """Wait until the load has appended so many records more; False if it ends before that."""
    goal = appended(host) + records
    wait_until(lambda: appended(host) > goal or load.poll() is not None, what=f"{records} records")
    return load.poll() is None


def appended(host: HostUnderTest) -> int:
    """The LSN appended; 0 while there is no disk server to ask."""
    try:
        return int(control.call(host.state.socket_path("disk_server"), "positions")["appended"])
    except TemporaryError:
        return 0


def test_status_never_looks_healthy_because_who_would_complain_is_gone(served: HostUnderTest) -> None:
    def check() -> tuple[int, dict[str, str]]:
        alarms = served.asrfs("status")["alarms"]
        return served.run("status", "--check").returncode, {each["id"]: each["severity"] for each in alarms}

    wait_until(lambda: check() == (0, {}), what="the agent's first word")
    agent = served.kill("agent", signal.SIGSTOP)
    assert check() == (2, {"agent": "critical"})
    assert served.asrfs("status")["link"] == "agent does not answer"
    os.kill(agent, signal.SIGCONT)
    wait_until(lambda: check() == (0, {}), what="the agent's own word")
    served.kill("supervisor")
    assert check() == (1, {"supervisor": "warning"})
    served.kill("agent")
    assert check() == (2, {"supervisor": "warning", "agent": "critical"})
    served.kill("disk_server")
    assert check() == (2, {"not-served": "critical"})
    run_tool("umount", "--lazy", served.mount)
    served.serve()
    assert served.stop() == 0
    assert check() == (1, {"not-served": "warning"})


def test_sigkill_of_the_agent_is_nothing(served: HostUnderTest, rng: random.Random) -> None:
    with Load(served, rng.randrange(1 << 30)) as load:
        for _ in range(3):
            load.go_on()
            served.wait_for_next("agent", served.kill("agent"))
    assert served.stop() == 0
    load.stamper.check([served.image("root")], exactly=load.writer.done)


def test_sigkill_of_the_supervisor_is_nothing_and_the_next_one_adopts(
    served: HostUnderTest, rng: random.Random
) -> None:
    with Load(served, rng.randrange(1 << 30)) as load:
        load.go_on()
        wait_until(lambda: served.pid("agent"), what="the agent")
        before = (served.pid("disk_server"), served.pid("agent"))
        served.kill("supervisor")
        load.go_on()
        other = served.run("serve", "--mount", make(served.root / "other"))
        assert other.returncode == 4
        assert f"--mount {served.mount}" in other.stderr
        served.serve()
        assert (served.pid("disk_server"), served.pid("agent")) == before
        load.go_on()
        disk_server = served.kill("disk_server")
        agent = served.kill("agent")
        served.wait_for_next("disk_server", disk_server)
        served.wait_for_next("agent", agent)
        load.go_on()
    assert served.stop() == 0
    assert mounts_below(served.mount) == []
    load.stamper.check([served.image("root")], exactly=load.writer.done)


def test_disk_server_of_an_older_program_is_replaced_without_unmounting(
    served: HostUnderTest, rng: random.Random
) -> None:
    """Told to stop while the mount is there, it flushes and ends, and the next one carries on."""
    with Load(served, rng.randrange(1 << 30)) as load:
        load.go_on()
        for _ in range(3):
            before = served.pid("disk_server")
            assert before
            control.call(served.state.socket_path("disk_server"), "stop")
            served.wait_for_next("disk_server", before)
            load.go_on()
    assert served.stop() == 0
    load.stamper.check([served.image("root")], exactly=load.writer.done)


def test_i2_nothing_fsynced_is_lost_when_all_are_killed(served: HostUnderTest, rng: random.Random) -> None:
    stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
    writer = StampWriter(stamper, [served.mount / "root.img"])
    writer.write(500)
    flushed = writer.fsync()
    writer.write(100)
    served.kill("supervisor")
    served.kill("agent")
    served.kill("disk_server")
    with pytest.raises(OSError, match=r"not connected|abort"):
        writer.write(1)
    with suppress(OSError):  # the flush that closing is finds nobody
        writer.close()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(served.mount)
    there = served.asrfs("status")
    assert there["lag"]["records"] == there["lsn"]["durable"] > flushed, "what no store has is not hidden"
    served.serve()
    assert served.said() == ""
    announced = served.asrfs("status")["lsn"]["durable"] - there["lsn"]["durable"]
    assert announced in (0, 1), "nothing but a DISK record, where that of before has been applied already"
    assert len(mounts_below(served.mount)) == 1, "the dead mount was replaced"
    reached = stamper.check([served.mount / "root.img"], at_least=flushed)
    assert served.stop() == 0
    stamper.check([served.image("root")], exactly=reached)


def test_kernel_without_resend_is_announced_and_survived(scratch: Path) -> None:
    """There a death is an I/O error above, but never wrong bytes, and the disks come back."""
    host = HostUnderTest(scratch, program="tests.fakes.old_kernel")
    host.init(root="8M")
    host.serve()
    assert "FUSE_NOTIFY_RESEND" in host.said()
    content = pattern(5, 1 << 20)
    write_through(host.mount / "root.img", content)
    host.wait_for_next("disk_server", host.kill("disk_server"))
    wait_until(lambda: (host.mount / "root.img").exists(), what="the new mount")
    assert (host.mount / "root.img").read_bytes()[: 1 << 20] == content
    assert len(mounts_below(host.mount)) == 1
    assert host.stop() == 0


@pytest.mark.parametrize("program", ["asrfs.cli.main", "tests.fakes.old_kernel"])
def test_disk_server_that_cannot_start_for_a_while_comes_back(scratch: Path, program: str) -> None:
    """Its image is away, twice in a row; with it the disks come back, on the same mount or, on an old kernel, anew."""
    host = HostUnderTest(scratch, program=program)
    host.init(root="8M")
    host.serve()
    content = pattern(13, 1 << 20)
    write_through(host.mount / "root.img", content)
    image = host.image("root")
    away = image.rename(image.with_suffix(".away"))
    dead = host.kill("disk_server")
    log = Path(host.state.log_path("supervisor"))
    wait_until(lambda: log.read_text().count("could not be started") >= 3, what="some vain tries")
    away.rename(image)
    host.wait_for_next("disk_server", dead)
    wait_until(lambda: (host.mount / "root.img").exists(), what="the disk")
    assert (host.mount / "root.img").read_bytes()[: 1 << 20] == content
    assert len(mounts_below(host.mount)) == 1
    assert host.stop() == 0


def test_a_stop_ends_although_the_disk_server_cannot_start(served: HostUnderTest) -> None:
    content = pattern(14, 1 << 20)
    write_through(served.mount / "root.img", content)
    image = served.image("root")
    away = image.rename(image.with_suffix(".away"))
    served.kill("disk_server")
    assert served.stop() == 3
    assert f"the image {image} of disk root does not exist" in served.said()
    assert mounts_below(served.mount) == []
    away.rename(image)
    served.serve()
    assert (served.mount / "root.img").read_bytes()[: 1 << 20] == content


def test_full_filesystem_below_the_journal_refuses_writes_until_there_is_space(scratch: Path) -> None:
    """Nothing acknowledged is lost, reads go on, and a disk server that dies meanwhile comes back."""
    small = make(scratch / "small")
    run_tool("mount", "-t", "tmpfs", "-o", "size=400M", "asrfs-test", small)
    host = HostUnderTest(small)
    try:
        host.init(root="256M")
        host.serve()
        ballast = small / "ballast"
        fd = os.open(host.mount / "root.img", os.O_RDWR)
        os.pwrite(fd, stamp(1), 0)
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(400 << 20))
        written = 1
        with pytest.raises(OSError, match="No space left"):
            while written < 250:
                written += os.pwrite(fd, stamp(1 + written), written << 20) >> 20
        host.wait_for_next("disk_server", host.kill("disk_server"))
        assert os.pread(fd, 1 << 20, 0) == stamp(1)
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, b"x" * (1 << 20), written << 20)
        ballast.unlink()
        os.pwrite(fd, stamp(999), 0)
        os.fsync(fd)
        assert os.pread(fd, 1 << 20, 0) == stamp(999)
        for number in range(1, written):
            assert os.pread(fd, 1 << 20, number << 20) == stamp(1 + number), number
        os.close(fd)
        assert host.stop() == 0
    finally:
        host.close()
        run_tool("umount", "--lazy", small)


# ---- disks that come and go --------------------------------------------------------------------------------------


def test_disk_is_added_and_removed_while_serving(served: HostUnderTest) -> None:
    content = pattern(6, 1 << 20)
    served.asrfs("disk", "add", "hot", "--size", "1M")
    disk = served.mount / "hot.img"
    assert disk.stat().st_size == 1 << 20
    write_through(disk, content)
    image = served.image("hot")
    served.wait_for_next("disk_server", served.kill("disk_server"))
    assert disk.read_bytes() == content
    fd = os.open(disk, os.O_RDWR)
    served.asrfs("disk", "remove", "hot", "--yes")
    wait_until(lambda: not disk.exists(), what="the file of the removed disk to go")
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(fd, 512, 0)
    os.close(fd)
    write_through(served.mount / "root.img", content)
    assert served.stop() == 0
    assert served.image("root").read_bytes()[: 1 << 20] == content
    assert image.read_bytes() == content, "what was written before the removal is in the image"


def test_i7_the_image_of_a_removed_disk_holds_every_write(served: HostUnderTest) -> None:
    """Also writes nobody synced, and when the command returns: the image may be somebody else's from then on."""
    image = served.root / "adopted.img"
    image.write_bytes(pattern(8, 1 << 20))
    served.asrfs("disk", "add", "theirs", "--image", image)
    content = pattern(9, 1 << 20)
    with (served.mount / "theirs.img").open("r+b", buffering=0) as disk:
        disk.write(content)
    served.asrfs("disk", "remove", "theirs", "--yes")
    assert image.read_bytes() == content
    image.write_bytes(b"theirs again" * 1000)
    write_through(served.mount / "root.img", content)
    served.wait_for_next("agent", served.kill("agent"))
    assert served.stop() == 0
    assert image.read_bytes() == b"theirs again" * 1000


def test_i7_a_removal_that_could_not_finish_keeps_the_image_and_goes_on(served: HostUnderTest) -> None:
    image = served.root / "adopted.img"
    image.write_bytes(pattern(10, 1 << 20))
    served.asrfs("disk", "add", "theirs", "--image", image)
    content = pattern(11, 1 << 20)
    served.kill("agent", signal.SIGSTOP)
    for written in (pattern(12, 1 << 20), content):
        write_through(served.mount / "theirs.img", written)
    for role in ("supervisor", "agent", "disk_server"):
        served.kill(role)
    run_tool("umount", "--lazy", served.mount)
    damaged = sorted((served.path / "journal").glob("*.segment"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:9000] + bytes(4096) + whole[13096:])
    refused = served.run("disk", "remove", "theirs", "--yes")
    assert refused.returncode == 5
    assert "does not hold the disk's last writes" in refused.stderr
    for again in (("--image", image), ("--size", "1M")):
        assert served.run("disk", "add", "theirs", *again).returncode == 4
    damaged.write_bytes(whole)
    served.asrfs("disk", "remove", "theirs", "--yes")
    assert image.read_bytes() == content
    assert served.run("disk", "remove", "theirs", "--yes").returncode == 3
    served.asrfs("disk", "add", "theirs", "--image", image)


def test_disk_of_the_same_name_is_another_one(served: HostUnderTest) -> None:
    write_through(served.mount / "root.img", pattern(7, 4096))
    served.asrfs("disk", "remove", "root", "--yes")
    served.asrfs("disk", "add", "root", "--size", "1M")
    wait_until(lambda: (served.mount / "root.img").stat().st_size == 1 << 20, what="the new disk")
    assert (served.mount / "root.img").read_bytes() == bytes(1 << 20)
    assert [disk.slot for disk in served.state.load_machine().disks] == [0, 1]


def make(path: Path) -> Path:
    path.mkdir()
    return path
