"""Objects in memory: the same contract as a directory, without a disk. Faults are put in `fail_puts`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from asrfs.errors import AsrfsError
from replica_store.vault.objects import Bytes, ObjectExistsError, ObjectMissingError, check_object_name


class MemoryObjects:
    """`content` is what is there. Errors in `fail_puts` are raised by the next puts, one each."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.fail_puts: list[AsrfsError] = []
        self._lock = threading.Lock()

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        check_object_name(name)
        with self._lock:
            if self.fail_puts:
                raise self.fail_puts.pop(0)
            if name in self.content:
                raise ObjectExistsError(f"{self.where(name)}: there is an object of this name already")
            self.content[name] = b"".join(pieces)

    def read(self, name: str) -> bytes:
        try:
            return self.content[check_object_name(name)]
        except KeyError:
            raise ObjectMissingError(f"{self.where(name)}: there is no such object") from None

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return self.read(name)[offset : offset + length]

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            return [name for name in self.content if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        with self._lock:
            self.content.pop(check_object_name(name), None)

    def size(self, name: str) -> int:
        return len(self.read(name))

    def settle(self, prefix: str) -> None:
        """Nothing is ever in doubt."""

    def where(self, name: str) -> str:
        return f"memory:{name}"
