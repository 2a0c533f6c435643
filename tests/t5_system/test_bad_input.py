"""Bad input to the two commands, on real processes: a code, one line that says what is wrong, and nothing half-done."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrfs.cli import main as host_program
from replica_store.cli import main as store_program
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import random_history
from tests.t5_system.machine import HostUnderTest, mounts_below, run_tool
from tests.t5_system.store import StoreUnderTest
from tests.waiting import wait_until

GARBAGE = {"empty": b"", "binary": b"\xff\x00\xfe" * 100, "nonsense": b"[[[1]]]\n"}


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command failed with this code, in one line that has these words, and printed nothing else."""
    assert done.returncode == code, (done.args, done.stdout, done.stderr)
    assert done.stdout == "", done.stdout
    assert done.stderr.startswith("asrfs: error: "), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "fault of the program" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def within(program: Callable[[list[str]], int], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """As a process would do it, in this one: faster. Not for what may serve."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(list(map(str, words)))
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def store_says(store: StoreUnderTest, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return within(store_program.run, "--vault", store.path, *words)


def host_says(host: HostUnderTest, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return within(host_program.run, "--state", host.path, *words)


def make(path: Path) -> Path:
    path.mkdir()
    return path


def tree(path: Path) -> dict[str, bytes]:
    """Every plain file below, with its content; locks and what SQLite keeps beside its file left out."""
    passing = ("lock", "-shm", "-wal")
    files = (each for each in sorted(path.rglob("*")) if each.is_file() and not each.name.endswith(passing))
    return {str(each.relative_to(path)): each.read_bytes() for each in files}


@pytest.fixture
def host(scratch: Path) -> Iterator[HostUnderTest]:
    """A machine web1 with a disk root of 64 MiB that is not served."""
    host = HostUnderTest(make(scratch / "web1"))
    host.init(root="64M")
    yield host
    host.close()


@pytest.fixture
def store(scratch: Path) -> Iterator[StoreUnderTest]:
    """A vault that is served."""
    store = StoreUnderTest(scratch)
    store.ask("init", "--name", "site-b")
    store.serve()
    yield store
    store.close()


# ---- what is in use --------------------------------------------------------------------------------------------


def test_a_machine_is_served_once_and_the_first_goes_on(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    other = make(scratch / "other")
    disk = host.mount / "root.img"
    fd = os.open(disk, os.O_RDWR)
    for mount in (host.mount, other):
        refused(host.run("serve", "--mount", mount), 4, "already served", str(host.pid("supervisor")))
        os.pwrite(fd, str(mount).encode(), 0)
        os.fsync(fd)
    os.close(fd)
    refused(host.run("init", "web1"), 4, str(host.path))
    assert mounts_below(other) == []
    assert disk.read_bytes().startswith(str(other).encode())
    assert host.stop() == 0


def test_mount_points_that_are_taken(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    second = HostUnderTest(make(scratch / "db1"), name="db1")
    second.init(root="1M")
    (scratch / "nowhere").symlink_to(scratch / "missing")
    before = tree(second.path)
    for mount, code, word in (
        (host.mount, 4, "mount point already"),
        (host.mount / "root.img", 4, "not a directory"),
        (second.path, 4, "not empty"),
        (scratch / "nowhere", 3, "does not exist"),
    ):
        refused(second.run("serve", "--mount", mount), code, word)
    assert {name: content for name, content in tree(second.path).items() if not name.startswith("log/")} == before
    assert mounts_below(scratch) == [str(host.mount)]
    second.serve()
    second.close()


def test_a_disk_that_is_attached_stays_what_it_is(host: HostUnderTest, scratch: Path) -> None:
    filesystem = make(scratch / "filesystem")
    host.serve()
    device = host.asrfs("attach", "root", "--format", "ext4", "--on", filesystem)["device"]
    (filesystem / "letter").write_text("dear")
    known = host.asrfs("disk", "list")
    for arguments, word in (
        (("attach", "root"), device),
        (("attach", "root", "--format", "ext4"), device),
        (("disk", "remove", "root"), device),
        (("disk", "remove", "root", "--yes"), device),
        (("disk", "add", "root", "--size", "1M"), "already has a disk root"),
    ):
        refused(host.run(*arguments), 4, word)
    with (filesystem / "letter").open():
        refused(host.run("detach", "root"), 4, "busy")
    assert host.asrfs("disk", "list") == known
    assert (filesystem / "letter").read_text() == "dear"
    assert host.asrfs("detach", "root")["devices"] == [device]
    refused(host.run("detach", "root"), 4, "not attached")
    host.asrfs("disk", "remove", "root", "--yes")
    for verb in ("attach", "detach"):
        refused(host.run(verb, "root"), 3, "no disk 'root'")
    assert host.asrfs("disk", "add", "root", "--size", "1M")["id"] != known[0]["id"]


def test_a_machine_is_no_disk_of_itself(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    device = host.asrfs("attach", "root", "--format", "ext4", "--on", make(scratch / "on"))["device"]
    inside = scratch / "on" / "inside.img"
    inside.write_bytes(bytes(1 << 20))
    for image in (host.mount / "root.img", Path(device), inside):
        refused(host_says(host, "disk", "add", "again", "--image", image), 4, "a disk that asrfs serves")
    assert [each["name"] for each in host.asrfs("disk", "list")] == ["root"]
    beside = scratch / "beside.img"
    beside.write_bytes(bytes(1 << 20))
    host.asrfs("disk", "add", "again", "--image", beside)
    host.asrfs("detach", "root")


def test_attach_hides_no_files_and_erases_no_filesystem(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    full = make(scratch / "full")
    (full / "letter").write_text("kept")
    refused(host.run("attach", "root", "--format", "ext4", "--on", full), 4, "not empty")
    busy = make(scratch / "busy")
    run_tool("mount", "-t", "tmpfs", "asrfs-test", busy)
    refused(host.run("attach", "root", "--format", "ext4", "--on", busy), 4, "mount point already")
    run_tool("umount", busy)
    assert (host.mount / "root.img").read_bytes() == bytes(64 << 20), "nothing was formatted"
    host.asrfs("attach", "root", "--format", "ext4", "--on", busy)
    (busy / "letter").write_text("kept")
    host.asrfs("detach", "root")
    refused(host.run("attach", "root", "--format", "ext4"), 2, "--yes")
    host.asrfs("attach", "root", "--on", busy)
    assert (busy / "letter").read_text() == "kept"
    host.asrfs("detach", "root")
    host.asrfs("attach", "root", "--format", "ext4", "--on", busy, "--yes")
    assert not (busy / "letter").exists()
    host.asrfs("detach", "root")


def test_a_loop_device_of_a_lost_mount_is_found_and_let_go(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    filesystem = make(scratch / "fs")
    device = host.asrfs("attach", "root", "--format", "ext4", "--on", filesystem)["device"]
    for role in ("supervisor", "agent", "disk_server"):
        host.kill(role)
    host.serve()
    assert f"{device}, mounted on {filesystem}, is disk root of a mount that is gone" in host.said()
    refused(host.run("attach", "root"), 4, device)
    host.asrfs("detach", "root")
    assert not os.path.ismount(filesystem)
    host.asrfs("attach", "root", "--on", filesystem)
    host.asrfs("detach", "root")
    refused(host.run("detach", "root"), 4, "not attached")


def test_an_attach_that_cannot_be_finished_attaches_nothing(host: HostUnderTest, scratch: Path) -> None:
    host.serve()
    (scratch / "file").touch()
    for directory in ("missing", "file"):
        refused(host.run("attach", "root", "--on", scratch / directory), 3, "not a directory")
    refused(host.run("attach", "root", "--on", make(scratch / "empty")), 4, "mount")
    refused(host.run("attach", "root", "--format", "ntfs"), 2, "ext4")
    assert run_tool("losetup", "--list", "--noheadings", "--output", "BACK-FILE").count(str(host.mount)) == 0
    assert mounts_below(scratch) == [str(host.mount)]


@pytest.mark.parametrize("taken", ["data", "manage"])
def test_ports_that_are_taken(scratch: Path, taken: str) -> None:
    store = StoreUnderTest(scratch)
    store.ask("init")
    before = tree(store.path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        ports = {"data": 0, "manage": 0, taken: port}
        words = [f"--{name}-port={number}" for name, number in ports.items()]
        refused(store.run("serve", "--host", "127.0.0.1", *words), 1, f"127.0.0.1:{port}", "in use")
    assert tree(store.path) == before
    store.serve()
    store.close()


# ---- enrolling -------------------------------------------------------------------------------------------------


def test_an_enrolment_that_is_refused_leaves_nothing_on_either_side(
    host: HostUnderTest, store: StoreUnderTest, scratch: Path
) -> None:
    foreign = StoreUnderTest(scratch, "foreign")
    foreign.ask("init")
    foreign.serve()
    token = store.token("web1")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    before = tree(host.path)
    try:
        for address, offered, code, word in (
            (store.manage, foreign.token("web1"), 6, "not the one the token was made for"),
            (store.manage, store.token("web1", "--expires", "1ms"), 6, "expired"),
            (store.manage, store.token("db1"), 2, "for machine db1"),
            (foreign.manage, token, 6, "not the one the token was made for"),
            (nobody, token, 1, nobody),
            (store.data, token, 2, "data port"),
        ):
            refused(host_says(host, "enroll", "--store", address, "--token", offered), code, word)
            assert tree(host.path) == before
        assert (store.ask("machine", "list"), foreign.ask("machine", "list")) == ([], [])
        host.asrfs("enroll", "--store", store.manage, "--token", token)
        enrolled = tree(host.path)
        refused(host_says(host, "enroll", "--store", store.manage, "--token", token), 6, "has been used")
        other_token = foreign.token("web1")
        refused(
            host_says(host, "enroll", "--store", foreign.manage, "--token", other_token), 4, store.data, "one store"
        )
        assert tree(host.path) == enrolled
        assert foreign.ask("machine", "list") == []
        second = HostUnderTest(make(scratch / "second"))
        second.init()
        second.asrfs("enroll", "--store", foreign.manage, "--token", other_token)
    finally:
        foreign.close()


# ---- asking the store ------------------------------------------------------------------------------------------


def test_what_the_store_does_not_have_and_outputs_that_cannot_be(scratch: Path) -> None:
    store = StoreUnderTest(scratch)
    history = random_history(7, records=50, disks={"root": 64 * 4096})
    fill_vault(store.path, history)
    here = make(scratch / "here")
    (here / "directory").mkdir()
    os.mkfifo(here / "pipe")
    (here / "taken").write_text("old")
    before = tree(scratch)

    def export(machine: str, disk: str, output: str | Path, *more: str) -> subprocess.CompletedProcess[str]:
        return store_says(store, "export", machine, disk, "--point", "latest", "--output", here / output, *more)

    refused(store_says(store, "verify", "../x"), 2, "'../x'")
    refused(store_says(store, "token", "../x"), 2, "'../x'")
    refused(export("../x", "root", "x"), 2, "'../x'")
    refused(export("web2", "root", "x"), 3, "web2")
    refused(export("web1", "../x", "x"), 3, "../x")
    refused(export("web1", "root", "missing/x"), 3, "missing")
    refused(export("web1", "root", "taken/x"), 3, "taken")
    refused(export("web1", "root", "taken"), 4, "--force")
    for force in ((), ("--force",)):
        for output in ("directory", "directory/", "pipe", "/dev/null", "/dev/loop0", "directory/.."):
            refused(export("web1", "root", output, *force), 4, output.rstrip("/"))
    assert tree(scratch) == before
    assert sorted(os.listdir(here)) == ["directory", "pipe", "taken"]
    assert export("web1", "root", "taken", "--force").returncode == 0
    assert (here / "taken").read_bytes() == history.state_at(history.lsn)[0]


# ---- files that are corrupt ------------------------------------------------------------------------------------

NEEDED_BY = {
    "machine.json": (("disk", "list"), ("status",), ("disk", "add", "data", "--size", "1M")),
    "settings.json": (("settings",), ("status",), ("set", "object_age=1s")),
    "positions.json": (("status",),),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", NEEDED_BY)
def test_a_corrupt_file_of_the_state_directory_is_named(host: HostUnderTest, name: str, kind: str) -> None:
    (host.path / name).write_bytes(GARBAGE[kind])
    images = sorted(os.listdir(host.path / "images"))
    for arguments in NEEDED_BY[name]:
        refused(host_says(host, *arguments), 5, str(host.path / name))
    refused(host.run("serve", "--mount", host.mount), 5, str(host.path / name))
    assert (host.path / name).read_bytes() == GARBAGE[kind]
    assert sorted(os.listdir(host.path / "images")) == images
    assert mounts_below(host.root) == []
    assert [host.pid(role) for role in ("supervisor", "disk_server", "agent")] == [None, None, None]


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("machine.json", '"id": "', '"id": "x'),
        ("machine.json", '"name": "root"', '"name": "../root"'),
        ("machine.json", '"size_bytes": 67108864', '"size_bytes": -1'),
        ("machine.json", '"slot": 0', '"slot": 65535'),
        ("machine.json", '"format": 1', '"format": 2'),
    ],
)
def test_what_machine_json_may_not_say_is_corruption(host: HostUnderTest, name: str, value: str, other: str) -> None:
    path = host.path / name
    content = path.read_text()
    assert content.count(value) >= 1
    path.write_text(content.replace(value, other))
    refused(host_says(host, "disk", "list"), 5, str(path))
    refused(host.run("serve", "--mount", host.mount), 5, str(path))
    assert mounts_below(host.root) == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [("store.json", "garbage"), ("machine.key", "missing"), ("ca.crt", "garbage")],
)
def test_corrupt_keys_of_a_machine_are_an_alarm_and_enrolling_again_heals(
    host: HostUnderTest, store: StoreUnderTest, name: str, damage: str
) -> None:
    """I8: the disks are served all the same."""
    host.asrfs("enroll", "--store", store.manage, "--token", store.token("web1"))
    path = host.path / "keys" / name
    path.unlink() if damage == "missing" else path.write_bytes(GARBAGE["binary"])
    host.serve()
    with (host.mount / "root.img").open("r+b", buffering=0) as disk:
        disk.write(b"written")

    def alarm() -> list[str]:
        return [each["text"] for each in host.asrfs("status")["alarms"] if each["id"] == "enrolment"]

    assert str(path) in wait_until(alarm, what="the alarm")[0]
    assert host_says(host, "status", "--check").returncode == 2
    if name == "store.json":
        refused(
            host_says(host, "enroll", "--store", store.manage, "--token", store.token("web1")),
            5,
            str(path),
            "remove it",
        )
        path.unlink()
    agent = host.pid("agent")
    host.asrfs("enroll", "--store", store.manage, "--token", store.token("web1"))
    assert host.run("drain", "--timeout", "20s").returncode == 0
    assert host.asrfs("status")["alarms"] == []
    assert host.pid("agent") == agent
    assert host.stop() == 0


@pytest.mark.parametrize("damage", ["garbage", "pem", "missing"])
@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "server.key", "server.crt", "master.key"])
def test_a_corrupt_key_of_the_vault_is_named(scratch: Path, name: str, damage: str) -> None:
    store = StoreUnderTest(scratch)
    store.ask("init")
    path = store.path / "keys" / name
    contents = {"garbage": GARBAGE["binary"], "pem": b"-----BEGIN CERTIFICATE-----\nAAAA\n"}
    path.unlink() if damage == "missing" else path.write_bytes(contents[damage])
    before = tree(store.path)
    refused(store.run("serve", "--host", "127.0.0.1", "--data-port=0", "--manage-port=0"), 5, str(path))
    if name in ("server.crt", "master.key"):
        refused(store_says(store, "token", "web1"), 5, str(path))
    assert tree(store.path) == before
    with sqlite3.connect(store.path / "catalog.sqlite3") as connection:
        assert connection.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_corrupt_vault_json_is_named(scratch: Path, kind: str) -> None:
    store = StoreUnderTest(scratch)
    store.ask("init")
    path = store.path / "vault.json"
    path.write_bytes(GARBAGE[kind])
    before = tree(store.path)
    for arguments in (("machine", "list"), ("token", "web1")):
        refused(store_says(store, *arguments), 5, str(path))
    refused(store.run("serve", "--data-port=0", "--manage-port=0"), 5, str(path))
    assert tree(store.path) == before
