"""Making and removing the FUSE mount of a volume: `mount(2)` and the INIT handshake, without a helper program.

The mount lives as long as somebody has its descriptor open; who makes it keeps the descriptor, so that the process
that answers requests may come and go. When the last descriptor is closed the mount stays behind, dead: every access
says "Transport endpoint is not connected". Such a mount is recognised by its type and replaced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass

from asrfs.errors import AsrfsError, BadInputError, NotFoundError, RefusedError, TemporaryError
from asrfs.fuse import abi
from asrfs.storage.kernel_text import kernel_lines

FILESYSTEM_TYPE = "fuse.asrfs"
SOURCE = "asrfs"
DEVICE = "/dev/fuse"
INIT_SECONDS_MAX = 10.0
MAX_BACKGROUND = 128
CONGESTION_THRESHOLD = 96

WANTED_FLAGS = (
    abi.ASYNC_READ
    | abi.BIG_WRITES
    | abi.ASYNC_DIO
    | abi.PARALLEL_DIROPS
    | abi.MAX_PAGES
    | abi.INIT_EXT
    | abi.DIRECT_IO_ALLOW_MMAP
    | abi.HAS_RESEND
)
_MS_NOSUID = 2
_MS_NODEV = 4
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_LINKS_MAX = 40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p,) * 3 + (ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class MountedFilesystem:
    """One line of mountinfo. `device` is `major:minor`."""

    device: str
    target: str
    type: str
    source: str


def mounted_filesystems() -> list[MountedFilesystem]:
    """What this process sees mounted, oldest first."""
    return parse_mountinfo(kernel_lines("/proc/self/mountinfo"))


def parse_mountinfo(lines: Iterable[str]) -> list[MountedFilesystem]:
    """The lines of a mountinfo file (proc(5)), octal escapes resolved."""
    mounts = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        mounts.append(MountedFilesystem(fields[2], _unescape(fields[4]), tail[0], _unescape(tail[1])))
    return mounts


def mount_at(path: str) -> MountedFilesystem | None:
    """The topmost filesystem mounted exactly at `path`, which is not accessed."""
    found = [mount for mount in mounted_filesystems() if mount.target == path]
    return found[-1] if found else None


def real_path(path: str) -> str:
    """`path` without symbolic links. What is mounted there is not asked anything: it may be dead or busy."""
    path = os.path.abspath(path)
    for _ in range(_LINKS_MAX):
        parent, name = os.path.split(path)
        parent = os.path.realpath(parent)
        path = os.path.join(parent, name) if name else parent
        try:
            path = os.path.normpath(os.path.join(parent, os.readlink(path)))
        except OSError:
            return path
    raise BadInputError(f"{path} has too many levels of symbolic links")


def prepare_directory(path: str) -> None:
    """Check that a filesystem can be mounted at `path`; a dead one of ours there is taken away first.

    Raises NotFoundError, RefusedError.
    """
    while (mount := mount_at(path)) is not None and mount.type == FILESYSTEM_TYPE and is_dead(path):
        unmount(path, lazily=True)
    if mount is not None:
        raise RefusedError(f"{path} is a mount point already ({mount.type}): choose another directory")
    try:
        content = os.listdir(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist: make the directory first") from None
    except NotADirectoryError:
        raise RefusedError(f"{path} is not a directory") from None
    except OSError as error:
        raise RefusedError(f"{path} cannot be used as a mount point: {error.strerror}") from None
    if content:
        raise RefusedError(f"{path} is not empty: choose an empty directory for the mount")


def is_dead(path: str) -> bool:
    """Whether what is mounted at `path` has lost its server for good."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def mount_volume(path: str) -> tuple[int, int]:
    """Mount at `path` and agree with the kernel: `(descriptor, flags agreed on)`. Undone if it fails."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RefusedError(f"{DEVICE} cannot be opened: {error.strerror}: load the fuse module, be root") from None
    try:
        _mount(fd, path)
        try:
            return fd, _shake_hands(fd)
        except BaseException:
            unmount(path, lazily=True)
            raise
    except BaseException:
        os.close(fd)
        raise


def unmount(path: str, *, lazily: bool = False) -> None:
    """Take the topmost mount at `path` away. Raises OSError, EBUSY when it is in use and not `lazily`."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)
    if _libc.umount2(os.fsencode(path), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def is_connected(fd: int) -> bool:
    """Whether the mount of this descriptor is still there."""
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)


def _mount(fd: int, path: str) -> None:
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,max_read={abi.WRITE_BYTES_MAX}"
    flags = _MS_NOSUID | _MS_NODEV
    done = _libc.mount(SOURCE.encode(), os.fsencode(path), FILESYSTEM_TYPE.encode(), flags, options.encode())
    if done != 0:
        raise RefusedError(f"cannot mount at {path}: {os.strerror(ctypes.get_errno())}")


def _shake_hands(fd: int) -> int:
    """Answer INIT; returns the flags agreed on."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        if not poll.poll(INIT_SECONDS_MAX * 1000):
            raise TemporaryError(f"the kernel did not greet within {INIT_SECONDS_MAX:g} s of mounting")
        request = abi.decode_init(os.read(fd, abi.REQUEST_BYTES_MAX + abi.PAGE_BYTES))
        if request is None:
            continue
        if (request.major, request.minor) < (abi.KERNEL_VERSION, abi.KERNEL_MINOR_VERSION_MIN):
            os.write(fd, abi.encode_error(request.unique, errno.EPROTO))
            raise AsrfsError(f"this kernel's FUSE {request.major}.{request.minor} is too old")
        flags = request.flags & WANTED_FLAGS
        reply = abi.encode_init(
            request, flags, max_background=MAX_BACKGROUND, congestion_threshold=CONGESTION_THRESHOLD
        )
        os.write(fd, reply)
        return flags


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
