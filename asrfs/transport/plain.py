"""Streams of bytes without TLS, for protocols that begin in the clear and go over to it in the middle.

Only for what listens on this machine alone, or begins TLS before anything is said that matters.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import trio

from asrfs.transport.enrolment import describe
from asrfs.transport.stream import RECEIVE_BYTES, Bytes, LinkError, SecureStream, accept, format_address

Handler = Callable[["PlainStream"], Awaitable[None]]


class PlainStream:
    """A ByteStream over TCP alone."""

    def __init__(self, connection: trio.SocketStream) -> None:
        self._connection = connection

    async def send_all(self, data: Bytes) -> None:
        """Raises LinkError."""
        try:
            await self._connection.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise LinkError(f"the connection broke: {describe(error)}") from None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Raises LinkError."""
        try:
            return await self._connection.receive_some(max_bytes or RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise LinkError(f"the connection broke: {describe(error)}") from None

    async def start_tls(self, context: ssl.SSLContext) -> SecureStream:
        """Go over to TLS as its server; what is returned takes this stream's place. Raises LinkError and
        AuthenticationError."""
        return await SecureStream.handshake(self._connection, context, None)

    def peer_address(self) -> str:
        """Where the peer is, for logs."""
        try:
            host, port, *_ = self._connection.socket.getpeername()
        except OSError:
            return "unknown"
        return format_address(host, port)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._connection)


async def serve_plain(listeners: Sequence[trio.SocketListener], handler: Handler) -> None:
    """Accept for ever; `handler` gets each connection, and it is closed afterwards. It must not raise."""

    async def one(connection: trio.SocketStream) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await handler(PlainStream(connection))
        except OSError:
            pass  # gone before it began
        finally:
            await trio.aclose_forcefully(connection)

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(accept, listener, one, nursery)
