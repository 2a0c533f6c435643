"""Running a hook: bounded in time, in what it prints, and in what it leaves behind.

It gets a session of its own, an environment made from nothing, no standard input (a `hold` hook: one that ends when
it is to let go), and nothing else of ours. Whatever it started is killed when it has ended: its process group, and,
since we adopt what it orphaned (see `adopt_orphans`), processes that left that group, too. When we are
killed, so is it, or, if it holds, its standard input ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from asrfs.consistency.hooks import Hook, check_program
from asrfs.errors import RefusedError, foreign_line
from asrfs.model.clock import Clock
from asrfs.model.marker import OUTPUT_CHARACTERS_MAX, HookPhase, HookResult

KEPT_BYTES = 4096
KILL_S_MAX = 5.0
_READ_BYTES = 1 << 16
_POLL_S = 0.02
_ROUNDS = 50
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """From now on, processes that our descendants leave behind are our children, to be found and killed."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def clean_environment(facts: Mapping[str, str]) -> dict[str, str]:
    """What a hook finds: nothing of ours but the facts, as ASRFS_…"""
    return {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/root", **{f"ASRFS_{key}": text for key, text in facts.items()}}


class RunningHook:
    """A hook that was started. Of what is our child when it has ended, that which was not before is what it left."""

    def __init__(self, hook: Hook, phase: HookPhase, environment: Mapping[str, str], clock: Clock) -> None:
        """Raises RefusedError if it may not run, OSError if it cannot."""
        check_program(hook)
        self.hook = hook
        self.phase = phase
        self._clock = clock
        self._started = clock.monotonic()
        self._kept = bytearray()
        self._others = set(_children())
        self._process = subprocess.Popen(
            hook.argv,
            stdin=subprocess.PIPE if hook.phase == "hold" else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd="/",
            umask=0o077,
            start_new_session=True,
            preexec_fn=None if hook.phase == "hold" else _die_with_us,
            bufsize=0,
        )
        assert self._process.stdout is not None
        self._output: IO[bytes] = self._process.stdout
        self._pidfd = os.pidfd_open(self._process.pid)
        os.set_blocking(self._output.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Its number stays its own until `finish`, which kills the group of that number."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def wait_for_line(self) -> HookResult | None:
        """Wait until it has said a line; None if it ended or was too slow, see `finish`."""
        self._listen(until=lambda: b"\n" in self._kept)
        return self._result(0, None) if b"\n" in self._kept and self.is_running else None

    def let_go(self) -> None:
        """End its standard input; its time begins anew."""
        self._started = self._clock.monotonic()
        self.phase = "post"
        if self._process.stdin is not None:
            self._process.stdin.close()

    def finish(self) -> HookResult:
        """Wait until it ends, as long as it may take, and kill the rest; how it went."""
        self._listen(until=lambda: False)
        happened = None
        if self.is_running:
            happened = f"killed: it had not ended after {self.hook.timeout_s:g} s"
        self._kill_group()
        try:
            self._process.wait(KILL_S_MAX)
        except subprocess.TimeoutExpired:
            happened = f"it had not ended after {self.hook.timeout_s:g} s and cannot be killed"
        left = kill_children(self._others | {self._process.pid})
        code = self._process.returncode
        if happened is None and code is not None and code < 0:
            happened = f"ended by {_signal_name(-code)}"
        elif happened is None and left:
            happened = f"left {left} processes behind: killed"
        self._output.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self._pidfd)
        ended_itself = code is not None and code >= 0 and not (happened or "").startswith("killed")
        return self._result(code if ended_itself else None, happened)

    def _listen(self, until: Callable[[], bool]) -> None:
        """Read what it prints until it has ended, `until` is true, or its time is over."""
        deadline = self._started + self.hook.timeout_s
        sources: list[IO[bytes] | int] = [self._output, self._pidfd]
        while not until() and (left := deadline - self._clock.monotonic()) > 0:
            readable, _, _ = select.select(sources, [], [], left)
            if self._output in readable and self._read() == b"":
                sources.remove(self._output)
            if self._pidfd in readable:
                while len(self._kept) < KEPT_BYTES and self._read():
                    pass
                return

    def _read(self) -> bytes | None:
        """Some of what it printed, the beginning of which is kept; empty at the end, None if there is nothing now."""
        piece = self._output.read(_READ_BYTES)
        self._kept += (piece or b"")[: KEPT_BYTES - len(self._kept)]
        return piece

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def _result(self, code: int | None, happened: str | None) -> HookResult:
        return HookResult(
            name=self.hook.name,
            phase=self.phase,
            exit_code=code,
            happened=happened,
            seconds=round(self._clock.monotonic() - self._started, 3),
            output=foreign_line(self._kept.decode(errors="replace"))[:OUTPUT_CHARACTERS_MAX],
        )


def run_hook(hook: Hook, phase: HookPhase, environment: Mapping[str, str], clock: Clock) -> HookResult:
    """Run a hook to its end."""
    try:
        running = RunningHook(hook, phase, environment, clock)
    except (RefusedError, OSError) as error:
        return not_started(hook, phase, error)
    return running.finish()


def not_started(hook: Hook, phase: HookPhase, error: Exception) -> HookResult:
    why = foreign_line(f"not started: {error}")[:OUTPUT_CHARACTERS_MAX]
    return HookResult(name=hook.name, phase=phase, happened=why)


def failure_of(result: HookResult) -> str | None:
    """Why a hook did not do its work; None if it did. What it left behind was killed, and is no failure."""
    if result.exit_code == 0:
        return None
    how = f"exit code {result.exit_code}" if result.exit_code is not None else result.happened
    return f"hook {result.name}: {how}" + (f": {result.output}" if result.output else "")


def kill_children(spared: set[int]) -> int:
    """SIGKILL every child of ours but those, and what becomes our child by that; how many were alive."""
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        found = {pid: state for pid, state in _children().items() if pid not in spared}
        if not found:
            break
        for pid, state in found.items():
            try:
                if state != "Z":
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                pass
        select.select([], [], [], _POLL_S)
    return len(killed)


def kill_hooks_of(point_id: str) -> None:
    """SIGKILL whatever still runs as a hook of this point, or was started by one: its environment says so.

    Not what holds something: it was told by the end of its input, and is just letting go.
    """
    mark, holds = f"ASRFS_POINT={point_id}".encode(), b"ASRFS_PHASE=hold"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                facts = (entry / "environ").read_bytes().split(b"\0")
                if mark in facts and holds not in facts:
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


def _children() -> dict[int, str]:
    """Children of this process and their states, as they are now."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(parent) == os.getpid():
                found[int(entry.name)] = state
    return found


def _die_with_us() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
