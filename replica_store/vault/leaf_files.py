"""The files of kept leaves: `leaves/MACHINE/`, one for each region of a disk, beside the objects and never among them.

Nothing in a vault needs them: whatever they say can be read from the objects again, so a file that is gone, torn or
not of this history costs time and nothing else. They are written under a hidden name and renamed, and not synced: what
a power loss leaves of one is found out by its seal. That one is removed is synced. Nobody takes a lock: whoever comes
last has it, and each says of itself what it was made of.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from dataclasses import dataclass

from asrfs.storage.interface import Storage
from replica_store.vault.tails import machine_of

LEAVES_DIRECTORY = "leaves"
_NAME = re.compile(r"(?P<slot>[0-9a-f]{4})-(?P<first>[0-9a-f]{12})\.leaves")


@dataclass(frozen=True, slots=True)
class LeavesName:
    """`first`: number of the region's first node."""

    slot: int
    first: int

    def __str__(self) -> str:
        return f"{self.slot:04x}-{self.first:012x}.leaves"


class LeafFiles:
    """`storage` is rooted at the vault's directory. Errors are OSError, as from the system."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def names(self, machine_id: str) -> list[LeavesName]:
        """Of all files of a machine; none if nothing can be read there."""
        try:
            found = self._storage.names(_directory(machine_id))
        except OSError:
            return []
        matches = [match for match in map(_NAME.fullmatch, found) if match]
        return [LeavesName(int(match["slot"], 16), int(match["first"], 16)) for match in matches]

    def read(self, machine_id: str, name: LeavesName, bytes_max: int) -> bytes:
        """The whole file, or as much of it."""
        file = self._storage.open(f"{_directory(machine_id)}/{name}")
        try:
            return file.read_at(bytes_max, 0)
        finally:
            file.close()

    def free_bytes(self) -> int:
        """Space left where they lie."""
        return self._storage.free_bytes()

    def put(self, machine_id: str, name: LeavesName, content: bytes) -> None:
        """Make the file, or replace it."""
        directory = _directory(machine_id)
        self._storage.make_directory(directory)
        temporary = f"{directory}/.{secrets.token_hex(8)}"
        try:
            file = self._storage.create(temporary)
            try:
                file.write_at([content], 0)
            finally:
                file.close()
            self._storage.rename(temporary, f"{directory}/{name}")
        except OSError:
            with suppress(OSError):
                self._storage.unlink(temporary)
            raise

    def remove(self, machine_id: str, name: LeavesName) -> None:
        """Durably: what it says may not hold any more. Nothing happens if it is not there."""
        with suppress(FileNotFoundError):
            self._storage.unlink(f"{_directory(machine_id)}/{name}")
            self._storage.sync_directory(_directory(machine_id))

    def sweep(self, machine_id: str) -> None:
        """Remove what writers that died left, and what one that lives writes just now: that is not kept then."""
        directory = _directory(machine_id)
        with suppress(FileNotFoundError):
            for base in self._storage.names(directory):
                if base.startswith("."):
                    with suppress(FileNotFoundError):
                        self._storage.unlink(f"{directory}/{base}")


def _directory(machine_id: str) -> str:
    return f"{LEAVES_DIRECTORY}/{machine_of(machine_id)}"
