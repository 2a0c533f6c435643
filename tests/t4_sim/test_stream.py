"""TLS streams on loopback: bytes arrive, ends are seen, caps and deadlines hold, each failure is the right error."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from asrfs.errors import AuthenticationError, BadInputError, RefusedError, TemporaryError
from asrfs.storage.system_clock import SystemClock
from asrfs.transport import stream, tls
from asrfs.transport.stream import LinkError, SecureStream

NAME = "store.test"
DAY_NS = 86_400 * 1_000_000_000


class Ends:
    """Certificates of one authority in files, and a server that echoes what it gets until the other side ends."""

    def __init__(self, scratch: Path, name: str = "one", machine_age_days: int = 0) -> None:
        now_ns = SystemClock().time_ns()
        self.path = scratch / name
        self.path.mkdir()
        authority = tls.make_authority(name, now_ns)
        server = tls.make_server(authority, NAME, now_ns)
        key, request = tls.make_key_and_request("web1", "1" * 32)
        machine, self.identity = tls.sign_request(
            authority, request, "web1", "1" * 32, now_ns - machine_age_days * DAY_NS
        )
        for file, content in (
            ("ca", authority.certificate),
            ("server", server.key + server.certificate),
            ("machine", key + machine),
        ):
            (self.path / file).write_bytes(content)
        self.listening = stream.listen("127.0.0.1", 0)
        self.port: int = self.listening.getsockname()[1]
        self.refused: list[str] = []
        self.served: list[tls.MachineIdentity] = []

    def file(self, name: str) -> str:
        return str(self.path / name)

    def client(self) -> ssl.SSLContext:
        return tls.client_context(self.file("machine"), self.file("machine"), self.file("ca"))

    async def connect(self, context: ssl.SSLContext | None = None, name: str = NAME) -> SecureStream:
        return await stream.connect("127.0.0.1", self.port, context or self.client(), name, 5.0)

    async def echo(self, connection: SecureStream) -> None:
        self.served.append(tls.machine_identity(connection.peer_certificate()))
        try:
            while received := await connection.receive_some():
                await connection.send_all(received)
        except LinkError:
            return

    @asynccontextmanager
    async def serving(self, **limits: float) -> AsyncIterator[None]:
        context = tls.server_context(self.file("server"), self.file("server"), self.file("ca"))
        listener = stream.listener_of(self.listening)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, listener, context, limits)
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, listener: trio.SocketListener, context: ssl.SSLContext, limits: dict[str, float]) -> None:
        async with listener:
            await stream.serve(
                [listener],
                context,
                self.echo,
                refused=self.refused.append,
                handshake_s=limits.get("handshake_s", 10.0),
                connections_max=int(limits.get("connections_max", 10)),
            )


async def test_bytes_come_back_in_order_and_the_end_is_seen(scratch: Path) -> None:
    ends = Ends(scratch)
    sent = bytes(range(256)) * 8192
    async with ends.serving():
        connection = await ends.connect()
        got = bytearray()

        async def send() -> None:
            for at in range(0, len(sent), 300_001):
                await connection.send_all(memoryview(sent)[at : at + 300_001])
            await connection.send_end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while received := await connection.receive_some(50_000):
                assert len(received) <= 50_000
                got += received
        assert got == sent
        await connection.aclose()
    assert ends.served == [ends.identity]


async def test_a_certificate_of_another_authority_is_an_authentication_error(scratch: Path) -> None:
    ends, other = Ends(scratch), Ends(scratch, "other")
    other.listening.close()
    async with ends.serving():
        with pytest.raises(AuthenticationError):
            await ends.connect(other.client())
        with pytest.raises(AuthenticationError):
            await ends.connect(name="another.test")
        stranger = other.client()
        stranger.load_verify_locations(ends.file("ca"))
        connection = await ends.connect(stranger)
        with pytest.raises(AuthenticationError):
            await connection.receive_some()
        await connection.aclose()
        await trio.testing.wait_all_tasks_blocked()
    assert len(ends.refused) == 3
    assert ends.served == []


@pytest.mark.parametrize("age_days", [tls.MACHINE_DAYS + 1, -30], ids=["expired", "to come"])
async def test_a_certificate_out_of_its_time_is_an_authentication_error(scratch: Path, age_days: int) -> None:
    ends = Ends(scratch, machine_age_days=age_days)
    async with ends.serving():
        connection = await ends.connect()
        with pytest.raises(AuthenticationError):
            await connection.send_all(b"hello")
            await connection.receive_some()
        await connection.aclose()
    assert (len(ends.refused), ends.served) == (1, [])


async def test_a_peer_that_does_not_shake_hands_is_dropped(scratch: Path) -> None:
    ends = Ends(scratch)
    async with ends.serving(handshake_s=0.2):
        mute = await trio.open_tcp_stream("127.0.0.1", ends.port)
        with trio.fail_after(5):
            assert await mute.receive_some() == b""
        await mute.aclose()
        junk = await trio.open_tcp_stream("127.0.0.1", ends.port)
        await junk.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with trio.fail_after(5):
            try:
                while await junk.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        await junk.aclose()
        await (await ends.connect()).aclose()
    assert len(ends.refused) == 2


async def test_more_connections_than_allowed_are_closed_at_once(scratch: Path) -> None:
    ends = Ends(scratch)
    async with ends.serving(connections_max=2):
        first, second = await ends.connect(), await ends.connect()
        with pytest.raises(LinkError):
            await ends.connect()
        await first.send_all(b"still served")
        assert await first.receive_some() == b"still served"
        await first.aclose()
        with trio.fail_after(5):
            while True:
                try:
                    third = await ends.connect()
                    break
                except LinkError:
                    await trio.sleep(0.01)  # sleep: until the server has seen the first one go
        await third.aclose()
        await second.aclose()


async def test_a_connection_that_breaks_is_a_link_error(scratch: Path) -> None:
    ends = Ends(scratch)
    async with ends.serving():
        connection = await ends.connect()
        connection._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        await trio.aclose_forcefully(connection._connection)
        with pytest.raises(LinkError):
            await connection.receive_some()
        with pytest.raises(LinkError):
            await connection.send_all(b"x")
        await connection.aclose()


async def test_nobody_listening_and_nobody_answering_are_link_errors(scratch: Path) -> None:
    ends = Ends(scratch)
    with pytest.raises(LinkError, match=r"within 0\.1 s"):  # listens, and never accepts
        await stream.connect("127.0.0.1", ends.port, ends.client(), NAME, 0.1)
    ends.listening.close()
    with pytest.raises(LinkError, match=rf"127\.0\.0\.1:{ends.port} cannot be reached"):
        await ends.connect()


def test_an_address_that_is_taken_or_not_ours_is_refused() -> None:
    listening = stream.listen("127.0.0.1", 0)
    with pytest.raises(TemporaryError, match="cannot be listened on: address already in use"):
        stream.listen("127.0.0.1", listening.getsockname()[1])
    assert stream.address_of(listening).startswith("127.0.0.1:")
    listening.close()
    with pytest.raises(RefusedError):
        stream.listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("store", ("store", 443)),
        ("store:9", ("store", 9)),
        ("[::1]:9", ("::1", 9)),
        ("[::1]", ("::1", 443)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert stream.parse_address(text, 443) == expected


@pytest.mark.parametrize("text", ["", ":", ":443", "store:", "store:0", "store:65536", "store:x", "store:1²"])
def test_what_is_no_address_is_bad_input(text: str) -> None:
    with pytest.raises(BadInputError):
        stream.parse_address(text, 443)
