"""Processes of a failover: started so that they outlive the command, found again whoever asks, ended when asked.

Each is marked in its environment with the failover and its part, and so is whatever it starts: that is how it is
found, whatever died in between. They are ended through pidfds, so no signal reaches a later process of the same number.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Literal, NamedTuple

import replica_store
from asrfs.errors import AsrfsError, NotFoundError, TemporaryError, error_class, foreign_line
from asrfs.storage.kernel_text import kernel_text
from asrfs.storage.priority import run_only_when_idle

Part = Literal["tree", "machine", "copy", "boot", "tool"]
"""`tree`: the read-only points; `machine`: what serves the recovered disks; `copy`: the same for a copy that is
examined; `boot`: the machine that was started on these; `tool`: whatever ends by itself."""

MARK = "ASRFS_FAILOVER"
READY_S_MAX = 120.0
TOOL_S_MAX = 600.0
_DEATH_S_MAX = 10.0
_LINE_BYTES = 4096
_PIECE_BYTES = 1 << 16
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)
_gives_way: ContextVar[bool] = ContextVar("gives_way", default=False)
_ANNOUNCED = b"ready"


class Marked(NamedTuple):
    """A process that bears the mark. `words`: its command line."""

    pid: int
    part: str
    words: tuple[str, ...]


def program(module: str, *words: str) -> list[str]:
    """A program of this very installation."""
    return [sys.executable, "-m", module, *words]


def inside(namespace: str | None, words: Sequence[str]) -> list[str]:
    """The command in a network of its own; mounts stay those of everybody."""
    return [*(["nsenter", f"--net=/run/netns/{namespace}", "--"] if namespace else []), *words]


def environment(operation_id: str, part: Part) -> dict[str, str]:
    """Of a process of the failover: it is marked, and finds this very package."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(replica_store.__file__)))
    paths = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, MARK: f"{operation_id}:{part}"}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Whatever this thread runs or waits for inside must end in that time. Raises TemporaryError."""
    token = _deadline.set(min(_deadline.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


@contextmanager
def giving_way(is_wanted: bool) -> Iterator[None]:
    """Whatever this thread starts inside, and what that starts, runs at the lowest priority: points are received on
    this machine, and disks may be served here, which should feel little of a drill."""
    token = _gives_way.set(is_wanted)
    try:
        yield
    finally:
        _gives_way.reset(token)


def _time_left(seconds_max: float) -> float:
    left = _deadline.get() - time.monotonic()
    if left <= 0:
        raise TemporaryError("its time is up")
    return min(seconds_max, left)


class Starting:
    """A daemon in a session of its own that has been started; `wait_ready` says whether it serves."""

    def __init__(self, operation_id: str, part: Part, words: Sequence[str], log: Path) -> None:
        self._words, self._log = words, log
        _time_left(READY_S_MAX)
        with log.open("ab") as errors:
            self._begin = errors.tell()
            self._child = _spawn(words, errors, environment(operation_id, part))

    def wait_ready(self) -> None:
        """Until it says `ready`. Raises what it could not start for."""
        assert self._child.stdout is not None
        with self._child.stdout as said:
            seconds_max = _time_left(READY_S_MAX)
            if _is_ready(said.fileno(), time.monotonic() + seconds_max):
                return
        try:
            code = self._child.wait(min(_DEATH_S_MAX, seconds_max))  # it has closed its end, or had its time
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            raise TemporaryError(
                f"{shown(self._words)} was not ready within {seconds_max:.3g} s: see {self._log}"
            ) from None
        raise _failure(self._words, code, _tail(self._log, self._begin))


def run(
    operation_id: str,
    words: Sequence[str],
    *,
    accepted: Sequence[int] = (0,),
    seconds_max: float = TOOL_S_MAX,
    more: dict[str, str] | None = None,
    part: Part = "tool",
    said: bytes = b"",
) -> tuple[int, str]:
    """Run a tool to its end: exit code and output. `said`: its input, for what nobody else is to see.

    Raises AsrfsError if its exit code is not one of the accepted.
    """
    seconds_max = _time_left(seconds_max)
    tool = _spawn(words, subprocess.STDOUT, environment(operation_id, part) | (more or {}), is_told=bool(said))
    try:
        output, _ = tool.communicate(said or None, timeout=seconds_max)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tool.pid, signal.SIGKILL)
        tool.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TemporaryError(f"{shown(words)} did not end within {seconds_max:.3g} s") from None
        raise
    finally:
        assert tool.stdout is not None
        tool.stdout.close()
    text = output.decode(errors="replace")
    if accepted and tool.returncode not in accepted:
        raise _failure(words, tool.returncode, text)
    return tool.returncode, text


def lines(operation_id: str, words: Sequence[str], seconds_max: float) -> Generator[str, None, None]:
    """What a tool says line by line, until this is closed: it is killed then. Raises AsrfsError if it ends, or says
    nothing for so long."""
    tool = _spawn(words, subprocess.STDOUT, environment(operation_id, "tool"))
    assert tool.stdout is not None
    said = b""
    try:
        poll = select.poll()
        poll.register(tool.stdout.fileno(), select.POLLIN)
        while True:
            if not poll.poll(_time_left(seconds_max) * 1000):
                raise TemporaryError(f"{shown(words)} said nothing for {seconds_max:.3g} s")
            if not (piece := os.read(tool.stdout.fileno(), _PIECE_BYTES)):
                raise _failure(words, tool.wait(_DEATH_S_MAX), said.decode(errors="replace"))
            *whole, said = (said + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tool.pid, signal.SIGKILL)
        tool.wait()
        tool.stdout.close()


def _spawn(
    words: Sequence[str], errors: IO[bytes] | int, variables: dict[str, str], *, is_told: bool = False
) -> subprocess.Popen[bytes]:
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE if is_told else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            cwd="/",
            env=variables,
        )
    except FileNotFoundError:
        raise NotFoundError(f"the program {words[0]} is not installed") from None
    if _gives_way.get():
        run_only_when_idle(child.pid)  # before it can have begun anything: it has only just become the program
    return child


# ---- finding and ending ---------------------------------------------------------------------------------------------


def find(operation_id: str, part: Part | None = None) -> list[Marked]:
    """The processes of a failover, or of a part of it, that run now; never this one or one that it runs below."""
    spared = set(_self_and_ancestors())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in spared:
            marked = _marked(entry, operation_id)
            if marked is not None and (part is None or marked.part == part):
                found.append(marked)
    return found


def end(operation_id: str, part: Part | None, *, gently_s: float = 0.0) -> None:
    """End the processes of a failover, or of a part of it: SIGTERM first where they have time, then SIGKILL.

    Raises TemporaryError if one does not die.
    """
    if gently_s:
        _signal_all(operation_id, part, signal.SIGTERM, gently_s)
    for _ in range(4):  # who is killed may have been starting another
        if not find(operation_id, part):
            return
        _signal_all(operation_id, part, signal.SIGKILL, _DEATH_S_MAX)
    if left := find(operation_id, part):
        raise TemporaryError(f"process {left[0].pid} ({shown(left[0].words)}) does not end: try again")


def stop_supervisor(operation_id: str, part: Part, seconds_max: float) -> bool:
    """SIGTERM who serves the disks, which then flushes and unmounts; whether all of the part has ended in time."""
    for each in find(operation_id, part):
        if "serve" in each.words:
            _signal(each, operation_id, signal.SIGTERM, seconds_max)
    return not find(operation_id, part)


def _signal_all(operation_id: str, part: Part | None, number: signal.Signals, seconds_max: float) -> None:
    deadline = time.monotonic() + seconds_max
    with _descriptors(find(operation_id, part), operation_id) as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
        for descriptor in descriptors:
            _wait(descriptor, deadline - time.monotonic())


def _signal(process: Marked, operation_id: str, number: signal.Signals, seconds_max: float) -> None:
    with _descriptors([process], operation_id) as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            _wait(descriptor, seconds_max)


@contextmanager
def _descriptors(processes: Sequence[Marked], operation_id: str) -> Iterator[list[int]]:
    """A pidfd of each that still is what it was when it was found."""
    opened: list[int] = []
    try:
        for each in processes:
            with contextlib.suppress(OSError):
                opened.append(os.pidfd_open(each.pid))
                if _marked(Path(f"/proc/{each.pid}"), operation_id) is None:
                    os.close(opened.pop())
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _wait(descriptor: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(max(0.0, seconds) * 1000)


def _marked(entry: Path, operation_id: str) -> Marked | None:
    try:
        variables = (entry / "environ").read_bytes()
        begin = f"{MARK}={operation_id}:".encode()
        for variable in variables.split(b"\0"):
            if variable.startswith(begin):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if words == [b""]:  # a zombie
                    return None
                part = variable.removeprefix(begin).decode(errors="replace")
                return Marked(int(entry.name), part, tuple(word.decode(errors="replace") for word in words))
    except OSError:  # ended meanwhile, or not ours to look at
        pass
    return None


def _self_and_ancestors() -> Iterator[int]:
    pid = os.getpid()
    while pid > 0:
        yield pid
        try:
            pid = int(kernel_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
        except OSError:
            return


# ---- what they say --------------------------------------------------------------------------------------------------


def _is_ready(descriptor: int, deadline: float) -> bool:
    """Read what a daemon says until it is ready, has ended, or time is up."""
    said = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        piece = os.read(descriptor, _LINE_BYTES)
        if not piece:
            return False
        said = (said + piece)[-_LINE_BYTES:]
        if any(line.startswith(_ANNOUNCED) for line in said.split(b"\n")):
            return True
    return False


def _tail(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def _failure(words: Sequence[str], code: int, said: str) -> AsrfsError:
    """A program's own error as ours: its last line, its exit code."""
    lines = [line for line in said.splitlines() if line.strip()]
    ours = [line.partition("error: ")[2] for line in lines if line.startswith("asrfs: error: ")]
    text = (ours or lines or [f"ended with exit code {code}"])[-1]
    return error_class(code if ours else None)(f"{shown(words)}: {foreign_line(text)}")


def shown(words: Sequence[str]) -> str:
    """A command as people know it."""
    told = list(words)
    if told[:1] == [sys.executable] and told[1:2] == ["-m"]:
        told = [
            {"asrfs.cli.main": "asrfs", "replica_store.cli.main": "replica-store"}.get(told[2], told[2]),
            *told[3:],
        ]
    return " ".join(told)[:300]
