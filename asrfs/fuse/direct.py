"""The direct session: answers the kernel's requests for disks from one plain blocking loop.

One request is read at a time into one buffer, so placed that the payload of a WRITE begins on a page and goes on to
the disk without a copy; it is answered with one system call. Only FSYNC and FLUSH are answered later, by whoever
makes the journal durable.

The kernel keeps every request until it is answered. If this process dies, the next one asks for them again
(`resume`), and what it then gets carries `RESEND_BIT`. So an exception that is not the disk's word (OSError,
AsrfsError) ends the process on purpose: the request is tried again by a fresh one, and only if it breaks that too is
it answered EIO. The buffer is touched and locked at the start, because a process that is killed while the kernel
copies into a page that is not there yet would fail the request.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL, addressof, c_char, c_size_t, c_void_p
from typing import Protocol

from asrfs.errors import AsrfsError
from asrfs.fuse import abi

FILE_SUFFIX = b".img"
_FIRST_DISK_NODE = abi.ROOT_NODE + 1
_FIRST_DISK_COOKIE = 3
_HEAD_OFFSET = abi.PAGE_BYTES - abi.WRITE_HEADER_BYTES
_ARGUMENTS_OFFSET = _HEAD_OFFSET + abi.IN_HEADER_BYTES

log = logging.getLogger(__name__)

_READ_AGAIN = (errno.EINTR, errno.ENOENT, errno.EAGAIN)
_REQUEST_GONE = (errno.ENOENT, errno.ENODEV)
_OPEN_FLAGS = abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES
_FORBIDDEN = (
    abi.SYMLINK,
    abi.MKNOD,
    abi.MKDIR,
    abi.UNLINK,
    abi.RMDIR,
    abi.RENAME,
    abi.LINK,
    abi.CREATE,
    abi.RENAME2,
    abi.TMPFILE,
)
"""Disks come and go by `asrfs disk`, not by file operations."""

Bytes = bytes | bytearray | memoryview
Handler = Callable[[int, int, memoryview], Sequence[Bytes]]
SyncCallback = Callable[[OSError | None], None]
RequestSync = Callable[[SyncCallback], None]


class ServedDisk(Protocol):
    """What a session needs of a disk. Failures are OSError and reach the kernel as they are."""

    @property
    def size_bytes(self) -> int: ...

    def write(self, offset: int, payload: Bytes) -> None: ...

    def read(self, offset: int, length: int) -> Sequence[Bytes]: ...

    def zero(self, offset: int, length: int) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...


class Volume:
    """The disks of a mount, by name and by node. May be changed by another thread while the session runs."""

    def __init__(self, request_sync: RequestSync) -> None:
        self.request_sync = request_sync
        self.disks: dict[int, ServedDisk] = {}
        self.nodes: dict[bytes, int] = {}

    def add(self, name: str, slot: int, disk: ServedDisk) -> None:
        """Make the disk appear as `NAME.img`."""
        node = slot + _FIRST_DISK_NODE
        self.disks[node] = disk
        self.nodes[name.encode() + FILE_SUFFIX] = node

    def remove(self, name: str) -> None:
        """Let the file vanish; whoever still has it open gets EIO."""
        node = self.nodes.pop(name.encode() + FILE_SUFFIX, abi.ROOT_NODE)
        self.disks.pop(node, None)


class _StopReading(Exception):
    """Raised out of a blocked read by `DirectSession.stop_from_signal`."""


class DirectSession:
    """Serves `volume` on the FUSE descriptor `fd`, whose INIT is done. `time_s`: the time files show."""

    def __init__(self, fd: int, volume: Volume, *, time_s: int) -> None:
        self._fd = fd
        self._volume = volume
        self._time_s = time_s
        self._stopping = False
        self._reading = False
        self._buffer = _locked_buffer(abi.PAGE_BYTES + abi.WRITE_BYTES_MAX + abi.PAGE_BYTES)
        self._handlers = self._make_handlers()

    def resume(self) -> None:
        """Ask the kernel for what another process read and did not answer. Before `run`."""
        os.write(self._fd, abi.encode_resend())

    def stop_from_signal(self) -> None:
        """Let `run` return soon. Called by a signal handler in the thread of `run`, repeatedly until it has.

        A request that was read and not begun is lost to this process; the next one gets it again.
        """
        self._stopping = True
        if self._reading:
            self._reading = False  # once is enough: a later signal must not interrupt what follows `run`
            raise _StopReading

    def run(self) -> bool:
        """Answer requests until the mount is gone (True) or `stop_from_signal` (False)."""
        fd = self._fd
        buffers = [self._buffer[_HEAD_OFFSET:]]
        payload = self._buffer[abi.PAGE_BYTES :]
        disks = self._volume.disks
        readv, write, writev = os.readv, os.write, os.writev
        unpack, pack = abi.REQUEST.unpack_from, abi.WRITE_REPLY.pack
        try:
            while not self._stopping:
                try:
                    self._reading = True
                    length = readv(fd, buffers)
                    self._reading = False
                except OSError as error:
                    self._reading = False
                    if error.errno == errno.ENODEV:
                        return True
                    if error.errno not in _READ_AGAIN:
                        raise
                    continue
                if not length:
                    return True
                _, opcode, unique, node, _, offset, size = unpack(self._buffer, _HEAD_OFFSET)
                reply: Sequence[Bytes]
                try:
                    if opcode == abi.WRITE:
                        disk = disks.get(node, _GONE)
                        if offset + size > disk.size_bytes:
                            size = _size_inside(disk, offset, size)
                        disk.write(offset, payload[:size])
                        reply = (pack(abi.WRITE_REPLY_BYTES, 0, unique, size, 0),)
                    elif opcode == abi.READ:
                        reply = _read(disks.get(node, _GONE), unique, offset, size)
                    else:
                        arguments = self._buffer[_ARGUMENTS_OFFSET : _HEAD_OFFSET + length]
                        reply = self._handlers.get(opcode, _unknown)(unique, node, arguments)
                except Exception as error:
                    reply = (_refusal(error, opcode, unique, node),)
                try:
                    if len(reply) == 1:
                        write(fd, reply[0])
                    elif reply:
                        writev(fd, reply)
                except OSError as error:
                    _forgive(error)
        except _StopReading:
            pass
        return False

    # ---- requests that are not on the hot path: each returns the reply, in pieces, or nothing -----------------

    def _make_handlers(self) -> Mapping[int, Handler]:
        handlers: dict[int, Handler] = {
            abi.LOOKUP: self._lookup,
            abi.GETATTR: self._getattr,
            abi.SETATTR: self._setattr,
            abi.OPEN: self._open,
            abi.STATFS: self._statfs,
            abi.OPENDIR: self._open_directory,
            abi.READDIR: self._read_directory,
            abi.FALLOCATE: self._fallocate,
        }
        handlers |= dict.fromkeys((abi.FSYNC, abi.FLUSH), self._sync)
        handlers |= dict.fromkeys((abi.FORGET, abi.BATCH_FORGET), _no_reply)
        handlers |= dict.fromkeys((abi.RELEASE, abi.RELEASEDIR, abi.FSYNCDIR, abi.DESTROY), _done)
        handlers |= dict.fromkeys(_FORBIDDEN, _forbidden)
        return handlers

    def _lookup(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        name = bytes(arguments).partition(b"\0")[0]
        found = self._volume.nodes.get(name) if node == abi.ROOT_NODE else None
        if found is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return (abi.encode_reply(unique, abi.encode_entry(self._attributes(found))),)

    def _getattr(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        return (abi.encode_reply(unique, abi.encode_attributes(self._attributes(node))),)

    def _setattr(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        """A disk keeps its size, like a block device: truncation to nothing (O_TRUNC) does nothing."""
        attributes = self._attributes(node)
        size = abi.decode_setattr(arguments)
        if size not in (None, 0, attributes.size_bytes):
            raise OSError(errno.EINVAL, "a disk cannot be truncated or extended")
        return (abi.encode_reply(unique, abi.encode_attributes(attributes)),)

    def _open(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        self._attributes(node)
        return (abi.encode_reply(unique, abi.encode_open(_OPEN_FLAGS)),)

    def _open_directory(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        return (abi.encode_reply(unique, abi.encode_open(0)),)

    def _read_directory(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        after, bytes_max = abi.decode_read(arguments)
        entries = [(1, abi.ROOT_NODE, True, b"."), (2, abi.ROOT_NODE, True, b"..")]
        for name, found in sorted(self._volume.nodes.copy().items(), key=lambda item: item[1]):
            entries.append((found - _FIRST_DISK_NODE + _FIRST_DISK_COOKIE, found, False, name))
        return (abi.encode_reply(unique, abi.encode_directory(entries, after, bytes_max)),)

    def _statfs(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        disks = list(self._volume.disks.values())
        body = abi.encode_statfs(sum(disk.size_bytes for disk in disks), len(disks))
        return (abi.encode_reply(unique, body),)

    def _fallocate(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        disk = self._volume.disks.get(node, _GONE)
        offset, length, mode = abi.decode_fallocate(arguments)
        end = offset + length
        kept = mode & ~abi.FALLOC_KEEP_SIZE
        if kept not in (0, abi.FALLOC_PUNCH_HOLE, abi.FALLOC_ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if end > disk.size_bytes and not mode & abi.FALLOC_KEEP_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inside = min(end, disk.size_bytes) - offset
        if inside > 0 and kept == abi.FALLOC_PUNCH_HOLE:
            disk.discard(offset, inside)
        elif inside > 0 and kept == abi.FALLOC_ZERO_RANGE:
            disk.zero(offset, inside)
        return (abi.encode_reply(unique),)

    def _sync(self, unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
        """Answered once everything appended so far is durable, by whoever made it so."""

        def answer(error: OSError | None) -> None:
            reply = abi.encode_error(unique, error.errno or errno.EIO) if error else abi.encode_reply(unique)
            try:
                os.write(self._fd, reply)
            except OSError as failure:
                if failure.errno not in _REQUEST_GONE:  # the thread that makes things durable must live on
                    log.error("an fsync could not be answered: %s", failure)

        self._volume.request_sync(answer)
        return ()

    def _attributes(self, node: int) -> abi.Attributes:
        if node == abi.ROOT_NODE:
            return abi.Attributes(node, 0, stat.S_IFDIR | 0o700, 2, self._time_s)
        disk = self._volume.disks.get(node)
        if disk is None:  # ESTALE lets the kernel forget the name and look it up again
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return abi.Attributes(node, disk.size_bytes, stat.S_IFREG | 0o600, 1, self._time_s)


class _GoneDisk:
    """Stands for a disk that was removed while a program still had it open."""

    @property
    def size_bytes(self) -> int:
        raise OSError(errno.EIO, "the disk was removed")

    def write(self, offset: int, payload: Bytes) -> None: ...

    def read(self, offset: int, length: int) -> Sequence[Bytes]:
        return ()

    def zero(self, offset: int, length: int) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...


_GONE = _GoneDisk()


def _read(disk: ServedDisk, unique: int, offset: int, size: int) -> Sequence[Bytes]:
    inside = min(size, disk.size_bytes - offset)
    if inside <= 0:
        return (abi.encode_reply(unique),)
    return (abi.OUT_HEADER.pack(abi.OUT_HEADER_BYTES + inside, 0, unique), *disk.read(offset, inside))


def _size_inside(disk: ServedDisk, offset: int, size: int) -> int:
    """Bytes of a write that lie on the disk. Like a block device: a short write, then ENOSPC."""
    inside = disk.size_bytes - offset
    if inside <= 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return min(size, inside)


def _refusal(error: Exception, opcode: int, unique: int, node: int) -> bytes:
    """The reply to a request that failed. Raises `error` again if a fresh process shall try the request first."""
    if isinstance(error, OSError):
        return abi.encode_error(unique, error.errno or errno.EIO)
    log.error("request %d (%#x) for node %d failed", opcode, unique, node, exc_info=error)
    if not isinstance(error, AsrfsError) and not unique & abi.RESEND_BIT:
        raise error
    return abi.encode_error(unique, errno.EIO)


def _forgive(error: OSError) -> None:
    """A reply may find its request gone (given up by the kernel) or the mount gone; all else is an error."""
    if error.errno not in _REQUEST_GONE:
        raise error


def _unknown(unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
    return (abi.encode_error(unique, errno.ENOSYS),)


def _forbidden(unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
    return (abi.encode_error(unique, errno.EPERM),)


def _done(unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
    return (abi.encode_reply(unique),)


def _no_reply(unique: int, node: int, arguments: memoryview) -> Sequence[Bytes]:
    return ()


def _locked_buffer(size: int) -> memoryview:
    """Anonymous memory that starts on a page, every page of it present and, where allowed, locked there."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(size)
    libc = CDLL(None, use_errno=True)
    libc.mlock.argtypes = (c_void_p, c_size_t)
    libc.mlock(addressof(c_char.from_buffer(memory)), size)  # a refusal (RLIMIT_MEMLOCK) leaves it touched
    return memoryview(memory)
