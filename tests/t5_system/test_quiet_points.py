"""Filesystem- and application-consistent points of a real machine: what they hold, and who thaws when all die.

Everything frozen here is a filesystem the test made, and something watches each: the product's own watchdog, or, where
the test freezes from outside, a process that thaws after some seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof.kernel.churn import check_clean, churn
from tests.proof.kernel.filesystems import mounted_copy, open_filesystem
from tests.proof.kernel.postgres import AcknowledgedRows, Postgres
from tests.proof.kernel.world import ask_asrfs, world
from tests.proof.level import Notes
from tests.proof.levels.kernel_freezes import run_case
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.test_databases import check_export, start_pgbench, transactions
from tests.waiting import wait_until

DEADLINE_S = 3.0


@pytest.fixture
def host(scratch: Path) -> Iterator[HostUnderTest]:
    """A served machine with three disks, each with a mounted filesystem."""
    host = HostUnderTest(scratch)
    host.init(a="160M", b="320M", c="64M")
    host.serve()
    for disk in ("a", "b", "c"):
        (scratch / disk).mkdir()
        kind = "xfs" if disk == "b" else "ext4"
        ask_asrfs(host.path, "attach", disk, "--format", kind, "--on", scratch / disk)
    yield host
    for disk in ("a", "b", "c"):
        subprocess.run(["umount", scratch / disk], check=False, timeout=60)
    host.close()


def create(host: HostUnderTest, *words: str) -> dict[str, object]:
    return ask_asrfs(host.path, "point", "create", *words)  # type: ignore[no-any-return]


def hook(host: HostUnderTest, phase: str, text: str, *options: str) -> None:
    path = host.root / f"hook-{len(list(host.root.glob('hook-*')))}.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    ask_asrfs(host.path, "hooks", "add", phase, str(path), *options)


def check_writable(path: Path, seconds_max: float = 5.0) -> float:
    """A write to the filesystem ends; how many seconds it took. In a process of its own: it may be stuck."""
    started = time.monotonic()
    done = subprocess.run(
        ["timeout", "-s", "KILL", str(seconds_max), "sh", "-c", f"echo x > {path}/written && sync -f {path}/written"],
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{path} cannot be written: frozen?"
    return time.monotonic() - started


# ---- filesystems --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_i5_filesystem_points_under_load_need_no_replay(scratch: Path) -> None:
    notes = Notes()
    with world(scratch / "w", ext4="200M", xfs="320M") as made:
        run_case(made, 1, 3, notes)
    assert notes.cases == 3


def test_what_is_left_to_do_for_xfs_is_what_freezing_it_leaves_on_any_device(scratch: Path) -> None:
    """A plain file, `xfs_freeze` and `cp`, nothing of ours: the same record, the same words of xfs_repair.

    Without freezing, the check that says so turns red.
    """
    device = scratch / "plain.img"
    with device.open("wb") as file:
        file.truncate(320 << 20)
    run_tool("mkfs.xfs", "-q", device)
    copies = {each: scratch / f"{each}.img" for each in ("frozen", "torn")}
    with mounted_copy(device, scratch / "plain", "xfs", "noatime") as where, churn(where, 5):
        run_tool("xfs_io", "-c", "syncfs", where)
        run_tool("cp", "--sparse=always", device, copies["torn"])
        with frozen_outside(where):
            run_tool("cp", "--sparse=always", device, copies["frozen"])
    checked = subprocess.run(["xfs_repair", "-n", "-f", copies["frozen"]], capture_output=True, timeout=60, check=False)
    assert checked.returncode == 1, "if XFS does not do that any more, docs/points.md may say less"
    assert check_clean(copies["frozen"], "xfs", scratch / "look") > 0
    with pytest.raises(AssertionError, match=r"something to replay|more than a count"):
        check_clean(copies["torn"], "xfs", scratch / "look")


def test_btrfs_is_frozen_too(scratch: Path) -> None:
    """It has no device of its own, and a subvolume is mounted apart."""
    with world(scratch / "w", pool="256M") as made:
        device = made.attach_bare("pool")
        run_tool("mkfs.btrfs", "-q", device)
        where, apart = made.root / "fs", made.root / "apart"
        for place in (where, apart):
            place.mkdir()
        run_tool("mount", "-o", "noatime", device, where)
        run_tool("btrfs", "subvolume", "create", where / "sub")
        run_tool("mount", "-o", "noatime,subvol=sub", device, apart)
        with churn(apart, 3):
            point = made.asrfs("point", "create", "--consistency", "filesystem", "--wait", "--timeout", "60s")
        assert (point["consistency"], point["failed"]) == ("filesystem", None), point
        for place in (apart, where):
            run_tool("umount", place)
        (image,) = made.export(point["id"], "p")
        run_tool("losetup", "--detach", device)  # btrfs knows its devices by id, and the copy has the same
        assert check_clean(image, "btrfs", made.root / "look") > 0


def test_partitions_filesystems_in_files_and_hidden_mounts_are_frozen_too(host: HostUnderTest) -> None:
    """One filesystem at an offset of a disk of its own, and one in a file of another: a deeper level."""
    ask_asrfs(host.path, "disk", "add", "parts", "--size", "96M")
    inner = host.root / "a/inner.img"
    with inner.open("wb") as file:
        file.truncate(64 << 20)
    run_tool("mkfs.ext4", "-q", "-F", inner)
    devices = [
        run_tool(
            "losetup", "--find", "--show", "-o", str(32 << 20), "--direct-io=on", host.mount / "parts.img"
        ).strip(),
        run_tool("losetup", "--find", "--show", inner).strip(),
    ]
    places = [host.root / "offset", host.root / "inner"]
    try:
        run_tool("mkfs.ext4", "-q", "-F", devices[0])
        for device, place in zip(devices, places, strict=True):
            place.mkdir()
            run_tool("mount", device, place)
        with churn(places[1], 7):
            point = create(host, "--consistency", "filesystem")
        assert (point["consistency"], point["failed"]) == ("filesystem", None), point
        run_tool("mount", "-t", "tmpfs", "none", places[0])
        try:
            point = create(host, "--consistency", "filesystem")
            assert point["consistency"] == "crash" and "hidden below another mount" in str(point["failed"])
        finally:
            run_tool("umount", places[0])
    finally:
        for place, device in zip(reversed(places), reversed(devices), strict=True):
            subprocess.run(["umount", place], check=False, timeout=60)
            run_tool("losetup", "--detach", device)


def test_a_freeze_that_cannot_be_thaws_the_others_and_names_it(host: HostUnderTest) -> None:
    """The second of three is frozen by somebody else; theirs stays frozen."""
    with frozen_outside(host.root / "b"):
        point = create(host, "--consistency", "filesystem", "--name", "n", "--note", "why not")
        for disk in ("a", "c"):
            check_writable(host.root / disk)
    assert (point["consistency"], point["wanted"], point["note"]) == ("crash", "filesystem", "why not")
    assert f"{host.root}/b (xfs) is frozen by somebody else" in str(point["failed"])
    (listed,) = ask_asrfs(host.path, "point", "list")
    assert listed["failed"] == point["failed"] and listed["hold_ms"] == point["hold_ms"] is not None


@contextlib.contextmanager
def frozen_outside(path: Path, seconds: float = 20.0) -> Iterator[None]:
    """`fsfreeze -f` by hand; a process thaws after some seconds whatever becomes of us."""
    words = ["sh", "-c", f"sleep {seconds:g}; fsfreeze -u {path}"]
    guard = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        run_tool("fsfreeze", "-f", path)
        try:
            yield
        finally:
            run_tool("fsfreeze", "-u", path)
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def test_a_point_inside_fsfreeze_from_outside(host: HostUnderTest) -> None:
    """Neither the command nor any process of ours writes to what is frozen."""
    with frozen_outside(host.root / "a"), frozen_outside(host.root / "b"):
        point = create(host, "--name", "outside")
    assert point["consistency"] == "crash" and point["name"] == "outside"
    check_writable(host.root / "a")


def test_points_at_the_same_time_queue_up(host: HostUnderTest) -> None:
    points: list[dict[str, object]] = []

    def make() -> None:
        points.append(host.asrfs("point", "create", "--consistency", "filesystem"))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [point["consistency"] for point in points] == ["filesystem"] * 3 and len({p["lsn"] for p in points}) == 3
    listed = ask_asrfs(host.path, "point", "list")
    assert [p["consistency"] for p in listed] == ["filesystem"] * 3 and not any(p["unfinished"] for p in listed)


def test_a_filesystem_that_holds_files_of_ours_is_refused_by_name(host: HostUnderTest) -> None:
    """Another machine's state directory, served from a disk of this one: freezing it would stop its journal."""
    (host.root / "b/other").mkdir()
    other = HostUnderTest(host.root / "b/other", name="other")
    other.init(root="1M")
    other.serve()
    try:
        point = create(host, "--consistency", "filesystem")
        assert point["consistency"] == "crash" and point["hold_ms"] is None, "nothing was frozen"
        assert f"{host.root}/b (xfs) holds" in str(point["failed"]) and "asrfs" in str(point["failed"])
    finally:
        other.close()
    assert create(host, "--consistency", "filesystem")["consistency"] == "filesystem"


# ---- the watchdog -------------------------------------------------------------------------------------------------


class HeldPoint:
    """A point of which all is frozen and that nobody marks: held until the deadline, by the product's own process."""

    def __init__(self, host: HostUnderTest) -> None:
        order = {"id": "1" * 32, "machine": "web1", "consistency": "filesystem", "is_external": True}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asrfs.daemon.point_process", "--state", str(host.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({**order, "deadline_s": DEADLINE_S}).encode() + b"\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        assert "held" in said, said
        self.deadline = float(said["held"]["deadline"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Writer:
    """Writes to a filesystem again and again; what it is told, and whether it is stuck, is seen from outside."""

    def __init__(self, path: Path, notes: Path) -> None:
        text = f"while :; do if echo x >> {path}/tick; then echo ok; else echo failed; fi >> {notes}; done"
        self.notes = notes
        notes.touch()
        self.process = subprocess.Popen(["sh", "-c", text], stderr=subprocess.DEVNULL)

    def wait_for_progress(self, seconds_max: float) -> float:
        """The moment at which it has gone on."""
        before = self.notes.stat().st_size
        wait_until(lambda: self.notes.stat().st_size > before, seconds_max, "a write that ends")
        return time.monotonic()

    def wait_until_stuck(self) -> None:
        wait_until(lambda: "D" in _state_of(self.process.pid), 10, "a write that waits for the thaw")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("who_stays", ["disk_server", "nobody"])
@pytest.mark.parametrize("process", ["killed", "stopped"])
def test_i8_whoever_dies_while_all_is_frozen_it_is_thawed_in_time(
    host: HostUnderTest, who_stays: str, process: str
) -> None:
    """SIGKILL of agent, disk server and supervisor at once; of who makes the point, too, or it hangs."""
    held = HeldPoint(host)
    writer = Writer(host.root / "a", host.root / "notes")
    try:
        writer.wait_until_stuck()
        os.kill(held.process.pid, signal.SIGKILL if process == "killed" else signal.SIGSTOP)
        for role in ("supervisor", "agent", "disk_server"):
            if role != who_stays and (pid := host.pid(role)):  # type: ignore[arg-type]
                os.kill(pid, signal.SIGKILL)
        went_on = writer.wait_for_progress(DEADLINE_S + 5)
        assert went_on < held.deadline + 1, f"thawed {went_on - held.deadline:.2f} s after the deadline"
        if process == "killed":
            assert went_on < held.deadline, "its death is reason enough to thaw at once"
        else:
            assert went_on >= held.deadline - 0.05, "before the deadline nobody thaws what a marker may rely on"
        if who_stays == "disk_server":
            for disk in ("a", "b", "c"):
                check_writable(host.root / disk)
    finally:
        writer.close()
        held.close()
        assert host.wait() == -signal.SIGKILL
        for disk in ("a", "b", "c"):
            unmount_patiently(host.root / disk) if who_stays == "disk_server" else detach_lazily(host, disk)
        host.serve()


def unmount_patiently(path: Path) -> None:
    """Once the watchdog has seen that who froze it is gone."""
    wait_until(lambda: not subprocess.run(["umount", path], capture_output=True, check=False).returncode, what="umount")


def detach_lazily(host: HostUnderTest, disk: str) -> None:
    """Take away a filesystem whose disk is gone."""
    device = run_tool("findmnt", "-n", "-o", "SOURCE", host.root / disk).strip()
    run_tool("umount", "--lazy", host.root / disk)
    subprocess.run(["losetup", "--detach", device], check=False, timeout=30)


def test_an_agent_that_dies_while_a_point_is_made_harms_nothing(host: HostUnderTest) -> None:
    """The point is made to its end, post hooks and all, by a process that does not die with it."""
    log = host.root / "log"
    hook(host, "pre", f"echo pre >> {log}; while [ ! -e {host.root}/go ]; do sleep 0.05; done")
    hook(host, "post", f"echo post $ASRFS_POINT >> {log}")
    creating = subprocess.Popen(
        host._command("--json", "point", "create", "--consistency", "application", "--name", "orphan"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(log.exists, what="the pre hook")
    finally:
        creating.kill()  # or it would ask the next agent for another one
        creating.wait()
    host.kill("agent")
    (host.root / "go").touch()
    wait_until(lambda: "post" in log.read_text(), what="the post hook")
    (point,) = wait_until(
        lambda: [p for p in ask_asrfs(host.path, "point", "list") if p["name"] == "orphan" and not p["unfinished"]],
        what="the point's last word",
    )
    assert point["consistency"] == "application" and point["id"] in log.read_text()


def test_post_hooks_run_after_the_process_that_makes_the_point_is_killed(host: HostUnderTest) -> None:
    log = host.root / "log"
    hook(host, "pre", f"setsid sleep 1000 & echo $! > {host.root}/child; echo pre >> {log}; sleep 1000")
    hook(host, "post", f"echo post $ASRFS_FAILED >> {log}")
    creating = subprocess.Popen(
        host._command("--json", "point", "create", "--consistency", "application"), stdout=subprocess.PIPE, text=True
    )
    wait_until(log.exists, what="the pre hook")
    os.kill(int(host.state.lock_holder("point") or 0), signal.SIGKILL)
    said, _ = creating.communicate(timeout=60)
    point = json.loads(said)
    assert (point["consistency"], point["wanted"]) == ("crash", "application") and "ended with -9" in point["failed"]
    child = Path(f"/proc/{(host.root / 'child').read_text().strip()}/stat")
    assert not child.exists() or ") Z " in child.read_text(), "a hook outlives its point"
    assert log.read_text().splitlines() == ["pre", "post the process that made the point was killed"]


# ---- applications -------------------------------------------------------------------------------------------------


def test_hooks_that_misbehave_make_crash_points_that_say_which(host: HostUnderTest) -> None:
    hook(host, "pre", "head -c 200000000 /dev/zero", "--order", "1", "--timeout", "30s", "--name", "loud")
    hook(host, "post", f"echo woken >> {host.root}/log", "--name", "wake")
    good = create(host, "--consistency", "application")
    assert (good["consistency"], good["failed"]) == ("application", None), good
    hook(host, "pre", "sleep 1000 & sleep 1000", "--order", "2", "--timeout", "1s", "--name", "hangs")
    point = create(host, "--consistency", "application")
    assert point["consistency"] == "crash" and "hook hangs: killed: it had not ended after 1 s" in str(point["failed"])
    ask_asrfs(host.path, "hooks", "remove", "hangs")
    os.chmod(host.root / "hook-0.sh", 0o777)
    point = create(host, "--consistency", "application")
    assert "hook loud: not started:" in str(point["failed"]) and "written by others" in str(point["failed"])
    done = host.run("hooks", "add", "pre", host.root / "hook-0.sh")
    assert done.returncode == 4 and "written by others" in done.stderr
    assert (host.root / "log").read_text().count("woken") == 3, "post hooks run always"
    shown = ask_asrfs(host.path, "hooks", "list")
    assert [(each["name"], each["phase"], each["order"]) for each in shown] == [
        ("loud", "pre", 1),
        ("wake", "post", 50),
    ]


@pytest.mark.timeout(300)
def test_postgresql_loses_nothing_that_was_acknowledged_before_an_application_point(scratch: Path) -> None:
    with world(scratch / "w", root="512M") as made:
        where = made.root / "fs"
        where.mkdir()
        open_filesystem(made, "root", "ext4", where)
        server = Postgres(where / "pg", made.root / "pg")
        server.create()
        server.start()
        server.client("pgbench", "-i", "-q", "-s", "2", "postgres")
        made.asrfs("hooks", "add", "pre", f"postgresql -h {made.root}/pg -U postgres", "--timeout", "60s")
        rows = AcknowledgedRows(server)
        bench = start_pgbench(server)
        acknowledged = {}
        try:
            for number in range(3):
                goal = rows.acknowledged + 20
                wait_until(lambda goal=goal: rows.acknowledged >= goal, what="rows between points")
                name = f"app{number}"
                acknowledged[name] = rows.acknowledged
                point = made.asrfs("point", "create", "--consistency", "application", "--name", name)
                assert (point["consistency"], point["failed"]) == ("application", None), point
                assert [(each["phase"], each["exit_code"]) for each in point["hooks"]] == [("pre", 0)]
            said, _ = bench.communicate(timeout=120)
            assert bench.returncode == 0 and transactions(said) > 0
        finally:
            bench.kill()
            bench.wait()
            rows.stop()
        rows.check_alive()
        made.drained()
        server.stop()
        run_tool("umount", where)
        for name, at_least in acknowledged.items():
            check_export(made, name, made.root / "pg2", at_least)
