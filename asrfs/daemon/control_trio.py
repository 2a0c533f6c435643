"""Control sockets for tasks: client and server of `control.py` on trio."""

from __future__ import annotations

import array
import logging
import select
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from asrfs.daemon.control import (
    CALL_SECONDS_MAX,
    LENGTH_BYTES,
    Answer,
    Fields,
    check_peer,
    connect,
    decode_body,
    decode_length,
    encode_message,
    listen,
    peer_credentials,
    raise_if_refused,
    refusal,
    short_path,
    unreachable,
    verb_of,
)
from asrfs.errors import AsrfsError, BadInputError, TemporaryError

_SHORT_BYTES = 4 << 10

log = logging.getLogger(__name__)

AsyncHandler = Callable[[Fields], Awaitable[Mapping[str, Any] | Answer]]


class AsyncControlClient:
    """A connection for tasks: their requests go one after the other. A cancelled request closes it."""

    def __init__(self, path: str, stream: trio.SocketStream) -> None:
        self.path = path
        self._stream = stream
        self._turn = trio.Lock()
        self.peer_pid, _ = peer_credentials(stream.socket)

    @classmethod
    async def open(cls, path: str) -> AsyncControlClient:
        """Raises TemporaryError when nobody listens at `path`."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(path) as short:
                await sock.connect(short)
            check_peer(sock)
        except OSError as error:
            sock.close()
            raise unreachable(path, error) from None
        except BaseException:
            sock.close()
            raise
        return cls(path, trio.SocketStream(sock))

    async def __aenter__(self) -> AsyncControlClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.socket.close()

    async def call(self, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
        """The reply to a request. Raises what the other side raised, TemporaryError when it cannot be had."""
        async with self._turn:
            try:
                with trio.fail_after(seconds_max):
                    await self._stream.send_all(encode_message({"verb": verb, **fields}))
                    reply = await _receive_message(self._stream)
            except trio.TooSlowError:
                self.close()
                raise unreachable(self.path, TimeoutError()) from None
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                self.close()
                raise unreachable(self.path, ConnectionResetError("the connection was closed")) from None
            except BaseException:
                self.close()
                raise
        if reply is None:
            self.close()
            raise unreachable(self.path, ConnectionResetError("the connection was closed"))
        return raise_if_refused(reply)


class PromptControlClient:
    """One request at a time of one task, with as little between it and the socket as can be: for requests whose answer
    others are held for. Messages are short. A connection that was left in a request is not used again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._asked: socket.socket | None = None
        """The connection on which an answer is due."""
        self._poll = select.poll()

    def close(self) -> None:
        for stream in (self._socket, self._asked):
            if stream is not None:
                stream.close()
        self._socket = self._asked = None

    def send(self, message: bytes) -> None:
        """Ask. Nothing is waited for. Raises UnreachableError when the other side is away."""
        stream, self._socket = self._socket, None
        try:
            if stream is None:
                stream = self._open()
            if stream.send(message) < len(message):
                raise ConnectionResetError("the connection takes no message")
        except OSError:
            if stream is not None:
                stream.close()
            raise self._broken() from None
        self._asked = stream

    async def receive(self, patience_s: float = 0.0) -> Fields:
        """The reply to what was sent. Raises what the other side raised, UnreachableError when it went away.

        `patience_s`: for how long every other task may wait with this one.
        """
        stream, self._asked = self._asked, None
        if stream is None:
            raise self._broken()
        try:
            if patience_s:
                self._poll.poll(patience_s * 1000)
            body = await _receive_at_once(stream)
        except OSError:
            stream.close()
            raise self._broken() from None
        except BaseException:
            stream.close()
            raise
        self._socket = stream
        return raise_if_refused(decode_body(body))

    async def call(self, message: bytes, patience_s: float = 0.0) -> Fields:
        """`send` and `receive`."""
        self.send(message)
        return await self.receive(patience_s)

    def _open(self) -> socket.socket:
        stream = connect(self._path)
        stream.setblocking(False)
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)
        return stream

    def _broken(self) -> TemporaryError:
        return unreachable(self._path, ConnectionResetError("the connection was closed"))


async def _receive_at_once(stream: socket.socket) -> bytes:
    """The body of one message."""
    received = b""
    while len(received) < LENGTH_BYTES or len(received) < LENGTH_BYTES + decode_length(received[:LENGTH_BYTES]):
        try:
            piece = stream.recv(_SHORT_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(stream)
            continue
        if not piece:
            raise ConnectionResetError("the connection was closed")
        received += piece
    return received[LENGTH_BYTES:]


async def call_async(path: str, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
    """One request on a connection of its own, from a task."""
    async with await AsyncControlClient.open(path) as client:
        return await client.call(verb, seconds_max=seconds_max, **fields)


async def serve_control(
    path: str,
    handlers: Mapping[str, AsyncHandler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `handlers` until cancelled, one task a connection; started once the socket listens."""
    with listen(path) as plain:
        plain.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain))
        async with trio.open_nursery() as nursery:
            task_status.started()

            async def serve(stream: trio.SocketStream) -> None:
                await _serve_stream(stream, handlers)

            await trio.serve_listeners(serve, [listener], handler_nursery=nursery)


async def _serve_stream(stream: trio.SocketStream, handlers: Mapping[str, AsyncHandler]) -> None:
    try:
        async with stream:
            check_peer(stream.socket)
            while (request := await _receive_message(stream)) is not None:
                reply, descriptor = await _answer_async(request, handlers)
                if descriptor is None:
                    await stream.send_all(reply)
                else:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
                    sent = await stream.socket.sendmsg([reply], [rights])
                    await stream.send_all(reply[sent:])
    except (OSError, AsrfsError, trio.BrokenResourceError) as error:
        log.info("control connection ended: %s", error)


async def _answer_async(request: Fields, handlers: Mapping[str, AsyncHandler]) -> tuple[bytes, int | None]:
    verb = verb_of(request)
    try:
        handler = handlers.get(verb)
        if handler is None:
            raise BadInputError(f"{verb[:40]!r} is not a verb of this control socket")
        answer = await handler(request)
        if isinstance(answer, Answer):
            return encode_message({"ok": True, **answer.fields}), answer.descriptor
        return encode_message({"ok": True, **answer}), None
    except Exception as error:
        if not isinstance(error, AsrfsError | OSError):
            log.exception("control verb %s failed", verb)
        return encode_message(refusal(error)), None


async def _receive_message(stream: trio.SocketStream) -> Fields | None:
    """One message, None at a clean end of the stream."""
    prefix = b""
    while len(prefix) < LENGTH_BYTES:
        piece = await stream.receive_some(LENGTH_BYTES - len(prefix))
        if not piece:
            if prefix:
                raise ConnectionResetError("the connection was closed inside a message")
            return None
        prefix += piece
    length = decode_length(prefix)
    body = bytearray()
    while len(body) < length:
        piece = await stream.receive_some(length - len(body))
        if not piece:
            raise ConnectionResetError("the connection was closed inside a message")
        body += piece
    return decode_body(bytes(body))
