"""The disk server: `python -m asrfs.daemon.disk_server --state DIR --mount DIR --fuse-fd N`, started by the supervisor.

The main thread belongs to the FUSE session. One thread of the journal makes records durable, and one thread for each
control connection serves the agent. It ends when the mount is gone, on SIGTERM, or by the verb `stop`: what was
appended is made durable first, and the exit code is 0. Whatever else ends it, the next one carries on.

On the descriptor `--status-fd` it says one line: `ready`, or `failed CODE TEXT` when it cannot start.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from asrfs.daemon.control import Answer, ControlServer, Fields
from asrfs.daemon.hardening import ignore_terminal, limit_thread_stacks, raise_file_limit, serve_io
from asrfs.daemon.logs import start_logging
from asrfs.daemon.served_machine import ServedMachine
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, RefusedError
from asrfs.fuse.direct import DirectSession
from asrfs.storage.priority import serve_at_once
from asrfs.storage.system_clock import SystemClock

_KICK_INTERVAL_S = 0.05

log = logging.getLogger("asrfs.disk_server")


class _Stopper:
    """Gets the main thread out of a read that nothing else would end."""

    def __init__(self, session: DirectSession, end_hold: Callable[[], None]) -> None:
        self._session = session
        self._end_hold = end_hold
        self._started = threading.Lock()
        self._done = threading.Event()

    def on_signal(self, _number: int, _frame: object) -> None:
        """In the main thread. One signal may come just before the read blocks, so there will be more."""
        self.start()
        self._session.stop_from_signal()

    def start(self) -> None:
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._kick, name="stopper", daemon=True).start()

    def finish(self) -> None:
        self._done.set()

    def _kick(self) -> None:
        self._end_hold()  # what is held would keep the main thread
        main = threading.main_thread().ident
        assert main is not None
        while not self._done.wait(_KICK_INTERVAL_S):
            signal.pthread_kill(main, signal.SIGTERM)


def serve(arguments: argparse.Namespace) -> int:
    """Serve until the end; the exit code."""
    state = StateDirectory.open(arguments.state)
    lock = state.take_lock("disk_server")
    if lock is None:
        raise RefusedError(f"{state.root} is already served by process {state.lock_holder('disk_server')}")
    state.settle()
    machine = ServedMachine(state, SystemClock())
    session = DirectSession(arguments.fuse_fd, machine.volume, time_s=int(time.time()))
    stopper = _Stopper(session, machine.hold.end)

    def hello(_: Fields) -> Fields:
        return {
            "pid": os.getpid(),
            "mount": arguments.mount,
            "machine": state.load_machine().name,
            "has_resend": arguments.has_resend,
        }

    def descriptor(request: Fields) -> Answer:
        return Answer(hello(request), arguments.fuse_fd)

    def stop(_: Fields) -> Fields:
        stopper.start()
        return {}

    verbs = machine.verbs() | {"hello": hello, "descriptor": descriptor, "stop": stop}
    control = ControlServer(state.socket_path("disk_server"), verbs)
    serve_io()
    signal.signal(signal.SIGTERM, stopper.on_signal)
    control.start()
    report(arguments.status_fd, "ready")
    arguments.status_fd = None  # closed: another file may have its number by the time something fails
    if arguments.resume:
        session.resume()
    mount_is_gone = session.run()
    stopper.finish()
    control.close()
    machine.flush()
    log.info("ended: %s", "the mount is gone" if mount_is_gone else "told to stop")
    return 0


def report(fd: int | None, text: str) -> None:
    """Tell the supervisor that waits for us, if it still does."""
    if fd is None:
        return
    try:
        os.write(fd, text.replace("\n", " ").encode() + b"\n")
        os.close(fd)
    except OSError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="asrfs.daemon.disk_server")
    parser.add_argument("--state", required=True)
    parser.add_argument("--mount", required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--has-resend", action="store_true")
    parser.add_argument("--resume", action="store_true", help="another process read requests before us")
    arguments = parser.parse_args()
    ignore_terminal()
    raise_file_limit()
    limit_thread_stacks()
    serve_at_once()
    try:
        start_logging(StateDirectory.open(arguments.state), "disk_server", owns_stderr=True)
        return serve(arguments)
    except AsrfsError as error:
        log.error("%s", error)
        report(arguments.status_fd, f"failed {error.exit_code} {error}")
        return error.exit_code
    except OSError as error:
        log.exception("the disk server ends")
        report(arguments.status_fd, f"failed 1 {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
