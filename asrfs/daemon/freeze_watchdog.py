"""The freeze watchdog: `python -m asrfs.daemon.freeze_watchdog FD…`, started before anything is frozen. Composition
only.

It has descriptors of all that may be frozen, stays in memory, is the last process the kernel kills for want of it, and
opens nothing. Who freezes tells it through its standard input, see `consistency.watchdog`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asrfs.consistency.freezing import KernelFreezer
from asrfs.consistency.watchdog import FREEZE, THAWED, Watchdog
from asrfs.daemon.hardening import ignore_terminal, limit_thread_stacks, serve_io
from asrfs.errors import TemporaryError
from asrfs.storage.system_clock import SystemClock

READY = b"ready\n"
START_SECONDS_MAX = 30.0
_NICE = -10


class WatchdogProcess:
    """A watchdog over open filesystems, ready when the constructor returns. Raises TemporaryError."""

    def __init__(self, fds: Sequence[int]) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asrfs.daemon.freeze_watchdog", *map(str, fds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,
                cwd="/",
                bufsize=0,
            )
        except OSError as error:
            raise TemporaryError(f"the freeze watchdog cannot be started: {error.strerror}") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._told, self._said = self._process.stdin, self._process.stdout
        if self._said.readline() != READY:
            self.close()
            raise TemporaryError("the freeze watchdog ended before it watched")

    @property
    def pid(self) -> int:
        return self._process.pid

    def freezing(self, deadline: float) -> None:
        """Say that freezing begins now. Raises TemporaryError if nobody would thaw."""
        try:
            self._told.write(FREEZE + f"{deadline!r}\n".encode())
        except OSError:
            raise TemporaryError("the freeze watchdog has ended, so nothing is frozen") from None

    def thawed(self) -> None:
        """Say that nothing is frozen any more; it ends."""
        try:
            self._told.write(THAWED + b"\n")
        except OSError:
            pass  # it was killed: there is nothing left to watch
        self.close()

    def close(self) -> None:
        self._told.close()
        self._said.close()
        self._process.wait()


def stand_apart() -> None:
    """Be neither the first to be killed for want of memory nor one of a service all of whose processes are killed."""
    for path, text in (("/proc/self/oom_score_adj", "-1000"), ("/sys/fs/cgroup/cgroup.procs", str(os.getpid()))):
        try:
            Path(path).write_text(text)
        except OSError:
            pass  # not allowed here: it watches all the same
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    except OSError:
        pass


def main() -> int:
    fds = [int(word) for word in sys.argv[1:]]
    ignore_terminal()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    limit_thread_stacks()
    watchdog = Watchdog(0, os.pidfd_open(os.getppid()), fds, KernelFreezer(), SystemClock())
    serve_io()
    stand_apart()
    os.write(1, READY)
    watchdog.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
