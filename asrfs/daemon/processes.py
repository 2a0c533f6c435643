"""Processes that outlive who started them: started in a session of their own, watched by pidfd, adopted when found.

Nothing ties a child's life to ours. A pidfd names one process for good, so no signal can reach a later one of the
same number, and a process that is not our child can be waited for as well; only its exit code is not ours to know.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import asrfs
from asrfs.daemon.control import UnreachableError, call
from asrfs.daemon.logs import LOG_BYTES_MAX
from asrfs.daemon.sd_notify import VARIABLE as NOTIFY_VARIABLE
from asrfs.daemon.state import Role, StateDirectory
from asrfs.storage.priority import pass_on

_CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""One thread and few arenas: nobody multiplies matrices here, and memory that is locked should be little."""

START_SECONDS_MAX = 15.0
"""A process that is started listens by then."""
_TELL_INTERVAL_S = 0.05


class WatchedProcess:
    """A process by its pidfd. `child`: ours, whose exit code we learn."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.started = time.monotonic()
        self._pidfd = os.pidfd_open(pid)
        self._child = child

    async def wait(self) -> int | None:
        """Wait for the end; the exit code (negative: of a signal), None if it was adopted. Any number of times."""
        import trio  # most commands need this module and no event loop, which takes half as long to load as they run

        await trio.lowlevel.wait_readable(self._pidfd)
        return None if self._child is None else self._child.wait()

    def kill(self) -> None:
        """SIGKILL; nothing happens if it has ended."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        os.close(self._pidfd)


class RestartPace:
    """How long to wait before a process is started again: not at all, unless it keeps dying young."""

    DELAY_S_FIRST = 0.1
    DELAY_S_MAX = 5.0
    LIFE_S_YOUNG = 10.0

    def __init__(self) -> None:
        self._young_deaths = 0

    def delay(self, lived_s: float) -> float:
        """Seconds to wait after a process that lived `lived_s`."""
        if lived_s >= self.LIFE_S_YOUNG:
            self._young_deaths = 0
        self._young_deaths += 1
        if self._young_deaths <= 2:
            return 0.0
        return float(min(self.DELAY_S_MAX, self.DELAY_S_FIRST * 2 ** min(self._young_deaths - 3, 16)))


def spawn(state: StateDirectory, role: Role, arguments: Sequence[str], pass_fds: Sequence[int] = ()) -> WatchedProcess:
    """Start `python -m asrfs.daemon.ROLE`, its output going to the log of the role."""
    with open(_log_file(state, role), "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", f"asrfs.daemon.{role}", "--state", state.root, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=pass_fds,
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
    pass_on(child.pid)
    return WatchedProcess(child.pid, child)


def child_environment() -> dict[str, str]:
    """Of a process of ours: it finds this very package."""
    environment = {**os.environ, **_CHILD_ENVIRONMENT}
    environment.pop(NOTIFY_VARIABLE, None)
    packages = os.path.dirname(os.path.dirname(os.path.abspath(asrfs.__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, environment.get("PYTHONPATH"))))
    return environment


def adopt(state: StateDirectory, role: Role) -> WatchedProcess | None:
    """The process that is this role now, None if nobody is."""
    pid = state.lock_holder(role)
    if not pid:
        return None
    try:
        process = WatchedProcess(pid)
    except ProcessLookupError:
        return None
    if state.lock_holder(role) == pid:
        return process
    process.close()
    return None


def tell(state: StateDirectory, role: Role, verb: str) -> None:
    """Have the process that is this role do `verb`; nothing if nobody is. Raises what it raised, TemporaryError.

    One that is just starting may have read the old state of things already, so it is asked until it listens.
    """
    deadline = time.monotonic() + START_SECONDS_MAX
    while state.lock_holder(role) is not None:
        try:
            call(state.socket_path(role), verb)
            return
        except UnreachableError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_TELL_INTERVAL_S)


def _log_file(state: StateDirectory, role: Role) -> str:
    """The log of a role, put aside first if it has grown too large."""
    path = state.log_path(role)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    try:
        if os.path.getsize(path) > LOG_BYTES_MAX:
            os.replace(path, f"{path}.1")
    except FileNotFoundError:
        pass
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return path
