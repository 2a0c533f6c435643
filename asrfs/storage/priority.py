"""Letting others go first: for processes whose work can wait for as long as it must. Linux, best effort."""

from __future__ import annotations

import ctypes
import os
import platform

_NICENESS = 19
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
"""The system call's number: libc has no name for it."""


def yield_to_others() -> None:
    """From now on this process has the lowest priority there is, of processors and, where the scheduler of a disk
    knows of any, of disks. A refusal changes nothing."""
    try:
        os.nice(_NICENESS)
    except OSError:
        pass
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
