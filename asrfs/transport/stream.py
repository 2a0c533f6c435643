"""Streams of bytes between host and store: mutual TLS over TCP, and what goes wrong with it in our own words.

`ByteStream` is what replication and ingest are handed; tests hand them one in memory. Whatever breaks a connection is
a `LinkError`, to be tried again; a certificate that one side does not accept is an AuthenticationError. In TLS 1.3 a
client learns of that only when it first reads, so `receive` may raise it too.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio

from asrfs.errors import AsrfsError, AuthenticationError, BadInputError, RefusedError, TemporaryError
from asrfs.transport.enrolment import describe

Bytes = bytes | bytearray | memoryview

HANDSHAKE_S = 10.0
CONNECT_S = 10.0
CONNECTIONS_MAX = 1000
RECEIVE_BYTES = 256 << 10
_RECORD_BYTES = 16 << 10
_SHORT_BYTES = 1 << 10
"""Of a message that is waited for with nothing else being done."""
_SEND_BYTES = 256 << 10
_BACKLOG = 256
_CLOSE_S = 1.0
_TRY_ACCEPT_AGAIN_S = 0.1
_TRY_ACCEPT_AGAIN = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_CERTIFICATE_WORDS = ("certificate", "unknown_ca", "unknown ca", "access_denied", "decrypt_error", "handshake_failure")


class LinkError(TemporaryError):
    """The connection broke, was never made, or the peer is silent. The same may work later."""


class ByteStream(Protocol):
    """One connection whose other end is authenticated. One sender and one receiver at a time."""

    async def send_all(self, data: Bytes) -> None:
        """Raises LinkError or AuthenticationError."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """What has come, at least one byte; empty when the peer has closed. Raises LinkError, AuthenticationError."""

    async def aclose(self) -> None:
        """Say farewell if that does not take long, and close. Nothing is raised."""


class SecureStream:
    """A ByteStream over TLS 1.3. The handshake is done when one of these exists.

    TLS runs on memory buffers here: one wake-up moves all records that have come, not one of 16 KiB.
    """

    def __init__(
        self, connection: trio.SocketStream, tls: ssl.SSLObject, inward: ssl.MemoryBIO, outward: ssl.MemoryBIO
    ) -> None:
        self._connection = connection
        self._tls = tls
        self._inward = inward
        self._outward = outward
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._ended = False
        self._unsent = memoryview(b"")
        self._poll: select.poll | None = None

    @classmethod
    async def handshake(
        cls, connection: trio.SocketStream, context: ssl.SSLContext, server_name: str | None
    ) -> SecureStream:
        """As a server if `server_name` is None, else as a client that expects that name."""
        inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(inward, outward, server_side=server_name is None, server_hostname=server_name)
        stream = cls(connection, tls, inward, outward)
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                await stream._flush()
                await stream._fill()
                if stream._ended:
                    raise LinkError("the peer closed the connection during the handshake") from None
                continue
            except ssl.SSLError as error:
                await stream._flush_quietly()  # tells the peer why
                raise _refusal(error) from None
            await stream._flush()
            return stream

    def peer_certificate(self) -> bytes:
        """DER of the peer's certificate, which TLS has verified."""
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise AuthenticationError("the peer shows no certificate")
        return certificate

    def peer_address(self) -> str:
        """Where the peer is, for logs."""
        try:
            host, port, *_ = self._connection.socket.getpeername()
        except OSError:
            return "unknown"
        return format_address(host, port)

    def peer_host(self) -> str:
        """The address alone; empty where the connection is gone."""
        try:
            return str(self._connection.socket.getpeername()[0])
        except OSError:
            return ""

    @property
    def has_ended(self) -> bool:
        """Whether the peer has closed."""
        return self._ended

    async def send_all(self, data: Bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        at = 0
        while at < len(view):
            try:
                at += self._tls.write(view[at : at + _RECORD_BYTES])
            except ssl.SSLError as error:
                raise _refusal(error) from None
            if self._outward.pending >= _SEND_BYTES:
                await self._flush()
        await self._flush()

    def seal(self, data: Bytes) -> None:
        """What takes time of sending a short message without waiting. `send_sealed` follows before anything else is
        sent. Not while `send_all` runs. Raises LinkError or AuthenticationError."""
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise _refusal(error) from None

    def send_sealed(self) -> bool:
        """False: not all went out, and `send_all` of anything, even of nothing, sends the rest. Raises LinkError."""
        unsent: Bytes = self._outward.read()
        if self._unsent:
            unsent = bytes(self._unsent) + unsent
        try:
            sent = os.write(self._connection.socket.fileno(), unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise _broken(error) from None
        if sent == len(unsent):
            self._unsent = memoryview(b"")
            return True
        self._unsent = memoryview(unsent)[sent:]
        return False

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        while not (content := self._read_all(max_bytes or RECEIVE_BYTES)) and not self._ended:
            await self._fill()
        return content

    def receive_now(self, seconds_max: float) -> Bytes:
        """What comes within `seconds_max`, perhaps nothing, while no other task runs. A task may be in `receive_some`.

        The end of the stream is `receive_some`'s to tell. Raises LinkError, AuthenticationError.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.fileno(), select.POLLIN)
        try:
            if not self._poll.poll(seconds_max * 1000):
                return b""
        except OSError as error:
            raise _broken(error) from None
        return self.take()

    def take(self) -> Bytes:
        """`receive_now` of what is there already."""
        try:
            count = os.readv(self._connection.socket.fileno(), [self._received])
        except BlockingIOError:
            return b""
        except OSError as error:
            raise _broken(error) from None
        self._inward.write(self._received[:count])
        if not count:
            self._ended = True
            return b""
        return self._read_short()

    def fileno(self) -> int:
        """For a poll; -1 when it is closed."""
        return self._connection.socket.fileno()

    async def send_end(self) -> None:
        """Say that nothing more will be sent; receiving goes on."""
        self._say_farewell()
        await self._flush()

    async def aclose(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_S, shield=True):
            self._say_farewell()
            await self._flush_quietly()
        await trio.aclose_forcefully(self._connection)

    def _say_farewell(self) -> None:
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError, OSError):
            pass  # wants the peer's farewell too, or the connection is broken already

    def _read_short(self) -> Bytes:
        """As `_read_all`, with as little as can be where one short record has come."""
        try:
            content = self._tls.read(_SHORT_BYTES)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            content = b""
        except ssl.SSLError as error:
            raise _refusal(error) from None
        if not content:
            self._ended = True
        elif self._inward.pending or self._tls.pending():
            return content + self._read_all(RECEIVE_BYTES)
        return content

    def _read_all(self, room: int) -> bytearray:
        """All records that have come, up to `room` bytes; notes when the peer has said farewell."""
        there = self._inward.pending + self._tls.pending()
        content = bytearray(min(room, there + _RECORD_BYTES) if there else 0)
        have = 0
        with memoryview(content) as view:
            try:
                while have < len(view) and not self._ended:
                    count: Any = self._tls.read(len(view) - have, view[have:])  # into a buffer: how many bytes
                    have += count
                    self._ended = not count
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._ended = True
            except ssl.SSLError as error:
                raise _refusal(error) from None
        del content[have:]
        return content

    # Trio's own streams take a good part of a processor for what these two do at full speed.

    async def _fill(self) -> None:
        await trio.lowlevel.checkpoint()  # a peer that sends without a pause must not hold up the other tasks
        connection = self._connection.socket
        while True:
            try:
                count = os.readv(connection.fileno(), [self._received])
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
            except OSError as error:
                raise _broken(error) from None
            else:
                break
        self._inward.write(self._received[:count])
        self._ended = not count

    async def _flush(self) -> None:
        rest, self._unsent = self._unsent, memoryview(b"")
        rest = memoryview(bytes(rest) + self._outward.read()) if rest else memoryview(self._outward.read())
        while rest:
            try:
                rest = rest[os.write(self._connection.socket.fileno(), rest) :]
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
            except OSError as error:
                raise _broken(error) from None

    async def _wait(self, until: Callable[[trio.socket.SocketType], Awaitable[None]]) -> None:
        try:
            await until(self._connection.socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise _broken(error) from None

    async def _flush_quietly(self) -> None:
        try:
            await self._flush()
        except LinkError:
            pass


async def connect(
    host: str, port: int, context: ssl.SSLContext, server_name: str, timeout: float = CONNECT_S
) -> SecureStream:
    """Dial a store. Raises LinkError, or AuthenticationError when its certificate is not of our authority."""
    where = format_address(host, port)
    connection: trio.SocketStream | None = None
    try:
        with trio.fail_after(timeout):
            connection = await trio.open_tcp_stream(host, port)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return await SecureStream.handshake(connection, context, server_name)
    except BaseException as error:
        if connection is not None:
            await trio.aclose_forcefully(connection)
        if isinstance(error, trio.TooSlowError):
            raise LinkError(f"{where} does not answer within {timeout:g} s") from None
        if isinstance(error, OSError):
            raise LinkError(f"{where} cannot be reached: {describe(error)}") from None
        if isinstance(error, AsrfsError):
            raise type(error)(f"{where}: {error}") from None
        raise


Handler = Callable[[SecureStream], Awaitable[None]]


async def serve(
    listeners: Sequence[trio.SocketListener],
    context: ssl.SSLContext,
    handler: Handler,
    *,
    refused: Callable[[str], None] = lambda text: None,
    handshake_s: float = HANDSHAKE_S,
    connections_max: int = CONNECTIONS_MAX,
) -> None:
    """Accept for ever; `handler` gets each connection whose handshake succeeded, and it is closed afterwards.

    `refused` is told, in one line, of connections that came to nothing. Handler errors are the handler's: it must not
    raise. Above `connections_max` new ones are closed at once.
    """
    count = 0

    async def one(connection: trio.SocketStream) -> None:
        nonlocal count
        count += 1
        try:
            if count > connections_max:
                refused(f"more than {connections_max} connections at once")
            elif stream := await _secured(connection, context, handshake_s, refused):
                try:
                    await handler(stream)
                finally:
                    await stream.aclose()
        finally:
            count -= 1
            await trio.aclose_forcefully(connection)

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(accept, listener, one, nursery)


async def _secured(
    connection: trio.SocketStream, context: ssl.SSLContext, handshake_s: float, refused: Callable[[str], None]
) -> SecureStream | None:
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with trio.fail_after(handshake_s):
            return await SecureStream.handshake(connection, context, None)
    except trio.TooSlowError:
        refused(f"a handshake took more than {handshake_s:g} s")
    except (AsrfsError, OSError) as error:
        refused(str(error))
    return None


async def accept(
    listener: trio.SocketListener, one: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery
) -> None:
    """For ever: start a task for each connection that comes."""
    while True:
        try:
            connection = await listener.accept()
        except OSError as error:
            if error.errno not in _TRY_ACCEPT_AGAIN:
                raise
            await trio.sleep(_TRY_ACCEPT_AGAIN_S)
        else:
            nursery.start_soon(one, connection)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one.

    Raises TemporaryError while somebody else has the port, RefusedError for an address that cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise RefusedError(f"{format_address(host, port)} cannot be listened on: {describe(error)}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        kind = TemporaryError if is_taken else RefusedError
        raise kind(f"{format_address(host, port)} cannot be listened on: {describe(error)}") from None
    listening.setblocking(False)
    return listening


def listener_of(listening: socket.socket) -> trio.SocketListener:
    """For `serve`."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def address_of(listening: socket.socket) -> str:
    """`HOST:PORT` it listens on."""
    host, port, *_ = listening.getsockname()
    return format_address(host, port)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `HOST` or `[V6]:PORT`. Raises BadInputError."""
    host, colon, port = text.rpartition(":")
    if not colon or (host.startswith("[") and not host.endswith("]")) or text.endswith("]"):
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) < 65536:
        raise BadInputError(f"{text[:100]!r} is not an address: write HOST:PORT")
    return host, int(port)


def _refusal(error: ssl.SSLError) -> AsrfsError:
    """What an error of TLS means: a certificate somebody does not accept, or a broken connection."""
    reason = str(error.reason or error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationError(f"the peer's certificate was refused: {error.verify_message}")
    if any(word in reason.lower() for word in _CERTIFICATE_WORDS):
        return AuthenticationError(f"the peers do not trust each other's certificates ({describe(error)})")
    return LinkError(f"the connection is not usable: {describe(error)}")


def _broken(error: Exception) -> LinkError:
    return LinkError(
        f"the connection broke: {describe(error)}" if isinstance(error, OSError) else "the connection broke"
    )
