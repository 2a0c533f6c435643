"""A storage in memory that can lose power, be killed and fail: the rules of `asrfs/storage/interface.py`, made real.

Every file keeps what programs see, what is durable, and the changes in between in their order; every directory
likewise keeps its names. `crash` decides the fate of each change that was not synced:

    KEPT    all of it reached the disk          LOST    none of it
    SUBSET  each change as a whole, or not      TORN    each 512-byte sector of each change, or not
    REORDERED  as SUBSET, and those that reach it in any order

and returns the storage the next start would find. `killed` returns what a killed process leaves: everything visible,
still not durable. Both are copies, so one run can be looked at after each of its operations (`after_operation`).

A datasync takes its time: `within_datasync` does what others do meanwhile.
Faults are injected by the number of the operation; `assert_fired` fails a test whose fault was never reached. As the
interface says, a call that was interrupted or came short goes on by itself; a power loss may come in between.
Directories themselves are durable at once; only the names in them are not.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence

from asrfs.storage.interface import Bytes
from tests.fakes.crash_state import HOLE_BYTES, SECTOR_BYTES, Change, Fate, Inode, NameChange, directory_of
from tests.fakes.faults import CHANGING, READING, Fault

__all__ = ["CHANGING", "READING", "CrashFile", "CrashStorage", "Fate", "Fault"]


class CrashFile:
    """An open file of `CrashStorage`."""

    def __init__(self, storage: CrashStorage, inode: int, name: str, write: bool) -> None:
        self._storage = storage
        self._inode = inode
        self._name = name
        self._write = write
        self._open = True
        self._sync_failed = False

    def _at(self, kind: str) -> Inode:
        assert self._open, f"{kind} of {self._name}, which was closed"
        if not self._write and kind in ("write", "punch", "allocate", "truncate"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._name)
        if kind != "write":  # a failing write may be partial and asks for its fault itself
            self._storage.enter(kind, self._name)
        return self._storage.inode(self._inode)

    def write_at(self, buffers: Sequence[Bytes], offset: int) -> None:
        with self._storage.lock:
            inode = self._at("write")
            content = b"".join(buffers)
            fault = self._storage.strike("write")
            if fault is not None:
                whole = offset + int(len(content) * fault.partial)
                short = content[: max(0, whole - whole % SECTOR_BYTES - offset)]
                if short:
                    inode.change(Change(offset, short))
                if not fault.goes_on:
                    raise OSError(fault.error, os.strerror(fault.error), self._name)
                self._storage.leave("write", self._name)
                offset, content = offset + len(short), content[len(short) :]
            room = self._storage.room_for(inode, offset + len(content))
            if room < offset + len(content):
                if room > offset:
                    inode.change(Change(offset, content[: room - offset]))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
            inode.change(Change(offset, content))
            self._storage.leave("write", self._name)

    def read_at(self, length: int, offset: int) -> bytes:
        with self._storage.lock:
            inode = self._at("read")
            return bytes(inode.visible[offset : offset + length])

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        piece = self.read_at(len(buffer), offset)
        buffer[: len(piece)] = piece
        return len(piece)

    def datasync(self) -> None:
        """What is there when it begins is durable when it ends. What is written meanwhile is not."""
        with self._storage.lock:
            assert self._open
            inode = self._storage.inode(self._inode)
            assert not self._sync_failed, f"datasync of {self._name} tried again after it had failed"
            try:
                self._storage.enter("datasync", self._name)
            except OSError:
                self._sync_failed = True
                inode.fail_datasync()
                raise
            last = inode.unsynced[-1] if inode.unsynced else None
        self._meanwhile(False)
        with self._storage.lock:
            if self._storage.honours_datasync:
                inode.datasync(last)
            self._storage.leave("datasync", self._name)
        self._meanwhile(True)

    def _meanwhile(self, is_durable: bool) -> None:
        """Between two steps of a datasync, without the lock: others write to the file, or power is lost."""
        if self._storage.within_datasync is not None:
            self._storage.within_datasync(self._name, is_durable)

    def punch(self, offset: int, length: int) -> None:
        with self._storage.lock:
            inode = self._at("punch")
            end = min(offset + length, len(inode.visible))
            if end > offset:
                inode.change(Change(offset, bytes(end - offset), punched=True))
            self._storage.leave("punch", self._name)

    def allocate(self, length: int) -> None:
        with self._storage.lock:
            inode = self._at("allocate")
            if self._storage.room_for(inode, length) < length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
            if length > len(inode.visible):
                inode.change(Change(0, None, length))
            self._storage.leave("allocate", self._name)

    def truncate(self, size: int) -> None:
        with self._storage.lock:
            inode = self._at("truncate")
            inode.change(Change(0, None, size))
            self._storage.leave("truncate", self._name)

    def size(self) -> int:
        with self._storage.lock:
            return len(self._storage.inode(self._inode).visible)

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        with self._storage.lock:
            inode = self._storage.inode(self._inode)
            size, data = len(inode.visible), sorted(inode.visible_data)
        begin = end = start
        for block in data:
            if (block + 1) * HOLE_BYTES <= start:
                continue
            if block * HOLE_BYTES > end:
                if end > begin:
                    yield begin, end - begin
                begin = block * HOLE_BYTES
            end = min((block + 1) * HOLE_BYTES, size)
        if end > begin:
            yield begin, end - begin

    def close(self) -> None:
        self._open = False


class CrashStorage:
    """See the module. `capacity` bounds the bytes of all files. With `honours_datasync` or `honours_directory_sync`
    False it acknowledges a sync that it did not do: for negative controls. `replaces_nothing_in`: directories in which
    no rename may put a file in the place of another."""

    def __init__(
        self, *, capacity: int | None = None, honours_datasync: bool = True, honours_directory_sync: bool = True
    ) -> None:
        self.capacity = capacity
        self.honours_datasync = honours_datasync
        self.honours_directory_sync = honours_directory_sync
        self.lock = threading.RLock()
        self.replaces_nothing_in: set[str] = set()
        self.operations = 0
        self.log: list[tuple[str, str]] = []
        self.after_operation: Callable[[str, str], None] | None = None
        self.within_datasync: Callable[[str, bool], None] | None = None
        """Called twice in each: before anything is durable, and when all is and the caller does not know it yet."""
        self._faults: list[Fault] = []
        self._inodes: dict[int, Inode] = {}
        self._names: dict[str, int] = {}
        self._durable_names: dict[str, int] = {}
        self._unsynced_names: list[NameChange] = []
        self._directories = {""}

    # ---- Storage ----

    def create(self, name: str) -> CrashFile:
        with self.lock:
            self._check_parent(name)
            if name in self._names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            self.enter("create", name)
            number = max(self._inodes, default=0) + 1
            self._inodes[number] = Inode()
            self._change_names(NameChange(None, name, number))
            self.leave("create", name)
            return CrashFile(self, number, name, write=True)

    def open(self, name: str, *, write: bool = False) -> CrashFile:
        with self.lock:
            if name in self._directories:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
            number = self._lookup(name)
            self.enter("open", name)
            return CrashFile(self, number, name, write)

    def exists(self, name: str) -> bool:
        with self.lock:
            return name in self._names or name in self._directories

    def rename(self, old: str, new: str) -> None:
        with self.lock:
            number = self._lookup(old)
            self._check_parent(new)
            if directory_of(new) in self.replaces_nothing_in:
                assert new not in self._names, f"rename of {old} replaces {new}"
            self.enter("rename", new)
            if self._names.get(new) != number:
                self._change_names(NameChange(old, new, number))
            self.leave("rename", new)

    def link(self, old: str, new: str) -> None:
        with self.lock:
            number = self._lookup(old)
            self._check_parent(new)
            if new in self._names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
            self.enter("link", new)
            self._change_names(NameChange(None, new, number, is_link=True))
            self.leave("link", new)

    def unlink(self, name: str) -> None:
        with self.lock:
            number = self._lookup(name)
            self.enter("unlink", name)
            self._change_names(NameChange(name, None, number, is_link=True))
            self.leave("unlink", name)

    def names(self, directory: str) -> list[str]:
        with self.lock:
            if directory not in self._directories:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
            every = [*self._names, *(d for d in self._directories if d)]
            return sorted(name.rpartition("/")[2] for name in every if directory_of(name) == directory)

    def make_directory(self, name: str) -> None:
        with self.lock:
            parts = name.split("/")
            for i in range(len(parts)):
                path = "/".join(parts[: i + 1])
                if path in self._names:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                self._directories.add(path)

    def sync_directory(self, directory: str) -> None:
        with self.lock:
            if directory not in self._directories:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
            self.enter("sync_directory", directory)
            if self.honours_directory_sync:
                for change in self._unsynced_names:
                    if change.touches(directory):
                        change.apply(self._durable_names, frozenset(self._names))
                self._unsynced_names = [c for c in self._unsynced_names if not c.touches(directory)]
            self.leave("sync_directory", directory)

    def free_bytes(self) -> int:
        with self.lock:
            return (1 << 40) if self.capacity is None else max(0, self.capacity - self._used())

    def below(self, directory: str) -> Below:
        """A storage whose root is a directory of this one, as each room is handed its own."""
        self.make_directory(directory)
        return Below(self, directory)

    def used_bytes(self) -> int:
        """Bytes of all files, which `capacity` bounds."""
        with self.lock:
            return self._used()

    # ---- crashes ----

    def crash(self, fate: Fate, rng: random.Random, names_kept: Sequence[bool] | None = None) -> CrashStorage:
        """What the next start finds after a power loss now. This storage stays as it is.

        `names_kept`: of each unsynced change of a name, whether it got to the disk; else the fate decides that, too.
        """
        with self.lock:
            after = self._successor()
            if names_kept is None and fate is Fate.KEPT:
                names = dict(self._names)
            else:
                names = dict(self._durable_names)
                for i, change in enumerate(self._unsynced_names):
                    if names_kept[i] if names_kept is not None else fate is not Fate.LOST and rng.random() < 0.5:
                        change.apply(names, frozenset(self._names))
            numbers = sorted(set(names.values()))
            after._inodes = {number: self._inodes[number].after_power_loss(fate, rng) for number in numbers}
            after._names, after._durable_names = names, dict(names)
            return after

    def unsynced_names(self) -> int:
        """How many changes of names a power loss could still take."""
        with self.lock:
            return len(self._unsynced_names)

    def is_settled(self) -> bool:
        """Whether a power loss now could take nothing: every fate leaves what a kill leaves."""
        with self.lock:
            return not self._unsynced_names and not any(
                inode.unsynced or inode.has_lost_writes for inode in self._living()
            )

    def contents(self) -> dict[str, bytes]:
        """Every file that has a name, with its visible bytes."""
        with self.lock:
            return {name: self._inodes[number].freeze() for name, number in self._names.items()}

    def killed(self) -> CrashStorage:
        """What the next start finds when the process was killed: all of it, and not more durable than it was."""
        with self.lock:
            after = self._successor()
            reachable = {*self._names.values(), *self._durable_names.values()}
            reachable.update(change.inode for change in self._unsynced_names)
            after._inodes = {number: self._inodes[number].copy() for number in sorted(reachable)}
            after._names, after._durable_names = dict(self._names), dict(self._durable_names)
            after._unsynced_names = list(self._unsynced_names)
            return after

    def keep_failing(self, before: CrashStorage) -> None:
        """The disk stays the same one: what was injected into it goes on counting here."""
        self._faults = before._faults

    def unsynced_bytes(self, name: str) -> int:
        """How much of a file a power loss could still take."""
        with self.lock:
            return sum(len(change.content or b"") for change in self._inodes[self._lookup(name)].unsynced)

    # ---- faults ----

    def inject(self, fault: Fault) -> Fault:
        with self.lock:
            self._faults.append(fault)
            return fault

    def assert_fired(self) -> None:
        """Every injected fault struck at least once, else the test has not tested what it says."""
        silent = [fault for fault in self._faults if not fault.fired]
        assert not silent, f"never fired: {silent}"

    def enter(self, kind: str, name: str) -> None:
        """An operation begins. Raises OSError if a fault strikes."""
        if (fault := self.strike(kind)) is not None and not fault.goes_on:
            raise OSError(fault.error, os.strerror(fault.error), name)

    def strike(self, kind: str) -> Fault | None:
        struck = [fault for fault in self._faults if fault.strikes(kind)]
        return struck[0] if struck else None

    def leave(self, kind: str, name: str) -> None:
        """An operation that changed something is done."""
        self.operations += 1
        self.log.append((kind, name))
        if self.after_operation is not None:
            self.after_operation(kind, name)

    # ---- inside ----

    def inode(self, number: int) -> Inode:
        return self._inodes[number]

    def room_for(self, inode: Inode, size: int) -> int:
        """The size the file may grow to, at most `size`."""
        if self.capacity is None or size <= len(inode.visible):
            return size
        return min(size, len(inode.visible) + max(0, self.capacity - self._used()))

    def _living(self) -> list[Inode]:
        return [self._inodes[number] for number in set(self._names.values())]

    def _used(self) -> int:
        return sum(len(self._inodes[number].visible) for number in set(self._names.values()))

    def _successor(self) -> CrashStorage:
        after = CrashStorage(
            capacity=self.capacity,
            honours_datasync=self.honours_datasync,
            honours_directory_sync=self.honours_directory_sync,
        )
        after._directories = set(self._directories)
        after.replaces_nothing_in = set(self.replaces_nothing_in)
        return after

    def _change_names(self, change: NameChange) -> None:
        self._unsynced_names.append(change)
        change.apply(self._names)

    def _lookup(self, name: str) -> int:
        number = self._names.get(name)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return number

    def _check_parent(self, name: str) -> None:
        if directory_of(name) not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


class Below:
    """A directory of a storage as a storage."""

    def __init__(self, storage: CrashStorage, directory: str) -> None:
        self._storage = storage
        self._directory = directory
        self.root = directory  # for messages

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}" if name else self._directory

    def create(self, name: str) -> CrashFile:
        return self._storage.create(self._path(name))

    def open(self, name: str, *, write: bool = False) -> CrashFile:
        return self._storage.open(self._path(name), write=write)

    def exists(self, name: str) -> bool:
        return self._storage.exists(self._path(name))

    def rename(self, old: str, new: str) -> None:
        self._storage.rename(self._path(old), self._path(new))

    def link(self, old: str, new: str) -> None:
        self._storage.link(self._path(old), self._path(new))

    def unlink(self, name: str) -> None:
        self._storage.unlink(self._path(name))

    def names(self, directory: str) -> list[str]:
        return self._storage.names(self._path(directory))

    def make_directory(self, name: str) -> None:
        self._storage.make_directory(self._path(name))

    def sync_directory(self, directory: str) -> None:
        self._storage.sync_directory(self._path(directory))

    def free_bytes(self) -> int:
        return self._storage.free_bytes()
