"""The worker's end of `transport.worker`: it needs no event loop, so a process that works is there soon."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

LENGTH = struct.Struct("<I")
"""Before each request and each answer: its bytes."""


def work(answer: Callable[[bytes], bytes]) -> None:
    """Answer until nobody asks any more."""
    while (prefix := _read(LENGTH.size)) is not None:
        request = _read(LENGTH.unpack(prefix)[0])
        if request is None:
            return
        said = answer(request)
        try:
            _write(LENGTH.pack(len(said)) + said)
        except BrokenPipeError:
            return


def _read(length: int) -> bytes | None:
    """So many bytes, None at the end."""
    read = b""
    while len(read) < length:
        piece = os.read(0, length - len(read))
        if not piece:
            return None
        read += piece
    return read


def _write(content: bytes) -> None:
    rest = memoryview(content)
    while len(rest):
        rest = rest[os.write(1, rest) :]
