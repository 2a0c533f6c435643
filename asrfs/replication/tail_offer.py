"""What a host that was superseded still has to say: the records that its store never got, its tail (I7).

    bar, sync ─▶ HELLO tail_lsn ─▶ WELCOME is_tail: behind LSN n ─▶ log objects, one after the other ─▶ REFUSED: kept
                                ─▶ REFUSED: kept                                    `fenced.json` says what became of it

The disks take no writes any more, so what is durable at the sync is all that guests ever wrote. Positions stay as they
are: nothing of the history is acknowledged by a tail, and no segment is freed for one. Whoever dies, the next session
goes on behind what the store has then. What was given up over the quota is in no journal, and cannot be offered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import trio

from asrfs.errors import FencedError, IntegrityError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.format.object_encoder import ZSTD_LEVEL
from asrfs.format.record import CHANGES
from asrfs.model.positions import Cursor
from asrfs.model.quantities import format_size
from asrfs.model.rejoining import FencedTail
from asrfs.model.tails import tail_name
from asrfs.protocol.frames import Bytes, ProtocolError
from asrfs.protocol.messages import (
    OBJECT_CHUNK_BYTES,
    PROTOCOL_VERSION,
    Acknowledge,
    Goodbye,
    Heartbeat,
    Hello,
    KeptTail,
    ObjectBegin,
    Refused,
    Welcome,
)
from asrfs.protocol.session import Event, Session, State
from asrfs.replication.object_builder import BuiltObject, MachineKeys
from asrfs.replication.reconciliation import (
    DivergedError,
    StoreLostError,
    check_same_record,
    check_welcome,
    refusal,
)
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.rewind import cursor_at
from asrfs.replication.shipping_session import CorruptJournalError
from asrfs.replication.source import Source
from asrfs.transport.stream import ByteStream

T = TypeVar("T")

ANSWER_S_MAX = 60.0
"""For a word of the store that says more than that it is alive."""
_PACE_S = 0.25
_PIECE_RECORDS, _PIECE_BYTES = 64 * 1024, 8 << 20
_NOTHING = FencedTail(outcome="none", text="the store has all that it wrote")


async def offer_tail(stream: ByteStream, source: Source, keys: MachineKeys) -> None:
    """Offer it over a new connection. Raises FencedError once it is settled, or where the store does not ask for it;
    other errors where another try may do better."""
    rejoiner = source.rejoiner
    assert rejoiner is not None and rejoiner.fence is not None
    await rejoiner.server.reread_fence()
    end = (await rejoiner.server.sync()).durable
    settled = _given_up(source, rejoiner)
    if settled is None and end.lsn <= source.positions.current.acknowledged.lsn:
        settled = _NOTHING
    if settled is None:
        offer = _Offer(stream, source, keys, end)
        try:
            settled = await offer.run()
        except (DivergedError, StoreLostError) as error:
            text = f"what it wrote and the store did not have cannot be offered: {error}"
            settled = FencedTail(outcome="lost", text=text[:1000])
    await rejoiner.tail_settled(settled)
    raise FencedError(rejoiner.fence.why)


def _given_up(source: Source, rejoiner: Rejoiner) -> FencedTail | None:
    """Of a tail that is in no journal any more."""
    if not source.given_up().covers(source.positions.current.acknowledged.lsn):
        return None
    disks = rejoiner.machine().live_disks()
    count = sum(rejoiner.dirty.map.dirty_bytes(disk.slot, disk.size_bytes) for disk in disks)
    images = ", ".join(disk.adopted or f"images/{disk.id}.img" for disk in disks)
    text = (
        f"its tail cannot be offered to the store: {format_size(count)} of it were given up when the journal was over "
        f"its quota. The only copy is this host's: {images}"
    )
    return FencedTail(outcome="lost", text=text[:1000])


class _Offer:
    """One session. `end`: the place behind the last record that guests may have written."""

    def __init__(self, stream: ByteStream, source: Source, keys: MachineKeys, end: Cursor) -> None:
        self._stream = stream
        self._source = source
        self._keys = keys
        self._end = end
        self._session = Session("host")
        self._events: deque[Event] = deque()
        self._epoch = source.progress.epoch

    async def run(self) -> FencedTail:
        """What became of it. Raises AsrfsError, OSError."""
        answer = await self._greet()
        if isinstance(answer, Welcome):
            cursor = await self._locate(answer.acknowledged_lsn, answer.acknowledged_time_ns)
            if cursor.lsn >= self._end.lsn:
                if self._is_open:
                    await self._send(self._session.send(Goodbye(reason="the store has all of it")))
                return _NOTHING
            answer = await self._send_tail(answer, cursor)
        if answer.tail is None:
            error = refusal(answer.code, answer.text)
            if isinstance(error, DivergedError):  # its word for a session of another kind, which settles nothing
                raise FencedError(str(error))
            raise error
        return await self._kept(answer.tail)

    @property
    def _is_open(self) -> bool:
        return self._session.state is not State.CLOSED

    async def _greet(self) -> Welcome | Refused:
        acknowledged = self._source.positions.current
        await self._send(
            self._session.send(
                Hello(
                    protocol=PROTOCOL_VERSION,
                    machine_id=self._source.machine_id.hex(),
                    machine_name=self._source.machine_name,
                    epoch=self._epoch,
                    appended_lsn=self._end.lsn,
                    durable_lsn=self._end.lsn,
                    acknowledged_lsn=acknowledged.acknowledged.lsn,
                    last_digest=acknowledged.last_digest,
                    tail_lsn=self._end.lsn,
                )
            )
        )
        answer = await self._hear()
        if isinstance(answer, Welcome):
            check_welcome(answer)
            if not answer.is_tail or answer.epoch != self._epoch:
                raise FencedError("the store does not hold this host for superseded, which its own file says")
        assert isinstance(answer, Welcome | Refused), "the protocol's table allows nothing else here"
        return answer

    async def _locate(self, lsn: int, time_ns: int) -> Cursor:
        """The place behind the store's last record of ours. Raises DivergedError where that is none of ours."""
        source, ours = self._source, self._source.positions.current.acknowledged
        if lsn > self._end.lsn:
            raise DivergedError(f"the store has records of that epoch up to LSN {lsn}, and this host {self._end.lsn}")
        cursor = ours
        if lsn != ours.lsn:
            start = source.given_up().needed_behind(ours)
            async with source.journal_turn:
                cursor = await self._read(cursor_at, source.journal, source.machine_id, source.reader, start, lsn)
        check_same_record(lsn, cursor.time_ns, time_ns)
        return cursor

    async def _send_tail(self, welcome: Welcome, cursor: Cursor) -> Refused:
        """Object by object, until the store ends it."""
        digest = bytes.fromhex(welcome.last_digest) or NO_DIGEST
        answer: Acknowledge | Welcome | Refused
        while cursor.lsn < self._end.lsn and self._is_open:
            built = await self._read(self._build, cursor, welcome.session_salt, digest)
            begin = ObjectBegin(first_lsn=built.first_lsn, last_lsn=built.last_lsn, length=built.length)
            if self._is_open:  # else the store has ended it, and why is heard next
                for buffer in self._session.send_object(begin, built.pieces):
                    await self._send(buffer)
            self._source.builder.give_back(built)
            answer = await self._hear()
            if isinstance(answer, Refused):
                return answer
            said = (answer.lsn, answer.digest) if isinstance(answer, Acknowledge) else None
            if said != (built.last_lsn, built.digest.hex()):
                raise ProtocolError(f"the store acknowledged something else than LSN {built.last_lsn} of the tail")
            cursor, digest = built.cursor, built.digest
        answer = await self._hear()
        if not isinstance(answer, Refused):
            raise ProtocolError("the store has all of the tail and does not say that it keeps it")
        return answer

    def _build(self, cursor: Cursor, salt: bytes, previous_digest: bytes) -> BuiltObject:
        """Blocks."""
        built = self._source.builder.build(
            cursor,
            self._end.lsn,
            keys=self._keys,
            session_salt=salt,
            previous_digest=previous_digest,
            bytes_max=self._source.settings.object_size,
            level=ZSTD_LEVEL if self._source.settings.compression else None,
        )
        if built is None:
            raise IntegrityError("the journal has no records where those of the tail are due")
        assert built.first_lsn == cursor.lsn + 1, "I4: no gap"
        return built

    async def _kept(self, kept: KeptTail) -> FencedTail:
        """Raises DivergedError where what is kept is another host's, or not all of it."""
        cursor = await self._locate(kept.lsn, kept.time_ns)
        if await self._read(self._changes_behind, cursor):
            raise DivergedError(f"the store keeps it up to LSN {kept.lsn}, and guests wrote behind that")
        name = tail_name(self._epoch)
        if kept.is_point:
            text = (
                f"what it wrote and the store did not have is kept there as the point {name} (up to LSN "
                f"{cursor.lsn}), and this host's copy may be given up"
            )
        else:
            text = (
                f"what it wrote and the store did not have is kept there (epoch {self._epoch}, to LSN {cursor.lsn}), "
                "but the store never had all of the disks: their only whole copy is this host's"
            )
        return FencedTail(outcome="kept", text=text)

    def _changes_behind(self, cursor: Cursor) -> bool:
        """Whether a guest's write comes behind it: what is made later, such as markers, is no loss. Blocks."""
        while cursor.lsn < self._end.lsn:
            batch = self._source.reader.read(cursor, min(self._end.lsn, cursor.lsn + _PIECE_RECORDS), _PIECE_BYTES)
            if any(np.isin(part.headers["kind"], [int(kind) for kind in CHANGES]).any() for part in batch.parts):
                return True
            cursor = batch.cursor
        return False

    async def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        """What reads the journal, in a thread. Raises StoreLostError, CorruptJournalError."""
        try:
            return await self._source.in_thread(function, *arguments)
        except StoreLostError:
            raise
        except IntegrityError as error:
            raise CorruptJournalError(str(error)) from None

    # ---- stream -------------------------------------------------------------------------------------------

    async def _hear(self) -> Acknowledge | Welcome | Refused:
        """The store's next word but for heartbeats. Raises TemporaryError when the connection is lost or silent."""
        try:
            with trio.fail_after(ANSWER_S_MAX):
                while True:
                    while not self._events:
                        received = await self._stream.receive_some()
                        if not received:
                            self._session.receive_end()
                            raise TemporaryError("the store closed the connection")
                        self._events.extend(self._session.receive(received))
                    event = self._events.popleft()
                    if isinstance(event, Acknowledge | Welcome | Refused):
                        return event
                    if not isinstance(event, Heartbeat):
                        raise ProtocolError(f"the store said {type(event).__name__} to a host that was superseded")
        except trio.TooSlowError:
            raise TemporaryError(f"the store did not answer within {ANSWER_S_MAX:g} s") from None

    async def _send(self, buffer: Bytes) -> None:
        limit = self._source.settings.bandwidth_limit
        rest = memoryview(buffer)
        while rest:
            piece = rest[: max(1, int(limit * _PACE_S)) if limit else OBJECT_CHUNK_BYTES]
            await self._stream.send_all(piece)
            rest = rest[len(piece) :]
            if limit:
                await trio.sleep(len(piece) / limit)
