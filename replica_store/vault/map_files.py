"""The files of map checkpoints: `maps/MACHINE/`, beside the objects and never among them.

Nothing in a vault needs them: whatever they say can be read from the objects again, so a file that is gone, torn or
not of this history costs time and nothing else. They are written whole under a hidden name, synced, and renamed, so
that a crash leaves a file or none; one that a power loss takes back is made again. Writing and removing is the holder's
of the lock of `maps/`; reading needs nobody's leave.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from asrfs.storage.interface import Storage
from replica_store.vault.tails import machine_of

MAPS_DIRECTORY = "maps"
MAPS_LOCK_FILE = f"{MAPS_DIRECTORY}/lock"
_NAME = re.compile(r"(?P<slot>[0-9a-f]{4})-(?P<after>[0-9a-f]{16})-(?P<lsn>[0-9a-f]{16})-(?P<digest>[0-9a-f]{16})\.map")
_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class MapName:
    """What the name of a checkpoint says. `digest`: how the digest of the log object begins that ends at `lsn`."""

    slot: int
    after_lsn: int
    lsn: int
    digest: str

    @classmethod
    def of(cls, slot: int, after_lsn: int, lsn: int, digest: bytes) -> MapName:
        return cls(slot, after_lsn, lsn, digest[:_DIGEST_BYTES].hex())

    def __str__(self) -> str:
        return f"{self.slot:04x}-{self.after_lsn:016x}-{self.lsn:016x}-{self.digest}.map"


class MapFiles:
    """`storage` is rooted at the vault's directory. Errors are OSError, as from the system.

    `lock`: become the one that writes and removes, as a context; raises RefusedError when another is, or OSError.
    """

    def __init__(self, storage: Storage, lock: Callable[[], AbstractContextManager[object]]) -> None:
        self._storage = storage
        self.lock = lock

    def names(self, machine_id: str) -> list[MapName]:
        """Of all checkpoints of a machine; none if nothing can be read there. A tail has those of its machine."""
        try:
            found = self._storage.names(f"{MAPS_DIRECTORY}/{machine_of(machine_id)}")
        except OSError:
            return []
        matches = [match for match in map(_NAME.fullmatch, found) if match]
        return [
            MapName(int(match["slot"], 16), int(match["after"], 16), int(match["lsn"], 16), match["digest"])
            for match in matches
        ]

    def size(self, machine_id: str, name: MapName) -> int:
        file = self._storage.open(_path(machine_id, name))
        try:
            return file.size()
        finally:
            file.close()

    def read_range(self, machine_id: str, name: MapName, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only where the file ends."""
        file = self._storage.open(_path(machine_id, name))
        try:
            return file.read_at(length, offset)
        finally:
            file.close()

    def free_bytes(self) -> int:
        """Space left where they lie."""
        return self._storage.free_bytes()

    def put(self, machine_id: str, name: MapName, pieces: Sequence[bytes]) -> None:
        """Make the file, or replace it. Under the lock."""
        directory = f"{MAPS_DIRECTORY}/{machine_id}"
        self._storage.make_directory(directory)
        temporary = f"{directory}/.{secrets.token_hex(8)}"
        try:
            file = self._storage.create(temporary)
            try:
                at = 0
                for piece in pieces:
                    file.write_at([piece], at)
                    at += len(piece)
                file.datasync()
            finally:
                file.close()
            self._storage.rename(temporary, _path(machine_id, name))
        except OSError:
            with suppress(OSError):
                self._storage.unlink(temporary)
            raise

    def remove(self, machine_id: str, name: MapName) -> None:
        """Nothing happens if it is not there. Under the lock."""
        with suppress(FileNotFoundError):
            self._storage.unlink(_path(machine_id, name))

    def sweep(self, machine_id: str) -> None:
        """Remove what writers that died left. Under the lock."""
        directory = f"{MAPS_DIRECTORY}/{machine_id}"
        with suppress(FileNotFoundError):
            for base in self._storage.names(directory):
                if base.startswith("."):
                    self._storage.unlink(f"{directory}/{base}")


def _path(machine_id: str, name: MapName) -> str:
    return f"{MAPS_DIRECTORY}/{machine_of(machine_id)}/{name}"
