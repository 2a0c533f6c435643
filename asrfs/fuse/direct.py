"""The direct session: answers the kernel's requests for disks, in turns, from one thread.

A turn takes what has arrived at the channel: one request, or several. Small writes of a turn that can be journaled
together are, with one system call; everything else is done one by one, in the order of arrival. Answered later, from
other threads, are only FSYNC and FLUSH, by whoever makes the journal durable, and a change that came while changes are
held (`HeldError`), by whoever lets them go; reads go on meanwhile. So is what needs bytes that are not on this host
(`AbsentError`), by who waits for them.

The kernel keeps every request until it is answered. If this process dies, the next one asks for them again
(`resume`), and what it then gets carries `RESEND_BIT`. So an exception that is not the disk's word (OSError,
AsrfsError) ends the process on purpose: the request is tried again by a fresh one, and only if it breaks that too is
it answered EIO.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from asrfs.disk.interface import AbsentError, HeldError
from asrfs.errors import AsrfsError
from asrfs.fuse import abi
from asrfs.fuse.channel import HEAD_OFFSET, REQUEST_GONE, Channel, MountGoneError, Slot, open_channel
from asrfs.fuse.volume import FIRST_DISK_NODE, Bytes, ServedDisk, TogetherWrite, Volume

_FIRST_DISK_COOKIE = 3
_ARGUMENTS_OFFSET = HEAD_OFFSET + abi.IN_HEADER_BYTES

log = logging.getLogger(__name__)

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
_NO_REPLY = b""
_IN_PAGE = abi.PAGE_BYTES - 1
_TOGETHER_BYTES_MAX = 128 << 10
"""Longer requests are done one by one and answered at once: a system call is nothing to them, waiting for others is."""

Handler = Callable[[int, int, memoryview], bytes]


class _StopReading(Exception):
    """Raised out of a blocked read by `DirectSession.stop_from_signal`."""


class DirectSession:
    """Serves `volume` on the FUSE descriptor `fd`, whose INIT is done. `time_s`: the time files show."""

    def __init__(
        self, fd: int, volume: Volume, *, time_s: int, open_channel: Callable[[int], Channel] = open_channel
    ) -> None:
        self._fd = fd
        self._volume = volume
        self._time_s = time_s
        self._open_channel = open_channel
        self._stopping = False
        self._waiting = False
        self._handlers = self._make_handlers()

    def resume(self) -> None:
        """Ask the kernel for what another process read and did not answer. Before `run`."""
        os.write(self._fd, abi.encode_resend())

    def stop_from_signal(self) -> None:
        """Let `run` return soon. Called by a signal handler in the thread of `run`, repeatedly until it has.

        A request that was read and not begun is lost to this process; the next one gets it again.
        """
        self._stopping = True
        if self._waiting:
            self._waiting = False  # once is enough: a later signal must not interrupt what follows `run`
            raise _StopReading

    def run(self) -> bool:
        """Answer requests until the mount is gone (True) or `stop_from_signal` (False)."""
        channel = self._open_channel(self._fd)
        try:
            while not self._stopping:
                self._waiting = True
                arrived = channel.wait()
                self._waiting = False
                self._answer(channel, arrived)
        except MountGoneError:
            return True
        except _StopReading:
            pass
        finally:
            self._waiting = False
            channel.close()
        return False

    def _answer(self, channel: Channel, arrived: Sequence[Slot]) -> None:
        """A turn."""
        disks, unpack = self._volume.disks, abi.REQUEST.unpack_from
        room, frame = self._volume.write_together.room, self._volume.write_together.frame
        together: list[TogetherWrite] = []
        waiting: list[tuple[Slot, int, int, int, int]] = []
        for slot in arrived:
            _, opcode, unique, node, _, offset, size = unpack(slot.request, HEAD_OFFSET)
            if (
                opcode == abi.WRITE
                and size <= _TOGETHER_BYTES_MAX
                and not size & _IN_PAGE  # what is made of a slot for a size is kept: there must not be many
                and (disk := disks.get(node)) is not None
            ):
                together.append((disk, offset, slot.framed(size, room, frame)))
                waiting.append((slot, unique, node, offset, size))
                continue
            if together:
                self._write(channel, together, waiting)
                together, waiting = [], []
            self._answer_one(channel, slot, opcode, unique, node, offset, size)
        if together:
            self._write(channel, together, waiting)

    def _write(
        self, channel: Channel, together: list[TogetherWrite], waiting: list[tuple[Slot, int, int, int, int]]
    ) -> None:
        if len(together) > 1 and self._is_written(together, waiting):
            pack_into, length, reply = abi.WRITE_REPLY.pack_into, abi.WRITE_REPLY_BYTES, channel.reply
            for slot, unique, _, _, size in waiting:
                pack_into(slot.reply, 0, length, 0, unique, size, 0)
                reply(slot, length)
        else:
            for slot, unique, node, offset, size in waiting:
                self._answer_one(channel, slot, abi.WRITE, unique, node, offset, size)

    def _is_written(self, together: list[TogetherWrite], waiting: list[tuple[Slot, int, int, int, int]]) -> bool:
        try:
            return self._volume.write_together(together)
        except Exception:
            if not any(unique & abi.RESEND_BIT for _, unique, *_ in waiting):
                raise
            log.exception("%d writes failed together, as they did before: each is tried by itself", len(together))
            return False

    def _answer_one(
        self, channel: Channel, slot: Slot, opcode: int, unique: int, node: int, offset: int, size: int
    ) -> None:
        try:
            if opcode == abi.WRITE:
                disk = self._volume.disks.get(node, _GONE)
                if offset + size > disk.size_bytes:
                    size = _size_inside(disk, offset, size)
                disk.write(offset, slot.payload(size))
                abi.WRITE_REPLY.pack_into(slot.reply, 0, abi.WRITE_REPLY_BYTES, 0, unique, size, 0)
                length = abi.WRITE_REPLY_BYTES
            elif opcode == abi.READ:
                disk = self._volume.disks.get(node, _GONE)
                length = abi.OUT_HEADER_BYTES + max(0, min(size, disk.size_bytes - offset))
                if length > abi.OUT_HEADER_BYTES:
                    disk.read_into(offset, slot.reply[abi.OUT_HEADER_BYTES : length])
                abi.OUT_HEADER.pack_into(slot.reply, 0, length, 0, unique)
            else:
                arguments = slot.request[_ARGUMENTS_OFFSET : HEAD_OFFSET + slot.length]
                length = _put(slot, self._handlers.get(opcode, _unknown)(unique, node, arguments))
        except HeldError:
            self._keep(channel, slot, opcode, unique, node, offset, size)
            return
        except AbsentError:
            wait = self._volume.wait
            assert wait is not None, "a volume whose disks have bases waits for them"
            wait(partial(self._answer_later, opcode, unique, node, offset, size, _copied(slot, opcode, size)))
            return
        except Exception as error:
            length = _put(slot, _refusal(error, opcode, unique, node))
        if length:
            channel.reply(slot, length)
            if size > _TOGETHER_BYTES_MAX and opcode in (abi.WRITE, abi.READ):
                channel.flush()

    # ---- requests that are answered from other threads ------------------------------------------------------------

    def _keep(self, channel: Channel, slot: Slot, opcode: int, unique: int, node: int, offset: int, size: int) -> None:
        """Keep a copy of the request, so that its slot is free for others; where changes go on by now, do it again."""
        keep = self._volume.keep
        assert keep is not None, "a volume whose disks may be held keeps what they hold"
        channel.flush()  # what was answered in this turn must not wait for this
        arguments = _copied(slot, opcode, size)
        if not keep(partial(self._answer_kept, opcode, unique, node, offset, size, arguments), len(arguments)):
            self._answer_one(channel, slot, opcode, unique, node, offset, size)

    def _answer_kept(self, opcode: int, unique: int, node: int, offset: int, size: int, arguments: bytes) -> None:
        """In the thread that lets go."""
        try:
            self._answer_later(opcode, unique, node, offset, size, arguments)
        except AbsentError:
            wait = self._volume.wait
            assert wait is not None
            wait(partial(self._answer_later, opcode, unique, node, offset, size, arguments))

    def _answer_later(self, opcode: int, unique: int, node: int, offset: int, size: int, arguments: bytes) -> None:
        """Raises AbsentError: nothing was done or answered."""
        reply: Bytes
        try:
            if opcode == abi.WRITE:
                self._volume.disks.get(node, _GONE).write(offset, arguments)
                reply = abi.WRITE_REPLY.pack(abi.WRITE_REPLY_BYTES, 0, unique, len(arguments), 0)
            elif opcode == abi.READ:
                reply = self._read_reply(unique, node, offset, size)
            else:
                reply = self._handlers[opcode](unique, node, memoryview(arguments))
        except AbsentError:
            raise
        except HeldError:  # not for the thread that lets go
            keep = self._volume.keep
            assert keep is not None
            if not keep(partial(self._answer_kept, opcode, unique, node, offset, size, arguments), len(arguments)):
                self._answer_later(opcode, unique, node, offset, size, arguments)
            return
        except Exception as error:
            reply = _refusal(error, opcode, unique, node)
        self._reply_later(reply)

    def _read_reply(self, unique: int, node: int, offset: int, size: int) -> bytearray:
        disk = self._volume.disks.get(node, _GONE)
        reply = bytearray(abi.OUT_HEADER_BYTES + max(0, min(size, disk.size_bytes - offset)))
        abi.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        if len(reply) > abi.OUT_HEADER_BYTES:
            disk.read_into(offset, memoryview(reply)[abi.OUT_HEADER_BYTES :])
        return reply

    def _reply_later(self, reply: Bytes) -> None:
        """From another thread than that of `run`. Raises OSError."""
        try:
            os.write(self._fd, reply)
        except OSError as error:
            if error.errno not in REQUEST_GONE:
                raise

    # ---- requests that are not on the hot path: each returns the reply, or nothing -----------------------------

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

    def _lookup(self, unique: int, node: int, arguments: memoryview) -> bytes:
        name = bytes(arguments).partition(b"\0")[0]
        found = self._volume.nodes.get(name) if node == abi.ROOT_NODE else None
        if found is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return abi.encode_reply(unique, abi.encode_entry(self._attributes(found)))

    def _getattr(self, unique: int, node: int, arguments: memoryview) -> bytes:
        return abi.encode_reply(unique, abi.encode_attributes(self._attributes(node)))

    def _setattr(self, unique: int, node: int, arguments: memoryview) -> bytes:
        """A disk keeps its size, like a block device: truncation to nothing (O_TRUNC) does nothing."""
        attributes = self._attributes(node)
        size = abi.decode_setattr(arguments)
        if size not in (None, 0, attributes.size_bytes):
            raise OSError(errno.EINVAL, "a disk cannot be truncated or extended")
        return abi.encode_reply(unique, abi.encode_attributes(attributes))

    def _open(self, unique: int, node: int, arguments: memoryview) -> bytes:
        self._attributes(node)
        return abi.encode_reply(unique, abi.encode_open(_OPEN_FLAGS))

    def _open_directory(self, unique: int, node: int, arguments: memoryview) -> bytes:
        return abi.encode_reply(unique, abi.encode_open(0))

    def _read_directory(self, unique: int, node: int, arguments: memoryview) -> bytes:
        after, bytes_max = abi.decode_read(arguments)
        entries = [(1, abi.ROOT_NODE, True, b"."), (2, abi.ROOT_NODE, True, b"..")]
        for name, found in sorted(self._volume.nodes.copy().items(), key=lambda item: item[1]):
            entries.append((found - FIRST_DISK_NODE + _FIRST_DISK_COOKIE, found, False, name))
        return abi.encode_reply(unique, abi.encode_directory(entries, after, bytes_max))

    def _statfs(self, unique: int, node: int, arguments: memoryview) -> bytes:
        disks = list(self._volume.disks.values())
        body = abi.encode_statfs(sum(disk.size_bytes for disk in disks), len(disks))
        return abi.encode_reply(unique, body)

    def _fallocate(self, unique: int, node: int, arguments: memoryview) -> bytes:
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
        return abi.encode_reply(unique)

    def _sync(self, unique: int, node: int, arguments: memoryview) -> bytes:
        """Answered once everything appended so far is durable, by whoever made it so."""

        def answer(error: OSError | None) -> None:
            reply = abi.encode_error(unique, error.errno or errno.EIO) if error else abi.encode_reply(unique)
            try:
                self._reply_later(reply)
            except OSError as failure:  # the thread that makes things durable must live on
                log.error("an fsync could not be answered: %s", failure)

        self._volume.request_sync(answer)
        return _NO_REPLY

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

    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...


_GONE = _GoneDisk()


def _put(slot: Slot, reply: bytes) -> int:
    """The length of the reply, which is in the slot now."""
    slot.reply[: len(reply)] = reply
    return len(reply)


def _copied(slot: Slot, opcode: int, size: int) -> bytes:
    """What there is to a request beside the numbers in its head."""
    if opcode == abi.WRITE:
        return bytes(slot.payload(size))
    return bytes(slot.request[_ARGUMENTS_OFFSET : HEAD_OFFSET + slot.length])


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


def _unknown(unique: int, node: int, arguments: memoryview) -> bytes:
    return abi.encode_error(unique, errno.ENOSYS)


def _forbidden(unique: int, node: int, arguments: memoryview) -> bytes:
    return abi.encode_error(unique, errno.EPERM)


def _done(unique: int, node: int, arguments: memoryview) -> bytes:
    return abi.encode_reply(unique)


def _no_reply(unique: int, node: int, arguments: memoryview) -> bytes:
    return _NO_REPLY
