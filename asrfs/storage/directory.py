"""The real filesystem behind the storage interface."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import CDLL, c_int, c_int64, get_errno

from asrfs.storage.interface import Bytes

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_BLKGETSIZE64 = 0x80081272
_ZEROS = bytes(1 << 20)
PIECE_BYTES = 256 << 10
"""Of a call that writes. Kernels that are not preempted at work, which servers' often are not, give a processor to
somebody else between calls: one of 8 MiB keeps him waiting for 3 ms."""
_libc = CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)


def _pieces(buffers: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """The same bytes in calls of at most so many."""
    piece: list[Bytes] = []
    room = PIECE_BYTES
    for buffer in buffers:
        rest = memoryview(buffer)
        while len(rest) >= room:
            yield [*piece, rest[:room]]
            piece, rest, room = [], rest[room:], PIECE_BYTES
        if len(rest):
            piece.append(rest)
            room -= len(rest)
    if piece:
        yield piece


class OpenFile:
    """A file descriptor. `fd` is public for the few calls (splice to FUSE, lock) that need the number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write_at(self, buffers: Sequence[Bytes], offset: int) -> None:
        if sum(map(len, buffers)) <= PIECE_BYTES:
            self._write_piece(buffers, offset)
            return
        for piece in _pieces(buffers):
            offset += self._write_piece(piece, offset)

    def _write_piece(self, buffers: Sequence[Bytes], offset: int) -> int:
        length = sum(map(len, buffers))
        written = os.pwritev(self.fd, buffers, offset)
        if written == length:
            return length
        rest = memoryview(b"".join(buffers))
        while written < length:
            written += os.pwrite(self.fd, rest[written:], offset + written)
        return length

    def read_at(self, length: int, offset: int) -> bytes:
        first = os.pread(self.fd, length, offset)
        if len(first) == length or not first:
            return first
        pieces = [first]
        have = len(first)
        while have < length and (piece := os.pread(self.fd, length - have, offset + have)):
            pieces.append(piece)
            have += len(piece)
        return b"".join(pieces)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        have = os.preadv(self.fd, [buffer], offset)
        if have == len(buffer) or not have:
            return have
        view = memoryview(buffer)
        while have < len(view) and (more := os.preadv(self.fd, [view[have:]], offset + have)):
            have += more
        return have

    def datasync(self) -> None:
        os.fdatasync(self.fd)

    def punch(self, offset: int, length: int) -> None:
        try:
            _fallocate(self.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            for at in range(offset, offset + length, len(_ZEROS)):
                self.write_at([_ZEROS[: min(len(_ZEROS), offset + length - at)]], at)

    def allocate(self, length: int) -> None:
        os.posix_fallocate(self.fd, 0, length)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def size(self) -> int:
        status = os.fstat(self.fd)
        if stat.S_ISBLK(status.st_mode):
            return int.from_bytes(fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)), "little")
        return status.st_size

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        size, at = self.size(), start
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            if at < size:
                yield at, size - at
            return
        while at < size:
            try:
                begin = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            at = os.lseek(self.fd, begin, os.SEEK_HOLE)
            yield begin, at - begin

    def will_need(self, offset: int, length: int) -> None:
        """Let the kernel read ahead, if it cares to; nobody waits for it."""
        if length > 0:
            with suppress(OSError):
                os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.fd)


class DirectoryStorage:
    """A directory of the real filesystem. `root` is made if it is missing."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        os.makedirs(self.root, mode=0o700, exist_ok=True)

    def path(self, name: str) -> str:
        """The path of `name`, for messages and for programs that want one."""
        return os.path.join(self.root, name) if name else self.root

    def create(self, name: str) -> OpenFile:
        return OpenFile(os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def open(self, name: str, *, write: bool = False) -> OpenFile:
        return open_path(self.path(name), write=write)

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def rename(self, old: str, new: str) -> None:
        os.rename(self.path(old), self.path(new))

    def link(self, old: str, new: str) -> None:
        os.link(self.path(old), self.path(new))

    def unlink(self, name: str) -> None:
        os.unlink(self.path(name))

    def names(self, directory: str) -> list[str]:
        return sorted(os.listdir(self.path(directory)))

    def make_directory(self, name: str) -> None:
        path = self.root
        for part in name.split("/"):  # one by one: `makedirs` gives its mode to the last one only
            path = os.path.join(path, part)
            os.makedirs(path, mode=0o700, exist_ok=True)

    def sync_directory(self, directory: str) -> None:
        fd = os.open(self.path(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize


def open_path(path: str, *, write: bool = False) -> OpenFile:
    """Open a file or block device anywhere, such as an adopted image."""
    return OpenFile(os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
