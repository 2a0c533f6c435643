"""Tails: a superseded host that lies to the store, and a store that lies to a superseded host.

Whatever the host says, no table of a history changes, what is stored of the tail is what was sent, and what is
acknowledged is stored. Whatever the store says, the host ends by a word of its own, and believes that its tail is kept
only of one who names its own last record.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import trio

from asrfs.errors import AsrfsError
from asrfs.journal.reader import JournalReader
from asrfs.model.positions import Positions
from asrfs.model.rejoining import Fence, FencedTail
from asrfs.protocol.frames import FrameReader, FrameType
from asrfs.protocol.messages import Acknowledge, Heartbeat, Hello, KeptTail, Refused, decode_message, encode_message
from asrfs.replication.disk_server import HostPositions
from asrfs.replication.object_builder import MachineKeys, ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.source import ShippingSettings
from asrfs.replication.tail_offer import offer_tail
from tests.fakes.journal_world import MACHINE_ID
from tests.proof.fuzzing.mutations import Strike
from tests.proof.fuzzing.sessions import (
    _GAP_S,
    WELCOME,
    HostWorld,
    ScriptedStream,
    StoreWorld,
    _InlineSource,
    _objects_in,
    run_virtually,
)
from tests.proof.fuzzing.target import Target, Trial
from tests.proof.fuzzing.wire import (
    Conversation,
    Piece,
    _objects,
    break_conversation,
    cut,
    encode,
    first_frame,
    history_of,
    host_says,
)

_UNTOUCHED = ("objects", "points", "disks", "confirmations")


EPOCH = 2
"""Of the side that superseded the host."""


def _orders_rejoining(stream: bytes) -> bool:
    """Whether the host's first word is that somebody there has ordered it to go on in a new epoch, which he may."""
    reader = FrameReader()
    for at in range(len(stream)):
        with contextlib.suppress(AsrfsError):
            for frame in reader.feed(stream[at : at + 1]):
                hello = decode_message(frame.type, bytes(frame.payload))
                return isinstance(hello, Hello) and hello.rejoin
    return False


@contextmanager
def open_hostile_host(scratch: Path) -> Iterator[Trial]:
    with StoreWorld.open(scratch) as world:
        with world.vault.catalog.transaction():
            world.vault.catalog.put_machine(replace(world.vault.machine("web1"), epoch=EPOCH))
        history = history_of(world.machine_id, world.keys, 6)
        said = host_says(history, 3)
        kinds = (FrameType.OBJECT_BEGIN, FrameType.OBJECT_BYTES, FrameType.HEARTBEAT)
        hello = msgspec.structs.replace(history.hello(), tail_lsn=history.last_lsn)
        said = [Piece(FrameType.HELLO, encode_message(hello)), *(each for each in said if each.type in kinds)]
        honest = set(_objects(said))
        heard = world.serve(cut(random.Random(1), encode(said), first_frame(said)))
        assert isinstance(heard[-1], Refused) and heard[-1].tail is not None, "an honest tail is kept"
        assert honest <= set(world.stored())

        def trial(rng: random.Random, strike: Strike) -> None:
            stream = break_conversation(rng, said, strike)
            heard = world.serve(cut(rng, stream, first_frame(said)))
            tables = {name: world.vault.catalog.table(name) for name in _UNTOUCHED}
            assert not any(tables.values()), "I6: a superseded host has added to a history"
            if (machine := world.vault.machine("web1")).epoch != EPOCH:
                assert _orders_rejoining(stream), "I6: a superseded host goes on, and nobody there has ordered it"
                with world.vault.catalog.transaction():
                    world.vault.catalog.put_machine(replace(machine, epoch=EPOCH))
            stored = set(world.stored())
            words = [content for content in stored if content not in honest]
            assert len(words) <= 1 and all(len(content) < 1000 for content in words), "stored, and not sent so"
            for event in heard:
                if isinstance(event, Acknowledge):
                    assert any(content[-32:].hex() == event.digest for content in stored), "I3: it is not stored"

        yield trial


class _TailHostWorld(HostWorld):
    """A host that was superseded before anything of it was acknowledged."""

    def offer(self, pieces: Sequence[bytes]) -> tuple[list[tuple[int, str]], FencedTail | None]:
        """One connection to a store that says this: the objects that were sent whole, and what became of the tail."""
        journal = self._world.journal_storage
        progress = Progress(Positions())
        progress.note_host(appended_lsn=self.durable_lsn, durable=self._durable, epoch=1)
        readers = [JournalReader(journal, MACHINE_ID) for _ in range(2)]
        stream = ScriptedStream(pieces, _GAP_S)
        settled: list[FencedTail] = []

        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        async def sync() -> HostPositions:
            await trio.lowlevel.checkpoint()
            return HostPositions(self.durable_lsn, self._durable, 1, None)

        async def settle(tail: FencedTail) -> None:
            await trio.lowlevel.checkpoint()
            settled.append(tail)

        async def run() -> None:
            source = _InlineSource(
                machine_id=MACHINE_ID,
                machine_name="web1",
                journal=journal,
                reader=readers[0],
                builder=ObjectBuilder(readers[1]),
                positions=PositionsFile(Positions(), lambda positions: None),
                progress=progress,
                settings=ShippingSettings(object_size=3 * 4096),
                threads=trio.CapacityLimiter(1),
                journal_turn=trio.Lock(),
                rejoiner=SimpleNamespace(  # type: ignore[arg-type]
                    fence=Fence(epoch=1, why="another side goes on", time_ns=1),
                    server=SimpleNamespace(reread_fence=nothing, sync=sync),
                    tail_settled=settle,
                ),
            )
            with contextlib.suppress(AsrfsError):
                await offer_tail(stream, source, MachineKeys(MACHINE_ID, b"i" * 32, b"p" * 32))
                raise AssertionError("a session ended without a reason")

        try:
            run_virtually(run)
        finally:
            for reader in readers:
                reader.close()
        return _objects_in(bytes(stream.said)), settled[0] if settled else None

    def time_ns(self) -> int:
        """Of the last durable record."""
        return self._world.journal.last_time_ns


@contextmanager
def open_hostile_store(_scratch: Path) -> Iterator[Trial]:
    world = _TailHostWorld()
    welcome = Piece(FrameType.WELCOME, encode_message(msgspec.structs.replace(WELCOME, is_tail=True)))
    sent: list[tuple[int, str]] = []
    while not sent or sent[-1][0] < world.durable_lsn:  # the next comes once the one before it is acknowledged
        sent, _ = world.offer([encode([welcome, *_acknowledged(sent)])])
    kept = KeptTail(lsn=sent[-1][0], time_ns=world.time_ns(), is_point=True)
    said = [welcome, *_acknowledged(sent)]
    said.append(Piece(FrameType.REFUSED, encode_message(Refused(code="fenced", text="over", tail=kept))))
    ends = [len(encode(said[:count])) for count in range(len(said) + 1)]
    _, settled = world.offer(_frame_by_frame(encode(said), ends))
    assert settled is not None and settled.outcome == "kept", "an honest store is believed"

    def trial(rng: random.Random, strike: Strike) -> None:
        _, settled = world.offer(_frame_by_frame(break_conversation(rng, said, strike), ends))
        is_kept = settled is not None and settled.outcome == "kept"
        assert not is_kept or f"LSN {world.durable_lsn})" in str(settled), (
            "I7: it is not kept, and the host believes so"
        )

    yield trial


def _frame_by_frame(stream: bytes, ends: Sequence[int]) -> list[bytes]:
    """As the host waits for each; what is behind the last of them, at once."""
    return [stream[start:end] for start, end in pairwise([*ends[:-1], max(ends[-1], len(stream))])]


def _acknowledged(sent: Sequence[tuple[int, str]]) -> Conversation:
    said: Conversation = []
    for lsn, digest in sent:
        said.append(Piece(FrameType.ACKNOWLEDGE, encode_message(Acknowledge(lsn=lsn, digest=digest))))
        said.append(Piece(FrameType.HEARTBEAT, encode_message(Heartbeat())))
    return said


TARGETS = (
    Target("hostile superseded host", 3, open_hostile_host),
    Target("hostile store of a tail", 2, open_hostile_store),
)
