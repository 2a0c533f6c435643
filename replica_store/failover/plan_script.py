"""One script of a plan, run to its end: bounded in time, and never twice side by side.

Whatever it starts bears its mark in the environment (`processes.py`), also when the command that began it was killed.
What it starts and leaves behind goes on: starting services is what scripts are for. Such a one may go on printing where
its script did, and so may the script itself when we are killed: somebody who outlives us reads that then, for nobody.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError, foreign_line
from asrfs.model.quantities import parse_duration
from replica_store.failover import processes
from replica_store.failover.plan import Script

_TEXT_BYTES_MAX = 300
_PIECE_BYTES = 1 << 16
_PIECES_AT_END = 16
"""A full pipe, and no more of one who never stops printing."""
_READ_ON = "read nothing; exec cat <&1 >/dev/null"
"""Its input is a pipe that ends with us, its output the one that is read on."""
_reading_on: set[subprocess.Popen[bytes]] = set()
"""Held until they have ended: Python warns of a process that is dropped before."""


def run_script(script: Script, variables: Mapping[str, str], mark: str) -> str:
    """The end of what it printed, as one line. `mark`: of this step of this run; what still runs with it, of a command
    that was killed, is ended first. Killed with all it started when its time is up. Raises AsrfsError."""
    processes.end(mark, None)
    with _printed_to_us() as (ours, theirs):
        child = _start(script, {**variables, processes.MARK: f"{mark}:tool"}, theirs)
        try:
            os.close(theirs)
            said = _read_until_it_ends(child, ours, time.monotonic() + parse_duration(script.timeout))
        except BaseException:
            _kill(child)
            raise
        if said is None:
            _kill(child)
            processes.end(mark, None)
            raise TemporaryError(f"script {script.name} did not end within {script.timeout}")
    text = foreign_line(said.decode(errors="replace"))
    if code := child.wait():
        raise AsrfsError(f"script {script.name} ended with {code}: {text}")
    return text


@contextmanager
def _printed_to_us() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe. From the end of this block, or of us, on somebody else reads it until nobody has the other
    end any more, which is the caller's to close."""
    for each in tuple(_reading_on):
        if each.poll() is not None:
            _reading_on.discard(each)
    ours, theirs = os.pipe()
    waits, ends = os.pipe()
    try:
        try:
            _reading_on.add(
                subprocess.Popen(
                    ("/bin/sh", "-c", _READ_ON),
                    stdin=waits,
                    stdout=ours,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            )
        except BaseException:
            os.close(theirs)
            raise
        finally:
            os.close(waits)
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(ends)


def _start(script: Script, variables: Mapping[str, str], printed: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            script.command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            env=dict(variables),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        os.close(printed)
        if isinstance(error, FileNotFoundError):
            raise NotFoundError(f"the program {script.command[0]} is not there") from None
        raise AsrfsError(f"{script.command[0]}: {error.strerror}") from None


def _kill(child: subprocess.Popen[bytes]) -> None:
    os.killpg(child.pid, signal.SIGKILL)  # it is there at the least as a zombie: nobody has waited for it
    child.wait()


def _read_until_it_ends(child: subprocess.Popen[bytes], printed: int, deadline: float) -> bytes | None:
    """The end of what it printed, whoever else still could; None if it has not ended then."""
    said = b""
    ended = os.pidfd_open(child.pid)
    poll = select.poll()
    for descriptor in (ended, printed):
        poll.register(descriptor, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            found = [descriptor for descriptor, _ in poll.poll(left * 1000)]
            if ended in found:
                return (said + _rest(printed))[-_TEXT_BYTES_MAX:]
            if printed in found:
                piece = os.read(printed, _PIECE_BYTES)
                said = (said + piece)[-_TEXT_BYTES_MAX:]
                if not piece:
                    poll.unregister(printed)
        return None
    finally:
        os.close(ended)


def _rest(printed: int) -> bytes:
    """What is in the pipe now."""
    poll = select.poll()
    poll.register(printed, select.POLLIN)
    said = b""
    for _ in range(_PIECES_AT_END):
        if not poll.poll(0) or not (piece := os.read(printed, _PIECE_BYTES)):
            break
        said = (said + piece)[-_TEXT_BYTES_MAX:]
    return said
