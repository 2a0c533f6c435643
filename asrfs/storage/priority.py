"""Letting others go first: for processes whose work can wait for as long as it must. Linux, best effort."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress

_NICENESS = 19
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
"""The system call's number: libc has no name for it."""


def yield_to_others(pid: int = 0) -> None:
    """From now on this process, or the one of that number, has the lowest priority there is, of processors and, where
    the scheduler of a disk knows of any, of disks. A refusal changes nothing."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICENESS)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, pid, _IOPRIO_IDLE)


def run_only_when_idle(pid: int) -> None:
    """The same, and others of its group (of its session, or of its service) have a processor that the process, or what
    it begins from now on, has as soon as they wake up. A refusal changes nothing."""
    yield_to_others(pid)
    with suppress(OSError):
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
