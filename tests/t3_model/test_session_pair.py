"""Host and store ends of the protocol as a pair: whatever way bytes are cut, both hear exactly what was said."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.format.log_object import OBJECT_BYTES_MAX
from asrfs.model.configuration import HostConfiguration
from asrfs.protocol.frames import FRAME_HEADER_BYTES, ProtocolError, encode_frame_header
from asrfs.protocol.messages import (
    TYPE_OF,
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
    Message,
    ObjectBegin,
    Promote,
    Promoted,
    Refused,
    encode_message,
)
from asrfs.protocol.session import ObjectReceived, Role, Session, State
from tests.fakes.session_exchange import HELLO, WELCOME, begin_of, greeted, random_exchange
from tests.fakes.wire import Cut, SessionPair, all_at_once, byte_by_byte, cut_at

REFUSED = Refused(code="fenced", text="no")
GOODBYE = Goodbye(reason="done")
COMPARE = Compare(number=3, slot=0, disk_id="ab" * 16, size_bytes=5 << 20, first=1, digests=bytes(32))
MATCH = Match(number=3, disks=(ChunksOfDisk(name="root", runs=((2, 3),), digests=bytes(48)),))
MATCHED = Matched(number=3, equal=(b"\x05",))
HANDOVER = Handover(id="ab" * 16, wanted="hand-over", seconds_max=60)
HANDED_OVER = HandedOver(id="ab" * 16, outcome="handed-over", lsn=10, chunks_compared=4)
PROMOTE = Promote(id="ab" * 16, wanted="write", lsn=3, left=(2,), boot=b"{}")
PROMOTED = Promoted(id="ab" * 16, outcome="ready", lsn=10)
FETCH = Fetch(number=3, slot=0, disk_id="ab" * 16, size_bytes=5 << 20, lsn=3, offset=4096)
FETCHED = Fetched(number=3, next=16384, extents=((4096, 512),), zeros=((8192, 8192),), content=bytes(512))
COMPARED = Compared(number=3, lsn=10, differs=b"\x01", leaves=bytes(16 * 32))
CONFIGURE = Configure(configuration=HostConfiguration(generation=3, policy="gold", keys={"crash_interval": "1s"}))


@pytest.mark.parametrize("cut", [all_at_once, byte_by_byte, cut_at(1, 17, 300)])
def test_a_whole_session_however_it_is_cut(cut: Cut) -> None:
    pair = SessionPair()
    pair.say("host", HELLO)
    assert pair.carry("host", cut) == [HELLO]
    pair.say("store", WELCOME)
    assert pair.carry("store", cut) == [WELCOME]
    content = random.Random(1).randbytes(5000)
    pair.say_object(begin_of(content), [content[:256], content[256:300], content[300:]])
    pair.say("host", Heartbeat(appended_lsn=10, durable_lsn=10, durable_time_ns=1))
    pair.say("host", COMPARE)
    pair.say("host", MATCH)
    pair.say("host", FETCH)
    assert pair.carry("host", cut) == [
        ObjectReceived(begin_of(content), content),
        Heartbeat(appended_lsn=10, durable_lsn=10, durable_time_ns=1),
        COMPARE,
        MATCH,
        FETCH,
    ]
    pair.say("store", Acknowledge(lsn=10, digest="12" * 32))
    pair.say("store", Heartbeat())
    pair.say("store", CONFIGURE)
    pair.say("store", COMPARED)
    pair.say("store", MATCHED)
    pair.say("store", HANDOVER)
    pair.say("store", PROMOTE)
    pair.say("store", FETCHED)
    assert pair.carry("store", cut) == [
        Acknowledge(lsn=10, digest="12" * 32),
        Heartbeat(),
        CONFIGURE,
        COMPARED,
        MATCHED,
        HANDOVER,
        PROMOTE,
        FETCHED,
    ]
    pair.say("host", HANDED_OVER)
    pair.say("host", PROMOTED)
    pair.say("host", GOODBYE)
    assert pair.carry("host", cut) == [HANDED_OVER, PROMOTED, GOODBYE]
    assert {end.state for end in pair.ends.values()} == {State.CLOSED}


@given(seed=st.integers(0, 1 << 32), objects=st.integers(0, 4), cuts=st.integers(0, 40))
@settings(max_examples=150)
def test_random_exchanges_at_random_cuts(seed: int, objects: int, cuts: int) -> None:
    random_exchange(random.Random(seed), objects, cuts)


def test_what_the_store_says_within_an_object_does_not_end_it() -> None:
    pair = greeted()
    content = bytes(3 << 20)
    buffers = pair.ends["host"].send_object(begin_of(content), [content])
    for _ in range(4):
        pair.sent["host"] += next(buffers)
    pair.carry("host")
    pair.say("store", Acknowledge(lsn=7, digest=""))
    pair.say("store", CONFIGURE)
    pair.say("store", COMPARED)
    pair.say("store", HANDOVER)
    pair.say("store", PROMOTE)
    pair.say("store", FETCHED)
    said = [Acknowledge(lsn=7, digest=""), CONFIGURE, COMPARED, HANDOVER, PROMOTE, FETCHED]
    assert pair.carry("store") == said
    assert pair.ends["store"].state is State.IN_OBJECT
    for buffer in buffers:
        pair.sent["host"] += buffer
    assert pair.carry("host") == [ObjectReceived(begin_of(content), content)]


def test_a_refusal_within_an_object_ends_both_sides() -> None:
    pair = greeted()
    content = bytes(3 << 20)
    buffers = pair.ends["host"].send_object(begin_of(content), [content])
    for _ in range(3):  # OBJECT_BEGIN, and one frame of OBJECT_BYTES
        pair.sent["host"] += next(buffers)
    pair.carry("host")
    pair.say("store", REFUSED)
    assert pair.carry("store") == [REFUSED]
    assert list(buffers) == []
    assert {end.state for end in pair.ends.values()} == {State.CLOSED}


ILLEGAL: list[tuple[str, Callable[[], tuple[SessionPair, Role]], Message]] = [
    ("welcome before hello", lambda: (SessionPair(), "host"), WELCOME),
    ("heartbeat before hello", lambda: (SessionPair(), "store"), Heartbeat()),
    ("hello twice", lambda: (greeted(), "store"), HELLO),
    ("the store greets", lambda: (SessionPair(), "host"), HELLO),
    ("the host acknowledges", lambda: (greeted(), "store"), Acknowledge(lsn=1, digest="")),
    ("the host refuses", lambda: (greeted(), "store"), REFUSED),
    ("configured before hello", lambda: (SessionPair(), "host"), CONFIGURE),
    ("the host configures", lambda: (greeted(), "store"), CONFIGURE),
    ("compared before hello", lambda: (SessionPair(), "host"), COMPARED),
    ("the host asks before it is welcome", lambda: (SessionPair(), "store"), COMPARE),
    ("the store asks", lambda: (greeted(), "host"), COMPARE),
    ("the host answers", lambda: (greeted(), "store"), COMPARED),
    ("matching before it is welcome", lambda: (SessionPair(), "store"), MATCH),
    ("the store asks for a match", lambda: (greeted(), "host"), MATCH),
    ("the host matches", lambda: (greeted(), "store"), MATCHED),
    ("the host asks for a handover", lambda: (greeted(), "store"), HANDOVER),
    ("a handover before hello", lambda: (SessionPair(), "host"), HANDOVER),
    ("the store hands over", lambda: (greeted(), "host"), HANDED_OVER),
    ("handed over before it is welcome", lambda: (SessionPair(), "store"), HANDED_OVER),
    ("the host asks for a promotion", lambda: (greeted(), "store"), PROMOTE),
    ("a promotion before hello", lambda: (SessionPair(), "host"), PROMOTE),
    ("the store promotes", lambda: (greeted(), "host"), PROMOTED),
    ("promoted before it is welcome", lambda: (SessionPair(), "store"), PROMOTED),
    ("the store fetches", lambda: (greeted(), "host"), FETCH),
    ("fetching before it is welcome", lambda: (SessionPair(), "store"), FETCH),
    ("the host gives back", lambda: (greeted(), "store"), FETCHED),
    (
        "chunks without digests",
        lambda: (greeted(), "store"),
        Match(number=1, disks=(ChunksOfDisk(name="root", runs=((0, 4),), digests=bytes(48)),)),
    ),
    (
        "no chunks",
        lambda: (greeted(), "store"),
        Match(number=1, disks=(ChunksOfDisk(name="root", runs=((0, 3), (7, 0)), digests=bytes(48)),)),
    ),
    (
        "too many chunks",
        lambda: (greeted(), "store"),
        Match(number=1, disks=(ChunksOfDisk(name="root", runs=((0, 5000),), digests=bytes(80000)),) * 2),
    ),
    ("a region of no disk", lambda: (greeted(), "store"), msgspec.structs.replace(COMPARE, first=2)),
    ("the store says goodbye", lambda: (greeted(), "host"), GOODBYE),
]


@pytest.mark.parametrize(("what", "make", "message"), ILLEGAL, ids=[row[0] for row in ILLEGAL])
def test_what_the_table_does_not_allow_is_refused(
    what: str, make: Callable[[], tuple[SessionPair, Role]], message: Message
) -> None:
    pair, receiver = make()
    liar = pair.ends["store" if receiver == "host" else "host"]
    payload = encode_message(message)
    frame = encode_frame_header(TYPE_OF[type(message)], len(payload), liar._sequence) + payload
    with pytest.raises(ProtocolError):
        pair.inject(receiver, frame)
    assert pair.ends[receiver].state is State.CLOSED


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=150)
def test_a_flipped_bit_is_heard_as_an_error_or_changes_a_message_but_never_its_size(seed: int) -> None:
    """Below TLS nothing flips; above, headers are checked, so no flip makes us wait for bytes that never come."""
    rng = random.Random(seed)
    pair = greeted()
    content = rng.randbytes(1000)
    pair.say_object(begin_of(content), [content])
    sent = bytearray(pair.sent["host"])
    at = rng.randrange(len(sent))
    sent[at] ^= 1 << rng.randrange(8)
    try:
        heard = pair.inject("store", sent)
    except ProtocolError:
        assert pair.ends["store"].state is State.CLOSED
        return
    assert at >= FRAME_HEADER_BYTES, "a flip in a frame's header is always noticed"
    assert len(heard) == (1 if pair.ends["store"].state is State.STREAMING else 0)


@pytest.mark.parametrize("drop", ["repeat", "skip"])
def test_frames_repeated_or_left_out_are_noticed(drop: str) -> None:
    pair = greeted()
    pair.say("host", Heartbeat(appended_lsn=1))
    first = bytes(pair.sent["host"])
    pair.sent["host"].clear()
    pair.say("host", Heartbeat(appended_lsn=2))
    second = bytes(pair.sent["host"])
    with pytest.raises(ProtocolError, match="came where"):
        pair.inject("store", first + first if drop == "repeat" else second)


@pytest.mark.parametrize("end", [1, 15, 16, 20, 60])
def test_the_stream_may_not_end_within_a_frame_or_object(end: int) -> None:
    pair = greeted()
    content = bytes(1000)
    pair.say_object(begin_of(content), [content])
    pair.inject("store", bytes(pair.sent["host"][:end]))
    with pytest.raises(ProtocolError):
        pair.ends["store"].receive_end()


def test_the_stream_may_end_between_frames() -> None:
    pair = greeted()
    pair.ends["store"].receive_end()
    assert pair.ends["store"].state is State.CLOSED


@pytest.mark.parametrize(
    "begin",
    [
        ObjectBegin(first_lsn=1, last_lsn=2, length=OBJECT_BYTES_MAX + 1),
        ObjectBegin(first_lsn=1, last_lsn=2, length=256),
        ObjectBegin(first_lsn=0, last_lsn=2, length=1000),
        ObjectBegin(first_lsn=3, last_lsn=2, length=1000),
    ],
)
def test_an_object_is_announced_within_bounds(begin: ObjectBegin) -> None:
    pair = greeted()
    pair.say("host", begin)
    with pytest.raises(ProtocolError):
        pair.carry("host")


@given(junk=st.binary(min_size=1, max_size=200))
@settings(max_examples=300)
def test_junk_is_a_protocol_error_or_waits_for_more(junk: bytes) -> None:
    store = Session("store")
    try:
        assert store.receive(junk) == []
    except ProtocolError:
        assert store.state is State.CLOSED
