"""Control sockets: both servers with both clients, errors that keep their class, descriptors, hostile peers."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from asrfs.daemon import control
from asrfs.daemon.control import Answer, ControlClient, ControlServer, Fields
from asrfs.daemon.control_trio import AsyncControlClient, call_async, serve_control
from asrfs.errors import (
    AsrfsError,
    AuthenticationError,
    BadInputError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    TemporaryError,
)

ERRORS: list[type[AsrfsError]] = [
    TemporaryError,
    BadInputError,
    NotFoundError,
    RefusedError,
    IntegrityError,
    AuthenticationError,
]


def echo(request: Fields) -> Fields:
    return {"verb_was": request["verb"], "payload": request.get("payload")}


def fail(request: Fields) -> Fields:
    raise ERRORS[request["which"]]("in one line")


def fail_of_the_system(request: Fields) -> Fields:
    raise OSError(28, "No space left on device")


def crash(request: Fields) -> Fields:
    raise ZeroDivisionError("division by zero")


@pytest.fixture
def path(scratch: Path) -> str:
    """Longer than an address of a socket may be."""
    deep = scratch / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    return str(deep / "disk_server.sock")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def handlers(pipe: tuple[int, int]) -> dict[str, control.Handler]:
    return {
        "echo": echo,
        "fail": fail,
        "full": fail_of_the_system,
        "crash": crash,
        "descriptor": lambda _: Answer({"of": "a pipe"}, pipe[1]),
        "huge": lambda _: {"body": bytes(control.MESSAGE_BYTES_MAX)},
    }


@contextmanager
def threaded(path: str, handlers: dict[str, control.Handler]) -> Iterator[None]:
    server = ControlServer(path, handlers)
    server.start()
    yield
    server.close()


@contextmanager
def on_trio(path: str, handlers: dict[str, control.Handler]) -> Iterator[None]:
    """The server for tasks, in a thread of its own."""

    def wrapped(handler: control.Handler) -> Callable[[Fields], object]:
        async def handle(request: Fields) -> object:
            await trio.lowlevel.checkpoint()
            return handler(request)

        return handle

    started, token, scope = threading.Event(), [], trio.CancelScope()

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_control, path, {verb: wrapped(h) for verb, h in handlers.items()})
                started.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(10)
    yield
    token[0].run_sync_soon(scope.cancel)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(params=[threaded, on_trio])
def server(request: pytest.FixtureRequest, path: str, handlers: dict[str, control.Handler]) -> Iterator[None]:
    with request.param(path, handlers):
        yield


@pytest.mark.usefixtures("server")
def test_calls_are_answered_in_turn_on_one_connection(path: str) -> None:
    with ControlClient(path) as client:
        assert client.peer_pid == os.getpid()
        for payload in (b"", b"x" * 500_000, None):
            assert client.call("echo", payload=payload) == {"verb_was": "echo", "payload": payload}


@pytest.mark.usefixtures("server")
def test_requests_that_come_together_or_in_pieces_are_answered_in_turn(path: str) -> None:
    payloads = (b"", b"x" * 5000)
    together = b"".join(control.encode_message({"verb": "echo", "payload": payload}) for payload in payloads)
    with control.connect(path) as stream:
        for pieces in ((together,), (together[:2], together[2:9], together[9:])):
            for piece in pieces:
                stream.sendall(piece)
            assert [control.decode_body(_body(stream))["payload"] for _ in payloads] == list(payloads)


def _body(stream: socket.socket) -> bytes:
    length = control.decode_length(stream.recv(4, socket.MSG_WAITALL))
    return stream.recv(length, socket.MSG_WAITALL)


@pytest.mark.usefixtures("server")
def test_errors_keep_class_text_and_exit_code(path: str) -> None:
    with ControlClient(path) as client:
        for which, error in enumerate(ERRORS):
            with pytest.raises(error, match=r"^in one line$") as caught:
                client.call("fail", which=which)
            assert caught.value.exit_code == error.exit_code
        with pytest.raises(TemporaryError, match="No space left"):
            client.call("full")
        with pytest.raises(BadInputError, match="'nonsense' is not a verb"):
            client.call("nonsense")
        assert client.call("echo")["verb_was"] == "echo", "the connection lives on"


@pytest.mark.usefixtures("server")
def test_bug_in_a_handler_is_an_answer_too(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with ControlClient(path) as client:
        with pytest.raises(TemporaryError, match="internal error: ZeroDivisionError"):
            client.call("crash")
        assert client.call("echo")["verb_was"] == "echo"
    assert "control verb crash failed" in caplog.text


@pytest.mark.usefixtures("server")
def test_descriptor_comes_with_the_reply(path: str, pipe: tuple[int, int]) -> None:
    with ControlClient(path) as client:
        reply, descriptor = client.call_for_descriptor("descriptor")
        assert reply == {"of": "a pipe"}
        os.write(descriptor, b"through")
        os.close(descriptor)
        assert os.read(pipe[0], 100) == b"through"
        assert client.call("descriptor") == {"of": "a pipe"}, "one that is not wanted is closed"
        with pytest.raises(FormatError, match="without a descriptor"):
            client.call_for_descriptor("echo")


@pytest.mark.usefixtures("server")
def test_message_that_is_too_large_is_refused_on_both_sides(path: str) -> None:
    with ControlClient(path) as client:
        with pytest.raises(FormatError, match="larger than"):
            client.call("echo", payload=bytes(control.MESSAGE_BYTES_MAX))
        with pytest.raises(IntegrityError, match="larger than"):
            client.call("huge")
        assert client.call("echo")["verb_was"] == "echo"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<I", control.MESSAGE_BYTES_MAX + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x90",
        struct.pack("<I", 100) + b"\x80",
        b"\x00\x00",
    ],
)
def test_garbage_ends_its_connection_and_no_other(path: str, garbage: bytes) -> None:
    with ControlClient(path) as client, control.connect(path) as stranger:
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
        assert client.call("echo")["verb_was"] == "echo"


@pytest.mark.usefixtures("server")
def test_only_the_owner_may_connect(path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_peer_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(control, "peer_credentials", lambda _: (4711, 12345))
        with pytest.raises(AuthenticationError, match="4711 of user 12345"):
            control.check_peer(ours)
        monkeypatch.setattr(control, "peer_credentials", lambda _: (4711, 0))
        assert control.check_peer(ours) == 4711


def test_nobody_there(path: str) -> None:
    with pytest.raises(TemporaryError, match="the disk server is not running"):
        control.call(path, "echo")
    with socket.socket(socket.AF_UNIX) as stale, control.short_path(path) as short:
        stale.bind(short)
    with pytest.raises(TemporaryError, match="the disk server is not running"):
        control.call(path, "echo")


def test_stale_socket_is_replaced(path: str, handlers: dict[str, control.Handler]) -> None:
    control.listen(path).close()
    with threaded(path, handlers):
        assert control.call(path, "echo")["verb_was"] == "echo"


def test_server_that_does_not_answer_in_time(path: str) -> None:
    with control.listen(path), pytest.raises(TemporaryError, match="did not answer in time"):
        control.call(path, "echo", seconds_max=0.05)


def test_server_that_goes_away(path: str) -> None:
    with control.listen(path) as listener:
        with ControlClient(path) as client:
            accepted, _ = listener.accept()
            accepted.close()
            with pytest.raises(TemporaryError, match="cannot be reached"):
                client.call("echo")


@pytest.mark.usefixtures("server")
async def test_client_for_tasks(path: str) -> None:
    assert (await call_async(path, "echo"))["verb_was"] == "echo"
    async with await AsyncControlClient.open(path) as client:
        answers: list[Fields] = []

        async def ask(payload: int) -> None:
            answers.append(await client.call("echo", payload=payload))

        async with trio.open_nursery() as nursery:
            for payload in range(20):
                nursery.start_soon(ask, payload)
        assert sorted(answer["payload"] for answer in answers) == list(range(20))
        with pytest.raises(RefusedError, match="in one line"):
            await client.call("fail", which=ERRORS.index(RefusedError))


async def test_client_for_tasks_without_a_server(path: str) -> None:
    with pytest.raises(TemporaryError, match="is not running"):
        await call_async(path, "echo")
    with control.listen(path) as listener:
        with pytest.raises(TemporaryError, match="did not answer in time"):
            await call_async(path, "echo", seconds_max=0.05)
        async with await AsyncControlClient.open(path) as client:
            listener.accept()[0].close()
            accepted, _ = listener.accept()
            accepted.close()
            with pytest.raises(TemporaryError, match="cannot be reached"):
                await client.call("echo")
