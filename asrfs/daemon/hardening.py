"""What a process asks of the kernel when disks depend on it. All of it is best effort: a refusal changes nothing."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import threading

_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4
_THREAD_STACK_BYTES = 256 << 10

ARMED_URGENCY = 1
AGENT_URGENCY = 2
HOLDING_URGENCY = 3
"""Of `hurry`, for points of groups: all agents of a host hear that they are to hold before the first disk server holds,
and what lets go comes before what says so to the next one."""

_libc = ctypes.CDLL(None, use_errno=True)


def ignore_terminal() -> None:
    """A daemon outlives the terminal it was started from: no SIGINT, no SIGHUP."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def raise_file_limit() -> None:
    """As many open files as the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass


def limit_thread_stacks() -> None:
    """Threads begun from now on have small stacks: `serve_io` locks the whole of those that are there."""
    threading.stack_size(_THREAD_STACK_BYTES)


def hurry(urgency: int) -> None:
    """Until `take_time`, the calling thread goes before every ordinary one of this host, and those of less urgency:
    others are held for it.

    Needs CAP_SYS_NICE. What it begins meanwhile is ordinary.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(urgency))
    except OSError:
        pass


def take_time() -> None:
    """The calling thread is an ordinary one again, of the niceness it had."""
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        pass


def serve_io() -> None:
    """Once everything is loaded: stay in memory, and never wait for one's own disk to be written back.

    What is mapped now is made present and locked, which also replaces shared pages of zeros by own ones; what comes
    later is locked when it is first touched, so that thread stacks and heaps cost no more than is used.
    """
    _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()
    _lock_memory()


def _lock_memory() -> None:
    """Only where no limit holds for us, by what is allowed or by what we may do. Who asks that all he will ever have be
    locked is believed whatever the limit, and once that is reached the kernel refuses memory itself: no thread begins
    any more. A limit of zero is passed by none but those for whom there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        soft = hard
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft if soft == resource.RLIM_INFINITY else 0, hard))
        if _libc.mlockall(_MCL_CURRENT) == 0:
            _libc.mlockall(_MCL_FUTURE | _MCL_ONFAULT)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    except (OSError, ValueError):
        pass
