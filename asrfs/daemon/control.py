"""Control sockets: how the processes of one machine and its commands talk to each other on the host.

A message is a 32-bit little-endian length and a msgpack map, at most 1 MiB. A request carries `verb`, a
reply `ok`; a reply that is not `ok` carries `error` and `exit_code`, and becomes the same class of error at
the caller. One request is answered before the next is read. A descriptor may travel with a reply
(SCM_RIGHTS). The peer must be root or our own user; the socket is 0600 besides.

Here are the messages, the sockets, and client and server without an event loop: the disk server's main thread
belongs to I/O, and commands need none. `control_trio.py` has the same for tasks.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from asrfs.errors import (
    AsrfsError,
    AuthenticationError,
    BadInputError,
    FormatError,
    NoSpaceError,
    TemporaryError,
    error_class,
)

MESSAGE_BYTES_MAX = 1 << 20
CALL_SECONDS_MAX = 30.0
_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size
_CREDENTIALS = struct.Struct("3i")
_CONNECTIONS_MAX = 64
_ACCEPT_RETRY_S = 0.1
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REQUEST_BYTES = 4 << 10
"""What is received at once: nearly every request is shorter."""

log = logging.getLogger(__name__)

Fields = dict[str, Any]


class HasSocketOptions(Protocol):
    """A socket of the standard library or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler returns when a descriptor goes with the reply. The descriptor stays open here."""

    fields: Mapping[str, Any]
    descriptor: int


Handler = Callable[[Fields], Mapping[str, Any] | Answer]


# ---- messages ---------------------------------------------------------------------------------------------


def encode_message(fields: Mapping[str, Any]) -> bytes:
    """Raises FormatError if the message would be too large."""
    body = msgspec.msgpack.encode(fields)
    if len(body) > MESSAGE_BYTES_MAX:
        raise FormatError(f"a control message of {len(body)} bytes is larger than {MESSAGE_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


def decode_length(prefix: bytes) -> int:
    """Bytes of the body that follows. Raises FormatError."""
    length: int = _LENGTH.unpack(prefix)[0]
    if length > MESSAGE_BYTES_MAX:
        raise FormatError(f"a control message of {length} bytes is larger than {MESSAGE_BYTES_MAX}")
    return length


def decode_body(body: bytes) -> Fields:
    """Raises FormatError."""
    try:
        return msgspec.msgpack.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a control message cannot be read: {error}") from None


def verb_of(request: Fields) -> str:
    """Empty when there is none: of what else may stand there, nothing is made a text."""
    verb = request.get("verb")
    return verb if isinstance(verb, str) else ""


def raise_if_refused(reply: Fields) -> Fields:
    """Return a reply that is `ok`, without that key; raise what the other side raised for any other."""
    if reply.pop("ok", False) is True:
        return reply
    kind = NoSpaceError if reply.get("errno") in _NO_SPACE else error_class(reply.get("exit_code", 1))
    raise kind(str(reply.get("error", "the request failed")))


def refusal(error: BaseException) -> Fields:
    if isinstance(error, AsrfsError):
        return {"ok": False, "error": str(error), "exit_code": error.exit_code}
    if isinstance(error, OSError):
        return {"ok": False, "error": f"{error.strerror or error}", "exit_code": 1, "errno": error.errno}
    return {"ok": False, "error": f"internal error: {type(error).__name__}: {error}", "exit_code": 1}


# ---- sockets ----------------------------------------------------------------------------------------------


@contextmanager
def short_path(path: str) -> Iterator[str]:
    """A name of `path` that fits into the 108 bytes of a socket address, valid inside the block."""
    directory, name = os.path.split(os.path.abspath(path))
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, 0600, in place of what lies there: the caller holds its role's lock."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(path) as short:
            if os.path.lexists(short):
                os.unlink(short)
            listener.bind(short)
            os.chmod(short, 0o600)  # nobody can connect before `listen`
        listener.listen(_CONNECTIONS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str, seconds_max: float = CALL_SECONDS_MAX) -> socket.socket:
    """A connection to the process that listens at `path`. Raises TemporaryError when there is none."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    stream.settimeout(seconds_max)
    try:
        with short_path(path) as short:
            stream.connect(short)
        check_peer(stream)
    except OSError as error:
        stream.close()
        raise unreachable(path, error) from None
    except BaseException:
        stream.close()
        raise
    return stream


def peer_credentials(stream: HasSocketOptions) -> tuple[int, int]:
    """`(pid, uid)` of the process at the other end, as it was when it connected or listened."""
    pid, uid, _ = _CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def check_peer(stream: HasSocketOptions) -> int:
    """The peer's pid if it is root or our own user, else AuthenticationError."""
    pid, uid = peer_credentials(stream)
    if uid not in (0, os.geteuid()):
        raise AuthenticationError(f"process {pid} of user {uid} may not use this control socket")
    return pid


class UnreachableError(TemporaryError):
    """The other process is away: it never listened, or it died before it answered."""


def unreachable(path: str, error: OSError) -> TemporaryError:
    role = os.path.basename(path).removesuffix(".sock").replace("_", " ")
    if isinstance(error, TimeoutError):
        return TemporaryError(f"the {role} did not answer in time at {path}")
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return UnreachableError(f"the {role} is not running: start it with `asrfs serve`")
    return UnreachableError(f"the {role} cannot be reached at {path}: {error.strerror or error}")


# ---- plain client -----------------------------------------------------------------------------------------


class ControlClient:
    """A connection that is used by one thread. After an error of the connection it is closed."""

    def __init__(self, path: str, *, seconds_max: float = CALL_SECONDS_MAX) -> None:
        self.path = path
        self._stream = connect(path, seconds_max)
        self.peer_pid, _ = peer_credentials(self._stream)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def call(self, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
        """The reply to a request. Raises what the other side raised, TemporaryError when it cannot be had."""
        reply, descriptor = self._exchange(verb, fields, seconds_max)
        if descriptor is not None:
            os.close(descriptor)
        return raise_if_refused(reply)

    def call_for_descriptor(self, verb: str, **fields: Any) -> tuple[Fields, int]:
        """The reply and the descriptor that came with it, which the caller owns."""
        reply, descriptor = self._exchange(verb, fields, CALL_SECONDS_MAX)
        raise_if_refused(reply)
        if descriptor is None:
            raise FormatError(f"the reply to {verb} at {self.path} came without a descriptor")
        return reply, descriptor

    def _exchange(self, verb: str, fields: Fields, seconds_max: float) -> tuple[Fields, int | None]:
        self._stream.settimeout(seconds_max)
        try:
            self._stream.sendall(encode_message({"verb": verb, **fields}))
            return _receive_reply(self._stream)
        except OSError as error:
            self.close()
            raise unreachable(self.path, error) from None


def call(path: str, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
    """One request on a connection of its own."""
    with ControlClient(path, seconds_max=seconds_max) as client:
        return client.call(verb, seconds_max=seconds_max, **fields)


def _receive_reply(stream: socket.socket) -> tuple[Fields, int | None]:
    descriptors = array.array("i")
    space = socket.CMSG_SPACE(descriptors.itemsize)
    prefix, ancillary, _, _ = stream.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    descriptor = descriptors[0] if descriptors else None
    try:
        return decode_body(_receive_body(stream, prefix)), descriptor
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise


def _receive_body(stream: socket.socket, prefix: bytes) -> bytes:
    """The body of a message of whose length `prefix` is the beginning, empty if the stream had ended."""
    if not prefix:
        raise ConnectionResetError("the connection was closed")
    prefix += _receive_exactly(stream, _LENGTH.size - len(prefix))
    return _receive_exactly(stream, decode_length(prefix))


def _cut_body(stream: socket.socket, received: bytes) -> tuple[bytes, bytes]:
    """The body of the message that begins `received`, and what came behind it."""
    if len(received) < LENGTH_BYTES:
        received += _receive_exactly(stream, LENGTH_BYTES - len(received))
    end = LENGTH_BYTES + decode_length(received[:LENGTH_BYTES])
    if len(received) < end:
        received += _receive_exactly(stream, end - len(received))
    return received[LENGTH_BYTES:end], received[end:]


def _receive_exactly(stream: socket.socket, length: int) -> bytes:
    pieces: list[bytes] = []
    while length:
        piece = stream.recv(length)
        if not piece:
            raise ConnectionResetError("the connection was closed inside a message")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


# ---- server of threads ------------------------------------------------------------------------------------


class ControlServer:
    """Serves `handlers` with one thread a connection; several threads may call a handler at once."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._listener = listen(path)
        self._closing = False

    def start(self) -> None:
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Take no more connections. Requests under way end by themselves."""
        self._closing = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def _accept(self) -> None:
        slots = threading.BoundedSemaphore(_CONNECTIONS_MAX)
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError as error:  # no descriptors or memory just now, or we are closing
                if self._closing:
                    return
                log.warning("no control connection can be taken: %s", error)
                time.sleep(_ACCEPT_RETRY_S)
                continue
            if not slots.acquire(blocking=False):
                stream.close()
                continue
            worker = threading.Thread(target=self._serve, args=(stream, slots), name="control", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                log.warning("no control connection can be taken: %s", error)
                stream.close()
                slots.release()

    def _serve(self, stream: socket.socket, slots: threading.BoundedSemaphore) -> None:
        try:
            with stream:
                check_peer(stream)
                received = b""
                while received := received or stream.recv(_REQUEST_BYTES):
                    body, received = _cut_body(stream, received)
                    self._answer(stream, decode_body(body))
        except (OSError, AsrfsError) as error:
            log.info("control connection ended: %s", error)
        finally:
            slots.release()

    def _answer(self, stream: socket.socket, request: Fields) -> None:
        verb = verb_of(request)
        descriptor = None
        try:
            handler = self._handlers.get(verb)
            if handler is None:
                raise BadInputError(f"{verb[:40]!r} is not a verb of this control socket")
            answer = handler(request)
            if isinstance(answer, Answer):
                descriptor, answer = answer.descriptor, answer.fields
            reply = encode_message({"ok": True, **answer})
        except Exception as error:
            if not isinstance(error, AsrfsError | OSError):
                log.exception("control verb %s failed", verb)
            reply = encode_message(refusal(error))
        _send(stream, reply, descriptor)


def _send(stream: socket.socket, message: bytes, descriptor: int | None) -> None:
    if descriptor is None:
        stream.sendall(message)
        return
    sent = stream.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
    stream.sendall(message[sent:])
