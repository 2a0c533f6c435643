"""Host and store ends of the protocol that have greeted, and random exchanges between them."""

from __future__ import annotations

import random

from asrfs.protocol.messages import PROTOCOL_VERSION, Compare, Heartbeat, Hello, ObjectBegin, Welcome
from asrfs.protocol.session import Event, ObjectReceived
from tests.fakes.wire import SessionPair, cut_at

HELLO = Hello(
    protocol=PROTOCOL_VERSION,
    machine_id="ab" * 16,
    machine_name="web1",
    epoch=1,
    appended_lsn=9,
    durable_lsn=8,
    acknowledged_lsn=7,
    last_digest="cd" * 32,
)
WELCOME = Welcome(
    protocol=PROTOCOL_VERSION,
    store_id="ef" * 16,
    session_salt=bytes(range(32)),
    epoch=1,
    acknowledged_lsn=7,
    acknowledged_time_ns=9,
    last_digest="cd" * 32,
)


def greeted() -> SessionPair:
    pair = SessionPair()
    pair.say("host", HELLO)
    assert pair.carry("host") == [HELLO]
    pair.say("store", WELCOME)
    assert pair.carry("store") == [WELCOME]
    return pair


def begin_of(content: bytes, first_lsn: int = 8) -> ObjectBegin:
    return ObjectBegin(first_lsn=first_lsn, last_lsn=first_lsn + 2, length=len(content))


def random_exchange(rng: random.Random, objects: int, cuts: int) -> int:
    """Objects, heartbeats and comparisons, cut anywhere: what one end says, in order, is what the other hears.

    Returns how much.
    """
    pair = greeted()
    said: list[Event] = []
    lsn = 8
    for _ in range(objects):
        length = rng.randint(257, 9000)
        content = rng.randbytes(length)
        begin = ObjectBegin(first_lsn=lsn, last_lsn=lsn + 1, length=length)
        edges = sorted(rng.sample(range(1, length), 3))
        pair.say_object(begin, [content[i:j] for i, j in zip([0, *edges], [*edges, length], strict=True)])
        said.append(ObjectReceived(begin, content))
        if rng.random() < 0.5:
            beat = Heartbeat(appended_lsn=rng.randrange(1 << 60), durable_lsn=lsn)
            pair.say("host", beat)
            said.append(beat)
        if rng.random() < 0.3:
            nodes = rng.randint(1, 32)
            digests = rng.randbytes(32 * nodes)
            first = rng.randrange(1 << 40)
            size_bytes = (first + nodes) * (4 << 20)
            ask = Compare(number=lsn, slot=1, disk_id="ab" * 16, size_bytes=size_bytes, first=first, digests=digests)
            pair.say("host", ask)
            said.append(ask)
        lsn += 2
    total = len(pair.sent["host"])
    assert pair.carry("host", cut_at(*(rng.randrange(total + 1) for _ in range(cuts)))) == said
    return len(said)
