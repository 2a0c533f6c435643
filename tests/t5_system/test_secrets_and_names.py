"""A whole run of both programs, looked at from outside: who may read what it leaves, which secrets are to be seen,
and what becomes of names that are none, over every verb that takes one.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrfs.cli import main as host_program
from asrfs.daemon import control
from asrfs.daemon.state import ROLES
from asrfs.errors import AsrfsError, BadInputError
from asrfs.transport.enrolment import decode_token, encode_base64url
from replica_store.cli import main as store_program
from replica_store.vault.vault import Vault
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.store import StoreUnderTest

SECRET_CHARACTERS_MIN = 20
NOBODY = 65534
NAMES = (
    *("../x", "..", ".", "/etc/passwd", "a/b", "a/../../b", "x/", "", " ", "a b", "a\nb", "\x1b[2J", "é", "a" * 64),
    *("-", "_x", ".x", "a:b", "a*", "$(id)", "%2e%2e", "a\\b", "--help=", "~root", "con\u202e"),
)


class Watch:
    """Every command line and environment of a process that names `scratch`, read over and over while this is open."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = os.fsencode(scratch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seen: set[bytes] = set()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self._look()

    def _look(self) -> None:
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                line = Path("/proc", number, "cmdline").read_bytes()
                if self._scratch in line:
                    self.seen.add(line)
                    self.seen.add(Path("/proc", number, "environ").read_bytes())


class Site:
    """A store, a host that enrols over stdin, serves, makes a point, drains, and an export; under umask 0."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.store = StoreUnderTest(scratch)
        (scratch / "host").mkdir()
        self.host = HostUnderTest(scratch / "host")
        self.said: list[str] = []
        with Watch(scratch) as self.watch:
            self.say(self.store.command("init", "--name", "site-b"))
            self.store.serve()
            token = self.say(self.store.command("token", "web1"))
            self.say(self.asrfs("init", "web1"))
            self.say(self.asrfs("disk", "add", "root", "--size", "1M"))
            self.said.remove(token)  # printed for a person to take along, once
            self.say(self.asrfs("enroll", "--store", self.store.manage, "--token", "-"), token)
            self.host.serve()
            with (self.host.mount / "root.img").open("r+b") as disk:
                disk.write(b"content" * 1000)
                os.fsync(disk.fileno())
            self.say(self.asrfs("point", "create", "--name", "noon", "--wait"))
            self.say(self.asrfs("set", "object_age=100ms"))
            for verb in (("drain",), ("status",), ("point", "list"), ("disk", "list"), ("settings",)):
                self.say(self.asrfs("--json", *verb))
            for words in (("machine", "show", "web1"), ("verify",), ("point", "list", "web1")):
                self.say(self.store.command("--json", *words))
            output = scratch / "export.img"
            self.say(self.store.command("export", "web1", "root", "--point", "noon", "--output", output))
            assert output.read_bytes().startswith(b"content")
        self.token = token.strip()

    def asrfs(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "asrfs.cli.main", "--state", str(self.host.path), *words]

    def say(self, command: list[str], given: str = "") -> str:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stderr)
        self.said += [done.stdout, done.stderr]
        return done.stdout

    def close(self) -> None:
        self.host.close()
        self.store.close()


@pytest.fixture(scope="module")
def site(make_scratch: Callable[[str], Path]) -> Iterator[Site]:
    previous = os.umask(0)  # whatever is private is so because the programs make it so
    try:
        site = Site(make_scratch("secrets"))
    finally:
        os.umask(previous)
    try:
        yield site
    finally:
        site.close()


# ---- who may read --------------------------------------------------------------------------------------------------


def test_directories_are_0700_and_files_and_sockets_0600(site: Site) -> None:
    sockets = 0
    for root in (site.host.path, site.store.path):
        for path in [root, *root.rglob("*")]:
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            wanted = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
            assert mode & ~wanted == 0, f"{path} is {mode:o}"
            assert status.st_uid == os.geteuid()
            sockets += stat.S_ISSOCK(status.st_mode)
    assert sockets >= 3, "supervisor, disk server and agent listen"
    mount = site.host.mount.stat()
    assert stat.S_IMODE(mount.st_mode) == 0o700
    assert stat.S_IMODE((site.host.mount / "root.img").stat().st_mode) == 0o600


def test_sockets_listen_to_no_other_user(site: Site) -> None:
    sockets = [site.host.state.socket_path(role) for role in ROLES]
    directory = os.open(site.host.path / "run", os.O_PATH)  # a way past the directories above, which are closed too
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        for path in sockets:
            with socket.socket(socket.AF_UNIX) as stream, pytest.raises(PermissionError):
                stream.connect(f"/proc/self/fd/{directory}/{Path(path).name}")
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.close(directory)


# ---- secrets -------------------------------------------------------------------------------------------------------


def secrets_of(site: Site) -> dict[str, set[bytes]]:
    """Each secret of the run in the ways in which it could be written."""
    enrolment = json.loads((site.host.path / "keys" / "store.json").read_text())
    raw = {
        "the token": decode_token(site.token).secret,
        "the payload key": base64.b64decode(enrolment["payload_key"]),
        "the index key": base64.b64decode(enrolment["index_key"]),
        "master.key": (site.store.path / "keys" / "master.key").read_bytes(),
    }
    ways = {
        what: {secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"="), encode_base64url(secret).encode()}
        for what, secret in raw.items()
    }
    ways["the token"].add(site.token.encode())
    for path in (
        site.host.path / "keys" / "machine.key",
        site.store.path / "keys" / "ca.key",
        site.store.path / "keys" / "server.key",
    ):
        key = path.read_bytes().partition(b"-----END PRIVATE KEY")[0]
        ways[path.name] = {line for line in key.splitlines() if len(line) >= SECRET_CHARACTERS_MIN and b"-" not in line}
        assert ways[path.name]
    return ways


def test_no_secret_on_a_command_line_in_an_environment_in_a_log_or_in_what_is_said(site: Site) -> None:
    secrets = secrets_of(site)
    logs = [*(site.host.path / "log").iterdir(), site.scratch / "store.log", site.host.root / "serve.stderr"]
    places = {f"log {path}": path.read_bytes() for path in logs}
    places |= {f"output {number}": text.encode() for number, text in enumerate(site.said)}
    places |= {f"process {line[:200]!r}": line for line in site.watch.seen}
    for part in ("asrfs.cli.main", "replica_store.cli.main", "disk_server", "agent"):
        assert any(part.encode() in line for line in site.watch.seen), f"{part} was looked at"
    for place, content in places.items():
        for what, ways in secrets.items():
            assert not any(way in content for way in ways), f"{what} is to be seen in {place}"


def test_a_secret_on_a_command_line_would_have_been_noticed(site: Site) -> None:
    """The negative control: the same watch over the form of the contract that shows its token."""
    token = site.store.token("web1")
    with Watch(site.scratch) as watch:
        done = subprocess.run(
            site.asrfs("enroll", "--store", site.store.manage, "--token", token), capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert any(token.encode() in line for line in watch.seen)


def test_secrets_lie_in_no_other_file(site: Site) -> None:
    """Keys lie in `keys/`, tokens nowhere. Payloads are sealed in the vault."""
    secrets = secrets_of(site)
    for root in (site.host.path, site.store.path):
        for path in root.rglob("*"):
            if path.is_file() and path.parent.name != "keys":
                content = path.read_bytes()
                for what, ways in secrets.items():
                    assert not any(way in content for way in ways), f"{what} lies in {path}"
    for path in (site.store.path / "objects").rglob("*.obj"):
        assert b"contentcontent" not in path.read_bytes(), "a payload lies open in the vault"


# ---- names ---------------------------------------------------------------------------------------------------------

HOST_VERBS: tuple[tuple[str, ...], ...] = (
    ("init", "NAME"),
    ("disk", "add", "NAME", "--size", "1M"),
    ("disk", "resize", "NAME", "2M"),
    ("disk", "remove", "NAME", "--yes"),
    ("attach", "NAME"),
    ("detach", "NAME"),
    ("point", "create", "--name", "NAME"),
)
STORE_VERBS: tuple[tuple[str, ...], ...] = (
    ("init", "--name", "NAME"),
    ("token", "NAME"),
    ("machine", "show", "NAME"),
    ("machine", "revoke", "NAME"),
    ("machine", "revoke", "NAME", "--yes"),
    ("point", "list", "NAME"),
    ("export", "NAME", "root", "--point", "latest", "--output", "OUT"),
    ("export", "web1", "NAME", "--point", "latest", "--output", "OUT"),
    ("export", "web1", "root", "--point", "NAME", "--output", "OUT"),
    ("verify", "NAME"),
)


def within(program: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """As a process would do it, in this one: faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(words)
    assert not (code and out.getvalue()), out.getvalue()
    return code, err.getvalue()


def listing(path: Path) -> set[str]:
    """Everything below except what running processes make by themselves."""
    passing = ("objects/", "journal/", "log/", "catalog.sqlite3-")
    return {name for each in path.rglob("*") if not any(p in (name := str(each.relative_to(path))) for p in passing)}


def test_names_that_are_none_over_every_verb(site: Site) -> None:
    disks = site.host.asrfs("disk", "list")
    before, above = listing(site.scratch), set(os.listdir(site.scratch.parent))
    for option, root, program, verbs in (
        ("--state", site.host.path, host_program.run, HOST_VERBS),
        ("--vault", site.store.path, store_program.run, STORE_VERBS),
    ):
        for verb in verbs:
            for name in NAMES:
                place = site.scratch / "new" if verb[0] == "init" else root
                words = [name if word == "NAME" else word for word in verb]
                words = [str(site.scratch / "out.img") if word == "OUT" else word for word in words]
                code, text = within(program, [option, str(place), *words])
                assert code in (2, 3), f"{verb} {name!r} ended with {code}: {text}"
                assert text.count("\n") == 1 and text.startswith("asrfs: error: "), f"{verb} {name!r}: {text!r}"
                assert "fault of the program" not in text, text
    assert listing(site.scratch) == before
    assert set(os.listdir(site.scratch.parent)) == above
    assert site.host.asrfs("disk", "list") == disks
    assert [each["machine"] for each in site.store.ask("machine", "list")] == ["web1"]


def test_names_that_are_none_over_every_control_verb(site: Site) -> None:
    """Also who speaks to the sockets themselves makes no path and ends no process."""
    pids = [site.host.pid(role) for role in ("supervisor", "disk_server", "agent")]
    verbs = {
        "agent": ("point_create", "wait_acknowledged", "../x", "", "__class__", "reload\0"),
        "disk_server": ("applied", "fill", "marker", "../x", "", "__init__"),
        "supervisor": ("../x", "", "__init__"),
    }
    for role, known in verbs.items():
        for verb in known:
            for name in NAMES:
                fields = {"name": name, "lsn": name, "slot": name, "offset": name, "segment": name, "payload": name}
                with pytest.raises(AsrfsError) as raised:
                    control.call(site.host.state.socket_path(role), verb, length=name, timeout=name, **fields)  # type: ignore[arg-type]
                assert raised.value.exit_code in (1, 2, 5), f"{role} {verb} {name!r}: {raised.value!r}"
    assert [site.host.pid(role) for role in ("supervisor", "disk_server", "agent")] == pids
    names = [point["name"] for point in site.host.asrfs("point", "list")]
    assert names == ["noon"]
    with pytest.raises(BadInputError):
        control.call(site.host.state.socket_path("agent"), "point_create", name="../x")
    with Vault.open(str(site.store.path)) as vault:
        assert [point.name for point in vault.points(vault.machine("web1").id)] == ["noon"]
