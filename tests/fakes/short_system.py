"""The module `os` whose reads and writes of a file at a place do only a third of what is asked, as any system may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from asrfs.storage.interface import Bytes


class ShortSystem:
    """`cut`: calls that did less than was asked."""

    def __init__(self) -> None:
        self.cut = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _share(self, length: int) -> int:
        self.cut += length > 1
        return max(1, length // 3) if length else 0

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(buffers), offset)

    def pwrite(self, fd: int, content: Bytes, offset: int) -> int:
        return os.pwrite(fd, memoryview(content)[: self._share(len(content))], offset)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, self._share(length), offset)

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        (buffer,) = buffers
        return os.preadv(fd, [memoryview(buffer)[: self._share(len(buffer))]], offset)
