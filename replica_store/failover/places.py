"""Where a recovered machine lies: chosen and checked before anything is touched, made, and taken away again.

VAULT/failover/ID/       lock, recovered.json, logs, tree/ (the points, mounted), copy/ (while one is examined), boot/
VAULT/failover/ID/state  and  VAULT/failover/ID/disks, or the two directories that were asked for
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from asrfs.errors import BadInputError, RefusedError
from replica_store.failover import mounts
from replica_store.vault.lock import VaultLock
from replica_store.vault.operations import ENDED, Operation, Places

DIRECTORY = "failover"
RECOVERED_FILE = "recovered.json"
_LOCK_FILE = "lock"


def choose_places(root: str, operation_id: str, state: str | None, mount: str | None, namespace: str | None) -> Places:
    """Raises BadInputError, and RefusedError for a directory that is in use. Nothing is made."""
    directory = os.path.join(root, DIRECTORY, operation_id[:12])
    chosen_state = os.path.realpath(state) if state else os.path.join(directory, "state")
    chosen_mount = os.path.realpath(mount) if mount else os.path.join(directory, "disks")
    for path, what in ((chosen_state, "--state"), (chosen_mount, "--mount")):
        _check_free(path, what)
    if _overlap(chosen_state, chosen_mount):
        raise BadInputError("--state and --mount must be two directories, and neither may lie in the other")
    made = tuple(path for path in (chosen_state, chosen_mount) if not os.path.isdir(path))
    return Places(directory=directory, state=chosen_state, mount=chosen_mount, made=made, namespace=namespace)


def _check_free(path: str, what: str) -> None:
    if mounts.is_mount_point(path):
        raise RefusedError(f"{what} {path}: something is mounted there already: choose another directory")
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise BadInputError(f"{what} {path} is not a directory")
    if os.listdir(path):
        raise RefusedError(f"{what} {path} is not empty: choose an empty directory or a new one")


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def check_not_taken(places: Places, others: list[Operation]) -> None:
    """Raise RefusedError if another failover has these directories, be they empty or not."""
    for other in others:
        if not other.remains:
            continue
        for mine in (places.state, places.mount):
            if any(_overlap(mine, theirs) for theirs in (other.places.state, other.places.mount)):
                raise RefusedError(
                    f"{mine} is a directory of {other.kind} failover {other.id[:12]}: choose another one"
                )


class FailoverLock(VaultLock):
    """Of a directory, which goes with it when nothing else is there."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        super().__init__(os.path.join(directory, _LOCK_FILE), "being worked on", "wait until that is done")

    def is_in_place(self) -> bool:
        """Whether it is the one that others find: who removed the directory before may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(os.path.join(self._directory, _LOCK_FILE)))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        try:
            if self.is_in_place() and os.listdir(self._directory) == [_LOCK_FILE]:
                with suppress(OSError):  # what somebody has just put there stays, as what was there before does
                    _remove_with_lock(self._directory)
        finally:
            super().close()


def take_lock(places: Places) -> FailoverLock:
    """Be the only one that works on this failover. Raises RefusedError while another is."""
    os.makedirs(os.path.dirname(places.directory), exist_ok=True)
    while True:
        # Not `makedirs`, which fails where the directory that was in its way has gone when it looks what that was.
        with suppress(FileExistsError):
            os.mkdir(places.directory, 0o700)
        try:
            lock = FailoverLock(places.directory)
        except FileNotFoundError:
            if os.path.islink(places.directory):  # to nothing: it would be so for ever
                raise
            continue  # it has gone since
        if lock.is_in_place():
            return lock
        lock.close()


def take_lock_of(found: Operation) -> AbstractContextManager[object]:
    """The same for one that there is. Of one that has ended, with nothing left, nobody changes anything more, and no
    directory is made for a lock."""
    return nullcontext() if found.state in ENDED and not found.remains else take_lock(found.places)


def tree_of(places: Places) -> str:
    return os.path.join(places.directory, "tree")


def copy_of(places: Places) -> str:
    return os.path.join(places.directory, "copy")


def boot_of(places: Places) -> str:
    return os.path.join(places.directory, "boot")


def log_of(places: Places, name: str) -> Path:
    return Path(places.directory, f"{name}.log")


def make(places: Places) -> None:
    """All directories of the failover, empty ones where nothing is yet."""
    for path in (places.directory, places.state, places.mount, tree_of(places)):
        os.makedirs(path, mode=0o700, exist_ok=True)


def empty(directory: str, spared: str | None = None) -> None:
    """Remove what is in it, but what has the name `spared`; nothing happens if it is not there."""
    if not os.path.isdir(directory):
        return
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != spared:
            os.unlink(entry.path)


def remove(places: Places) -> None:
    """What was made goes, what was there before is left empty. Nothing of it is mounted any more."""
    for path in (places.state, places.mount):
        if mounts.is_mount_point(path):
            raise RefusedError(f"{path} is still mounted")
        empty(path)
    for path in reversed(places.made):
        if os.path.isdir(path):
            os.rmdir(path)
    if os.path.isdir(places.directory):
        empty(places.directory, spared=_LOCK_FILE)
        _remove_with_lock(places.directory)


def _remove_with_lock(directory: str) -> None:
    """From now on somebody else may have the lock, with this directory or a new one: that is his, and goes with him.

    Raises OSError where anything else keeps it: then it is tried again.
    """
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, _LOCK_FILE))
    with suppress(FileNotFoundError):
        while True:
            try:
                return os.rmdir(directory)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                there = os.listdir(directory)
                if _LOCK_FILE in there:
                    return None
                if there:
                    raise  # written by who was thought to have ended
