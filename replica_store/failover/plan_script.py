"""One script of a plan, run to its end: bounded in time, and never twice side by side.

Whatever it starts bears its mark in the environment (`processes.py`), also when the command that began it was killed.
What it starts and leaves behind goes on: starting services is what scripts are for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from typing import IO

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError, foreign_line
from asrfs.model.quantities import parse_duration
from replica_store.failover import processes
from replica_store.failover.plan import Script

_TEXT_BYTES_MAX = 300


def run_script(script: Script, variables: Mapping[str, str], mark: str) -> str:
    """The end of what it printed, as one line. `mark`: of this step of this run; what still runs with it, of a command
    that was killed, is ended first. Killed with all it started when its time is up. Raises AsrfsError."""
    processes.end(mark, None)
    # A file, not a pipe: what it leaves behind may go on printing, and nobody waits for the end of that.
    with tempfile.TemporaryFile() as printed:
        child = _start(script, {**variables, processes.MARK: f"{mark}:tool"}, printed)
        try:
            code = child.wait(parse_duration(script.timeout))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            processes.end(mark, None)
            raise TemporaryError(f"script {script.name} did not end within {script.timeout}") from None
        text = _end_of(printed)
    if code:
        raise AsrfsError(f"script {script.name} ended with {code}: {text}")
    return text


def _start(script: Script, variables: Mapping[str, str], printed: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            script.command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd="/",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NotFoundError(f"the program {script.command[0]} is not there") from None
    except OSError as error:
        raise AsrfsError(f"{script.command[0]}: {error.strerror}") from None


def _end_of(printed: IO[bytes]) -> str:
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - _TEXT_BYTES_MAX))
    return foreign_line(printed.read(_TEXT_BYTES_MAX).decode(errors="replace"))
