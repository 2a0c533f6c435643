"""One connection to the store, from HELLO to its end: five tasks around one `protocol.Session`.

    build ──▶ match ──(channel)──▶ send ──▶ stream    at most OBJECTS_UNACKNOWLEDGED_MAX built and not acknowledged
    others ──(outlet)───▲                             between objects
    receive ◀── stream: ACKNOWLEDGE moves positions.acknowledged, and nothing else does (I3)

`build` reads the journal and seals in a thread while `send` writes the object before it; `match` holds an object until
the store has said what of it is in a seed. Only `send` writes to the stream. An LSN is sealed once in a session: a
session that fails is over, and the next one has another salt.
What may change at an await: `progress` and `positions.acknowledged`; the session's own cursor belongs to `build`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import msgspec
import trio

from asrfs.errors import AsrfsError, IntegrityError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.format.object_encoder import ZSTD_LEVEL, ZSTD_LEVEL_FAST
from asrfs.model.dirty_map import GivenUp
from asrfs.model.positions import Cursor
from asrfs.protocol.frames import Bytes, ProtocolError
from asrfs.protocol.messages import (
    OBJECT_CHUNK_BYTES,
    PROTOCOL_VERSION,
    Acknowledge,
    Compared,
    Configure,
    Fetched,
    Goodbye,
    Handover,
    Heartbeat,
    Hello,
    Match,
    Matched,
    Promote,
    Refused,
    Welcome,
)
from asrfs.protocol.session import Event, Session, State
from asrfs.replication.object_builder import BuiltObject, MachineKeys
from asrfs.replication.outlet import Said
from asrfs.replication.pace import Pace
from asrfs.replication.progress import bytes_between
from asrfs.replication.reconciliation import (
    Side,
    StoreLostError,
    check_same_history,
    check_same_record,
    check_welcome,
    refusal,
)
from asrfs.replication.rewind import check_kept, cursor_at
from asrfs.replication.seeding import Matching, Outgoing
from asrfs.replication.source import Source
from asrfs.transport.stream import ByteStream

HEARTBEAT_S = 5.0
SILENCE_S_MAX = 15.0
"""Three heartbeats: a peer that says nothing for so long is gone."""
GREETING_S_MAX = 20.0
OBJECTS_UNACKNOWLEDGED_MAX = 4
_TOGETHER_BYTES = 64 << 10
_PACE_S = 0.25
FOLD_BACKLOG_BYTES = 512 << 20
"""With so much of the journal behind, what was overwritten meanwhile is left out."""
_FAST_BYTES_PER_S = 48 << 20
"""Above this, level 1 of zstd would take a tenth to a quarter of a processor."""

T = TypeVar("T")


class CorruptJournalError(IntegrityError):
    """Records that were durable cannot be read back. Their bytes are not shipped."""


class ShippingSession:
    """`run` returns never: it raises why the session ended. `welcomed`, `objects_acknowledged` say how far it came."""

    def __init__(self, stream: ByteStream, source: Source, keys: MachineKeys, on_welcome: Callable[[], None]) -> None:
        self._stream = stream
        self._source = source
        self._keys = keys
        self._on_welcome = on_welcome
        self._session = Session("host")
        self._salt = b""
        self._takes_stretches = False
        self._rejoins = False
        self._digest = NO_DIGEST
        self._cursor = source.positions.current.acknowledged
        self._slots = trio.Semaphore(OBJECTS_UNACKNOWLEDGED_MAX)
        self._in_flight: deque[BuiltObject] = deque()
        self._matching = Matching(source.seeds, source.in_thread)
        self._failure: Exception | None = None
        self._pending_events: deque[Event] = deque()
        self._heartbeat_at = 0.0
        self._cut_at = -math.inf
        self._pace = Pace()
        self._is_sending = False
        self._takes_matches = False
        self.welcomed = False
        self.objects_acknowledged = 0

    async def run(self) -> None:
        """Greet, reconcile, ship until something ends it. Raises AsrfsError or OSError; cancelled, it says goodbye."""
        try:
            welcome = await self._greet()
            await self._reconcile(welcome)
            self._on_welcome()
            await self._stream_objects(welcome)
        except CorruptJournalError:
            await self._say_goodbye("the journal cannot be read")
            raise
        except (AsrfsError, OSError):
            raise
        except BaseException:  # cancelled, by itself or as a group
            await self._say_goodbye("paused or stopped")
            raise

    # ---- greeting -----------------------------------------------------------------------------------------

    async def _greet(self) -> Welcome:
        progress, positions = self._source.progress, self._source.positions.current
        order = self._source.order
        self._rejoins = order is not None
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            machine_id=self._source.machine_id.hex(),
            machine_name=self._source.machine_name,
            epoch=progress.epoch if order is None else max(progress.epoch, order.above),
            appended_lsn=progress.appended_lsn,
            durable_lsn=progress.durable.lsn,
            acknowledged_lsn=positions.acknowledged.lsn,
            last_digest=positions.last_digest,
            takes_configuration=True,
            group_port=self._source.group_port,
            group_address=self._source.group_address,
            rejoin=self._rejoins,
            order=order.id if order is not None else "",
            takes_handover=self._source.handover is not None,
            takes_promotion=self._source.promotion is not None,
        )
        try:
            with trio.fail_after(GREETING_S_MAX):
                await self._send(self._session.send(hello))
                event = await self._next_event()
        except trio.TooSlowError:
            raise TemporaryError(f"the store did not greet within {GREETING_S_MAX:g} s") from None
        if isinstance(event, Refused):
            raise refusal(event.code, event.text)
        assert isinstance(event, Welcome), "the protocol's table allows nothing else here"
        check_welcome(event)
        self.welcomed = True
        return event

    async def _reconcile(self, welcome: Welcome) -> None:
        """Take the store's acknowledged LSN for ours and find its place in the journal."""
        source = self._source
        if self._rejoins:
            return await self._rejoin(welcome)
        async with source.journal_turn:
            ours = source.positions.current
            check_same_history(
                Side(source.progress.epoch, ours.acknowledged.lsn, ours.last_digest),
                source.progress.durable.lsn,
                Side(welcome.epoch, welcome.acknowledged_lsn, welcome.last_digest),
            )
            cursor = ours.acknowledged
            if welcome.acknowledged_lsn != cursor.lsn:
                cursor = await self._locate(welcome)
            needed = source.given_up().needed_behind(cursor)
            await source.in_thread(check_kept, source.journal, source.machine_id, needed.lsn, cursor.lsn)
            check_same_record(cursor.lsn, cursor.time_ns, welcome.acknowledged_time_ns)
            source.positions.change(acknowledged=cursor, last_digest=welcome.last_digest)
            if cursor.lsn < source.positions.saved.acknowledged.lsn:  # also when an earlier session could not save it
                await source.in_thread(source.positions.save)
        self._go_on_at(cursor, welcome)

    async def _rejoin(self, welcome: Welcome) -> None:
        """Whatever the store has is what it has acknowledged; ours goes on behind it, in the epoch it gave."""
        source = self._source
        assert source.rejoiner is not None
        cursor = await source.rejoiner.go_on(welcome)
        async with source.journal_turn:
            source.positions.change(epoch=welcome.epoch, acknowledged=cursor, last_digest=welcome.last_digest)
            await source.in_thread(source.positions.save)
        self._go_on_at(cursor, welcome)
        await source.rejoiner.finish()

    def _go_on_at(self, cursor: Cursor, welcome: Welcome) -> None:
        self._source.progress.note_acknowledged(cursor)
        self._cursor = cursor
        self._salt, self._takes_stretches = welcome.session_salt, welcome.takes_stretches
        self._takes_matches = welcome.takes_matches
        self._digest = bytes.fromhex(welcome.last_digest) or NO_DIGEST

    async def _locate(self, welcome: Welcome) -> Cursor:
        """Where the store stands. In what was given up there is no place any more: then it is only a number, the time
        is the store's word, and a gap object is what goes on from there."""
        source, lsn = self._source, welcome.acknowledged_lsn
        given_up, ours = source.given_up(), source.positions.current.acknowledged
        start = given_up.needed_behind(ours)
        try:
            return await source.in_thread(cursor_at, source.journal, source.machine_id, source.reader, start, lsn)
        except IntegrityError as error:
            if given_up.covers(lsn):
                return msgspec.structs.replace(ours, lsn=lsn, time_ns=welcome.acknowledged_time_ns)
            if isinstance(error, StoreLostError):
                raise
            raise CorruptJournalError(str(error)) from None

    # ---- streaming ----------------------------------------------------------------------------------------

    async def _stream_objects(self, welcome: Welcome) -> None:
        sending, receiving = trio.open_memory_channel[Outgoing | Match | Said](0)
        built, matching = trio.open_memory_channel[Outgoing](OBJECTS_UNACKNOWLEDGED_MAX)
        tasks: list[Callable[[], Awaitable[None]]] = [
            self._receive,
            partial(self._build, built, sending.send),
            partial(self._matching.pass_on, matching, sending.send),
            partial(self._send_objects, receiving),
        ]
        with self._source.outlet.opened(sending.send, welcome.compares, welcome.takes_fetches):
            async with trio.open_nursery() as nursery:
                for task in tasks:
                    nursery.start_soon(self._until_failure, task, nursery.cancel_scope)
        if self._failure is not None:
            raise self._failure

    async def _until_failure(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """The first task to fail says why the session ended and ends the others."""
        try:
            await task()
        except (AsrfsError, OSError) as error:
            self._failure = self._failure or error
            scope.cancel()

    async def _build(self, channel: trio.MemorySendChannel[Outgoing], send: Callable[[Match], Awaitable[None]]) -> None:
        while True:
            await self._slots.acquire()
            built = await self._next_object()
            assert built.first_lsn == self._cursor.lsn + 1, "I4: no gap"
            self._cursor, self._digest = built.cursor, built.digest
            outgoing = Outgoing(built)
            channel.send_nowait(outgoing)  # it has room for as many as there are turns
            await self._matching.ask(outgoing, send)

    async def _next_object(self) -> BuiltObject:
        """Of the next records, once that is due; of what was given up at once."""
        source = self._source
        while not (given_up := source.given_up()).covers(self._cursor.lsn):
            await self._wait_until_due()
            try:
                built = await source.in_thread(
                    self._build_next, self._level(), source.seeds.worth_asking(self._takes_matches)
                )
            except IntegrityError as error:
                if source.given_up().covers(self._cursor.lsn):
                    continue  # it was freed while it was read
                raise CorruptJournalError(str(error)) from None
            if built is None:
                raise TemporaryError("the journal has no records where durable ones are due")
            self._pace.note(bytes_between(self._cursor, built.cursor), trio.current_time())
            return built
        if not self._takes_stretches:
            raise ProtocolError("the store is of before stretches and cannot be told what was given up: upgrade it")
        return await source.in_thread(self._build_gap, given_up)

    def _build_gap(self, given_up: GivenUp) -> BuiltObject:
        return self._source.builder.build_gap(
            self._cursor.lsn + 1,
            given_up.through,
            given_up.disks,
            epoch=self._source.progress.epoch,
            keys=self._keys,
            session_salt=self._salt,
            previous_digest=self._digest,
        )

    def _build_next(self, level: int | None, is_seeded: Callable[[int], bool] | None) -> BuiltObject | None:
        source = self._source
        is_far_behind = bytes_between(self._cursor, source.progress.durable) >= FOLD_BACKLOG_BYTES
        return source.builder.build(
            self._cursor,
            source.progress.durable.lsn,
            keys=self._keys,
            session_salt=self._salt,
            previous_digest=self._digest,
            bytes_max=source.settings.object_size,
            level=level,
            folds=is_far_behind and self._takes_stretches,
            is_seeded=is_seeded,
        )

    def _level(self) -> int | None:
        """How hard to compress: less when so much is shipped that it would take a good part of a processor."""
        if not self._source.settings.compression:
            return None
        is_much = self._pace.bytes_per_s(trio.current_time()) > _FAST_BYTES_PER_S
        return ZSTD_LEVEL_FAST if is_much else ZSTD_LEVEL

    async def _wait_until_due(self) -> None:
        """Until there is enough for an object, or what there is has waited for its age, or somebody waits for it."""
        source, progress = self._source, self._source.progress
        await progress.wait_until(lambda: progress.durable.lsn > self._cursor.lsn)

        def is_due() -> bool:
            enough = bytes_between(self._cursor, progress.durable) >= source.settings.object_size
            return enough or source.hurry_lsn > self._cursor.lsn

        with trio.move_on_at(self._cut_at + source.settings.object_age):
            await progress.wait_until(is_due)
        self._cut_at = trio.current_time()

    async def _send_objects(self, channel: trio.MemoryReceiveChannel[Outgoing | Match | Said]) -> None:
        self._heartbeat_at = trio.current_time() + HEARTBEAT_S
        while True:
            next_one = None
            with trio.move_on_at(self._heartbeat_at):
                next_one = await channel.receive()
            if self._session.state is not State.CLOSED and trio.current_time() >= self._heartbeat_at:
                await self._send_heartbeat()
            if self._session.state is State.CLOSED:  # the store ended the session: `receive` says why
                return
            if isinstance(next_one, Outgoing):
                await self._send_object(next_one)
            elif next_one is not None:
                await self._send(self._session.send(next_one))

    async def _send_object(self, outgoing: Outgoing) -> None:
        self._in_flight.append(outgoing.built)
        begin, pieces = outgoing.wire()
        self._source.seeds.bytes_left_out += outgoing.built.length - begin.length
        header: Bytes = b""
        for buffer in self._session.send_object(begin, pieces):
            if len(buffer) < _TOGETHER_BYTES:
                header = b"".join((header, buffer))
                continue
            await self._send(header, buffer)
            header = b""
        await self._send(header)
        self._source.builder.give_back(outgoing.built)

    async def _send_heartbeat(self) -> None:
        progress = self._source.progress
        durable = progress.durable
        beat = Heartbeat(appended_lsn=progress.appended_lsn, durable_lsn=durable.lsn, durable_time_ns=durable.time_ns)
        self._heartbeat_at = trio.current_time() + HEARTBEAT_S
        await self._send(self._session.send(beat))

    async def _receive(self) -> None:
        while True:
            event = await self._next_event()
            if isinstance(event, Acknowledge):
                self._on_acknowledge(event)
            elif isinstance(event, Compared | Fetched):
                self._source.outlet.answered(event)
            elif isinstance(event, Matched):
                self._matching.answered(event)
            elif isinstance(event, Configure):
                self._source.configured(event.configuration)
            elif isinstance(event, Handover):
                if self._source.handover is None:
                    raise ProtocolError("the store asked for a handover, which this host never said that it takes")
                self._source.handover(event)
            elif isinstance(event, Promote):
                if self._source.promotion is None:
                    raise ProtocolError("the store asked for a promotion, which this host never said that it takes")
                self._source.promotion(event)
            elif isinstance(event, Refused):
                self._source.seeds.is_useless |= event.code == "seed"
                raise refusal(event.code, event.text)

    def _on_acknowledge(self, acknowledge: Acknowledge) -> None:
        """The store has everything up to this LSN on disk. It may answer several objects at once."""
        acknowledged = next((built for built in self._in_flight if built.last_lsn == acknowledge.lsn), None)
        if acknowledged is None:
            raise ProtocolError(f"the store acknowledged LSN {acknowledge.lsn}, where no log object in flight ends")
        if acknowledge.digest != acknowledged.digest.hex():
            raise ProtocolError(f"the store acknowledged LSN {acknowledge.lsn} with another digest than was sent")
        while self._in_flight.popleft() is not acknowledged:
            self._release()
        self._release()
        source = self._source
        source.positions.change(acknowledged=acknowledged.cursor, last_digest=acknowledge.digest)
        source.progress.note_acknowledged(acknowledged.cursor)

    def _release(self) -> None:
        self._slots.release()
        self.objects_acknowledged += 1

    # ---- stream -------------------------------------------------------------------------------------------

    async def _next_event(self) -> Event:
        """The store's next word. Raises TemporaryError when the connection is lost or silent."""
        while not self._pending_events:
            try:
                with trio.fail_after(SILENCE_S_MAX):
                    received = await self._stream.receive_some()
            except trio.TooSlowError:
                raise TemporaryError(f"the store was silent for {SILENCE_S_MAX:g} s") from None
            if not received:
                self._session.receive_end()
                raise TemporaryError("the store closed the connection")
            self._pending_events.extend(self._session.receive(received))
        return self._pending_events.popleft()

    async def _send(self, *buffers: Bytes) -> None:
        """In slices, so that another limit holds within a second, also for an object that is being sent."""
        self._is_sending = True
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                limit = self._source.settings.bandwidth_limit
                piece = rest[: max(1, int(limit * _PACE_S)) if limit else OBJECT_CHUNK_BYTES]
                await self._stream.send_all(piece)
                rest = rest[len(piece) :]
                if limit:
                    await trio.sleep(len(piece) / limit)
        self._is_sending = False

    async def _say_goodbye(self, reason: str) -> None:
        """A courtesy: the store need not wait for silence. Not possible inside an object or another message."""
        if self._session.state is not State.STREAMING or self._is_sending:
            return
        with trio.move_on_after(1, shield=True):
            try:
                await self._stream.send_all(self._session.send(Goodbye(reason=reason)))
            except AsrfsError:
                return
