"""What a program makes of what it is called with, in processes that are called as odd callers do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

from asrfs.daemon import loop_devices
from asrfs.errors import NotFoundError, RefusedError
from asrfs.storage.kernel_text import kernel_lines
from asrfs.terminal import program as frame
from asrfs.terminal.surroundings import with_tools
from replica_store.daemon.serve import allow_descriptors

SETTLE = "from asrfs.terminal import surroundings; surroundings.settle()\n"


def said_by(program: str, *, closed: str = "", **variables: str) -> bytes:
    """What a program says that has settled and then does this; `closed`: in the shell's words."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", SETTLE + program],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    return done.stdout


def test_no_file_is_taken_for_a_standard_stream() -> None:
    say = "import os, sys; print('x'); print('x', file=sys.stderr); assert sys.stdin.read() == ''\n"
    say += "fd = os.open('/', os.O_RDONLY); assert fd > 2, fd; assert os.get_inheritable(1)"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        assert said_by(say, closed=closed) == (b"" if " >&-" in f" {closed}" else b"x\n")


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("utf-8:strict", b"\xc3\xbc\xe2\x82\xac\xff"), ("latin-1:strict", b"\xfc\\u20ac\\udcff")],
)
def test_every_name_of_a_file_can_be_said(encoding: str, printed: bytes) -> None:
    name = "print(bytes.fromhex('c3bce282acff').decode(errors='surrogateescape'), end='')"
    assert said_by(name, PYTHONIOENCODING=encoding) == printed


def test_how_children_end_is_known_and_no_signal_waits() -> None:
    """Who calls us may ignore SIGCHLD and have blocked anything, and both are inherited."""
    odd = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    odd += "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); os.execvp(sys.argv[1], sys.argv[1:])"
    say = "import signal, subprocess; assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
    say += "print(subprocess.run(['false']).returncode)"
    words = [sys.executable, "-c", odd, sys.executable, "-c", SETTLE + say]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout == "1\n"


def test_the_tools_of_the_system_are_looked_for_where_they_are() -> None:
    everything = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert with_tools("") == everything
    assert with_tools(everything) == everything
    assert (
        with_tools("/opt/first:/usr/bin:/bin")
        == "/opt/first:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin"
    )
    assert said_by("import os; print(os.environ['PATH'])", PATH="/usr/bin:/bin") == (
        b"/usr/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin\n"
    )


def test_of_what_the_kernel_says_nothing_but_a_newline_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(b"a\xff\r\x0c\xc2\x85\n\xe2\x80\xa8b\n")
    assert kernel_lines(tmp_path / "said") == [os.fsdecode(b"a\xff\r\x0c\xc2\x85"), "\u2028b"]
    (tmp_path / "said").write_bytes(b"")
    assert kernel_lines(tmp_path / "said") == []


def test_what_a_tool_says_may_be_in_any_encoding() -> None:
    with pytest.raises(RefusedError, match=r"failed: ung.ltig"):
        loop_devices.run_tool("sh", "-c", r"printf 'ung\374ltig\n' >&2; exit 1")


def test_a_limit_of_open_files_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses one above its own, also where it is ours already."""
    asked = []

    def refuse(kind: int, limits: tuple[int, int]) -> None:
        asked.append((kind, limits))
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_descriptors()
    assert asked


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 1, "too many open files: allow more of them (`ulimit -n`)"),
        (NotFoundError("no such thing"), 3, "no such thing"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (
            UnicodeEncodeError("utf-8", "/a\udcff", 2, 3, "surrogates not allowed"),
            2,
            r"'/a\udcff' is not UTF-8: choose a path that is",
        ),
        (LookupError("x"), 1, "this is a fault of the program: LookupError: x"),
    ],
)
def test_what_happens_in_a_task_is_said_as_if_there_were_none(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> tuple[list[str], object]:
        raise BaseExceptionGroup("a nursery", [BaseExceptionGroup("in a nursery", [raised])])

    assert frame.run(click.Group(), "asrfs", fail) == code
    assert capsys.readouterr().err == f"asrfs: error: {said}\n"


def test_a_place_without_devices_is_left_as_it_is() -> None:
    """As a container's root that nobody has put anything into."""
    say = "import os; os.devnull = '/nonexistent/null'; surroundings.settle(); print('x')"
    assert said_by(say) == b"x\n"
    assert said_by(say, closed=">&-") == b""


def test_who_is_in_a_directory_that_is_gone_is_told_so(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", sys.executable, "-m", "asrfs.cli.main"]
    words += ["--state", "state", "disk", "list"]
    # An empty part would be the directory that is gone, and Python itself would not start.
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        words, cwd=gone, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 1
    assert done.stderr == "asrfs: error: the current directory is gone: change to another, or give absolute paths\n"
