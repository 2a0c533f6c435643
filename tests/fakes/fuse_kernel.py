"""The kernel's end of a FUSE descriptor in memory: sends requests, reads replies, one message at a time.

A pair of packet sockets stands for `/dev/fuse`: one read takes one request, one write gives one reply. Layouts are
written down here a second time, from `linux/fuse.h`, so that a wrong one in the session does not agree with itself.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from asrfs.fuse.channel import Channel, open_channel
from asrfs.fuse.direct import DirectSession
from asrfs.fuse.volume import Volume

ANSWER_SECONDS_MAX = 10.0
_SO_SNDBUFFORCE = 32
_SOCKET_BYTES = 4 << 20


class Reply(NamedTuple):
    """`error` as it came: 0 or a negative errno."""

    error: int
    unique: int
    body: bytes


class FuseKernel:
    """A kernel and the session that serves it in a thread. Leaving the block is unmounting."""

    def __init__(self, volume: Volume, open_channel: Callable[[int], Channel] = open_channel) -> None:
        self._kernel, self._server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._kernel, self._server):
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
        self._kernel.settimeout(ANSWER_SECONDS_MAX)
        self.session = DirectSession(self._server.fileno(), volume, time_s=1_700_000_000, open_channel=open_channel)
        self.died_of: BaseException | None = None
        self._unique = 2
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FuseKernel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._kernel.shutdown(socket.SHUT_WR)
        self._thread.join(ANSWER_SECONDS_MAX)
        assert not self._thread.is_alive()
        self._kernel.close()
        self._server.close()

    def wait_for_death(self) -> BaseException | None:
        """What the session died of."""
        self._thread.join(ANSWER_SECONDS_MAX)
        return self.died_of

    def send(self, opcode: int, node: int, arguments: bytes = b"", unique: int | None = None) -> int:
        """Send a request; its unique number."""
        if unique is None:
            self._unique += 2
            unique = self._unique
        length = 40 + len(arguments)
        self._kernel.send(struct.pack("<IIQQIIIHH", length, opcode, unique, node, 0, 0, 1, 0, 0) + arguments)
        return unique

    def receive(self) -> Reply:
        message = self._kernel.recv(2 << 20)
        length, error, unique = struct.unpack_from("<IiQ", message)
        assert length == len(message)
        return Reply(error, unique, message[16:])

    def ask(self, opcode: int, node: int, arguments: bytes = b"", unique: int | None = None) -> Reply:
        """Send a request and take the reply, which must be to it."""
        unique = self.send(opcode, node, arguments, unique)
        reply = self.receive()
        assert reply.unique == unique
        return reply

    def write(self, node: int, offset: int, payload: bytes, unique: int | None = None) -> Reply:
        head = struct.pack("<QQIIQII", 0, offset, len(payload), 0, 0, 0, 0)
        return self.ask(16, node, head + payload, unique)

    def read(self, node: int, offset: int, size: int) -> Reply:
        return self.ask(15, node, struct.pack("<QQIIQII", 0, offset, size, 0, 0, 0, 0))

    def _serve(self) -> None:
        try:
            self.session.run()
        except BaseException as error:
            self.died_of = error
