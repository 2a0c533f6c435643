"""One script of a plan, run to its end: bounded in time, and never twice side by side.

Whatever it starts bears its mark in the environment (`processes.py`), also when the command that began it was killed.
What it starts and leaves behind goes on: starting services is what scripts are for. Such a one may go on printing where
its script did, so that is read to its end by somebody who outlives us.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import IO

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError, foreign_line
from asrfs.model.quantities import parse_duration
from replica_store.failover import processes
from replica_store.failover.plan import Script

_TEXT_BYTES_MAX = 300
_PIECE_BYTES = 1 << 16
_PIECES_AT_END = 16
"""A full pipe, and no more of one who never stops printing."""


def run_script(script: Script, variables: Mapping[str, str], mark: str) -> str:
    """The end of what it printed, as one line. `mark`: of this step of this run; what still runs with it, of a command
    that was killed, is ended first. Killed with all it started when its time is up. Raises AsrfsError."""
    processes.end(mark, None)
    child = _start(script, {**variables, processes.MARK: f"{mark}:tool"})
    assert child.stdout is not None
    with child.stdout as printed:
        os.set_blocking(printed.fileno(), False)
        said = _read_until_it_ends(child, printed, time.monotonic() + parse_duration(script.timeout))
        if said is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            processes.end(mark, None)
            raise TemporaryError(f"script {script.name} did not end within {script.timeout}")
        code = child.wait()
    text = foreign_line(said.decode(errors="replace"))
    if code:
        raise AsrfsError(f"script {script.name} ended with {code}: {text}")
    return text


def _start(script: Script, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            script.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
    except FileNotFoundError:
        raise NotFoundError(f"the program {script.command[0]} is not there") from None
    except OSError as error:
        raise AsrfsError(f"{script.command[0]}: {error.strerror}") from None


def _read_until_it_ends(child: subprocess.Popen[bytes], printed: IO[bytes], deadline: float) -> bytes | None:
    """The end of what it printed, whoever else still could; None if it has not ended then."""
    said, is_open = b"", True
    ended = os.pidfd_open(child.pid)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([ended, *([printed.fileno()] if is_open else [])], [], [], left)
            has_ended = ended in ready
            for _ in range(_PIECES_AT_END if has_ended else 1):
                if not is_open or (piece := printed.read(_PIECE_BYTES)) is None:
                    break
                said, is_open = (said + piece)[-_TEXT_BYTES_MAX:], bool(piece)
            if has_ended:
                if is_open:
                    _hand_over(printed.fileno())
                return said
        return None
    finally:
        os.close(ended)


def _hand_over(descriptor: int) -> None:
    """Have what is still printed read, for nobody: who prints must neither wait nor die of it."""
    os.set_blocking(descriptor, True)
    files = [
        (os.POSIX_SPAWN_DUP2, descriptor, 0),
        *((os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_WRONLY, 0) for each in (1, 2)),
    ]
    os.posix_spawnp("cat", ["cat"], {"PATH": os.defpath}, file_actions=files, setsid=True)
