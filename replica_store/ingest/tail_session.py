"""The rest of a session whose host was refused as fenced and offers its tail; it ends by that refusal in any case.

    REFUSED fenced, and no word of a tail      it may not, or another connection is about to
    WELCOME is_tail ─▶ log objects, each acknowledged ─▶ REFUSED fenced, tail kept
    REFUSED fenced, tail kept                  it is here already: the answer was lost

The session of the machine's other side, if it has one, is not touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import structlog
import trio

from asrfs.errors import AsrfsError, FencedError, RefusedError
from asrfs.protocol.messages import PROTOCOL_VERSION, Goodbye, Heartbeat, Hello, KeptTail, Message, Welcome
from asrfs.protocol.session import Event, ObjectReceived
from asrfs.transport.stream import LinkError
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.budget import Budget
from replica_store.ingest.ingester import Position
from replica_store.ingest.tails import TailIngester, may_offer
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault

BEAT_S = 5.0
_NONCE_BYTES = 4

T = TypeVar("T")


class TailKeptError(FencedError):
    """Refused, and its tail is kept."""

    def __init__(self, text: str, kept: KeptTail) -> None:
        super().__init__(text)
        self.kept = kept


def kept_by(error: AsrfsError) -> KeptTail | None:
    """What a host that is refused with this is told of its tail."""
    return error.kept if isinstance(error, TailKeptError) else None


class Line(Protocol):
    """The session whose host is heard."""

    async def send(self, *messages: Message) -> None: ...

    async def receive(self) -> list[Event]: ...


class TailStore(Protocol):
    """What of the store this needs."""

    vault: Vault
    budget: Budget
    taking_tails: set[str]

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T: ...

    def make_salt(self) -> bytes: ...


async def take_tail(line: Line, store: TailStore, identity: MachineIdentity, hello: Hello, fenced: FencedError) -> None:
    """Returns if nothing is to be taken. Raises TailKeptError once all is kept, or what else ends the session."""
    machine = await store.in_thread(may_offer, store.vault.catalog, identity, hello)
    if machine is None:
        return
    if machine.id in store.taking_tails:
        raise RefusedError(f"a tail of machine {machine.name} is coming over another connection")
    store.taking_tails.add(machine.id)
    try:
        await _take(line, store, machine, hello, fenced)
    finally:
        store.taking_tails.discard(machine.id)


async def _take(line: Line, store: TailStore, machine: MachineRow, hello: Hello, fenced: FencedError) -> None:
    log = structlog.get_logger("replica_store.tails").bind(machine=machine.name, epoch=hello.epoch)
    ingester = TailIngester(store.vault, machine, hello, lambda: secrets.token_hex(_NONCE_BYTES))
    salt = store.make_salt()
    position = await store.in_thread(ingester.begin, salt)
    kept = await store.in_thread(ingester.finish_if_whole)
    if kept is None:
        await line.send(_welcome(store.vault.id, salt, position))
        log.info("a superseded host sends its tail", after_lsn=position.lsn, until_lsn=hello.tail_lsn)
        kept = await _receive(line, store, ingester)
    log.warning("the tail of a superseded host is kept", lsn=kept.lsn, is_point=kept.is_point)
    raise TailKeptError(str(fenced), kept)


async def _receive(line: Line, store: TailStore, ingester: TailIngester) -> KeptTail:
    """Until the tail is whole. Whatever fails ends the session; what is durable by then is gone on from."""
    failure: AsrfsError | None = None
    kept = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_beat, line)
        try:
            while kept is None:
                for event in await line.receive():
                    await _on_event(line, store, ingester, event)
                kept = await store.in_thread(ingester.finish_if_whole)
        except AsrfsError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if kept is None:
        assert failure is not None
        raise failure
    return kept


async def _on_event(line: Line, store: TailStore, ingester: TailIngester, event: Event) -> None:
    if isinstance(event, Heartbeat):
        return
    if isinstance(event, Goodbye):
        raise LinkError("the host said goodbye before its tail was whole")
    if not isinstance(event, ObjectReceived):
        raise RefusedError("a host that was superseded may send its tail, and nothing else")
    await store.budget.take(len(event.content))
    try:
        taken = await store.in_thread(ingester.take, [event])
    finally:
        store.budget.give_back(len(event.content))
    if taken.acknowledged:
        await line.send(*taken.acknowledged)
    if taken.error is not None:
        raise taken.error


async def _beat(line: Line) -> None:
    try:
        while True:
            await trio.sleep(BEAT_S)
            await line.send(Heartbeat())
    except AsrfsError:
        return  # who receives finds that, too


def _welcome(store_id: str, salt: bytes, position: Position) -> Welcome:
    return Welcome(
        protocol=PROTOCOL_VERSION,
        store_id=store_id,
        session_salt=salt,
        epoch=position.epoch,
        acknowledged_lsn=position.lsn,
        acknowledged_time_ns=position.time_ns,
        last_digest=position.digest_hex,
        takes_stretches=True,
        is_tail=True,
    )
