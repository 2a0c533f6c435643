"""A read-only tree of directories and files, served by pyfuse3.

This session knows nothing of what the tree holds: directories list and look up their entries when they are asked,
files are opened as readable disks. Whatever blocks (listing, opening, reading) runs in threads. What a name leads to
may change at any time unless the entry says that it lasts; what a file holds never changes, so the kernel keeps what
it has read.

One tree a process: pyfuse3 keeps its session in globals.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

import pyfuse3
import trio

from asrfs.disk.interface import MappedDisk, ReadableDisk
from asrfs.errors import AsrfsError, BadInputError, NotFoundError, RefusedError
from asrfs.storage.content import CONTENT_EXTENTS_MAX, content_asked, encode_content

LASTING_SECONDS = 3600.0
_THREADS = 16
_STOP_SECONDS = 2.0
_SECTOR_BYTES = 512

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file whose bytes never change. Equal keys are one file under several names. `open` may block and raise."""

    key: Hashable
    size_bytes: int
    time_ns: int
    open: Callable[[], ReadableDisk]


class TreeDirectory(Protocol):
    """A directory. Equal keys are one directory under several names. Calls may block and raise AsrfsError."""

    @property
    def key(self) -> Hashable: ...

    @property
    def time_ns(self) -> int: ...

    def entries(self) -> Sequence[TreeEntry]:
        """What a listing shows."""

    def lookup(self, name: str) -> TreeEntry:
        """The entry of this name, listed or not. Raises NotFoundError or BadInputError where there is none."""


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """`lasting`: the name will always lead to this node, so the kernel need not ask again."""

    name: str
    node: TreeFile | TreeDirectory
    lasting: bool = False


async def serve_tree(
    root: TreeDirectory,
    mount_point: str,
    *,
    source: str,
    ready: Callable[[], None],
    stop: trio.Event,
    report: Callable[[str], None],
) -> None:
    """Mount `root` and answer until `stop` is set or somebody unmounts it; unmounted when this returns.

    `source` is what the list of mounts shows. `report` is given a line for everything that cannot be read. Raises
    AsrfsError if the mount is refused. Files that are still open when it stops give errors from then on.
    """
    operations = _Operations(root, report)
    options = {*pyfuse3.default_options, "ro", "nosuid", "nodev", f"fsname={source}", "subtype=asrfs"}
    try:
        pyfuse3.init(operations, mount_point, options)
    except RuntimeError as error:
        raise AsrfsError(f"cannot mount on {mount_point}: {error}; is /dev/fuse there and may you use it?") from None
    try:
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def answer() -> None:
                await pyfuse3.main(min_tasks=1, max_tasks=2 * _THREADS)
                ended.set()
                stop.set()

            nursery.start_soon(answer)
            ready()
            await stop.wait()
            if not ended.is_set():
                pyfuse3.terminate()
            with trio.move_on_after(_STOP_SECONDS):
                await ended.wait()
            nursery.cancel_scope.cancel()  # a read that still waits for its storage is given up
    finally:
        pyfuse3.close(unmount=True)


class _Operations(pyfuse3.Operations):
    """Requests of the kernel to calls of the tree."""

    supports_dot_lookup = False

    def __init__(self, root: TreeDirectory, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._inodes = _Inodes(root)
        self._handles = count(1)
        self._files: dict[int, ReadableDisk] = {}
        self._listings: dict[int, Sequence[TreeEntry]] = {}
        self._uid, self._gid = os.getuid(), os.getgid()

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self._directory(parent_inode)
        text = os.fsdecode(name)
        entry = await self._in_thread(lambda: directory.lookup(text))
        inode = self._inodes.number(entry.node)
        self._inodes.referred(inode)
        return self._attributes(inode, entry.node, LASTING_SECONDS if entry.lasting else 0.0)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            self._inodes.forget(inode, lookups)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode, self._inodes.node(inode))

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        directory = self._directory(inode)
        handle = next(self._handles)
        self._listings[handle] = await self._in_thread(directory.entries)
        return pyfuse3.FileHandleT(handle)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        # The listing was fixed when the directory was opened, so a position in it is a stable id.
        listing = self._listings[fh]
        for i in range(start_id, len(listing)):
            entry = listing[i]
            inode = self._inodes.number(entry.node)
            attributes = self._attributes(inode, entry.node, LASTING_SECONDS if entry.lasting else 0.0)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(os.fsencode(entry.name)), attributes, i + 1):
                self._inodes.forget(inode, 0)
                return
            self._inodes.referred(inode)

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        del self._listings[fh]

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        node = self._inodes.node(inode)
        if not isinstance(node, TreeFile):
            raise pyfuse3.FUSEError(errno.EISDIR)
        handle = next(self._handles)
        self._files[handle] = await self._in_thread(node.open)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        disk = self._files[fh]
        length = max(0, min(size, disk.size_bytes - off))
        return bytes(await self._in_thread(lambda: disk.read(off, length)) if length else b"")

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """Where a file has content, which lseek cannot ask of this tree: see `storage.content`."""
        node, start = self._inodes.node(inode), content_asked(name)
        if start is None or not isinstance(node, TreeFile):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        disk = await self._in_thread(node.open)
        if not isinstance(disk, MappedDisk):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return encode_content(await self._in_thread(lambda: disk.content(start, CONTENT_EXTENTS_MAX)))

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        del self._files[fh]

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status = pyfuse3.StatvfsData()
        status.f_bsize = status.f_frsize = 4096
        status.f_namemax = 255
        return status

    def _directory(self, inode: int) -> TreeDirectory:
        node = self._inodes.node(inode)
        if isinstance(node, TreeFile):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return node

    def _attributes(
        self, inode: int, node: TreeFile | TreeDirectory, entry_seconds: float = 0.0
    ) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(inode)
        attributes.st_uid, attributes.st_gid = self._uid, self._gid
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = node.time_ns
        attributes.st_blksize = 4096
        attributes.entry_timeout = entry_seconds
        if isinstance(node, TreeFile):
            attributes.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400)
            attributes.st_nlink = 1
            attributes.st_size = node.size_bytes
            attributes.st_blocks = -(-node.size_bytes // _SECTOR_BYTES)
            attributes.attr_timeout = LASTING_SECONDS
        else:
            attributes.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o500)
            attributes.st_nlink = 2
            attributes.attr_timeout = 0.0
        return attributes

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Run what may block beside the session; every failure becomes an errno."""
        try:
            return await trio.to_thread.run_sync(call, limiter=self._limiter, abandon_on_cancel=True)
        except (NotFoundError, BadInputError):
            raise pyfuse3.FUSEError(errno.ENOENT) from None
        except RefusedError as error:
            self._report(str(error))
            raise pyfuse3.FUSEError(errno.EBUSY) from None
        except Exception as error:
            # An exception that left a handler would end the whole tree; one file's trouble stays with that file.
            self._report(f"{type(error).__name__}: {error}" if not isinstance(error, AsrfsError) else str(error))
            raise pyfuse3.FUSEError(errno.EIO) from None


class _Inodes:
    """Numbers of the nodes the kernel knows. A node keeps its number while the kernel refers to it."""

    def __init__(self, root: TreeDirectory) -> None:
        self._nodes: dict[int, TreeFile | TreeDirectory] = {pyfuse3.ROOT_INODE: root}
        self._numbers: dict[Hashable, int] = {root.key: pyfuse3.ROOT_INODE}
        self._lookups: dict[int, int] = {pyfuse3.ROOT_INODE: 1}
        self._next = count(pyfuse3.ROOT_INODE + 1)

    def number(self, node: TreeFile | TreeDirectory) -> int:
        """The number of a node, a new one if the kernel does not know it."""
        inode = self._numbers.get(node.key)
        if inode is None:
            inode = self._numbers[node.key] = next(self._next)
            self._nodes[inode] = node
            self._lookups[inode] = 0
        return inode

    def node(self, inode: int) -> TreeFile | TreeDirectory:
        return self._nodes[inode]

    def referred(self, inode: int) -> None:
        self._lookups[inode] += 1

    def forget(self, inode: int, lookups: int) -> None:
        self._lookups[inode] -= lookups
        assert self._lookups[inode] >= 0
        if self._lookups[inode] == 0:
            del self._lookups[inode]
            del self._numbers[self._nodes.pop(inode).key]
