"""Control sockets: requests to a server that has to live on, replies to clients, what a disk server says."""

from __future__ import annotations

import math
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import trio

from asrfs.daemon import control
from asrfs.daemon.control_trio import AsyncControlClient, serve_control
from asrfs.daemon.disk_server_client import host_positions
from asrfs.errors import BadInputError
from tests.proof.fuzzing.mutations import Strike, as_msgpack, extreme, mutate_bytes, mutate_document
from tests.proof.fuzzing.target import Target, Trial, refused

_REQUEST = {"verb": "applied", "lsn": 7, "segment": 3, "timeout": 1.5, "name": "noon", "payload": b"x" * 20}
_REPLY = {"ok": True, "lsn": 7, "time_ns": 5, "error": "no", "exit_code": 4}
_POSITIONS = {
    "durable": 7,
    "segment": 1,
    "offset": 9000,
    "time_ns": 5,
    "appended": 9,
    "epoch": 1,
    "failed": None,
}
_LENGTH = struct.Struct("<I")


def broken_message(rng: random.Random, document: Any, strike: Strike) -> bytes:
    """As bytes, as a length, or as a document."""
    good = control.encode_message(document)
    chance = rng.random()
    if chance < 0.3:
        return mutate_bytes(rng, good, good, strike)
    if chance < 0.45:
        strike("field")
        return _LENGTH.pack(extreme(rng, 32)) + good[4:]
    body = as_msgpack(rng, mutate_document(rng, document, strike))
    return _LENGTH.pack(len(body)) + body


def _echo(request: control.Fields) -> dict[str, Any]:
    """A verb that uses what it is given."""
    if not isinstance(request["lsn"], int):
        raise BadInputError("lsn is a number")
    return {"lsn": request["lsn"], "name": str(request.get("name"))[:100]}


@contextmanager
def open_server(scratch: Path) -> Iterator[Trial]:
    """Threads: whatever comes, the next one is served."""
    path = str(scratch / "server.sock")
    server = control.ControlServer(path, {"applied": _echo})
    server.start()
    died: list[str] = []

    def trial(rng: random.Random, strike: Strike) -> None:
        message = broken_message(rng, _REQUEST, strike)
        with control.connect(path) as stream:
            try:
                stream.sendall(message)
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(65536):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
        assert control.call(path, "applied", lsn=5)["lsn"] == 5, "the next one is served"
        assert not died, f"a thread of the server died: {died.pop()}"

    with mock.patch.object(threading, "excepthook", lambda what: died.append(repr(what.exc_value))):
        try:
            yield trial
        finally:
            server.close()


@contextmanager
def open_async_server(scratch: Path) -> Iterator[Trial]:
    """Tasks: one connection must not end the loop that serves all."""
    path = str(scratch / "server.sock")

    async def echo(request: control.Fields) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return _echo(request)

    async def serve_once(message: bytes) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve_control(path, {"applied": echo}, task_status=task_status))
            client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with client:
                await client.connect(path)
                try:
                    await trio.SocketStream(client).send_all(message)
                    client.shutdown(socket.SHUT_WR)
                    while await client.recv(65536):
                        pass
                except (OSError, trio.BrokenResourceError):
                    pass
            async with await AsyncControlClient.open(path) as good:
                assert (await good.call("applied", lsn=5))["lsn"] == 5, "the next one is served"
            nursery.cancel_scope.cancel()

    def trial(rng: random.Random, strike: Strike) -> None:
        trio.run(serve_once, broken_message(rng, _REQUEST, strike))

    yield trial


@contextmanager
def open_client(scratch: Path) -> Iterator[Trial]:
    """A process in the place of ours that answers anything."""
    path = str(scratch / "client.sock")
    with control.listen(path) as listener:

        def trial(rng: random.Random, strike: Strike) -> None:
            message = broken_message(rng, _REPLY, strike)
            with control.ControlClient(path) as client:
                served, _ = listener.accept()
                with served:
                    served.sendall(message)
                    served.shutdown(socket.SHUT_WR)
                    refused(lambda: client.call("positions"))

        yield trial


@contextmanager
def open_positions(_scratch: Path) -> Iterator[Trial]:
    """What the agent believes of a disk server."""

    def trial(rng: random.Random, strike: Strike) -> None:
        reply = refused(lambda: control.decode_body(as_msgpack(rng, mutate_document(rng, _POSITIONS, strike))))
        positions = reply and refused(lambda: host_positions(reply))
        if positions:
            numbers = (positions.appended_lsn, positions.durable.lsn, positions.durable.segment, positions.epoch)
            assert all(isinstance(number, int) and math.isfinite(number) for number in numbers)

    yield trial


TARGETS = (
    Target("control server", 3, open_server),
    Target("control tasks", 1, open_async_server),
    Target("control client", 5, open_client),
    Target("disk server's word", 14, open_positions),
)
