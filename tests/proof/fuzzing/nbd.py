"""NBD: a client's half of the wire against both halves of the server's protocol.

A stream is heard the same at once and in pieces. What was not agreed on before TLS is not there after it; what is
given out to be carried out lies inside the export, and a read-only one is never told to change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from asrfs.errors import AsrfsError
from replica_store.nbd.negotiation import Negotiation, Step
from replica_store.nbd.offer import Offer
from replica_store.nbd.transmission import Extent, Piece, Request, Transmission
from replica_store.nbd.wire import REQUEST, REQUEST_MAGIC, Command, Fact, Option
from tests.fakes.nbd_client import FLAGS, Answers, contexts, go, option, request, string, write
from tests.proof.fuzzing.mutations import Strike, extreme, mutate_bytes
from tests.proof.fuzzing.target import Target, Trial

_OFFERS = {
    "root": Offer("root", 1 << 20, read_only=True, description="a"),
    "live": Offer("live", 4096, read_only=False),
}
_OPTIONS = (
    *(option(Option.LIST), option(Option.STRUCTURED_REPLY), option(99, b"x"), go("root", number=Option.INFO)),
    *(contexts("root", "base:allocation"), contexts("live", "base:", number=Option.LIST_META_CONTEXT)),
    option(Option.GO, string("nowhere") + b"\0\0"),
)
_LENGTH_MAX = 1 << 16
"""Of what is read here: how much may be is known."""


def _pieces(rng: random.Random, stream: bytes) -> list[bytes]:
    edges = sorted({0, len(stream), *(rng.randrange(len(stream) + 1) for _ in range(rng.randint(0, 9)))})
    return [stream[start:end] for start, end in pairwise(edges)]


def try_negotiation(rng: random.Random, strike: Strike) -> None:
    said = [FLAGS, *rng.choices(_OPTIONS, k=rng.randint(0, 5)), go(rng.choice(("root", "live", "")), Fact.BLOCK_SIZE)]
    if rng.random() < 0.3:
        said.insert(1, option(Option.STARTTLS))
    stream = mutate_bytes(rng, b"".join(said), b"".join(said), strike)
    tls = rng.random() < 0.3

    def hear(pieces: list[bytes]) -> tuple[str, bytes, object, bool]:
        negotiation, answer = Negotiation(_OFFERS, tls=tls), b""
        try:
            for piece in pieces:
                if negotiation.step is not Step.HAGGLING:
                    break
                answer += negotiation.receive(piece)
        except AsrfsError:
            return "refused", b"", None, False
        assert not tls or negotiation.chosen is None, "an export was chosen without TLS"
        return negotiation.step.value, answer, negotiation.chosen, negotiation.allocation

    whole = hear([stream])
    if whole[0] in ("haggling", "chosen"):  # where it ended before, what follows at once is not heard in pieces
        assert hear(_pieces(rng, stream)) == whole, "the same bytes in pieces say something else"


def try_transmission(rng: random.Random, strike: Strike) -> None:
    offer = rng.choice(tuple(_OFFERS.values()))
    structured = rng.random() < 0.7
    said = [
        request(Command.READ, 512, 1024, cookie=1),
        write(100, b"payload" * 20, cookie=2, flags=1),
        request(Command.BLOCK_STATUS, 0, 4096, cookie=3, flags=8),
        request(Command.TRIM, 0, 512, cookie=4),
        request(Command.FLUSH, cookie=5),
    ]
    rng.shuffle(said)
    if rng.random() < 0.4:
        strike("field")
        at = rng.randrange(len(said))
        fields = [extreme(rng, 16), rng.randrange(12), 9, extreme(rng, 64), extreme(rng, 32)]
        said[at] = REQUEST.pack(REQUEST_MAGIC, *fields)
        stream = b"".join(said)
    else:
        stream = mutate_bytes(rng, b"".join(said), b"".join(said), strike)
    heard: list[list[Request]] = []
    for pieces in ([stream], _pieces(rng, stream)):
        transmission = Transmission(offer, structured=structured, allocation=structured)
        requests: list[Request] = []
        try:
            for piece in pieces:
                requests += transmission.receive(piece)
            transmission.receive_end()
        except AsrfsError:
            pass
        heard.append(requests)
    for each in heard[0]:
        _check(transmission, offer, each)
    assert heard[0] == heard[1][: len(heard[0])], "the same bytes in pieces say something else"


def _check(transmission: Transmission, offer: Offer, each: Request) -> None:
    """What may be carried out lies inside, and every answer is one that a client can read."""
    answers = Answers()
    if each.error:
        answers.feed(b"".join(transmission.error_reply(each, each.error, "why")))
        assert answers.done[each.cookie].error == each.error
        return
    assert each.command is Command.FLUSH or each.offset + each.length <= offer.size_bytes
    assert not offer.read_only or each.command in (Command.READ, Command.FLUSH, Command.BLOCK_STATUS)
    if each.command is Command.READ and each.length <= _LENGTH_MAX:
        answers.reads[each.cookie] = each.offset, each.length
        pieces = [Piece(each.offset, each.length, b"x" * each.length)] if each.length else []
        answers.feed(b"".join(transmission.read_reply(each, pieces)))
        assert answers.done[each.cookie].content(each.offset, each.length) == b"x" * each.length
    elif each.command is Command.BLOCK_STATUS:
        extents = [Extent(max(1, each.length // 2), is_hole=True), Extent(each.length, is_hole=False)]
        answers.feed(b"".join(transmission.status_reply(each, extents)))
        assert 0 < sum(length for length, _ in answers.done[each.cookie].extents) <= each.length
    assert answers.is_empty()


def _target(name: str, trial: Trial, weight: int) -> Target:
    @contextmanager
    def open_nothing(_scratch: Path) -> Iterator[Trial]:
        yield trial

    return Target(name, weight, open_nothing)


TARGETS = (_target("nbd negotiation", try_negotiation, 12), _target("nbd transmission", try_transmission, 12))
