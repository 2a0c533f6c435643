"""A process of ours that works for another one, over its standard input and output: one request, one answer, in turns.

    4 bytes length, little-endian | so many bytes

It is in a session of its own and ends when its standard input does, so at the latest with who started it. What the
bytes mean is its own and its master's concern. Here is the master's end; the worker's is `transport.working`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

import trio

from asrfs.errors import TemporaryError
from asrfs.transport.working import LENGTH

MESSAGE_BYTES_MAX = 4 << 20


class Worker:
    """The master's end. One request at a time; one that is cancelled or fails makes it useless: close it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.is_good = True

    @classmethod
    async def start(cls, module: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Worker:
        """Run `python -m module arguments`. Raises TemporaryError when no process can be started."""
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
                env=env,
            )
        except OSError as error:
            raise TemporaryError(f"no process can be started: {error.strerror}") from None
        return cls(process)

    async def ask(self, request: bytes) -> bytes:
        """Its answer. Raises TemporaryError when it ended instead."""
        assert self.is_good
        self.is_good = False
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            await stdin.send_all(LENGTH.pack(len(request)) + request)
            (length,) = LENGTH.unpack(await _receive(stdout, LENGTH.size))
            answer = await _receive(stdout, length)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise TemporaryError("a process that works for us ended before it had answered") from None
        self.is_good = True
        return answer

    async def close(self) -> None:
        """Kill it, and wait for its end."""
        with trio.CancelScope(shield=True):
            self._process.kill()
            await self._process.wait()
            for end in (self._process.stdin, self._process.stdout):
                if end is not None:
                    await end.aclose()


async def _receive(stream: trio.abc.ReceiveStream, length: int) -> bytes:
    """Exactly so many bytes. Raises BrokenResourceError at the end of the stream or for too many."""
    if length > MESSAGE_BYTES_MAX:
        raise trio.BrokenResourceError
    received = bytearray()
    while len(received) < length:
        piece = await stream.receive_some(length - len(received))
        if not piece:
            raise trio.BrokenResourceError
        received += piece
    return bytes(received)
