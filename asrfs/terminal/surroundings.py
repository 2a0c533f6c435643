"""What a program of ours finds when it is called, made what it relies on. Whatever it starts then finds the same.

Who calls us may be a cron job, a minimal container, a service manager or a program with habits of its own: standard
streams may be closed, signals blocked or ignored, and the directories of the system's tools missing from PATH.
"""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper

_TOOLS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_STREAMS = 3


def settle() -> None:
    """Only for the main thread of a process that is just beginning."""
    _open_streams()
    _say_whatever_it_is()
    _take_signals()
    os.environ["PATH"] = with_tools(os.environ.get("PATH", ""))


def with_tools(path: str) -> str:
    """A PATH that leads to the system's tools, behind all that it led to before: losetup and mkfs are where ordinary
    users, and cron, do not look."""
    given = [directory for directory in path.split(os.pathsep) if directory]
    return os.pathsep.join([*given, *(directory for directory in _TOOLS if directory not in given)])


def _open_streams() -> None:
    """Of standard streams that are closed, whatever is opened next would be taken for them: a socket, /dev/fuse."""
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) < _STREAMS:
            os.set_inheritable(fd, True)
    except OSError:  # a place without devices: then they stay as they are
        return
    os.close(fd)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _say_whatever_it_is() -> None:
    """Names of files are any bytes, and not every terminal has every letter: neither is a reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def _take_signals() -> None:
    """While SIGCHLD is ignored the kernel forgets how children end, and every tool would seem to have done its work.
    Who has blocked SIGTERM could not be asked to stop."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
