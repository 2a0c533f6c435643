"""How requests come from the kernel and replies go to it: through io_uring if it may be used, else by read and write.

A request is read into a *slot*, so placed that the payload of a WRITE begins on a page, with the room for a record's
header before it: the journal takes it from there without a copy. The reply is built in the slot, too. All slots are
touched and locked at the start, because a process that is killed while the kernel copies into or out of a page that is
not there would fail the request; otherwise the kernel keeps every request until it is answered, whoever dies.

With io_uring one system call hands over all replies and takes all requests that wait. Reads are a chain, each begun by
the end of the one before: of many reads that wait, every request would wake all.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from ctypes import CDLL, addressof, c_char, c_size_t, c_void_p
from typing import Protocol

from asrfs.fuse import abi
from asrfs.fuse.ring import HARD_LINK, READ, SILENT, WRITE, Ring

SLOTS = 16
"""Requests that one turn may take; each slot costs 2 MiB."""
HEAD_OFFSET = abi.PAGE_BYTES - abi.WRITE_HEADER_BYTES
"""Where in a slot's request buffer the request begins."""
_REQUEST_BYTES = abi.PAGE_BYTES + abi.WRITE_BYTES_MAX + abi.PAGE_BYTES
_REPLY_BYTES = abi.WRITE_BYTES_MAX + abi.PAGE_BYTES
_NOTHING_READ = (errno.EINTR, errno.ENOENT, errno.EAGAIN, errno.ECANCELED)
REQUEST_GONE = (errno.ENOENT, errno.ENODEV)
"""A reply may find its request given up by the kernel, or the mount gone."""

log = logging.getLogger(__name__)


class MountGoneError(Exception):
    """Nobody will ask anything any more."""


class Slot:
    """Room for one request and its reply. `length`: of the request that is in it; `replied`: of the last reply."""

    def __init__(self, number: int, request: memoryview, reply: memoryview) -> None:
        self.number = number
        self.request = request
        self.reply = reply
        self.length = 0
        self.replied = 0
        self._payload = request[abi.PAGE_BYTES :]
        self._framed: dict[int, object] = {}

    def payload(self, size: int) -> memoryview:
        """What a WRITE of `size` bytes brings."""
        return self._payload[:size]

    def framed(self, size: int, room: int, frame: Callable[[memoryview], object]) -> object:
        """What `frame` makes of the payload with `room` bytes before it, which are the request's own header and free
        once that is read. It is made once for each size."""
        framed = self._framed.get(size)
        if framed is None:
            framed = self._framed[size] = frame(self.request[abi.PAGE_BYTES - room : abi.PAGE_BYTES + size])
        return framed


class Channel(Protocol):
    """Used by one thread."""

    def wait(self) -> Sequence[Slot]:
        """Hand over the replies and wait; slots that hold a request, none if a signal came. Raises MountGoneError."""

    def reply(self, slot: Slot, length: int) -> None:
        """The first `length` bytes of `slot.reply` are the reply; the slot is used again after the next `wait`."""

    def flush(self) -> None:
        """Hand over the replies now, for who must not wait until the turn is done."""

    def close(self) -> None:
        """Hand over the replies that are left."""


def open_channel(fd: int) -> Channel:
    """The best channel there is to the kernel at the other end of `fd`."""
    try:
        return RingChannel(fd)
    except OSError as error:
        log.info("requests are taken one at a time: io_uring cannot be used here: %s", error.strerror or error)
        return PlainChannel(fd)


class PlainChannel:
    """One slot; a system call for each request and one for each reply."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, True)
        self._fd = fd
        (self._slot,) = self._slots = _make_slots(1)[0]
        self._buffers = [self._slot.request[HEAD_OFFSET:]]

    def wait(self) -> Sequence[Slot]:
        try:
            length = os.readv(self._fd, self._buffers)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise MountGoneError from None
            if error.errno in _NOTHING_READ:
                return ()
            raise
        if not length:
            raise MountGoneError
        self._slot.length = length
        return self._slots

    def reply(self, slot: Slot, length: int) -> None:
        try:
            os.write(self._fd, slot.reply[:length])
        except OSError as error:
            if error.errno not in REQUEST_GONE:
                raise

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class RingChannel:
    """Entries 0 to `SLOTS` - 1 of the ring read into a slot each, the others write their replies."""

    def __init__(self, fd: int) -> None:
        self._ring = ring = Ring(2 * SLOTS)
        os.set_blocking(fd, False)  # else the kernel would hand a read that must wait to a thread of its own
        self._slots, memory = _make_slots(SLOTS)
        self._memory = memory
        for slot in self._slots:
            link = HARD_LINK if slot.number < SLOTS - 1 else 0
            request, reply = _address(slot.request) + HEAD_OFFSET, _address(slot.reply)
            ring.prepare(slot.number, READ, link, fd, request, _REQUEST_BYTES - HEAD_OFFSET)
            ring.prepare(SLOTS + slot.number, WRITE, SILENT, fd, reply, 0)
        self._reading = 0

    def wait(self) -> Sequence[Slot]:
        ring = self._ring
        if not self._reading:
            for number in range(SLOTS):
                ring.add(number)
            self._reading = SLOTS
        if not ring.submit_and_wait():
            return ()
        arrived = []
        for number, result in ring.completions():
            if number >= SLOTS:
                if -result not in REQUEST_GONE:
                    raise OSError(-result, os.strerror(-result))
                continue
            self._reading -= 1
            if result > 0:
                slot = self._slots[number]
                slot.length = result
                arrived.append(slot)
            elif -result not in _NOTHING_READ:
                if -result in (0, errno.ENODEV):
                    raise MountGoneError
                raise OSError(-result, os.strerror(-result))
        return arrived

    def reply(self, slot: Slot, length: int) -> None:
        number = SLOTS + slot.number
        if slot.replied != length:
            self._ring.set_length(number, length)
            slot.replied = length
        self._ring.add(number)

    def flush(self) -> None:
        self._ring.submit()

    def close(self) -> None:
        self.flush()
        self._ring.close()


def _make_slots(count: int) -> tuple[list[Slot], memoryview]:
    """Anonymous memory, every page of it present and, where allowed, locked there."""
    size = count * (_REQUEST_BYTES + _REPLY_BYTES)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, abi.PAGE_BYTES):
        memory[at] = 0
    libc = CDLL(None, use_errno=True)
    libc.mlock.argtypes = (c_void_p, c_size_t)
    libc.mlock(addressof(c_char.from_buffer(memory)), size)  # a refusal (RLIMIT_MEMLOCK) leaves it touched
    view = memoryview(memory)
    slots = []
    for number in range(count):
        at = number * (_REQUEST_BYTES + _REPLY_BYTES)
        middle = at + _REQUEST_BYTES
        slots.append(Slot(number, view[at:middle], view[middle : middle + _REPLY_BYTES]))
    return slots, view


def _address(view: memoryview) -> int:
    return addressof(c_char.from_buffer(view))
