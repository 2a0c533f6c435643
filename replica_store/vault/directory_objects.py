"""Objects as files of a directory, durable before anything else is said of them.

    .incoming/…        create, write, fdatasync            a crash leaves a stray file here, swept at the next start
    machines/…/NAME    link, unlink of the first name, fsync of the directory (and once of those above it)

Linking fails when the name is taken, so a put never replaces; a reader never sees half an object.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from asrfs.errors import NoSpaceError, TemporaryError
from asrfs.storage.interface import Storage, read_whole
from replica_store.vault.objects import (
    SUFFIX,
    Bytes,
    ObjectExistsError,
    ObjectMissingError,
    check_object_name,
    is_object_name,
)

_INCOMING = ".incoming"


class DirectoryObjects:
    """`storage` is rooted at the directory `root`, whose path is only shown to people."""

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage = storage
        self._root = root
        self._durable_directories: set[str] = set()

    def sweep(self) -> None:
        """Remove what puts that died left. Only for the one process that puts."""
        with self._errors(_INCOMING):
            if self._storage.exists(_INCOMING):
                for name in self._storage.names(_INCOMING):
                    self._storage.unlink(f"{_INCOMING}/{name}")

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        directory = check_object_name(name).rpartition("/")[0]
        temporary = f"{_INCOMING}/{secrets.token_hex(8)}"
        with self._errors(name):
            self._make_directory(_INCOMING)
            self._make_directory(directory)
            self._write_new(temporary, pieces)
            try:
                self._storage.link(temporary, name)
            except FileExistsError:
                raise ObjectExistsError(f"{self.where(name)}: there is an object of this name already") from None
            finally:
                self._storage.unlink(temporary)
            self._storage.sync_directory(directory)

    def read(self, name: str) -> bytes:
        with self._errors(name):
            return read_whole(self._storage, check_object_name(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self._errors(name):
            file = self._storage.open(check_object_name(name))
            try:
                return file.read_at(length, offset)
            finally:
                file.close()

    def list(self, prefix: str) -> list[str]:
        directory, _, _ = prefix.rpartition("/")
        with self._errors(directory):
            return [name for name in self._walk(directory, prefix) if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        with self._errors(name):
            try:
                self._storage.unlink(check_object_name(name))
            except FileNotFoundError:
                return
            self._storage.sync_directory(name.rpartition("/")[0])

    def size(self, name: str) -> int:
        with self._errors(name):
            file = self._storage.open(check_object_name(name))
            try:
                return file.size()
            finally:
                file.close()

    def settle(self, prefix: str) -> None:
        directory, _, _ = prefix.rpartition("/")
        with self._errors(directory):
            if not self._storage.exists(directory):
                return
            self._durable_directories.discard(directory)
            self._make_directory(directory)
            self._storage.sync_directory(directory)  # files were synced before they got the names that this keeps

    def where(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write_new(self, temporary: str, pieces: Sequence[Bytes]) -> None:
        file = self._storage.create(temporary)
        try:
            file.write_at(pieces, 0)
            file.datasync()
        except BaseException:
            file.close()
            self._storage.unlink(temporary)
            raise
        file.close()

    def _make_directory(self, directory: str) -> None:
        """With its parents, all durable: also those that a process before this one made and did not live to sync."""
        if directory in self._durable_directories:
            return
        self._storage.make_directory(directory)
        above = directory
        while above:
            above = above.rpartition("/")[0]
            self._storage.sync_directory(above)
        self._durable_directories.add(directory)

    def _walk(self, directory: str, prefix: str) -> Iterator[str]:
        try:
            names = self._storage.names(directory)
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file that somebody else put there
            return
        for base in names:
            name = f"{directory}/{base}" if directory else base
            if base.startswith("."):
                continue
            if base.endswith(SUFFIX):
                if is_object_name(name):
                    yield name
            elif name.startswith(prefix) or prefix.startswith(name + "/"):
                yield from self._walk(name, prefix)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """The system's errors in our words, naming the file."""
        try:
            yield
        except FileNotFoundError:
            raise ObjectMissingError(f"{self.where(name)}: there is no such object") from None
        except OSError as error:
            text = f"{self.where(name)}: {(error.strerror or str(error)).lower()}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(text) from None
            raise TemporaryError(text) from None
