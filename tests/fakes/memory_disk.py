"""A disk in memory behind the direct session's interface, with every call written down."""

from __future__ import annotations

Bytes = bytes | bytearray | memoryview


class MemoryDisk:
    """`calls` has `(operation, offset, length)` in order. `fail_with` is raised by every operation while set."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.content = bytearray(size_bytes)
        self.calls: list[tuple[str, int, int]] = []
        self.fail_with: Exception | None = None

    def write(self, offset: int, payload: Bytes) -> None:
        self._note("write", offset, len(payload))
        self.content[offset : offset + len(payload)] = payload

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._note("read", offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def zero(self, offset: int, length: int) -> None:
        self._note("zero", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def _note(self, operation: str, offset: int, length: int) -> None:
        assert offset >= 0, (operation, offset)
        assert length > 0, (operation, length)
        assert offset + length <= self.size_bytes, (operation, offset, length)
        self.calls.append((operation, offset, length))
        if self.fail_with is not None:
            raise self.fail_with


class NullDisk:
    """Takes everything and keeps nothing: what a session costs by itself."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._zeros = bytes(1 << 20)

    def write(self, offset: int, payload: Bytes) -> None: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self._zeros)[: len(buffer)]

    def zero(self, offset: int, length: int) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...
