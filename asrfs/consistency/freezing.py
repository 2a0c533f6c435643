"""Freezing filesystems together: all of them, or none.

    open each ─▶ sync each, nothing held yet ─▶ freeze level by level, deepest first ─▶ … ─▶ thaw in the other order

A freeze waits for dirty pages, which on our disks pass through our own disk server, so it runs in a thread that
serves nobody. Once begun it cannot be interrupted; one that returns after the deadline is undone at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from asrfs.consistency.filesystems import Kernel, MountedFilesystem
from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.model.clock import Clock

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878

_libc = ctypes.CDLL(None, use_errno=True)


class Freezer(Protocol):
    """What the kernel does with an open filesystem. Calls block and raise OSError."""

    def sync(self, fd: int) -> None: ...

    def freeze(self, fd: int) -> None:
        """EBUSY if somebody has frozen it already."""

    def thaw(self, fd: int) -> None:
        """EINVAL if it is not frozen."""


class KernelFreezer:
    """`Freezer` of this host."""

    def sync(self, fd: int) -> None:
        if _libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def freeze(self, fd: int) -> None:
        fcntl.ioctl(fd, FIFREEZE, 0)

    def thaw(self, fd: int) -> None:
        fcntl.ioctl(fd, FITHAW, 0)


class OpenFilesystem:
    """A filesystem and a descriptor of its root, open until `close`."""

    def __init__(self, filesystem: MountedFilesystem, fd: int) -> None:
        self.name = str(filesystem)
        self.level = filesystem.level
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


def open_filesystems(kernel: Kernel, filesystems: Sequence[MountedFilesystem]) -> list[OpenFilesystem]:
    """In the same order. Raises RefusedError naming the one that cannot be opened; then none is left open."""
    opened: list[OpenFilesystem] = []
    try:
        for each in filesystems:
            opened.append(OpenFilesystem(each, _open(kernel, each)))
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened


def _open(kernel: Kernel, filesystem: MountedFilesystem) -> int:
    """A place that is not hidden below another mount."""
    why = "every place where it is mounted is hidden below another mount"
    for mount in filesystem.mounts:
        try:
            fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            continue  # a bind mount of a file
        except OSError as error:
            why = error.strerror or str(error)
            continue
        if kernel.mount_id_of("self", str(fd)) == mount.id:
            return fd
        os.close(fd)
    raise RefusedError(f"{filesystem} cannot be opened: {why}")


class FrozenTogether:
    """Freezes and thaws `filesystems`, which are open, from one thread. `deadline` on the clock's monotonic time."""

    def __init__(self, filesystems: Sequence[OpenFilesystem], freezer: Freezer, clock: Clock) -> None:
        self._filesystems = filesystems
        self._freezer = freezer
        self._clock = clock
        self._frozen: list[OpenFilesystem] = []

    def sync(self) -> None:
        """Have most of what is dirty written before anything waits for it. Raises TemporaryError."""
        with self._pool() as pool:
            for each, error in zip(self._filesystems, pool.map(self._tried_sync, self._filesystems), strict=True):
                if error is not None:
                    raise TemporaryError(f"{each.name} could not be synced: {error.strerror}")

    def freeze(self, deadline: float) -> None:
        """Freeze all. Raises AsrfsError that names what could not be; then nothing is frozen any more."""
        try:
            with self._pool() as pool:
                for level in sorted({each.level for each in self._filesystems}, reverse=True):
                    together = [each for each in self._filesystems if each.level == level]
                    outcomes = list(pool.map(self._tried_freeze, together))
                    self._frozen += [each for each, error in zip(together, outcomes, strict=True) if error is None]
                    for each, error in zip(together, outcomes, strict=True):
                        if error is not None:
                            raise _not_frozen(each, error)
                    if self._clock.monotonic() >= deadline:
                        raise TemporaryError("freezing took longer than freeze_deadline allows")
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> str | None:
        """Thaw what is frozen; None, or which one somebody else has thawed before or nobody could thaw."""
        failed = None
        while self._frozen:
            each = self._frozen.pop()
            try:
                self._freezer.thaw(each.fd)
            except OSError as error:
                failed = f"{each.name} was thawed too early"
                if error.errno != errno.EINVAL:
                    failed = f"{each.name} could not be thawed: {error.strerror}"
        return failed

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, len(self._filesystems)), thread_name_prefix="freeze")

    def _tried_sync(self, each: OpenFilesystem) -> OSError | None:
        try:
            self._freezer.sync(each.fd)
        except OSError as error:
            return error
        return None

    def _tried_freeze(self, each: OpenFilesystem) -> OSError | None:
        try:
            self._freezer.freeze(each.fd)
        except OSError as error:
            return error
        return None


def _not_frozen(each: OpenFilesystem, error: OSError) -> AsrfsError:
    if error.errno == errno.EBUSY:
        return RefusedError(f"{each.name} is frozen by somebody else already")
    if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
        return RefusedError(f"{each.name} cannot be frozen: this kind of filesystem does not support it")
    return TemporaryError(f"{each.name} could not be frozen: {error.strerror}")
