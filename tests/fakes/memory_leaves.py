"""A place for kept leaves in memory: what `vault.leaf_files.LeafFiles` is on a disk."""

from __future__ import annotations

from replica_store.vault.leaf_files import LeavesName


class MemoryLeaves:
    """Of any machine. `free`: what it says of its space; `refuses`: every put fails."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, LeavesName], bytes] = {}
        self.free = 1 << 40
        self.refuses = False

    def names(self, machine_id: str) -> list[LeavesName]:
        return [name for machine, name in self.files if machine == machine_id]

    def read(self, machine_id: str, name: LeavesName, bytes_max: int) -> bytes:
        try:
            return self.files[machine_id, name][:bytes_max]
        except KeyError:
            raise FileNotFoundError(2, "no such file", str(name)) from None

    def free_bytes(self) -> int:
        return self.free

    def put(self, machine_id: str, name: LeavesName, content: bytes) -> None:
        if self.refuses:
            raise OSError(28, "no space left on device")
        self.files[machine_id, name] = content

    def remove(self, machine_id: str, name: LeavesName) -> None:
        self.files.pop((machine_id, name), None)

    def sweep(self, machine_id: str) -> None:
        pass
