"""One connection of a host, from its first byte to its end: tasks around one `protocol.Session` and one `Ingester`.

    receive ──(channel, at most OBJECTS_WAITING)──▶ store, in a thread ──▶ ACKNOWLEDGE
    beat: HEARTBEAT every few seconds            watch: is the certificate still good?
    configure: CONFIGURE at once and on change, to a host that takes it
    hand_over: HANDOVER as long as a planned failover wants something of the host
    promote: PROMOTE as long as a promotion wants something of the host
    fetch: one task for each FETCH; what it asks is done elsewhere
    match: one task for each MATCH, answered from a table
    compare: one task for each COMPARE that is not answered yet; what it asks is done elsewhere

What has been received waits for the thread in order; while it waits the host is held back by TCP. The first task that
ends, ends all; if it was by an error that the host should know, REFUSED is said and what still comes is let run out, so
that the word is not lost in a reset. A thread that stores is never abandoned: when `run` returns nothing is written
any more for this session. What may change at an await: the state of `Session`, on sending under `_turn`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
import trio

from asrfs.errors import AsrfsError, RefusedError
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import (
    FETCHES_MAX,
    MATCHES_MAX,
    PROTOCOL_VERSION,
    Compare,
    Compared,
    Configure,
    Fetch,
    Fetched,
    Goodbye,
    HandedOver,
    Heartbeat,
    Hello,
    Match,
    Message,
    Promoted,
    Refused,
    Welcome,
)
from asrfs.protocol.session import Event, ObjectReceived, Session, State
from asrfs.transport.stream import ByteStream, LinkError
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.budget import Budget
from replica_store.ingest.configurations import AGAIN_S, Configurations
from replica_store.ingest.greeting import (
    check_hello,
    check_identity,
    check_not_replaced,
    check_position,
    granted_before,
    refusal_code,
)
from replica_store.ingest.handovers import Handovers
from replica_store.ingest.ingester import Ingester, Position
from replica_store.ingest.links import Links
from replica_store.ingest.promoting import Fetching, Promotions
from replica_store.ingest.seeding import match
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.groups import put_place
from replica_store.vault.returning import check_side, end_by_return
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault

HEARTBEAT_S = 5.0
SILENCE_S_MAX = 3 * HEARTBEAT_S
GREETING_S_MAX = 10.0
SEND_S_MAX = 5.0
OBJECTS_WAITING = 4
_RECEIVE_BYTES = 256 << 10
_RUN_OUT_S = 2.0
_TOO_OLD = "the host is of before planned failover: update asrfs there"

T = TypeVar("T")


class Comparing(Protocol):
    """Who answers what hosts ask about the content of their disks. Raises nothing: failures are answers."""

    @property
    def at_once(self) -> int:
        """How many requests of one host may be unanswered; 0 where nobody answers."""

    async def compare(self, machine_id: str, wanted: Compare) -> Compared: ...


class NoComparing:
    """Of a store that cannot compare."""

    at_once = 0

    async def compare(self, machine_id: str, wanted: Compare) -> Compared:
        raise AssertionError("nobody may ask")


class Store(Protocol):
    """What a session needs of the store it belongs to."""

    vault: Vault
    links: Links
    budget: Budget
    configurations: Configurations
    handovers: Handovers
    promotions: Promotions
    comparing: Comparing
    fetching: Fetching

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what blocks; never abandoned."""

    def make_salt(self) -> bytes: ...

    def now_ns(self) -> int: ...

    async def take_turn(self, machine_id: str, session: StoreSession) -> Ingester:
        """End the machine's other session, wait until it writes no more, and become its only one."""


class StoreSession:
    """`run` returns when the connection is done with; `scope` ends it from outside, `finished` says that it has."""

    def __init__(self, stream: ByteStream, identity: MachineIdentity, store: Store, host: str = "") -> None:
        self._stream = stream
        self._host = host
        self._identity = identity
        self._store = store
        self._session = Session("store")
        self._turn = trio.Lock()
        self._events: list[Event] = []
        self._failure: AsrfsError | None = None
        self._is_torn = False
        self._held = 0
        self._comparing = 0
        self._matching = 0
        self._fetching = 0
        self._log = structlog.get_logger("replica_store.session").bind(machine=identity.name)
        self.scope = trio.CancelScope()
        self.finished = trio.Event()

    async def run(self) -> None:
        """Serve the host. Errors of the link and of the host end here."""
        try:
            with self.scope:
                await self._serve()
        finally:
            self.finished.set()

    async def _serve(self) -> None:
        try:
            ingester, hello = await self._greet()
            self._log.info("session began", acknowledged_lsn=ingester.position.lsn, host_lsn=hello.appended_lsn)
            self._store.links.connected(self._identity.machine_id, hello)
            try:
                await self._stream_objects(ingester, hello)
            finally:
                self._give_back(self._held)
                self._store.links.disconnected(self._identity.machine_id)
            self._log.info("session ended", acknowledged_lsn=ingester.position.lsn)
        except LinkError as error:
            self._log.info("connection lost", reason=str(error))
        except AsrfsError as error:
            self._log.warning("session refused", reason=str(error))
            await self._refuse(error)

    # ---- greeting -----------------------------------------------------------------------------------------

    async def _greet(self) -> tuple[Ingester, Hello]:
        hello = await self._hear_hello()
        machine = await self._store.in_thread(self._authorised, hello)
        check_hello(hello, machine)
        ingester = await self._store.take_turn(machine.id, self)
        salt = self._store.make_salt()
        position, digest = await self._store.in_thread(self._begin, ingester, hello, salt)
        check_position(hello, position, digest)
        await self._send(
            Welcome(
                protocol=PROTOCOL_VERSION,
                store_id=self._store.vault.id,
                session_salt=salt,
                epoch=position.epoch,
                acknowledged_lsn=position.lsn,
                acknowledged_time_ns=position.time_ns,
                last_digest=position.digest_hex,
                takes_stretches=True,
                compares=self._store.comparing.at_once,
                takes_matches=True,
                disks=ingester.live_disks if hello.rejoin else (),
                takes_fetches=True,
            )
        )
        return ingester, hello

    async def _hear_hello(self) -> Hello:
        with trio.move_on_after(GREETING_S_MAX):
            while not self._events:
                received = await self._stream.receive_some(_RECEIVE_BYTES)
                if not received:
                    raise LinkError("the host closed the connection before it greeted")
                self._events = self._session.receive(received)
            hello = self._events.pop(0)
            assert isinstance(hello, Hello) and not self._events, "the protocol's table allows nothing else here"
            return hello
        raise LinkError(f"the host did not greet within {GREETING_S_MAX:g} s")

    def _authorised(self, hello: Hello) -> MachineRow:
        """Blocks."""
        catalog = self._store.vault.catalog
        row = catalog.machine_by_id(self._identity.machine_id)
        check_not_replaced(self._identity, row, hello)
        machine = check_identity(self._identity, row)
        check_side(catalog, machine, hello.epoch)
        return machine

    def _begin(self, ingester: Ingester, hello: Hello, salt: bytes) -> tuple[Position, str | None]:
        """Blocks. The position, and the digest of our object that ends where the host's acknowledged ones do.

        Who rejoins gets a new epoch, behind everything that the old one has brought here.
        """
        position = ingester.begin_session(self._authorised(hello), salt)
        if hello.rejoin:
            self._grant(ingester, hello, position)
            position = ingester.begin_session(self._authorised(hello), salt)
        if hello.group_port and (address := hello.group_address or self._host):
            put_place(self._store.vault.catalog, self._identity.machine_id, address, hello.group_port)
        row = self._store.vault.catalog.object_with(self._identity.machine_id, hello.acknowledged_lsn)
        ends_there = row is not None and row.last_lsn == hello.acknowledged_lsn
        return position, row.digest.hex() if row is not None and ends_there else None

    def _grant(self, ingester: Ingester, hello: Hello, position: Position) -> None:
        """Blocks. A new epoch for who rejoins, unless this order got one that its host has not seen yet. A machine that
        comes back ends its failover: after the epoch was raised, so that never two sides could add something."""
        vault = self._store.vault
        granted = granted_before(hello, position.epoch, ingester.granted)
        if granted is None:
            granted = raise_epoch(vault, self._identity.machine_id, above=hello.epoch)
            ingester.granted[hello.order] = granted
        returns = check_side(vault.catalog, self._authorised(hello), hello.epoch)
        if returns is not None:
            end_by_return(vault.root, returns.id, granted, self._store.now_ns())
        self._log.warning("a host rejoins", epoch=granted, acknowledged_lsn=position.lsn, host_epoch=hello.epoch)

    # ---- streaming ----------------------------------------------------------------------------------------

    async def _stream_objects(self, ingester: Ingester, hello: Hello) -> None:
        arriving, waiting = trio.open_memory_channel[ObjectReceived](OBJECTS_WAITING - 1)
        tasks: list[Callable[[], Awaitable[None]]] = [self._beat, partial(self._watch, hello)]
        tasks.append(partial(self._hand_over, takes_handover=hello.takes_handover))
        tasks.append(partial(self._promote, takes_promotion=hello.takes_promotion))
        if hello.takes_configuration:
            tasks.append(self._configure)
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            tasks.append(partial(self._receive, arriving, nursery))
            for task in tasks:
                nursery.start_soon(self._until_failure, scope, task)
            await self._until_failure(scope, partial(self._store_objects, ingester, waiting))
            scope.cancel()  # the host has ended, and all that came is stored
        if self._failure is not None:
            raise self._failure

    async def _until_failure(self, scope: trio.CancelScope, task: Callable[[], Awaitable[None]]) -> None:
        """The first task to fail says why the session ends, and ends the others."""
        try:
            await task()
        except AsrfsError as error:
            self._failure = self._failure or error
            scope.cancel()

    async def _receive(self, arriving: trio.MemorySendChannel[ObjectReceived], nursery: trio.Nursery) -> None:
        """Until the host has closed or said goodbye; then nothing more is waiting to come."""
        with arriving:  # at once: an error must be known before the task behind finds that nothing more comes
            while await self._receive_once(arriving, nursery):
                pass

    async def _receive_once(self, arriving: trio.MemorySendChannel[ObjectReceived], nursery: trio.Nursery) -> bool:
        received = None
        with trio.move_on_after(SILENCE_S_MAX):
            received = await self._stream.receive_some(_RECEIVE_BYTES)
        if received is None:
            raise LinkError(f"the host was silent for {SILENCE_S_MAX:g} s")
        if not received:
            self._end_of_stream()
            return False
        for event in self._session.receive(received):
            if isinstance(event, ObjectReceived):
                await self._store.budget.take(len(event.content))
                self._held += len(event.content)
                await arriving.send(event)
            elif isinstance(event, Heartbeat):
                self._store.links.heard(self._identity.machine_id, event)
            elif isinstance(event, Compare):
                if self._comparing >= self._store.comparing.at_once:
                    raise ProtocolError(f"the host asked for more than {self._comparing} comparisons at once")
                self._comparing += 1
                nursery.start_soon(self._until_failure, nursery.cancel_scope, partial(self._compare, event))
            elif isinstance(event, Match):
                if self._matching >= MATCHES_MAX:
                    raise ProtocolError(f"the host asked for more than {MATCHES_MAX} matches at once")
                self._matching += 1
                nursery.start_soon(self._until_failure, nursery.cancel_scope, partial(self._match, event))
            elif isinstance(event, Fetch):
                if self._fetching >= FETCHES_MAX:
                    raise ProtocolError(f"the host asked for more than {FETCHES_MAX} pieces at once")
                self._fetching += 1
                nursery.start_soon(self._until_failure, nursery.cancel_scope, partial(self._fetch, event))
            elif isinstance(event, Promoted):
                await self._store.promotions.answered(self._identity.machine_id, event)
            elif isinstance(event, HandedOver):
                await self._store.handovers.answered(self._identity.machine_id, event)
            elif isinstance(event, Goodbye):
                self._log.info("host said goodbye", reason=event.reason[:200])
                return False
        return True

    async def _compare(self, wanted: Compare) -> None:
        answer = await self._store.comparing.compare(self._identity.machine_id, wanted)
        self._comparing -= 1  # before the host hears it, and asks the next
        await self._send(answer)

    async def _match(self, wanted: Match) -> None:
        answer = await self._store.in_thread(match, self._store.vault, self._identity.machine_id, wanted)
        self._matching -= 1
        await self._send(answer)

    async def _fetch(self, wanted: Fetch) -> None:
        try:
            self._store.promotions.check_asked(self._identity.machine_id, wanted)
            answer = await self._store.fetching.fetch(self._identity.machine_id, wanted)
        except RefusedError as error:
            answer = Fetched(number=wanted.number, exit_code=error.exit_code, text=str(error))
        self._fetching -= 1
        await self._send(answer)

    def _end_of_stream(self) -> None:
        try:
            self._session.receive_end()
        except ProtocolError as error:
            raise LinkError(str(error)) from None

    async def _store_objects(self, ingester: Ingester, waiting: trio.MemoryReceiveChannel[ObjectReceived]) -> None:
        """Store what waits, in order and as a batch, then acknowledge it (I3)."""
        async for first in waiting:
            batch = [first]
            try:
                while True:
                    batch.append(waiting.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                pass
            taken = await self._store.in_thread(ingester.take, batch)
            self._give_back(sum(len(received.content) for received in batch))
            if taken.acknowledged:
                position = ingester.position
                self._store.links.received(self._identity.machine_id, position.lsn, position.time_ns)
                await self._send(*taken.acknowledged)
            if taken.error is not None:
                raise taken.error

    def _give_back(self, count: int) -> None:
        """To the store's budget, from what this session holds of it."""
        self._held -= count
        self._store.budget.give_back(count)

    async def _beat(self) -> None:
        while True:
            await trio.sleep(HEARTBEAT_S)
            await self._send(Heartbeat())

    async def _watch(self, hello: Hello) -> None:
        """Cut a certificate that is not good any more."""
        while True:
            await trio.sleep(HEARTBEAT_S)
            await self._store.in_thread(self._authorised, hello)

    async def _configure(self) -> None:
        """Say what is wanted of the host, and say it again when that has changed."""
        configurations = self._store.configurations
        said = None
        while True:
            looked = configurations.generation
            wanted = await configurations.of(self._identity.machine_id)
            if wanted is not None:
                looked = max(looked, wanted.generation)
                if said is None or msgspec.structs.replace(wanted, generation=said.generation) != said:
                    await self._send(Configure(configuration=wanted))
                    said = wanted
            with trio.move_on_after(math.inf if wanted is not None else AGAIN_S):
                await configurations.newer_than(looked)

    async def _hand_over(self, *, takes_handover: bool) -> None:
        """Say what a planned failover wants of the host, once for each thing."""
        handovers, machine_id = self._store.handovers, self._identity.machine_id
        said = None
        while True:
            wanted = handovers.of(machine_id)
            if wanted is not None and wanted != said:
                if takes_handover:
                    await self._send(wanted)
                else:
                    await handovers.answered(machine_id, HandedOver(id=wanted.id, outcome="failed", error=_TOO_OLD))
            said = wanted
            await handovers.change()

    async def _promote(self, *, takes_promotion: bool) -> None:
        """Say what a promotion wants of the host, and again now and then."""
        promotions, machine_id = self._store.promotions, self._identity.machine_id
        while True:
            wanted = promotions.of(machine_id)
            if wanted is not None and takes_promotion:
                await self._send(wanted)
            elif wanted is not None:
                text = "the host is of before promotion: update asrfs there"
                await promotions.answered(machine_id, Promoted(id=wanted.id, outcome="failed", exit_code=4, error=text))
            await promotions.change()

    # ---- stream -------------------------------------------------------------------------------------------

    async def _send(self, *messages: Message) -> None:
        """In one piece and in order: a frame that has got its number is sent whole, even when the session is ending."""
        async with self._turn:
            if self._session.state is State.CLOSED:
                return
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_S_MAX) as scope:
                await self._stream.send_all(b"".join(self._session.send(message) for message in messages))
            if scope.cancelled_caught:
                self._is_torn = True
                raise LinkError(f"the host took nothing for {SEND_S_MAX:g} s")

    async def _refuse(self, error: AsrfsError) -> None:
        """Tell the host why, if it can still be told, and read on for a moment until it has hung up."""
        if self._is_torn or self._session.state in (State.START, State.CLOSED):
            return
        code = refusal_code(error)
        with trio.move_on_after(_RUN_OUT_S):
            try:
                await self._send(Refused(code=code, text=" ".join(str(error).split())[:500]))
                while await self._stream.receive_some(_RECEIVE_BYTES):
                    pass
            except AsrfsError:
                return
