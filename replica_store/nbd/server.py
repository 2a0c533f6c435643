"""Serving exports to NBD clients: many connections, several requests of each at once, in threads.

What a client can make us hold is bounded: how many connect, how long they may haggle, and, of each that has chosen an
export, how many requests and bytes are under way; whoever asks for more waits. A client that does not speak the
protocol loses its connection and nothing else.
"""

from __future__ import annotations

import errno
import signal
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import trio

from asrfs.errors import AsrfsError, TemporaryError
from asrfs.transport.plain import PlainStream, serve_plain
from asrfs.transport.stream import Bytes, ByteStream, SecureStream, address_of, listen, listener_of
from replica_store.ingest.budget import Budget
from replica_store.nbd.exports import Export
from replica_store.nbd.negotiation import Negotiation, Step
from replica_store.nbd.transmission import Request, Transmission
from replica_store.nbd.wire import Command, CommandFlag, ErrorNumber

HAGGLING_S_MAX = 30.0
HAGGLING_MAX = 128
SERVED_MAX = 32
"""Connections at once that haggle, and that have chosen an export."""
REQUESTS_MAX = 16
BYTES_MAX = 64 << 20
"""Of one connection, under way."""
THREADS = 8
_JOINED_BYTES_MAX = 64 << 10
_ERROR_NUMBERS = {
    errno.ENOSPC: ErrorNumber.ENOSPC,
    errno.EDQUOT: ErrorNumber.ENOSPC,
    errno.EPERM: ErrorNumber.EPERM,
    errno.EROFS: ErrorNumber.EPERM,
}
_CARRIES_BYTES = (Command.READ, Command.WRITE)
_CHANGES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


@dataclass(frozen=True, slots=True)
class TlsTerms:
    """TLS is a must: `context` for it, and `admit`, which gets the client's certificate (DER) and raises
    AuthenticationError for one that may not read here."""

    context: ssl.SSLContext
    admit: Callable[[bytes], None]


class NbdServer:
    """Serves `exports`, by name. `report` gets a line about whatever went wrong."""

    def __init__(
        self, exports: Mapping[str, Export], *, tls: TlsTerms | None = None, report: Callable[[str], None]
    ) -> None:
        self._exports = exports
        self._offers = {name: export.offer for name, export in exports.items()}
        self._tls = tls
        self._report = report
        self._haggling = 0
        self._served = 0
        self._threads = trio.CapacityLimiter(THREADS)

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """For ever."""
        await serve_plain(listeners, self._handle)

    async def _handle(self, plain: PlainStream) -> None:
        where = plain.peer_address()
        if self._haggling >= HAGGLING_MAX:
            self._report(f"{where}: more than {HAGGLING_MAX} clients at once")
            return
        try:
            self._haggling += 1
            try:
                with trio.fail_after(HAGGLING_S_MAX):
                    agreed = await self._haggle(plain)
            finally:
                self._haggling -= 1
            if agreed is None:
                return
            stream, negotiation = agreed
            try:
                await self._transmit(stream, negotiation)
            finally:
                await stream.aclose()
        except trio.TooSlowError:
            self._report(f"{where}: chose no export within {HAGGLING_S_MAX:g} s")
        except AsrfsError as error:
            self._report(f"{where}: {error}")
        except Exception as error:  # a fault of ours in one connection must not end the others
            self._report(f"{where}: this is a fault of the program: {error!r}")

    async def _haggle(self, plain: PlainStream) -> tuple[ByteStream, Negotiation] | None:
        """The stream to go on with, once an export is chosen; None if the client wants none."""
        stream: PlainStream | SecureStream = plain
        negotiation = Negotiation(self._offers, tls=self._tls is not None)
        await stream.send_all(negotiation.greeting())
        while True:
            received = await stream.receive_some()
            if not received:
                return None
            said = negotiation.receive(received)
            if negotiation.step is not Step.ENDED and said:
                await stream.send_all(said)
            elif said:
                await _send_quietly(stream, said)  # a client that gives up need not wait for the answer
            if negotiation.step is Step.START_TLS:
                assert self._tls is not None
                stream = await plain.start_tls(self._tls.context)
                self._tls.admit(stream.peer_certificate())
                negotiation.secured()
            elif negotiation.step is Step.ENDED:
                return None
            elif negotiation.step is Step.CHOSEN:
                if self._served >= SERVED_MAX:
                    raise TemporaryError(f"more than {SERVED_MAX} connections read disks at once")
                return stream, negotiation

    async def _transmit(self, stream: ByteStream, negotiation: Negotiation) -> None:
        chosen = negotiation.chosen
        assert chosen is not None
        transmission = Transmission(chosen, structured=negotiation.structured, allocation=negotiation.allocation)
        connection = _Connection(self._exports[chosen.name], transmission, stream, self._threads, self._report)
        self._served += 1
        try:
            await connection.run(negotiation.rest)
        finally:
            self._served -= 1


class _Connection:
    """One client that has chosen an export."""

    def __init__(
        self,
        export: Export,
        transmission: Transmission,
        stream: ByteStream,
        threads: trio.CapacityLimiter,
        report: Callable[[str], None],
    ) -> None:
        self._export = export
        self._transmission = transmission
        self._stream = stream
        self._threads = threads
        self._report = report
        self._requests = trio.Semaphore(REQUESTS_MAX)
        self._budget = Budget(BYTES_MAX)
        self._sending = trio.Lock()
        self._broken: AsrfsError | None = None

    async def run(self, rest: bytes) -> None:
        """Until the client ends, then until its last request is carried out. Raises LinkError, NbdError."""
        failure: AsrfsError | None = None
        async with trio.open_nursery() as nursery:
            try:
                await self._read(nursery, rest)
            except AsrfsError as error:
                failure = error
                nursery.cancel_scope.cancel()  # what has begun in a thread is still carried out
        if failure is not None:
            raise failure

    async def _read(self, nursery: trio.Nursery, rest: bytes) -> None:
        received: Bytes = rest
        while self._broken is None:
            for request in self._transmission.receive(received) if received else ():
                await self._requests.acquire()
                count = request.length if request.command in _CARRIES_BYTES and not request.error else 0
                await self._budget.take(count)
                nursery.start_soon(self._one, request, count)
            if self._transmission.is_over:
                return
            received = await self._stream.receive_some()
            if not received:
                self._transmission.receive_end()
                return

    async def _one(self, request: Request, count: int) -> None:
        try:
            said = await self._answer(request)
            try:
                await self._send(said)
            except AsrfsError as error:  # the reader finds out, too
                self._broken = error
        finally:
            self._budget.give_back(count)
            self._requests.release()

    async def _answer(self, request: Request) -> list[Bytes]:
        if request.error:
            return self._transmission.error_reply(request, request.error)
        try:
            return await trio.to_thread.run_sync(self._carry_out, request, limiter=self._threads)
        except (AsrfsError, OSError) as error:
            text = str(error) if isinstance(error, AsrfsError) else (error.strerror or str(error))
            self._report(f"{self._export.offer.name}: {request.command.name} at {request.offset} failed: {text}")
            number = _ERROR_NUMBERS.get(getattr(error, "errno", None) or 0, ErrorNumber.EIO)
            return self._transmission.error_reply(request, number, text)

    def _carry_out(self, request: Request) -> list[Bytes]:
        export, transmission, (command, _, offset, length, flags, payload, _) = (
            self._export,
            self._transmission,
            request,
        )
        if command is Command.READ:
            may_have_holes = transmission.may_have_holes(request)
            return transmission.read_reply(request, export.pieces(offset, length, may_have_holes=may_have_holes))
        if command is Command.BLOCK_STATUS:
            return transmission.status_reply(request, export.extents(offset, length))
        if command is Command.WRITE:
            export.write(offset, payload)
        elif command is Command.WRITE_ZEROES:
            export.zero(offset, length, keep_space=bool(flags & CommandFlag.NO_HOLE))
        elif command is Command.TRIM:
            export.zero(offset, length, keep_space=False)
        if command is Command.FLUSH or (flags & CommandFlag.FUA and command in _CHANGES):
            export.flush()
        return transmission.done_reply(request)

    async def _send(self, said: list[Bytes]) -> None:
        async with self._sending:
            if self._broken is not None:
                return
            small: list[Bytes] = []
            for buffer in said:
                if len(buffer) < _JOINED_BYTES_MAX and sum(map(len, small)) < _JOINED_BYTES_MAX:
                    small.append(buffer)
                    continue
                if small:
                    await self._stream.send_all(b"".join(small))
                    small = []
                if len(buffer) < _JOINED_BYTES_MAX:
                    small.append(buffer)
                else:
                    await self._stream.send_all(buffer)
            if small:
                await self._stream.send_all(b"".join(small))


async def _send_quietly(stream: ByteStream, said: bytes) -> None:
    try:
        await stream.send_all(said)
    except AsrfsError:
        pass


def run_server(server: NbdServer, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told `HOST:PORT`. Blocks. Raises what `listen` raises."""

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            with closing(listen(host, port)) as listening:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.serve, [listener_of(listening)])
                    ready(address_of(listening))
                    async for _ in signals:
                        nursery.cancel_scope.cancel()

    trio.run(main)
