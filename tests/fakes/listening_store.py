"""A store that hosts connect to: a vault in a directory and its listener, real sessions; wire and time in memory."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from asrfs.format.log_object import NO_DIGEST
from asrfs.model.clock import Clock
from asrfs.protocol.messages import Acknowledge, Goodbye, Heartbeat, Welcome
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.ingest.listener import Listener
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.vault import Vault
from tests.fakes.scripted_host import BuiltObject, HostEnd, HostHistory
from tests.fakes.scripted_store import Wire

T = TypeVar("T")


class InlineListener(Listener):
    """Works in the task: virtual time would run on while a thread works. `pause` holds the worker back."""

    def __init__(self, vault: Vault, clock: Clock) -> None:
        super().__init__(vault, clock)
        self.pause: trio.Event | None = None
        self.batches: list[int] = []

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        if function.__name__ == "take":
            self.batches.append(len(arguments[0]))
            if self.pause is not None:
                with trio.CancelScope(shield=True):
                    await self.pause.wait()
        return function(*arguments)


class StoreWorld:
    """A vault in a directory and its listener; `restart` is what a SIGKILL and a new process are."""

    def __init__(self, scratch: Path, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.clock = SystemClock()
        self.path = str(scratch / "vault")
        self.vault = Vault.create(self.path, "site-b", self.clock)
        self.listener = InlineListener(self.vault, self.clock)
        self.certificates: dict[str, bytes] = {}

    def enrol(self, name: str = "web1", number: int = 1) -> HostHistory:
        machine_id = f"{number:032x}"
        secret = encode_base64url(decode_token(make_token(self.vault, name, self.clock)).secret)
        _, request = make_key_and_request(name, machine_id)
        wanted = EnrolRequest(secret=secret, machine=name, machine_id=machine_id, csr=request.decode())
        reply = enrol(self.vault, wanted, self.clock, 9443)
        self.certificates[machine_id] = ssl.PEM_cert_to_DER_cert(reply.certificate)
        keys = self.vault.machine_keys(self.vault.machine(name))
        return HostHistory(machine_id, keys, name, seed=number)

    def connect(self, history: HostHistory, **limits: float) -> HostEnd:
        """A connection of this machine; `limits` of the wire."""
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self._serve, Wire(theirs), self.certificates[history.machine_id])
        return HostEnd(Wire(ours, **limits))

    async def _serve(self, wire: Wire, certificate: bytes) -> None:
        """As the transport does: the connection is closed when its handler is done."""
        try:
            await self.listener.handle(wire, certificate, "memory")
        finally:
            with trio.CancelScope(shield=True):
                await wire.aclose()

    async def begin(self, history: HostHistory) -> tuple[HostEnd, Welcome]:
        """A session that was welcomed."""
        host = self.connect(history)
        welcome = await host.greet(history.hello())
        assert isinstance(welcome, Welcome), welcome
        return host, welcome

    async def ship_all(self, history: HostHistory, records_each: int = 3) -> None:
        """Ship what the store has not got, and wait until it is acknowledged."""
        host, welcome = await self.begin(history)
        built = objects_of(history, welcome, records_each)
        for each in built:
            await host.ship(each)
            event = await host.hear_except(Heartbeat)
            assert event == Acknowledge(lsn=each.begin.last_lsn, digest=each.digest.hex())
        await host.say(Goodbye(reason="done"))

    def restart(self) -> None:
        self.vault.close()
        self.vault = Vault.open(self.path, writable=True)
        self.listener = InlineListener(self.vault, self.clock)

    def received(self, history: HostHistory) -> int:
        return self.vault.received_lsn(history.machine_id)


def objects_of(history: HostHistory, welcome: Welcome, records_each: int) -> list[BuiltObject]:
    built = []
    digest = bytes.fromhex(welcome.last_digest) or NO_DIGEST
    for first in range(welcome.acknowledged_lsn + 1, history.last_lsn + 1, records_each):
        last = min(first + records_each - 1, history.last_lsn)
        built.append(history.build(first, last, welcome.session_salt, digest))
        digest = built[-1].digest
    return built


@asynccontextmanager
async def make_world(scratch: Path) -> AsyncIterator[StoreWorld]:
    async with trio.open_nursery() as nursery:
        world = StoreWorld(scratch, nursery)
        try:
            yield world
        finally:
            nursery.cancel_scope.cancel()
            world.vault.close()
