"""The NBD server on loopback: exports read and written by several clients, TLS, and clients that mean no good."""

from __future__ import annotations

import os
import random
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from asrfs.errors import AsrfsError, AuthenticationError, BadInputError
from asrfs.storage.system_clock import SystemClock
from asrfs.transport import tls
from asrfs.transport.stream import SecureStream, listen, listener_of
from replica_store.nbd import server as nbd_server
from replica_store.nbd.admission import admission, check_address
from replica_store.nbd.exports import Export, FileExport, PointExport, image_files
from replica_store.nbd.server import NbdServer, TlsTerms
from replica_store.nbd.wire import Command, CommandFlag, ErrorNumber, Option
from replica_store.points.builder import open_disks, resolve
from replica_store.points.point_disk import FrameCache
from tests.fakes.memory_history import MemoryHistory, random_history
from tests.fakes.nbd_client import FLAGS, Answer, Answers, contexts, go, option, request, write

SIZE = 700 * 4096 + 1536
LIVE_BYTES = 1 << 20
GREETING_BYTES = 18
MACHINE = "1" * 32


class Client:
    """A connection whose export is chosen."""

    def __init__(self, stream: trio.abc.Stream | SecureStream) -> None:
        self.stream = stream
        self.answers = Answers()
        self._cookies = iter(range(1, 1 << 30))

    async def choose(self, name: str, *, structured: bool = True) -> None:
        said = go(name)
        if structured:
            said = option(Option.STRUCTURED_REPLY) + contexts(name, "base:allocation") + said
        await self.stream.send_all(FLAGS + said)
        heard = b""
        while not heard.endswith(b"\0\0\0\7\0\0\0\1\0\0\0\0"):  # GO, ACK, no content
            received = await self.stream.receive_some()
            assert received, f"the server ended the handshake after {heard!r}"
            heard += received

    async def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
    ) -> Answer:
        cookie = next(self._cookies)
        if command == Command.READ:
            self.answers.reads[cookie] = offset, length
        await self.stream.send_all(request(command, offset, length, cookie=cookie, flags=flags, payload=payload))
        return await self.answer(cookie)

    async def answer(self, cookie: int) -> Answer:
        while cookie not in self.answers.done:
            received = await self.stream.receive_some()
            assert received, "the server ended the connection"
            self.answers.feed(received)
        return self.answers.done[cookie]

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        answer = await self.ask(Command.READ, offset, length, flags=flags)
        assert not answer.error, answer.text
        return answer.content(offset, length)


class Place:
    """A server with a point `root` and a file `live`."""

    def __init__(self, exports: dict[str, Export], terms: TlsTerms | None = None) -> None:
        self.reports: list[str] = []
        self.listening = listen("127.0.0.1", 0)
        self.port: int = self.listening.getsockname()[1]
        self.server = NbdServer(exports, tls=terms, report=self.reports.append)
        self._streams: list[trio.SocketStream] = []

    async def connect(self) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        for stream in self._streams:
            stream.socket.close()
        self.listening.close()

    async def client(self, name: str, *, structured: bool = True) -> Client:
        client = Client(await self.connect())
        await client.stream.receive_some(GREETING_BYTES)
        await client.choose(name, structured=structured)
        return client


@asynccontextmanager
async def serving(exports: dict[str, Export], terms: TlsTerms | None = None) -> AsyncIterator[Place]:
    place = Place(exports, terms)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.server.serve, [listener_of(place.listening)])
            with trio.fail_after(20):
                yield place
            nursery.cancel_scope.cancel()
    finally:
        place.close()


@pytest.fixture
def history(rng: random.Random) -> MemoryHistory:
    return random_history(rng.randrange(1 << 30), records=200, disks={"root": SIZE})


@pytest.fixture
def content(history: MemoryHistory) -> bytes:
    return history.state_at(history.lsn)[0]


@pytest.fixture
def exports(history: MemoryHistory, scratch: Path) -> Iterator[dict[str, Export]]:
    disk = open_disks(history, resolve(history, "web1", "latest"), ["root"], FrameCache(history))["root"]
    (scratch / "live.img").write_bytes(b"")
    os.truncate(scratch / "live.img", LIVE_BYTES)
    live = FileExport(str(scratch / "live.img"), "live", read_only=False)
    yield {"root": PointExport(disk, "root"), "live": live}
    live.close()


@pytest.mark.parametrize("structured", [False, True])
async def test_i9_a_point_reads_as_it_was(
    exports: dict[str, Export], content: bytes, rng: random.Random, structured: bool
) -> None:
    async with serving(exports) as place:
        client = await place.client("root", structured=structured)
        assert await client.read(0, SIZE) == content
        for _ in range(40):
            offset = rng.randrange(SIZE)
            length = rng.randint(0, min(300_000, SIZE - offset))
            flags = CommandFlag.DF if structured and rng.random() < 0.3 else 0
            assert await client.read(offset, length, flags) == content[offset : offset + length]
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            assert (await client.ask(command, 0, 512)).error == ErrorNumber.EPERM
        assert (await client.ask(Command.WRITE, 0, 3, payload=b"xyz")).error == ErrorNumber.EPERM
        assert not (await client.ask(Command.FLUSH)).error
    assert not place.reports


async def test_status_tells_holes_and_never_calls_content_one(
    exports: dict[str, Export], content: bytes, rng: random.Random
) -> None:
    async with serving(exports) as place:
        client = await place.client("root")
        for offset, length in [(0, SIZE), (1, 4095)] + [
            (offset, rng.randint(1, SIZE - offset)) for offset in (rng.randrange(SIZE) for _ in range(20))
        ]:
            extents = (await client.ask(Command.BLOCK_STATUS, offset, length)).extents
            assert sum(size for size, _ in extents) == length
            at = offset
            for size, status in extents:
                assert status in (0, 3)
                assert status == 0 or not content[at : at + size].strip(b"\0")
                at += size
            assert all(one[1] != other[1] for one, other in pairwise(extents))


async def test_a_file_is_written_zeroed_trimmed_and_flushed(exports: dict[str, Export], scratch: Path) -> None:
    path, model = scratch / "live.img", bytearray(LIVE_BYTES)
    async with serving(exports) as place:
        one, other = await place.client("live"), await place.client("live", structured=False)
        for offset, payload, flags in ((0, b"a" * 300_000, 0), (300_001, b"b" * 5, CommandFlag.FUA)):
            assert not (await one.ask(Command.WRITE, offset, len(payload), flags=flags, payload=payload)).error
            model[offset : offset + len(payload)] = payload
        assert await other.read(0, LIVE_BYTES) == model
        for command, offset, length, flags in (
            (Command.TRIM, 4096, 8192, 0),
            (Command.WRITE_ZEROES, 100_000, 50_001, CommandFlag.NO_HOLE),
            (Command.WRITE_ZEROES, 65536, 4096, CommandFlag.FUA),
        ):
            assert not (await other.ask(command, offset, length, flags=flags)).error
            model[offset : offset + length] = bytes(length)
        assert not (await one.ask(Command.FLUSH)).error
        assert await one.read(0, LIVE_BYTES) == model
        extents = (await one.ask(Command.BLOCK_STATUS, 0, LIVE_BYTES)).extents
        assert extents[0][1] == 0 and extents[-1][1] == 3
    assert path.read_bytes() == model


async def test_what_fails_is_said_and_the_connection_lives(
    exports: dict[str, Export], history: MemoryHistory, scratch: Path
) -> None:
    for row in history.objects_of(history.id, history.lsn):
        header, _, table = history.object_head(row)
        for i in range(header.frame_count):
            history.damage(row, table.extent(i)[0])
    async with serving(exports) as place:
        client = await place.client("root")
        answer = await client.ask(Command.READ, 0, SIZE)
        assert answer.error == ErrorNumber.EIO and "LSN" in answer.text
        plain = await place.client("root", structured=False)
        assert (await plain.ask(Command.READ, 0, SIZE)).error == ErrorNumber.EIO
        assert (await client.ask(Command.BLOCK_STATUS, 0, SIZE)).extents
        os.truncate(scratch / "live.img", 4096)
        live = await place.client("live")
        assert "shorter" in (await live.ask(Command.READ, 0, 8192)).text
    assert sum("failed" in line for line in place.reports) == 3


async def test_a_failed_flush_is_never_followed_by_a_good_one(
    exports: dict[str, Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = exports["live"]
    assert isinstance(live, FileExport)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(live, "_file", type("Failing", (), {"datasync": staticmethod(fail)})())
    async with serving(exports) as place:
        client = await place.client("live")
        for _ in range(2):
            assert (await client.ask(Command.FLUSH)).error == ErrorNumber.EIO
    assert len(calls) == 1
    monkeypatch.undo()


async def test_many_requests_at_once_are_all_answered(exports: dict[str, Export], content: bytes) -> None:
    async with serving(exports) as place:
        client = await place.client("root")
        lengths = {cookie: 4096 * (1 + cookie % 37) for cookie in range(1000, 1300)}
        said = b"".join(request(Command.READ, 512, n, cookie=cookie) for cookie, n in lengths.items())
        await client.stream.send_all(said + request(Command.DISC))
        for cookie, n in lengths.items():
            assert (await client.answer(cookie)).content(512, n) == content[512 : 512 + n]
        assert not await client.stream.receive_some(), "DISC ends it once all is answered"
    assert not place.reports


async def test_clients_that_do_not_speak_nbd_lose_their_connection_and_nothing_else(
    exports: dict[str, Export], rng: random.Random
) -> None:
    async with serving(exports) as place:
        good = await place.client("live")
        hostile = [b"GET / HTTP/1.1\r\n\r\n", FLAGS + b"x" * 16, FLAGS + go("root") + b"y" * 28]
        hostile += [FLAGS + go("live") + write(0, b"z")[:16] + b"\xff" * 12 for _ in range(2)]
        hostile += [FLAGS + rng.randbytes(200) for _ in range(10)]
        for said in hostile:
            stream = await place.connect()
            await stream.send_all(said)
            while await stream.receive_some():
                pass
        assert await good.read(0, 4096) == bytes(4096)
        assert len(place.reports) == len(hostile), place.reports
        gone = await place.client("live")
        await gone.stream.send_all(write(0, b"q" * 100_000)[:50_000])
        await gone.stream.aclose()
        assert await good.read(0, 4096) == bytes(4096), "a write that was cut is not carried out"


async def test_bounds_on_clients_and_on_their_time(exports: dict[str, Export], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_server, "SERVED_MAX", 2)
    monkeypatch.setattr(nbd_server, "HAGGLING_MAX", 2)
    monkeypatch.setattr(nbd_server, "HAGGLING_S_MAX", 0.2)
    async with serving(exports) as place:
        clients = [await place.client("root") for _ in range(2)]
        third = await place.connect()
        await third.send_all(FLAGS + go("root"))
        while await third.receive_some():
            pass
        assert "more than 2 connections" in place.reports[-1]
        idle = [await place.connect() for _ in range(2)]
        for stream in idle:
            await stream.receive_some()
        turned_away = await place.connect()
        assert not await turned_away.receive_some()
        assert "more than 2 clients" in place.reports[-1]
        for stream in idle:
            assert not await stream.receive_some()
        assert sum("chose no export" in line for line in place.reports) == 2
        assert await clients[0].read(0, 512) is not None


# ---- TLS ----------------------------------------------------------------------------------------------------------


class Authority:
    """Certificates in files, as a vault has them; `terms` for clients of `MACHINE`, whose own one is `machine`."""

    def __init__(self, scratch: Path) -> None:
        now_ns = SystemClock().time_ns()
        self.path = scratch
        authority = tls.make_authority("vault", now_ns)
        server = tls.make_server(authority, "store.test", now_ns)
        self._write("ca", authority.certificate)
        self._write("server", server.key + server.certificate)
        serials = {}
        for name, machine_id in (("machine", MACHINE), ("old", MACHINE), ("other", "2" * 32)):
            key, wanted = tls.make_key_and_request("web1", machine_id)
            certificate, identity = tls.sign_request(authority, wanted, "web1", machine_id, now_ns)
            self._write(name, key + certificate)
            serials[name] = identity.serial
        for name, machine_id in (("reader", MACHINE), ("stranger", "2" * 32)):
            client = tls.make_nbd_client(authority, machine_id, now_ns)
            self._write(name, client.key + client.certificate)
        context = tls.server_context(self.file("server"), self.file("server"), self.file("ca"))
        self.terms = TlsTerms(context, admission(MACHINE, lambda: serials["machine"]))

    def _write(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)

    def file(self, name: str) -> str:
        return str(self.path / name)

    def client(self, name: str) -> ssl.SSLContext:
        return tls.client_context(self.file(name), self.file(name), self.file("ca"))


async def secure(place: Place, context: ssl.SSLContext) -> Client:
    plain = await place.connect()
    heard = await plain.receive_some(GREETING_BYTES)
    assert heard.startswith(b"NBDMAGIC")
    await plain.send_all(FLAGS + option(Option.STARTTLS))
    assert struct.unpack(">QIII", await plain.receive_some(20))[2] == 1
    client = Client(await SecureStream.handshake(plain, context, "store.test"))
    said = option(Option.STRUCTURED_REPLY) + go("root")
    await client.stream.send_all(said)
    heard = b""
    while not heard.endswith(b"\0\0\0\7\0\0\0\1\0\0\0\0"):
        received = await client.stream.receive_some()
        if not received:
            raise AuthenticationError("turned away")
        heard += received
    return client


async def test_tls_lets_in_who_has_a_certificate_for_this_machine(
    exports: dict[str, Export], content: bytes, scratch: Path
) -> None:
    authority = Authority(scratch)
    async with serving(exports, authority.terms) as place:
        for name in ("reader", "machine"):
            client = await secure(place, authority.client(name))
            assert await client.read(0, SIZE) == content
        for name in ("other", "old", "stranger"):
            with pytest.raises(AsrfsError):
                await secure(place, authority.client(name))
        anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anonymous.load_verify_locations(authority.file("ca"))
        with pytest.raises(AsrfsError):
            await secure(place, anonymous)
        plain = await place.connect()
        await plain.send_all(FLAGS + go("root") + option(Option.ABORT))
        heard = b""
        while received := await plain.receive_some():
            heard += received
        assert b"TLS comes first" in heard
    assert len(place.reports) == 4


def test_in_the_clear_only_this_machine_is_spoken_to() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.3.4.5"):
        check_address(host)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(BadInputError, match="--tls"):
            check_address(host)


def test_a_nbd_client_is_no_machine() -> None:
    now_ns = SystemClock().time_ns()
    client = tls.make_nbd_client(tls.make_authority("vault", now_ns), MACHINE, now_ns)
    der = ssl.PEM_cert_to_DER_cert(client.certificate.decode())
    assert tls.nbd_machine_id(der) == MACHINE
    with pytest.raises(AuthenticationError):
        tls.machine_identity(der)


def test_files_of_a_mount(scratch: Path) -> None:
    for name in ("root.img", "data.img", ".img", "notes.txt"):
        (scratch / name).write_bytes(b"")
    assert image_files(str(scratch)) == {"data": f"{scratch}/data.img", "root": f"{scratch}/root.img"}
    with pytest.raises(BadInputError, match="empty"):
        FileExport(f"{scratch}/root.img", "root", read_only=True)
