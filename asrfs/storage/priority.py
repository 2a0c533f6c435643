"""Who goes before whom: for processes whose work can wait, and for those that others wait for. Linux, best effort: a
refusal changes nothing.

Three things decide when somebody who wakes up has a processor that somebody else works on:

- Niceness, which counts among the processes of one group. Where sessions are scheduled as groups (autogroup, which
  Debian has switched on) each of our processes leads one; whose work can wait for ever says it of the session, too. A
  service manager's groups have weights of their own.
- Turns. One ends by itself at a tick of the clock, which may be 4 ms away, forty times what a write takes; but who is
  content with shorter turns than who has the processor has it at once (Linux 6.12). So work asks for the longest turns
  there are, which costs it nothing, and who serves disks for the shortest.
- The idle class, which anybody else of the same group goes before.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress

_NICENESS_MAX = 19
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}
"""The system calls' numbers: libc has no names for them."""
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""`struct sched_attr` of linux/sched/types.h, first version."""
_RESET_ON_FORK = 1
_SHORTEST_NS, _LONGEST_NS, _USUAL_NS = 100_000, 100_000_000, 0


def stand_back(niceness: int, pid: int = 0) -> None:
    """From now on this process, or the one of that number which has only just become a program, and whatever it begins
    let others go first: of that niceness, and in long turns. Its session has the share of any other."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, max(niceness, os.getpriority(os.PRIO_PROCESS, pid)))
    _take_turns(_LONGEST_NS, pid)


def yield_to_others(pid: int = 0) -> None:
    """The same, and it has the lowest priority there is, as all of the session if it leads one, of processors and,
    where the scheduler of a disk knows of any, of disks."""
    stand_back(_NICENESS_MAX, pid)
    with suppress(OSError):
        if os.getsid(pid) == (pid or os.getpid()):
            _set_session_niceness(pid, _NICENESS_MAX)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        _call(number, _IOPRIO_WHO_PROCESS, pid, _IOPRIO_IDLE)


def run_only_when_idle(pid: int) -> None:
    """The same, and others of its group have a processor that the process, or what it begins from now on, has as soon
    as they wake up."""
    yield_to_others(pid)
    with suppress(OSError):
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def serve_at_once() -> None:
    """The calling thread, and those it begins from now on, have a processor soon after they wake up."""
    _take_turns(_SHORTEST_NS)


def be_usual() -> None:
    """The calling thread, and what it begins from now on, have turns as everybody has."""
    _take_turns(_USUAL_NS)


def wait_for_others() -> None:
    """The calling thread works in long turns; what it begins does not."""
    _take_turns(_LONGEST_NS, flags=_RESET_ON_FORK)


def pass_on(child: int) -> None:
    """A child that has only just begun a session of its own has the niceness of ours: else it would be as everybody."""
    with suppress(OSError):
        if niceness := _session_niceness(0):
            _set_session_niceness(child, niceness)


def _take_turns(length_ns: int, pid: int = 0, flags: int = 0) -> None:
    """Nothing for a process of another class, which knows no length of turns."""
    number = _SCHED_SETATTR.get(os.uname().machine)
    with suppress(OSError):
        policy = os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK
        if number is not None and policy == os.SCHED_OTHER:
            niceness = os.getpriority(os.PRIO_PROCESS, pid)
            attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, flags, niceness, 0, length_ns, 0, 0)
            _call(number, pid, attributes, 0)


def _session_niceness(pid: int) -> int:
    """Usual for a process that nobody ever began a session for: it is in no group, and nothing is said of it."""
    with open(_autogroup(pid)) as group:
        words = group.read().split()
    return int(words[-1]) if words else 0


def _set_session_niceness(pid: int, niceness: int) -> None:
    with open(_autogroup(pid), "w") as group:
        group.write(str(niceness))


def _autogroup(pid: int) -> str:
    return f"/proc/{pid or 'self'}/autogroup"


def _call(number: int, *arguments: int | bytes) -> None:
    ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
