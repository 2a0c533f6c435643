"""io_uring as far as a session needs it: entries that are prepared once, submitted by number, waited for together.

The kernel shares two rings with us. We write the numbers of prepared entries into one and say how many with
`io_uring_enter`; it writes completions into the other. Entries keep their operation, descriptor and address for good:
only a length may change. Layouts are those of `linux/io_uring.h`, all little-endian like the machines we run on.

One thread makes and uses a ring. The kernel runs what completes only while that thread is inside `submit_and_wait`
(`DEFER_TASKRUN`), so a process that is killed has taken nothing that it does not know of.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

_SETUP = 425
_ENTER = 426
_SETUP_SINGLE_ISSUER = 1 << 12
_SETUP_DEFER_TASKRUN = 1 << 13
_ENTER_GETEVENTS = 1
_OFFSET_RINGS = 0
_OFFSET_ENTRIES = 0x10000000
_FEATURE_SINGLE_MMAP = 1
_FEATURE_CQE_SKIP = 1 << 11

READ = 22
WRITE = 23
HARD_LINK = 1 << 3
"""The next entry begins when this one has ended, however it ended."""
SILENT = 1 << 6
"""No completion unless it failed."""

_PARAMETERS = struct.Struct("<7I12x")
_OFFSETS = struct.Struct("<9I4x")
_ENTRY = struct.Struct("<BBHiQQIIQ24x")
"""operation, flags, priority, descriptor, offset, address, length, flags of the operation, user data"""
_LENGTH = struct.Struct("<I")
_LENGTH_OFFSET = 24
_COMPLETION_BYTES = 16
_NO_OFFSET = (1 << 64) - 1
_COUNTER_MASK = (1 << 32) - 1

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    *(ctypes.c_void_p, ctypes.c_size_t),
)
_setup = ctypes.CDLL(None, use_errno=True).syscall
_setup.restype = ctypes.c_long
_setup.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p)


class Ring:
    """`entries`: a power of two. Raises OSError where the kernel has no io_uring or forbids it."""

    def __init__(self, entries: int) -> None:
        parameters = bytearray(120)
        _PARAMETERS.pack_into(parameters, 0, 0, 0, _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN, 0, 0, 0, 0)
        shared = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self._fd = _setup(_SETUP, entries, shared)
        if self._fd < 0:
            raise _error()
        os.set_inheritable(self._fd, False)
        try:
            sq_entries, cq_entries, *_, features, _ = _PARAMETERS.unpack_from(parameters)[:7]
            if not features & _FEATURE_SINGLE_MMAP or not features & _FEATURE_CQE_SKIP:
                raise OSError("this kernel's io_uring is too old")
            sq_head, sq_tail, *_, array, _ = _OFFSETS.unpack_from(parameters, 40)[:8]
            cq_head, cq_tail, _, _, _, completions, *_ = _OFFSETS.unpack_from(parameters, 80)
            size = max(array + 4 * sq_entries, completions + _COMPLETION_BYTES * cq_entries)
            rings = memoryview(mmap.mmap(self._fd, size, offset=_OFFSET_RINGS))
            self._entries = mmap.mmap(self._fd, 64 * sq_entries, offset=_OFFSET_ENTRIES)
        except BaseException:
            os.close(self._fd)
            raise
        self._numbers = rings[array : array + 4 * sq_entries].cast("I")
        self._sq_mask = sq_entries - 1
        self._sq_head = rings[sq_head : sq_head + 4].cast("I")
        self._sq_tail = rings[sq_tail : sq_tail + 4].cast("I")
        self._tail = self._sq_tail[0]
        self._cq_mask = cq_entries - 1
        self._cq_head = rings[cq_head : cq_head + 4].cast("I")
        self._cq_tail = rings[cq_tail : cq_tail + 4].cast("I")
        held = rings[completions : completions + _COMPLETION_BYTES * cq_entries]
        self._numbers_done = held.cast("Q")
        self._results = held.cast("i")

    def prepare(self, number: int, operation: int, flags: int, fd: int, address: int, length: int) -> None:
        """What entry `number` does from now on: `length` bytes at `address` of this process, from or to `fd`."""
        _ENTRY.pack_into(self._entries, 64 * number, operation, flags, 0, fd, _NO_OFFSET, address, length, 0, number)

    def set_length(self, number: int, length: int) -> None:
        _LENGTH.pack_into(self._entries, 64 * number + _LENGTH_OFFSET, length)

    def add(self, number: int) -> None:
        """Submit entry `number` with the next `submit_and_wait`; until then it must not be added again."""
        self._numbers[self._tail & self._sq_mask] = number
        self._tail += 1

    def submit(self) -> None:
        """Submit what was added."""
        self._enter(0)

    def submit_and_wait(self) -> bool:
        """Submit what was added and wait until something is complete; False if a signal came instead."""
        return self._enter(1)

    def _enter(self, completions_min: int) -> bool:
        self._sq_tail[0] = self._tail & _COUNTER_MASK
        # How far the kernel is, only the kernel's own counter says: a handler may have raised behind the last call. It
        # would not wait for one who says he submits more than there is.
        count = (self._tail - self._sq_head[0]) & _COUNTER_MASK
        if _syscall(_ENTER, self._fd, count, completions_min, _ENTER_GETEVENTS, None, 0) < 0:
            error = _error()
            if isinstance(error, InterruptedError):
                return False
            raise error
        return True

    def completions(self) -> Iterator[tuple[int, int]]:
        """`(number, result)` of what is complete; a result below zero is a negative errno."""
        head, end = self._cq_head[0], self._cq_tail[0]
        while head != end:
            at = head & self._cq_mask
            yield self._numbers_done[2 * at], self._results[4 * at + 2]
            head = (head + 1) & _COUNTER_MASK
        self._cq_head[0] = head

    def close(self) -> None:
        """The kernel gives up what it has not begun."""
        os.close(self._fd)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
