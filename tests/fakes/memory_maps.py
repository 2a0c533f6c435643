"""A place for map checkpoints in memory: what `vault.map_files.MapFiles` is on a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from replica_store.vault.map_files import MapName


class MemoryMaps:
    """Of any machine. `free`: what it says of its space; `refuses`: every put fails."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, MapName], bytes] = {}
        self.free = 1 << 40
        self.refuses = False
        self.lock: Callable[[], AbstractContextManager[object]] = nullcontext

    def names(self, machine_id: str) -> list[MapName]:
        return [name for machine, name in self.files if machine == machine_id]

    def size(self, machine_id: str, name: MapName) -> int:
        return len(self._content(machine_id, name))

    def read_range(self, machine_id: str, name: MapName, offset: int, length: int) -> bytes:
        return self._content(machine_id, name)[offset : offset + length]

    def free_bytes(self) -> int:
        return self.free

    def put(self, machine_id: str, name: MapName, pieces: Sequence[bytes]) -> None:
        if self.refuses:
            raise OSError(28, "no space left on device")
        self.files[machine_id, name] = b"".join(pieces)

    def remove(self, machine_id: str, name: MapName) -> None:
        self.files.pop((machine_id, name), None)

    def sweep(self, machine_id: str) -> None:
        pass

    def _content(self, machine_id: str, name: MapName) -> bytes:
        try:
            return self.files[machine_id, name]
        except KeyError:
            raise FileNotFoundError(2, "no such file", str(name)) from None
