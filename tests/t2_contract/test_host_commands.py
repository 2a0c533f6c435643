"""The command contract of `asrfs`: bad input gets one line, the right exit code, and leaves nothing half-done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from asrfs.cli.main import run
from asrfs.model.configuration import HostConfiguration, encode_configuration
from asrfs.model.policy import DEFAULT_TEXTS as POLICY_TEXTS
from asrfs.model.recovered import RecoveredDisk, RecoveredMachine, encode_recovered
from asrfs.transport.enrolment import Token, encode_token


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def asrfs(scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `asrfs` in this process on a state directory of the test; checks the form of every failure."""
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "state"))

    def call(*arguments: str) -> Outcome:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("asrfs: error: "), err
            assert err.count("\n") == 1, err
            assert "Traceback" not in err
        return Outcome(code, out, err)

    return call


def recovered_file(path: Path, **changes: object) -> str:
    """A description of machine db1 with one disk over `base`, as a store writes it."""
    disk = RecoveredDisk(slot=3, id="d" * 32, name="root", size_bytes=1 << 20, base=str(path.parent / "base"))
    machine = RecoveredMachine(machine_id="a" * 32, name="db1", epoch=2, lsn=7, time_ns=10**18, disks=(disk,))
    path.write_bytes(encode_recovered(msgspec.structs.replace(machine, **changes)))
    return str(path)


def test_machine_from_a_recovery_point(asrfs: Run, scratch: Path) -> None:
    file = recovered_file(scratch / "db1.json")
    assert asrfs("init", "db2", "--recovered", file).code == 2
    assert asrfs("init", "db1", "--recovered", str(scratch / "none.json")).code == 3
    assert asrfs("init", "db1", "--recovered", str(scratch)).code == 2
    (scratch / "bad.json").write_text("{}")
    assert asrfs("init", "db1", "--recovered", str(scratch / "bad.json")).code == 5
    assert not (scratch / "state" / "machine.json").exists()
    made = asrfs("init", "db1", "--recovered", file, "--json")
    assert json.loads(made.out)["id"] == "a" * 32
    assert asrfs("init", "db1", "--recovered", file).code == 4
    shown = json.loads(asrfs("status", "--json").out)
    assert (shown["state"], shown["epoch"], shown["lsn"]["appended"]) == ("recovered", 2, 7)
    assert "LSN 7 of 2001-09-09" in shown["reason"]
    assert asrfs("disk", "resize", "root", "2M").code == 4
    assert asrfs("disk", "remove", "root", "--yes").code == 4


@pytest.mark.parametrize("is_trial", [True, False])
def test_a_machine_that_is_only_tried_is_not_enrolled(asrfs: Run, scratch: Path, is_trial: bool) -> None:
    """Before anything is asked of the store, which would lock the machine itself out; nobody listens there."""
    assert asrfs("init", "db1", "--recovered", recovered_file(scratch / "db1.json", is_trial=is_trial)).code == 0
    token = encode_token(Token(machine="db1", secret=bytes(32), fingerprint=bytes(32)))
    said = asrfs("enroll", "--store", "127.0.0.1:1", "--token", token)
    assert (said.code, "in a test failover" in said.err) == ((4, True) if is_trial else (1, False))


@pytest.fixture
def machine(asrfs: Run) -> Run:
    """`asrfs` with a machine web1 that has a disk root of 1 MiB."""
    assert asrfs("init", "web1").code == 0
    assert asrfs("disk", "add", "root", "--size", "1M").code == 0
    return asrfs


def tree(path: Path) -> dict[str, bytes]:
    """Every file below, with its content."""
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


BAD_NAMES = ["../x", "", "x" * 64, "%2F", "a/b", ".", "-x", "a b", "ä"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_machine_names(asrfs: Run, scratch: Path, name: str) -> None:
    assert asrfs("init", "--", name).code == 2
    assert not (scratch / "state" / "machine.json").exists()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_disk_names_leave_nothing(machine: Run, scratch: Path, name: str) -> None:
    before = tree(scratch)
    assert machine("disk", "add", "--size", "1M", "--", name).code == 2
    assert tree(scratch) == before


@pytest.mark.parametrize("size", ["0", "1", "511", "513", "1000", "-512", "16E", "99E", "8E", "ten", "", "1.5G"])
def test_bad_sizes_leave_nothing(machine: Run, scratch: Path, size: str) -> None:
    before = tree(scratch)
    assert machine("disk", "add", "data", f"--size={size}").code == 2
    assert tree(scratch) == before


def test_a_size_the_filesystem_cannot_hold_leaves_nothing(machine: Run, scratch: Path) -> None:
    before = tree(scratch)
    assert machine("disk", "add", "data", "--size", "7E").code == 2
    assert tree(scratch) == before


def test_size_and_image_exclude_each_other(machine: Run) -> None:
    assert machine("disk", "add", "data").code == 2
    assert machine("disk", "add", "data", "--size", "1M", "--image", "/etc/hostname").code == 2


def test_images_that_cannot_be_adopted(machine: Run, scratch: Path) -> None:
    odd = scratch / "odd.img"
    odd.write_bytes(b"x" * 1000)
    empty = scratch / "empty.img"
    empty.touch()
    for image, code in ((scratch / "none.img", 3), (odd, 2), (empty, 2), (scratch, 2), (Path("/dev/null"), 2)):
        outcome = machine("disk", "add", "data", "--image", str(image))
        assert outcome.code == code, (image, outcome)
    assert len(json.loads(machine("disk", "list", "--json").out)) == 1


def test_an_image_belongs_to_one_state_directory(machine: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = scratch / "disk.img"
    image.write_bytes(os.urandom(8192))
    assert machine("disk", "add", "data", "--image", str(image)).code == 0
    again = scratch / "same.img"
    again.symlink_to(image)
    assert machine("disk", "add", "data2", "--image", str(again)).code == 4
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "other"))
    assert machine("init", "web2").code == 0
    refused = machine("disk", "add", "data", "--image", str(image))
    assert refused.code == 4
    assert str(scratch / "state") in refused.err
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "state"))
    assert machine("disk", "remove", "data", "--yes").code == 0
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "other"))
    assert machine("disk", "add", "data", "--image", str(image)).code == 0
    assert image.stat().st_size == 8192


def test_an_image_that_a_state_directory_made_is_adopted_once_it_is_given_up(
    machine: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = json.loads(machine("disk", "list", "--json").out)[0]["image"]
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "other"))
    assert machine("init", "web2").code == 0
    alias = scratch / "alias.img"
    alias.symlink_to(image)
    for state in (scratch / "other", scratch / "state"):
        monkeypatch.setenv("ASRFS_STATE", str(state))
        for path in (image, str(alias)):
            before = tree(scratch)
            refused = machine("disk", "add", "data", "--image", path)
            assert refused.code == 4, (state, path, refused)
            assert "disk root of machine web1" in refused.err
            assert tree(scratch) == before
    assert machine("disk", "remove", "root", "--yes").code == 0
    monkeypatch.setenv("ASRFS_STATE", str(scratch / "other"))
    assert machine("disk", "add", "data", "--image", image).code == 0


def test_a_disk_name_is_used_once(machine: Run, scratch: Path) -> None:
    before = tree(scratch)
    assert machine("disk", "add", "root", "--size", "1M").code == 4
    assert tree(scratch) == before


def test_unknown_disks(machine: Run) -> None:
    for arguments in (("attach", "data"), ("detach", "data"), ("disk", "remove", "data", "--yes")):
        assert machine(*arguments).code == 3


def test_removing_asks_first_and_keeps_the_image(machine: Run) -> None:
    image = json.loads(machine("disk", "list", "--json").out)[0]["image"]
    refused = machine("disk", "remove", "root")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert len(json.loads(machine("disk", "list", "--json").out)) == 1
    assert machine("disk", "remove", "root", "--yes").code == 0
    assert json.loads(machine("disk", "list", "--json").out) == []
    assert Path(image).exists()


def test_a_disk_grows_and_never_shrinks(machine: Run) -> None:
    def disk() -> dict[str, object]:
        return dict(json.loads(machine("disk", "list", "--json").out)[0])

    before = disk()
    assert machine("disk", "resize", "root", "8M").code == 0
    assert disk() == before | {"size_bytes": 8 << 20}
    refused = machine("disk", "resize", "root", "4M")
    assert refused.code == 4
    assert "not made smaller" in refused.err
    assert machine("disk", "resize", "root", "8M").code == 0, "what is so already is no error"
    assert machine("disk", "resize", "root", "5000").code == 2
    assert machine("disk", "resize", "other", "9M").code == 3
    assert os.path.getsize(str(before["image"])) == 8 << 20


def test_a_disk_made_again_is_another_incarnation(machine: Run) -> None:
    first = json.loads(machine("disk", "list", "--json").out)[0]
    assert machine("disk", "remove", "root", "--yes").code == 0
    assert machine("disk", "add", "root", "--size", "1M").code == 0
    second = json.loads(machine("disk", "list", "--json").out)[0]
    assert second["id"] != first["id"]
    assert second["slot"] != first["slot"]


def test_a_state_directory_is_made_once(machine: Run, scratch: Path) -> None:
    before = tree(scratch)
    assert machine("init", "web2").code == 4
    assert tree(scratch) == before


def test_no_state_directory(asrfs: Run) -> None:
    for arguments in (("disk", "list"), ("status",), ("serve", "--mount", "/nowhere"), ("settings",), ("drain",)):
        assert asrfs(*arguments).code == 3


def test_what_needs_a_served_machine_says_so(machine: Run) -> None:
    for arguments in (("point", "create"), ("drain",), ("pause",), ("resume",), ("attach", "root"), ("detach", "root")):
        outcome = machine(*arguments)
        assert outcome.code == 4, arguments
        assert "asrfs serve" in outcome.err


def test_status_of_a_machine_that_is_not_served(machine: Run) -> None:
    status = json.loads(machine("status", "--json").out)
    assert status["machine"] == "web1"
    assert status["state"] == "unprotected"
    assert status["lsn"] == {"appended": 0, "durable": 0, "applied": 0, "acknowledged": 0}
    assert set(status["processes"]) == {"supervisor", "disk_server", "agent"}
    assert [disk["name"] for disk in status["disks"]] == ["root"]
    assert {"reason", "epoch", "lag", "achieved_rpo_seconds", "journal", "link", "alarms"} <= set(status)
    assert set(status["lag"]) == {"records", "bytes", "seconds"}
    assert {"bytes", "quota_bytes"} <= set(status["journal"])


@pytest.mark.parametrize(
    "word", ["object_age", "colour=red", "object_age=never", "journal_quota=-1", "object_size=1", "=", "=1"]
)
def test_bad_settings_change_nothing(machine: Run, word: str) -> None:
    before = machine("settings", "--json").out
    assert machine("set", "object_size=1M", word).code == 2
    assert machine("settings", "--json").out == before


def test_settings_are_kept(machine: Run) -> None:
    assert machine("set", "object_age=1s", "journal_quota=30%").code == 0
    shown = json.loads(machine("settings", "--json").out)
    assert shown["object_age"]["value"] == "1s"
    assert shown["object_age"]["set"]
    assert shown["object_size"] == {"value": "4M", "default": "4M", "set": False, "policy": None, "from": "default"}


def test_every_key_of_the_policy_is_shown_with_where_it_comes_from(machine: Run, scratch: Path) -> None:
    told = HostConfiguration(
        generation=4, policy="gold", keys={"crash_interval": "60s", "retention": "7d", "point_alarm": "x"}
    )
    (scratch / "state" / "configuration.json").write_bytes(encode_configuration(told))
    assert machine("set", "crash_interval=5s", "application_interval=off").code == 0
    shown = json.loads(machine("settings", "--json").out)
    assert shown.keys() >= POLICY_TEXTS.keys()
    assert {key: (shown[key]["value"], shown[key]["from"], shown[key]["policy"]) for key in POLICY_TEXTS} == {
        key: (text, "default", None) for key, text in POLICY_TEXTS.items()
    } | {
        "crash_interval": ("5s", "set here", "60s"),
        "application_interval": ("off", "set here", None),
        "retention": ("7d", "policy gold", "7d"),
    }
    assert "set here, the policy says 60s" in machine("settings").out
    assert machine("set", "crash_interval=default").code == 0
    assert json.loads(machine("settings", "--json").out)["crash_interval"]["from"] == "policy gold"


def test_what_cannot_be_set_here_is_said_all_at_once(machine: Run) -> None:
    before = machine("settings", "--json").out
    refused = machine(
        *("set", "retention=1d", "crash_intervall=5s", "object_age=never", "aplication_interval=default"),
        *("junk", "object_size=1M", "object_size=2M"),
    )
    assert refused.code == 2
    for part in (
        "retention is decided at the store",
        "did you mean crash_interval?",
        "object_age=never",
        "did you mean application_interval?",
        "'junk' is not KEY=VALUE",
        "object_size is given twice",
    ):
        assert part in refused.err, refused.err
    contradiction = machine("set", "application_interval=48h")
    assert contradiction.code == 2 and "not shorter than retention of 24h" in contradiction.err
    assert machine("settings", "--json").out == before


@pytest.mark.parametrize(
    "token", ["", "x", "asrfs1.", "asrfs1.AAAA", "asrfs2." + "A" * 80, "asrfs1." + "!" * 40, "asrfs1." + "A" * 5000]
)
def test_what_is_no_token(machine: Run, scratch: Path, token: str) -> None:
    outcome = machine("enroll", "--store", "127.0.0.1:1", f"--token={token}")
    assert outcome.code in (2, 6)
    assert not list((scratch / "state" / "keys").iterdir())


@pytest.mark.parametrize("address", ["", "nowhere", "host:", ":1", "host:0", "host:70000", "host:x", "a b:1"])
def test_what_is_no_address(machine: Run, address: str) -> None:
    assert machine("enroll", f"--store={address}", "--token", "asrfs1.AAAA").code == 2


def test_mount_points_that_cannot_be_used(machine: Run, scratch: Path) -> None:
    full = scratch / "full"
    full.mkdir()
    (full / "file").touch()
    file = scratch / "file"
    file.touch()
    for path, code in ((scratch / "none", 3), (full, 4), (file, 4), (Path("/proc"), 4)):
        program = [sys.executable, "-m", "asrfs.cli.main", "--state", str(scratch / "state")]
        command = [*program, "serve", "--mount", str(path)]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert outcome.returncode == code, (path, outcome)
        assert outcome.stderr.startswith("asrfs: error: ")
        assert outcome.stderr.count("\n") == 1


def test_points_that_cannot_be(machine: Run) -> None:
    assert machine("point", "create", "--name", "../x").code == 2
    assert machine("point", "create", "--consistency", "perfect").code == 2


def test_a_segment_that_was_made_ahead_is_no_damage(machine: Run, scratch: Path) -> None:
    (scratch / "next.segment").write_bytes(bytes(1 << 20))
    assert json.loads(machine("inspect", str(scratch / "next.segment"), "--json").out)["records"] == []


def test_paths_that_are_no_text_cannot_be_written_down(machine: Run, scratch: Path) -> None:
    odd = os.fsdecode(os.fsencode(scratch) + b"/\xff")
    os.mkdir(odd)
    (Path(odd) / "image").write_bytes(bytes(4096))
    (Path(odd) / "hook").touch(0o700)
    (Path(odd) / "mount").mkdir()
    assert "is not UTF-8" in machine("init", "web2", "--state", f"{odd}/state").err
    assert "is not UTF-8" in machine("disk", "add", "extra", "--image", f"{odd}/image").err
    assert "is not UTF-8" in machine("serve", "--mount", f"{odd}/mount").err
    assert "is not UTF-8" in machine("hooks", "add", "pre", f"{odd}/hook", "--order", "1", "--timeout", "1s").err
    assert not os.path.exists(f"{odd}/state")
    assert os.listxattr(f"{odd}/image") == []
    assert "extra" not in machine("disk", "list").out


def test_a_fifo_is_not_waited_for(machine: Run, scratch: Path) -> None:
    os.mkfifo(scratch / "fifo")
    assert machine("inspect", str(scratch / "fifo")).code == 2


def test_standard_streams_may_be_closed(machine: Run) -> None:
    command = f"{sys.executable} -m asrfs.cli.main"
    for closed in (">&-", ">&- 2>&-", "<&-"):
        done = subprocess.run(
            ["sh", "-c", f"{command} disk list {closed}"], capture_output=True, timeout=30, check=False
        )
        assert (done.returncode, done.stderr) == (0, b""), closed


def test_watching_without_a_terminal_prints_until_it_is_interrupted(machine: Run) -> None:
    watch = [sys.executable, "-m", "asrfs.cli.main", "status", "--watch"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen: list[str] = []
        while len(seen) < 2:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            seen += [line] if line.startswith("machine") else []
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("name", ["latest", "latest-processed", "latest-application", "0" * 32, "tail-of-epoch-1"])
def test_a_point_is_not_named_like_a_selector(machine: Run, name: str) -> None:
    refused = machine("point", "create", "--name", name)
    assert refused.code == 2
    assert "means something else" in refused.err


def test_what_cannot_be_inspected(machine: Run, scratch: Path) -> None:
    junk = scratch / "junk"
    junk.write_bytes(os.urandom(8192))
    assert machine("inspect", str(scratch / "none")).code == 3
    assert machine("inspect", str(scratch)).code == 2
    assert machine("inspect", str(junk)).code == 5
    junk.write_bytes(b"ASRSEG1\n" + bytes(5000))
    assert machine("inspect", str(junk)).code == 5


def test_usage(asrfs: Run) -> None:
    for arguments in (("nonsense",), ("disk", "frobnicate"), ("init",), ("serve",), ("disk", "add")):
        assert asrfs(*arguments).code == 2
    assert asrfs("--help").code == 0
    assert asrfs("disk", "add", "--help").code == 0


def test_options_stand_anywhere(machine: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASRFS_STATE")
    state = str(scratch / "state")
    for arguments in (
        ("--state", state, "--json", "disk", "list"),
        ("disk", "list", "--json", "--state", state),
        ("disk", "--json", "list", f"--state={state}"),
    ):
        assert json.loads(machine(*arguments).out)[0]["name"] == "root"
    assert machine("disk", "list", "--state").code == 2


def test_state_files_are_private(machine: Run, scratch: Path) -> None:
    for path in [scratch / "state", *(scratch / "state").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_hooks_are_added_listed_and_removed(machine: Run) -> None:
    assert machine("hooks", "add", "pre", "/bin/true -x 'a b'", "--order", "7", "--timeout", "5s").code == 0
    assert machine("hooks", "add", "hold", "mysql", "--name", "lock").code == 0
    (first, lock) = json.loads(machine("hooks", "list", "--json").out)
    assert (first["name"], first["argv"], first["timeout_s"]) == ("pre-07-true", ["/bin/true", "-x", "a b"], 5.0)
    assert lock["phase"] == "hold" and lock["command"].endswith("/hooks/mysql.sh")
    assert machine("hooks", "remove", "pre-07-true").code == 0
    assert machine("hooks", "remove", "pre-07-true").code == 3
    assert len(json.loads(machine("hooks", "list", "--json").out)) == 1


def test_a_hook_whose_path_has_blanks_is_one_program(machine: Run, scratch: Path) -> None:
    path = scratch / "be quiet.sh"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    assert machine("hooks", "add", "pre", str(path)).code == 0
    assert json.loads(machine("hooks", "list", "--json").out)[0]["argv"] == [str(path)]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("during", "/bin/true"), 2),
        (("pre", "/bin/true", "--order", "-1"), 2),
        (("pre", "/bin/true", "--order", "x"), 2),
        (("pre", "/bin/true", "--timeout", "0s"), 2),
        (("pre", "/bin/true", "--timeout", "soon"), 2),
        (("pre", "/bin/true", "--name", "../x"), 2),
        (("pre", "/bin/sh 'x"), 2),
        (("pre", ""), 2),
        (("pre", "no-such-program-anywhere"), 2),
        (("post", "postgresql"), 2),
        (("pre", "/nonexistent/x"), 4),
        (("pre", "/etc/passwd"), 4),
    ],
)
def test_hooks_that_cannot_be_leave_nothing(machine: Run, scratch: Path, words: tuple[str, ...], code: int) -> None:
    before = tree(scratch)
    assert machine("hooks", "add", *words).code == code
    assert tree(scratch) == before
