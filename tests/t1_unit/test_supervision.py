"""Small parts of the supervisor: pace of restarts, mount points, what systemd is told, logs that rotate."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrfs.daemon import logs
from asrfs.daemon.processes import RestartPace
from asrfs.daemon.sd_notify import notify
from asrfs.daemon.state import StateDirectory
from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.fuse.mount import MountedFilesystem, parse_mountinfo, prepare_directory, real_path


def test_restart_is_at_once_unless_a_process_keeps_dying_young() -> None:
    pace = RestartPace()
    delays = [pace.delay(0.2) for _ in range(12)]
    assert delays[:2] == [0.0, 0.0]
    assert delays == sorted(delays)
    assert delays[-1] == RestartPace.DELAY_S_MAX
    assert pace.delay(RestartPace.LIFE_S_YOUNG) == 0.0
    assert pace.delay(1.0) == 0.0
    assert pace.delay(1.0) > 0.0


def test_mountinfo_with_escapes_and_optional_fields() -> None:
    lines = [
        "36 35 98:0 /mnt1 /mnt/with\\040space rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue",
        "37 35 0:52 / /run/disks rw,nosuid,nodev - fuse.asrfs asrfs rw,user_id=0",
    ]
    assert parse_mountinfo(lines) == [
        MountedFilesystem("98:0", "/mnt/with space", "ext3", "/dev/root"),
        MountedFilesystem("0:52", "/run/disks", "fuse.asrfs", "asrfs"),
    ]


def test_directories_that_cannot_be_mounted_on(scratch: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        prepare_directory(str(scratch / "missing"))
    (scratch / "file").touch()
    with pytest.raises(RefusedError, match="not a directory"):
        prepare_directory(str(scratch / "file"))
    with pytest.raises(RefusedError, match="not empty"):
        prepare_directory(str(scratch))
    with pytest.raises(RefusedError, match="mount point already"):
        prepare_directory("/proc")
    (scratch / "empty").mkdir()
    prepare_directory(str(scratch / "empty"))


def test_real_path_follows_links_everywhere(scratch: Path) -> None:
    base = Path(os.path.realpath(scratch))
    (base / "a" / "b").mkdir(parents=True)
    (base / "link").symlink_to("a")
    (base / "a" / "last").symlink_to("b")
    (base / "loop").symlink_to("loop")
    assert real_path(str(base / "link" / "last")) == str(base / "a" / "b")
    assert real_path(str(base / "link" / "b") + "/") == str(base / "a" / "b")
    assert real_path(str(base / "missing")) == str(base / "missing")
    assert real_path("/") == "/"
    with pytest.raises(BadInputError, match="too many levels"):
        real_path(str(base / "loop"))


def test_systemd_is_told_where_it_listens(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(scratch / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(b"\0" + path.encode())
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path)
        notify("STOPPING=1")
        assert listener.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, "", "nonsense", "/nobody/listens"])
def test_nobody_asked_to_be_told(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_who_cannot_tell_systemd_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving does not end because there are too many open files for a moment."""

    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setenv("NOTIFY_SOCKET", "/nobody/listens")
    monkeypatch.setattr(socket, "socket", refuse)
    notify("READY=1")


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level, stderr = root.handlers, root.level, os.dup(2)
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = before, level
    os.dup2(stderr, 2)
    os.close(stderr)


@pytest.mark.usefixtures("own_logging")
def test_stderr_follows_the_log_to_the_new_file(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 400)
    state = StateDirectory(str(scratch))
    logs.start_logging(state, "agent", owns_stderr=True)
    for number in range(20):
        logging.getLogger("t").info("line %d", number)
        os.write(2, b"traceback %d\n" % number)
    current = Path(state.log_path("agent"))
    assert "traceback 19" in current.read_text()
    assert sorted(path.name for path in current.parent.iterdir()) == ["agent.log", "agent.log.1", "agent.log.2"]
    assert current.stat().st_mode & 0o777 == 0o600
