"""Failover on a vault that nobody serves: the bytes of the point, every refusal, and a death at every step."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asrfs.model.quantities import format_time
from replica_store.failover.choice import RESERVE_BYTES, free_bytes
from replica_store.failover.mounts import is_mount_point
from replica_store.failover.processes import find
from replica_store.vault.enrolment import put_description
from replica_store.vault.protection import protection_of
from replica_store.vault.rebuild import rebuild
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory, random_history
from tests.t5_system.failovers import FailoversUnderTest, contents, failovers_of
from tests.t5_system.machine import run_tool
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)
DISKS = {"root": 300 * 4096, "db": 200 * 4096 + 1536}
MACHINE = "web1"


@pytest.fixture
def history(scratch: Path, rng: random.Random) -> MemoryHistory:
    history = random_history(rng.randrange(1 << 30), records=60, disks=DISKS)
    history.marker(name="early")
    history.seal()
    history.write(0, 0, b"later" * 1000 + bytes(4096 * 2 - 5000))
    history.marker(name="late")
    history.seal()
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault")) as vault:
        put_description(vault, vault.machine(MACHINE))
    return history


@pytest.fixture
def failovers(scratch: Path, history: MemoryHistory) -> Iterator[FailoversUnderTest]:
    with failovers_of(scratch / "vault") as failovers:
        yield failovers


def lsn_of(history: MemoryHistory, name: str) -> int:
    return max(point.lsn for point in history.points(history.id) if point.name == name)


def check_bytes(document: dict[str, Any], history: MemoryHistory) -> None:
    """The recovered disks are the model's at the point (I9)."""
    state = history.state_at(document["lsn"])
    assert contents(document) == {name: state[slot] for slot, name in enumerate(DISKS)}


def standing(failovers: FailoversUnderTest) -> tuple[str, int]:
    with Vault.open(str(failovers.root)) as vault:
        machine = vault.machine(MACHINE)
        return str(protection_of(vault, machine)), machine.epoch


# ---- tests ----------------------------------------------------------------------------------------------------------


def test_i9_a_test_failover_has_the_bytes_of_every_selector_and_leaves_nothing(
    failovers: FailoversUnderTest, history: MemoryHistory
) -> None:
    early = lsn_of(history, "early")
    selectors = {"early": early, f"time:{format_time(history.time_at(early))}": early, "latest": history.lsn}
    documents = []
    for selector, lsn in selectors.items():
        document = failovers.ask("test", MACHINE, "--point", selector)
        assert (document["lsn"], document["state"], document["selector"]) == (lsn, "serving", selector)
        documents.append(document)
    for document in documents:  # all of them at once
        check_bytes(document, history)
        assert [step["name"] for step in document["steps"]] == [
            "start",
            "resolve",
            "clear",
            "state",
            "tree",
            "serve",
            "fsck",
        ]
        assert document["rto_seconds"] == pytest.approx(sum(step["seconds"] for step in document["steps"]), abs=0.01)
        assert all(disk["fsck"] == "no filesystem" for disk in document["disks"])
    assert standing(failovers) == ("protected", 1)
    first, second = (Path(document["disks"][0]["path"]) for document in documents[:2])
    with first.open("r+b") as disk:
        disk.write(b"mine" * 1024)
    assert first.read_bytes()[:4096] == b"mine" * 1024
    assert second.read_bytes() == history.state_at(early)[0], "what one writes, no other sees"
    assert len(failovers.ask("list")) == 3
    for document in documents:
        assert failovers.ask("cleanup", document["id"][:8])["state"] == "cleaned"
    assert failovers.leftovers() == ""
    assert failovers.ask("list") == []
    assert failovers.ask("cleanup", documents[0]["id"])["state"] == "cleaned", "asked for again"
    (report,) = failovers.ask("report", MACHINE)
    assert (report["drills"], report["passed"], len(failovers.ask("list", "--all"))) == (3, 3, 3)
    assert [run["lsn"] for run in report["runs"]] == list(selectors.values())


def test_where_it_is_asked_for_and_nothing_of_it_stays_there(
    failovers: FailoversUnderTest, history: MemoryHistory, scratch: Path
) -> None:
    mount = scratch / "disks"
    mount.mkdir()
    words = ("test", MACHINE, "--point", "early", "--state", scratch / "state", "--mount", mount)
    document = failovers.ask(*words)
    check_bytes(document, history)
    assert document["mount"] == str(mount) and (scratch / "state/machine.json").exists()
    assert "empty" in failovers.refused(4, *words) or "mounted" in failovers.refused(4, *words)
    failovers.ask("cleanup", document["id"])
    assert list(mount.iterdir()) == [] and not (scratch / "state").exists()
    assert failovers.leftovers() == ""


def test_its_network_is_its_own_and_the_check_command_decides(failovers: FailoversUnderTest) -> None:
    command = 'ls "$ASRFS_MOUNT"; ip -o link; test -e "$ASRFS_STATE/machine.json"'
    document = failovers.ask("test", MACHINE, "--point", "early", "--check", command)
    said = document["check"]["output"].split("\n")
    assert said[:2] == ["db.img", "root.img"]
    assert [line.split(":")[1].strip() for line in said[2:] if line] == ["lo"]
    failed = failovers.run("failover", "test", MACHINE, "--point", "early", "--check", "echo no good; exit 7")
    assert failed.returncode == 1 and "exit code 7: no good" in failed.stderr
    for each in failovers.ask("list"):
        failovers.ask("cleanup", each["id"])
    (report,) = failovers.ask("report")
    assert (report["drills"], report["passed"]) == (2, 1)


def test_its_time_is_up(failovers: FailoversUnderTest, history: MemoryHistory) -> None:
    short = failovers.ask("test", MACHINE, "--point", "early", "--ttl", "1s")
    long = failovers.ask("test", MACHINE, "--point", "late")
    wait_until(lambda: [each["id"] for each in failovers.ask("list")] == [long["id"]], what="the end of the first")
    assert "time was up" in failovers.ask("show", short["id"])["log"][-1]["cause"]
    check_bytes(long, history)
    failovers.ask("cleanup", long["id"])
    assert failovers.leftovers() == ""


def test_its_space_is_limited(failovers: FailoversUnderTest) -> None:
    document = failovers.ask("test", MACHINE, "--point", "early", "--space-limit", "300M")
    assert failovers.ask("list") != []
    with open(os.path.join(document["state_directory"], "filler"), "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, 301 << 20)
    assert failovers.ask("list") == []
    assert "more than its limit of 300.0 MiB" in failovers.ask("show", document["id"])["log"][-1]["cause"]
    assert failovers.leftovers() == ""


# ---- failover -------------------------------------------------------------------------------------------------------


def test_i6_commit_pending_and_its_ways_out(failovers: FailoversUnderTest, history: MemoryHistory) -> None:
    document = failovers.ask("unplanned", MACHINE, "--point", "late")
    check_bytes(document, history)
    assert (document["state"], document["network"]) == ("commit-pending", None)
    assert standing(failovers) == ("failed-over", 1)
    assert "failed-over: unplanned-failover is refused" in failovers.refused(4, "unplanned", MACHINE, "--point", "late")
    assert "cleanup is refused; allowed: cancel, commit" in failovers.refused(4, "cleanup", document["id"])
    with Path(document["disks"][0]["path"]).open("r+b") as disk:
        disk.write(b"mine" * 1024)
    changed = failovers.ask("change-point", document["id"], "--point", "early")
    assert (changed["lsn"], changed["state"]) == (lsn_of(history, "early"), "commit-pending")
    check_bytes(changed, history)
    assert failovers.ask("cancel", document["id"])["state"] == "cancelled"
    assert standing(failovers) == ("protected", 1)
    assert failovers.leftovers() == ""
    assert "protected: commit is refused" in failovers.refused(4, "commit", document["id"])
    assert "protected: cancel is refused" in failovers.refused(4, "cancel", document["id"])
    assert failovers.leftovers() == "", "no lock either of what nobody works on"
    again = failovers.ask("unplanned", MACHINE, "--point", "latest")
    check_bytes(again, history)
    with Path(again["disks"][0]["path"]).open("r+b") as disk:
        disk.write(b"mine" * 1024)
    committed = failovers.ask("commit", again["id"])
    assert (committed["state"], committed["epoch"]) == ("committed", 2)
    for verb in (("commit",), ("cancel",), ("change-point", "--point", "early")):
        assert "is committed: " in failovers.refused(4, *verb, again["id"])
    assert "allowed: nothing that ends it" in failovers.refused(4, "cleanup", again["id"])
    rebuild(str(failovers.root))
    assert standing(failovers) == ("committed", 2)
    assert failovers.ask("show", again["id"])["log"] == committed["log"]
    assert Path(again["disks"][0]["path"]).read_bytes()[:4096] == b"mine" * 1024, "it goes on"


def test_what_died_is_started_again_with_all_that_was_written(
    failovers: FailoversUnderTest, history: MemoryHistory
) -> None:
    document = failovers.ask("unplanned", MACHINE, "--point", "early")
    path = Path(document["disks"][0]["path"])
    with path.open("r+b") as disk:
        disk.write(b"mine" * 1024)
        os.fsync(disk.fileno())
    for process in find(document["id"]):
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not find(document["id"]), what="their end")
    assert failovers.ask("resume", document["id"])["state"] == "commit-pending"
    expected = history.state_at(document["lsn"])[0]
    assert path.read_bytes() == b"mine" * 1024 + expected[4096:]
    failovers.ask("cancel", document["id"])
    assert failovers.leftovers() == ""


# ---- what bad input gets --------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_touched(
    failovers: FailoversUnderTest, history: MemoryHistory, scratch: Path
) -> None:
    occupied, file = scratch / "occupied", scratch / "file"
    occupied.mkdir()
    (occupied / "content").write_text("mine")
    file.write_text("mine")
    for kind in ("test", "unplanned"):
        begin = (kind, MACHINE, "--point")
        failovers.refused(3, kind, "nobody", "--point", "latest")
        for selector, code in (("nothing", 3), ("lsn:9999", 3), ("lsn:x", 2), ("latest-application", 3)):
            failovers.refused(code, *begin, selector)
        for option in ("--mount", "--state"):
            assert "is not empty" in failovers.refused(4, *begin, "late", option, occupied)
            assert "is not a directory" in failovers.refused(2, *begin, "late", option, file)
            assert "mounted there already" in failovers.refused(4, *begin, "late", option, "/proc")
        failovers.refused(2, *begin, "late", "--state", scratch / "one", "--mount", scratch / "one" / "two")
    for words in (("--ttl", "0s"), ("--ttl", "soon"), ("--space-limit", "1M"), ("--space-limit", "lots")):
        failovers.refused(2, "test", MACHINE, "--point", "late", *words)
    for verb in ("cancel", "commit", "cleanup", "resume", "show"):
        failovers.refused(3, verb, "0123456789")
    failovers.refused(3, "change-point", "0123456789", "--point", "late")
    assert standing(failovers) == ("protected", 1)
    assert failovers.ask("list", "--all") == []
    assert failovers.leftovers() == ""
    assert (occupied / "content").read_text() == file.read_text() == "mine"


def test_too_little_space_is_said_before_it_starts(failovers: FailoversUnderTest, scratch: Path) -> None:
    small = scratch / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100M", "asrfs-small", small], check=True, timeout=30)
    try:
        words = ("--point", "late", "--state", small / "state")
        assert "make space" in failovers.refused(4, "unplanned", MACHINE, *words)
        assert "make space" in failovers.refused(4, "test", MACHINE, *words, "--space-limit", "1G")
        assert list(small.iterdir()) == []
        assert failovers.ask("list", "--all") == []
        size = RESERVE_BYTES + 2 * sum(DISKS.values())
        subprocess.run(["mount", "-o", f"remount,size={size}", small], check=True, timeout=30)
        document = failovers.ask("unplanned", MACHINE, *words)
        assert free_bytes(str(small)) < RESERVE_BYTES, "its journal"
        assert failovers.ask("change-point", document["id"], "--point", "early")["state"] == "commit-pending"
        failovers.ask("cancel", document["id"])
        assert list(small.iterdir()) == []
    finally:
        failovers.discard()
        subprocess.run(["umount", small], check=True, timeout=30)


def test_what_hangs_in_the_kernel_is_taken_away(failovers: FailoversUnderTest, scratch: Path) -> None:
    """A filesystem on its disks, not synced, whose disk server does not answer: who unmounts that cannot be killed."""
    document = failovers.ask("test", MACHINE, "--point", "late")
    device = run_tool("losetup", "--find", "--show", document["disks"][0]["path"]).strip()
    mounted = scratch / "mounted"
    mounted.mkdir()
    run_tool("mkfs.ext4", "-q", "-F", device)
    run_tool("mount", device, mounted)
    (mounted / "file").write_bytes(bytes(4096))
    (server,) = [each.pid for each in find(document["id"]) if "asrfs.daemon.disk_server" in each.words]
    os.kill(server, signal.SIGSTOP)
    failovers.ask("cleanup", document["id"])
    assert failovers.leftovers() == ""
    assert not is_mount_point(str(mounted))


def test_a_point_that_verification_flagged_is_refused(failovers: FailoversUnderTest, history: MemoryHistory) -> None:
    early = lsn_of(history, "early")
    row = next(row for row in history.objects_of(history.id, history.lsn) if row.first_lsn > early)
    with Vault.open(str(failovers.root)) as vault:
        stored = vault.object_with(history.id, row.first_lsn)
        assert stored is not None
        path = Path(vault.where(stored))
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    assert failovers.run("verify", MACHINE).returncode == 5
    for kind in ("test", "unplanned"):
        said = failovers.refused(4, kind, MACHINE, "--point", "late")
        assert f"choose a point before LSN {row.first_lsn}" in said
    document = failovers.ask("test", MACHINE, "--point", "early")
    check_bytes(document, history)
    failovers.ask("cleanup", document["id"])
    content[-40] ^= 1
    path.write_bytes(content)
    assert failovers.run("verify", MACHINE).returncode == 0
    document = failovers.ask("test", MACHINE, "--point", "late")
    check_bytes(document, history)
    failovers.ask("cleanup", document["id"])


def test_a_member_of_a_group_alone_is_warned_of(failovers: FailoversUnderTest, history: MemoryHistory) -> None:
    with Vault.open(str(failovers.root), writable=True) as vault:
        row = vault.machine(MACHINE)
        other = type(row)("c" * 32, "web2", 1, "2", False, 0, 1, row.sealed_keys)
        with vault.catalog.transaction():
            vault.catalog.put_machine(other)
    assert failovers.run("group", "create", "shop", "--member", MACHINE, "--member", "web2").returncode == 0
    document = failovers.ask("test", MACHINE, "--point", "early")
    (warning,) = document["warnings"]
    assert "web2 stay where they are" in warning
    failovers.ask("cleanup", document["id"])
    assert "nothing has been received" in failovers.refused(3, "unplanned", "web2", "--point", "latest")


# ---- death at every step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["resolve", "clear", "tree", "state", "serve", "fsck", "check", "report"])
def test_a_test_failover_that_died_is_resumed_or_cleaned_up(
    failovers: FailoversUnderTest, history: MemoryHistory, step: str
) -> None:
    failovers.killed(step, "test", MACHINE, "early")
    assert standing(failovers) == ("protected", 1)
    found = failovers.ask("list")
    if step == "resolve":
        assert found == []
        return
    ((operation_id, state),) = [(each["id"], each["state"]) for each in found]
    assert state == "preparing"
    document = failovers.ask("resume", operation_id)
    assert document["state"] == "serving"
    check_bytes(document, history)
    failovers.killed("undo", "cleanup", operation_id)
    assert failovers.ask("show", operation_id)["state"] == "cleaned"
    failovers.ask("list")  # any command takes away what is left
    assert failovers.leftovers() == ""


@pytest.mark.parametrize("step", ["clear", "tree", "state", "serve", "check", "report"])
def test_a_failover_that_died_is_carried_on_with_by_the_same_command(
    failovers: FailoversUnderTest, history: MemoryHistory, step: str
) -> None:
    failovers.killed(step, "unplanned", MACHINE, "early")
    assert standing(failovers) == ("failed-over", 1)
    (found,) = failovers.ask("list")
    assert found["state"] == "preparing"
    assert "is preparing: commit is refused" in failovers.refused(4, "commit", found["id"])
    document = failovers.ask("unplanned", MACHINE, "--point", "early")
    assert (document["id"], document["state"]) == (found["id"], "commit-pending")
    check_bytes(document, history)
    failovers.killed(step, "change_point", found["id"], "late")
    (found,) = failovers.ask("list")
    assert (found["state"], found["selector"]) == ("preparing", "late")
    if step == "state":
        document = failovers.ask("resume", found["id"])
        assert document["state"] == "commit-pending"
        check_bytes(document, history)
    failovers.killed("undo", "cancel", found["id"])
    assert standing(failovers) == ("protected", 1)
    assert failovers.ask("show", found["id"])["state"] == "cancelled"
    failovers.ask("list")
    assert failovers.leftovers() == ""


@pytest.mark.parametrize("step", ["epoch", "committed"])
def test_i6_a_commit_that_died_is_a_commit_or_none(
    failovers: FailoversUnderTest, history: MemoryHistory, step: str
) -> None:
    document = failovers.ask("unplanned", MACHINE, "--point", "late")
    failovers.killed(step, "commit", document["id"])
    assert standing(failovers) == ("failed-over", 1 if step == "epoch" else 2)
    for words in (("cancel", document["id"]), ("change-point", document["id"], "--point", "early")):
        assert "has begun" in failovers.refused(4, *words)
    rebuild(str(failovers.root))
    committed = failovers.ask("commit", document["id"])
    epoch = 2 if step == "epoch" else 3  # somebody may have been told the one that was raised before
    assert (committed["state"], committed["epoch"]) == ("committed", epoch)
    assert standing(failovers) == ("committed", epoch)
    check_bytes(committed, history)
