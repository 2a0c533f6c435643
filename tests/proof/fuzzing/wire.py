"""The wire: frames and both ends of a session as bytes come, a hostile host against the store, a hostile store
against the host.

An end is fed the same bytes at once and in pieces and must hear the same. A header that was changed and not sealed
again ends the stream right there. What the store acknowledges of a stream that was broken on the way is, byte for
byte, what was sent; what the host takes for acknowledged was durable.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from crc32c import crc32c

from asrfs.model.configuration import (
    GroupOrder,
    HostConfiguration,
    Member,
    decode_configuration,
    encode_configuration,
)
from asrfs.protocol import frames, session
from asrfs.protocol.frames import FRAME_HEADER_BYTES, FRAME_PAYLOAD_BYTES_MAX, FrameType, ProtocolError
from asrfs.protocol.messages import (
    Acknowledge,
    ChunksOfDisk,
    Compare,
    Compared,
    Configure,
    Fetch,
    Fetched,
    Goodbye,
    HandedOver,
    Handover,
    Heartbeat,
    Match,
    Matched,
    Promote,
    Promoted,
    Refused,
    encode_message,
)
from asrfs.protocol.session import Event, Role
from replica_store.vault.keys import MachineKeys
from tests.fakes.scripted_host import HostHistory
from tests.proof.fuzzing.mutations import Strike, any_extreme, as_msgpack, extreme, flip, mutate_bytes, mutate_document
from tests.proof.fuzzing.sessions import SALT, WELCOME, HostWorld, StoreWorld
from tests.proof.fuzzing.target import Target, Trial

_HEADER = struct.Struct("<2sBBII")
_MEMBERS = tuple(Member(machine_id=f"{n:032x}", name=f"web{n}", address="10.0.0.7", port=20004) for n in range(3))
_GROUP = GroupOrder(id="c" * 32, name="shop", coordinator=f"{1:032x}", members=_MEMBERS, interval_s=60.0)
_KEYS = {"crash_interval": "60s", "retention": "7d", "bandwidth_limit": "08:00-18:00 20M; else 200M"}
CONFIGURE = Configure(
    configuration=HostConfiguration(generation=9, policy="gold", keys=_KEYS, groups=(_GROUP,)),
)


class Piece(NamedTuple):
    """One frame of a conversation before it gets its header."""

    type: int
    payload: bytes


Conversation = list[Piece]


def encode(conversation: Conversation) -> bytes:
    """The stream, headers and all."""
    return b"".join(header(piece.type, len(piece.payload), n) + piece.payload for n, piece in enumerate(conversation))


def header(code: int, length: int, sequence: int, magic: bytes = b"A1", zero: int = 0) -> bytes:
    """A frame's header with a right checksum, whatever it says."""
    fields = _HEADER.pack(magic, code, zero, length, sequence)
    return fields + struct.pack("<I", crc32c(fields))


def break_conversation(rng: random.Random, conversation: Conversation, strike: Strike) -> bytes:
    """The stream broken in one way: as bytes, in a header, in a message, or in the order of what is said."""
    chance = rng.random()
    if chance < 0.35:
        stream = encode(conversation)
        return mutate_bytes(rng, stream, stream, strike)
    at = rng.randrange(len(conversation))
    if chance < 0.55:
        return _break_header(rng, conversation, at, strike)
    changed = list(conversation)
    if chance < 0.85:
        piece = changed[at]
        if piece.type == FrameType.OBJECT_BYTES:
            changed[at] = Piece(piece.type, mutate_bytes(rng, piece.payload, changed[0].payload, strike))
        else:
            document = mutate_document(rng, msgspec.msgpack.decode(piece.payload), strike)
            changed[at] = Piece(piece.type, as_msgpack(rng, document))
    elif chance < 0.9:
        strike("field")
        changed[at] = Piece(rng.randrange(16), changed[at].payload)
    elif chance < 0.95:
        strike("remove")
        del changed[at]
    else:
        strike("repeat")
        changed.insert(rng.randrange(len(changed) + 1), changed[at])
    if any(len(piece.payload) > FRAME_PAYLOAD_BYTES_MAX for piece in changed):
        return encode(conversation)
    return encode(changed)


def _break_header(rng: random.Random, conversation: Conversation, at: int, strike: Strike) -> bytes:
    """One field of one header, its checksum right."""
    strike("field")
    before, piece = encode(conversation[:at]), conversation[at]
    field = rng.choice(("code", "length", "sequence", "magic", "zero"))
    changed = header(
        extreme(rng, 8) if field == "code" else piece.type,
        extreme(rng, 32) if field == "length" else len(piece.payload),
        extreme(rng, 32) if field == "sequence" else at,
        rng.randbytes(2) if field == "magic" else b"A1",
        extreme(rng, 8) if field == "zero" else 0,
    )
    return before + changed + piece.payload + encode(conversation[at + 1 :])


# ---- frames, and an end of a session ------------------------------------------------------------------------------


def feed_session(end: session.Session, pieces: list[bytes]) -> tuple[list[Event], str]:
    """What an end hears, and why it heard no more."""
    heard: list[Event] = []
    try:
        for piece in pieces:
            heard += end.receive(piece)
            if end.role == "store" and end.state is session.State.GREETED:
                end.send(WELCOME)
        end.receive_end()
    except ProtocolError as error:
        return heard, str(error)
    return heard, ""


def cut(rng: random.Random, stream: bytes, first: int, count: int = 12) -> list[bytes]:
    """In up to a dozen pieces. One ends behind the first frame: nobody says more before the other has answered it."""
    places = (rng.randrange(len(stream) + 1) for _ in range(rng.randint(0, count)))
    edges = sorted({0, len(stream), min(first, len(stream)), *places})
    return [stream[start:end] for start, end in pairwise(edges)]


def first_frame(conversation: Conversation) -> int:
    """Bytes of it."""
    return FRAME_HEADER_BYTES + len(conversation[0].payload)


def try_session(role: Role, conversation: Conversation, hello: Any, rng: random.Random, strike: Strike) -> None:
    stream = break_conversation(rng, conversation, strike)

    def end() -> session.Session:
        fresh = session.Session(role)
        if role == "host":
            fresh.send(hello)
        return fresh

    heard, why = feed_session(end(), cut(rng, stream, first_frame(conversation)))
    at_once, why_at_once = feed_session(end(), cut(rng, stream, first_frame(conversation), 0))
    if stream.startswith(encode(conversation[:1])):  # else the cut falls elsewhere than behind the greeting
        assert bool(why) == bool(why_at_once), f"in pieces: {why}; at once: {why_at_once}"
        same = at_once == heard or repr(at_once) == repr(heard)  # a NaN is not equal to itself
        assert why or same, "the same bytes in pieces say something else"


def try_frame_header(conversation: Conversation, rng: random.Random, strike: Strike) -> None:
    """A changed header without the checksum that belongs to it: exactly what was before it is heard."""
    strike("flip")
    at = rng.randrange(len(conversation))
    before, piece = conversation[:at], conversation[at]
    changed = flip(rng, header(piece.type, len(piece.payload), at))
    reader = frames.FrameReader()
    for number, known in enumerate(before):
        (got,) = reader.feed(header(known.type, len(known.payload), number) + known.payload)
        assert got == frames.Frame(FrameType(known.type), known.payload)
    try:
        taken = reader.feed(changed + piece.payload)
    except ProtocolError:
        return
    raise AssertionError(f"a header that does not match its checksum was believed: {taken}")


def try_frame_order(conversation: Conversation, rng: random.Random, strike: Strike) -> None:
    """Whole frames lost, said twice or in another order, with the headers they had: nothing is heard from there on."""
    frame = [header(each.type, len(each.payload), number) + each.payload for number, each in enumerate(conversation)]
    at = rng.randrange(len(frame) - 1)
    kind = rng.choice(("remove", "repeat", "splice"))
    strike(kind)
    changed = {
        "remove": [*frame[:at], *frame[at + 1 :]],
        "repeat": [*frame[: at + 1], *frame[at:]],
        "splice": [*frame[:at], frame[at + 1], frame[at], *frame[at + 2 :]],
    }
    reader, heard = frames.FrameReader(), 0
    try:
        for each in changed[kind]:
            heard += len(reader.feed(each))
    except ProtocolError:
        assert heard == at + (kind == "repeat"), "a frame in its place was not heard"
        return
    raise AssertionError("frames that were lost, repeated or moved were believed")


# ---- the two conversations ----------------------------------------------------------------------------------------


def host_says(history: HostHistory, records_each: int) -> Conversation:
    """HELLO, every record in objects sealed with `SALT`, what a host says besides, GOODBYE."""
    said = [_piece(history.hello(), FrameType.HELLO)]
    digest = bytes(32)
    for first in range(1, history.last_lsn + 1, records_each):
        built = history.build(first, min(first + records_each - 1, history.last_lsn), SALT, digest)
        digest = built.digest
        said.append(_piece(built.begin, FrameType.OBJECT_BEGIN))
        content = built.content
        half = len(content) // 2
        said += [Piece(FrameType.OBJECT_BYTES, content[:half]), Piece(FrameType.OBJECT_BYTES, content[half:])]
        beat = Heartbeat(appended_lsn=history.last_lsn, durable_lsn=first, durable_time_ns=history.records[0].time_ns)
        said.append(_piece(beat, FrameType.HEARTBEAT))
    ask = Compare(number=1, slot=0, disk_id="0" * 32, size_bytes=1 << 20, first=0, digests=bytes(32))
    wanted = Match(number=1, disks=(ChunksOfDisk(name="root", runs=((0, 2),), digests=bytes(32)),))
    said.append(_piece(wanted, FrameType.MATCH))
    said.append(_piece(HandedOver(id="d" * 32, outcome="failed", error="no"), FrameType.HANDED_OVER))
    said.append(_piece(Promoted(id="d" * 32, outcome="ready", lsn=2), FrameType.PROMOTED))
    fetch = Fetch(number=1, slot=0, disk_id="0" * 32, size_bytes=1 << 20, lsn=2, offset=0)
    said.append(_piece(fetch, FrameType.FETCH))
    said += [_piece(ask, FrameType.COMPARE), _piece(msgspec.structs.replace(ask, lsn=2), FrameType.COMPARE)]
    return [*said, _piece(Goodbye(reason="done"), FrameType.GOODBYE)]


def store_says(acknowledged: list[Acknowledge]) -> Conversation:
    """WELCOME, what it acknowledges, what a store says besides."""
    said = [_piece(WELCOME, FrameType.WELCOME), _piece(CONFIGURE, FrameType.CONFIGURE)]
    for acknowledge in acknowledged:
        said += [_piece(acknowledge, FrameType.ACKNOWLEDGE), _piece(Heartbeat(), FrameType.HEARTBEAT)]
    said.append(_piece(Compared(number=1, lsn=3, differs=b"\x02", leaves=bytes(range(32)) * 16), FrameType.COMPARED))
    said.append(_piece(Matched(number=1, equal=(b"\x02",)), FrameType.MATCHED))
    said.append(_piece(Handover(id="d" * 32, wanted="take-back"), FrameType.HANDOVER))
    said.append(_piece(Promote(id="d" * 32, wanted="write", lsn=2, boot=b"{}"), FrameType.PROMOTE))
    given = Fetched(number=2, next=8192, extents=((0, 512),), zeros=((4096, 4096),), content=bytes(512))
    said.append(_piece(given, FrameType.FETCHED))
    return [*said, _piece(Refused(code="busy", text="later"), FrameType.REFUSED)]


def _piece(message: Any, frame_type: FrameType) -> Piece:
    return Piece(frame_type, encode_message(message))


def history_of(machine_id: str, keys: Any, writes: int) -> HostHistory:
    """A disk, writes of which some are long, a point."""
    history = HostHistory(machine_id, keys, seed=5)
    history.disk(0)
    for number in range(writes):
        history.write(1 + number % 3)
    history.marker("noon")
    return history


@contextmanager
def open_session(role: Role) -> Iterator[Trial]:
    history = history_of("0" * 31 + "1", MachineKeys(bytes(32), bytes(range(32))), 6)
    said = {
        "store": host_says(history, 3),
        "host": store_says([Acknowledge(lsn=lsn, digest=bytes([lsn] * 32).hex()) for lsn in range(1, 6)]),
    }[role]
    whole, why = feed_session(_fresh(role, history), cut(random.Random(1), encode(said), first_frame(said)))
    assert not why and len(whole) >= 5, f"the conversation itself is a good one: {why}"

    def trial(rng: random.Random, strike: Strike) -> None:
        chance = rng.random()
        if chance < 0.25:
            try_frame_header(said, rng, strike)
        elif chance < 0.35:
            try_frame_order(said, rng, strike)
        else:
            try_session(role, said, history.hello(), rng, strike)

    yield trial


def _fresh(role: Role, history: HostHistory) -> session.Session:
    end = session.Session(role)
    if role == "host":
        end.send(history.hello())
    return end


# ---- whole sessions -----------------------------------------------------------------------------------------------


@contextmanager
def open_hostile_host(scratch: Path) -> Iterator[Trial]:
    with StoreWorld.open(scratch) as world:
        history = history_of(world.machine_id, world.keys, 6)
        said = host_says(history, 3)
        honest = set(_objects(said))
        world.serve(cut(random.Random(1), encode(said), first_frame(said)))
        assert set(world.stored()) == honest, "an honest host is served"

        def trial(rng: random.Random, strike: Strike) -> None:
            is_number = rng.random() < 0.2
            stream = encode(_with_odd_number(rng, said, strike)) if is_number else break_conversation(rng, said, strike)
            heard = world.serve(cut(rng, stream, first_frame(said)))
            stored = set(world.stored())
            assert stored <= honest, "something was stored that was not sent so"
            acknowledged = [event for event in heard if isinstance(event, Acknowledge)]
            for event in acknowledged:
                assert any(content[-32:].hex() == event.digest for content in stored), "I3: acknowledged, not stored"
            world.links_can_be_saved()

        yield trial


def _with_odd_number(rng: random.Random, conversation: Conversation, strike: Strike) -> Conversation:
    """What a host says of its positions goes to the catalog: one of these numbers is any number."""
    strike("value")
    changed = list(conversation)
    at = rng.choice([n for n, piece in enumerate(changed) if piece.type in (FrameType.HELLO, FrameType.HEARTBEAT)])
    document = msgspec.msgpack.decode(changed[at].payload)
    field = rng.choice([name for name in document if name.endswith(("_lsn", "_ns"))])
    payload = as_msgpack(rng, {**document, field: rng.choice((any_extreme(rng), -1, 1 << 63, (1 << 64) - 1))})
    changed[at] = Piece(changed[at].type, payload)
    return changed


def _objects(conversation: Conversation) -> list[bytes]:
    halves = [piece.payload for piece in conversation if piece.type == FrameType.OBJECT_BYTES]
    return [first + second for first, second in zip(halves[::2], halves[1::2], strict=True)]


@contextmanager
def open_hostile_store(_scratch: Path) -> Iterator[Trial]:
    world = HostWorld()
    first = encode(store_says([])[:1])
    begun = world.ship([first])
    assert begun.objects, "an honest store is shipped to"
    assert world.ship([encode(store_says([])[:2])]).followed == [CONFIGURE.configuration], "and followed"
    said = store_says([Acknowledge(lsn=lsn, digest=digest) for lsn, digest in begun.objects])
    done = world.ship([encode(said)[: len(first)], encode(said)[len(first) :]])
    assert done.acknowledged_lsn == begun.objects[-1][0], "an honest store is believed"
    assert done.differing == list(range(64, 80)), "and heard"

    def trial(rng: random.Random, strike: Strike) -> None:
        stream = break_conversation(rng, said, strike)
        shipped = world.ship(cut(rng, stream, len(first), 2))
        assert shipped.acknowledged_lsn <= world.durable_lsn, "I3: acknowledged what is not durable here"
        assert set(shipped.differing) <= set(range(80)), "chunks that the disk does not have"
        for configuration in shipped.followed:
            assert decode_configuration(encode_configuration(configuration)) == configuration, "kept as it was told"

    yield trial


def _opened(role: Role) -> Callable[[Path], Any]:
    return lambda _scratch: open_session(role)


TARGETS = (
    Target("frames to the store", 20, _opened("store")),
    Target("frames to the host", 20, _opened("host")),
    Target("hostile host", 4, open_hostile_host),
    Target("hostile store", 3, open_hostile_store),
)
