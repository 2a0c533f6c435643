"""The NBD protocol without I/O: what is said to each option and request, however the bytes come, and what ends it."""

from __future__ import annotations

import struct

import pytest

from replica_store.nbd.negotiation import Negotiation, Step
from replica_store.nbd.offer import Offer
from replica_store.nbd.transmission import Extent, Piece, Request, Transmission
from replica_store.nbd.wire import (
    OPTION,
    OPTION_BYTES_MAX,
    OPTION_MAGIC,
    OPTIONS_MAX,
    REQUEST_BYTES_MAX,
    Command,
    CommandFlag,
    ErrorNumber,
    Fact,
    Flag,
    NbdError,
    Option,
    Reply,
)
from tests.fakes.nbd_client import FLAGS, Answers, contexts, go, option, option_answers, request, string, write
from tests.fakes.wire import all_at_once, byte_by_byte

ROOT = Offer("root", 1 << 20, read_only=True, description="web1 at LSN 9")
LIVE = Offer("live", 4096, read_only=False)
OFFERS = {"root": ROOT, "live": LIVE}


def haggle(*said: bytes, tls: bool = False, offers: dict[str, Offer] = OFFERS) -> tuple[Negotiation, list[int]]:
    """After flags and these options: the state, and the kinds of the answers."""
    negotiation = Negotiation(offers, tls=tls)
    answers = option_answers(negotiation.receive(FLAGS + b"".join(said)))
    return negotiation, [answer.kind for answer in answers]


# ---- negotiation --------------------------------------------------------------------------------------------------


def test_greeting_is_fixed_newstyle() -> None:
    assert Negotiation(OFFERS).greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("cut", [all_at_once, byte_by_byte])
def test_a_whole_handshake_however_the_bytes_come(cut: object) -> None:
    negotiation = Negotiation(OFFERS)
    said = b"".join(
        [
            FLAGS,
            option(Option.STRUCTURED_REPLY),
            option(Option.LIST),
            contexts("root", "base:allocation"),
            go("root", Fact.NAME, Fact.DESCRIPTION, Fact.BLOCK_SIZE),
        ]
    )
    heard = b""
    assert callable(cut)
    for piece in cut(said):
        heard += negotiation.receive(piece)
    answers = option_answers(heard)
    assert [answer.kind for answer in answers] == [
        *(Reply.ACK, Reply.SERVER, Reply.SERVER, Reply.ACK, Reply.META_CONTEXT, Reply.ACK),
        *(Reply.INFO, Reply.INFO, Reply.INFO, Reply.INFO, Reply.ACK),
    ]
    assert [answers[1].content, answers[2].content] == [string("live"), string("root")]
    flags = Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_FLUSH | Flag.SEND_DF | Flag.CAN_MULTI_CONN
    assert answers[6].content == struct.pack(">HQH", Fact.EXPORT, 1 << 20, flags)
    assert answers[7].content == struct.pack(">H", Fact.NAME) + b"root"
    assert answers[8].content == struct.pack(">H", Fact.DESCRIPTION) + b"web1 at LSN 9"
    assert answers[9].content == struct.pack(">HIII", Fact.BLOCK_SIZE, 1, 4096, 32 << 20)
    assert negotiation.step is Step.CHOSEN and negotiation.chosen == ROOT
    assert negotiation.structured and negotiation.allocation and not negotiation.rest


def test_requests_that_follow_at_once_are_not_lost() -> None:
    negotiation, _ = haggle(go("live"), request(Command.READ, 0, 512))
    assert negotiation.rest == request(Command.READ, 0, 512)
    assert not negotiation.structured and not negotiation.allocation


def test_info_tells_without_choosing_and_refuses_what_is_not_there() -> None:
    negotiation, kinds = haggle(go("live", number=Option.INFO), go("nothing"), go("nothing", number=Option.INFO))
    assert kinds == [Reply.INFO, Reply.ACK, Reply.UNKNOWN, Reply.UNKNOWN]
    assert negotiation.step is Step.HAGGLING


def test_the_only_export_needs_no_name_and_of_several_none_is_meant() -> None:
    assert haggle(go(""), offers={"root": ROOT})[0].chosen == ROOT
    assert haggle(go(""))[1] == [Reply.UNKNOWN]


def test_the_old_way_to_choose() -> None:
    negotiation = Negotiation(OFFERS)
    flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.CAN_MULTI_CONN
    flags |= Flag.SEND_FUA | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES
    assert negotiation.receive(FLAGS + option(Option.EXPORT_NAME, b"live")) == struct.pack(">QH", 4096, flags)
    assert negotiation.chosen == LIVE
    with_zeros = Negotiation(OFFERS).receive(struct.pack(">I", 1) + option(Option.EXPORT_NAME, b"live"))
    assert len(with_zeros) == 10 + 124
    with pytest.raises(NbdError, match="not here"):
        haggle(option(Option.EXPORT_NAME, b"nothing"))


def test_a_context_holds_for_the_export_it_was_set_for() -> None:
    asked = (option(Option.STRUCTURED_REPLY), contexts("root", "base:allocation"))
    assert not haggle(*asked, go("live"))[0].allocation
    assert not haggle(*asked, contexts("root", "qemu:dirty-bitmap:x"), go("root"))[0].allocation
    listing = Option.LIST_META_CONTEXT
    for queries, kinds in (
        ((), [Reply.META_CONTEXT, Reply.ACK]),
        (("base:",), [Reply.META_CONTEXT, Reply.ACK]),
        (("other:",), [Reply.ACK]),
    ):
        assert haggle(asked[0], contexts("root", *queries, number=listing))[1] == [Reply.ACK, *kinds]
    assert haggle(contexts("root", "base:allocation"))[1] == [Reply.INVALID], "structured replies come first"
    assert haggle(asked[0], contexts("nothing", "base:allocation"))[1] == [Reply.ACK, Reply.UNKNOWN]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (option(99, b"what"), Reply.UNSUPPORTED),
        (option(Option.LIST, b"x"), Reply.INVALID),
        (option(Option.STRUCTURED_REPLY, b"x"), Reply.INVALID),
        (option(Option.GO, b""), Reply.INVALID),
        (option(Option.GO, string("root")), Reply.INVALID),
        (option(Option.GO, string("root") + b"\0\5\0\0"), Reply.INVALID),
        (option(Option.GO, string("root") + b"\0\0" + b"more"), Reply.INVALID),
        (option(Option.GO, string("r" * 5000) + b"\0\0"), Reply.INVALID),
        (option(Option.GO, string(b"\xff") + b"\0\0"), Reply.INVALID),
        (option(Option.GO, b"\xff\xff\xff\xff"), Reply.INVALID),
        (option(Option.STARTTLS), Reply.POLICY),
    ],
)
def test_what_is_wrong_in_an_option_is_said_and_haggling_goes_on(said: bytes, kind: Reply) -> None:
    negotiation, kinds = haggle(said, go("root"))
    assert kinds == [kind, Reply.INFO, Reply.ACK]
    assert negotiation.chosen == ROOT


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n",
        struct.pack(">I", 0),
        struct.pack(">I", 7),
        FLAGS + b"NBDMAGIC" + bytes(8),
        FLAGS + OPTION.pack(OPTION_MAGIC, Option.GO, OPTION_BYTES_MAX + 1),
        FLAGS + OPTION.pack(OPTION_MAGIC, 77, (1 << 32) - 1),
        FLAGS + option(Option.LIST) * (OPTIONS_MAX + 1),
    ],
)
def test_who_does_not_speak_nbd_is_cut_off(said: bytes) -> None:
    with pytest.raises(NbdError):
        Negotiation(OFFERS).receive(said)


def test_abort_ends() -> None:
    negotiation, kinds = haggle(option(Option.ABORT), option(Option.LIST))
    assert kinds == [Reply.ACK] and negotiation.step is Step.ENDED


def test_nothing_is_told_before_tls_and_nothing_said_before_it_holds() -> None:
    negotiation, kinds = haggle(
        *(option(Option.LIST), go("root"), go("root", number=Option.INFO), contexts("root"), option(99)),
        option(Option.STARTTLS),
        tls=True,
    )
    assert kinds == [Reply.TLS_REQUIRED] * 5 + [Reply.ACK]
    assert negotiation.step is Step.START_TLS
    negotiation.secured()
    answers = option_answers(negotiation.receive(contexts("root", "base:allocation") + option(Option.STARTTLS)))
    assert [answer.kind for answer in answers] == [Reply.INVALID, Reply.INVALID], "not structured, and TLS has begun"
    negotiation.receive(go("root"))
    assert negotiation.chosen == ROOT and not negotiation.allocation


def test_words_smuggled_in_before_tls_end_the_connection() -> None:
    with pytest.raises(NbdError, match="in the clear"):
        haggle(option(Option.STARTTLS), option(Option.ABORT), tls=True)
    with pytest.raises(NbdError, match="without TLS"):
        haggle(option(Option.EXPORT_NAME, b"root"), tls=True)


# ---- transmission -------------------------------------------------------------------------------------------------


def begin(offer: Offer = LIVE, *, structured: bool = True, allocation: bool = True) -> Transmission:
    return Transmission(offer, structured=structured, allocation=allocation)


def only(transmission: Transmission, said: bytes) -> Request:
    (got,) = transmission.receive(said)
    return got


def heard(transmission: Transmission, said: list[bytes | bytearray | memoryview]) -> Answers:
    answers = Answers()
    answers.feed(b"".join(said))
    assert answers.is_empty()
    return answers


@pytest.mark.parametrize("cut", [all_at_once, byte_by_byte])
def test_requests_however_the_bytes_come(cut: object) -> None:
    said = write(512, b"x" * 700) + request(Command.READ, 0, 4096, cookie=9) + request(Command.DISC) + b"junk"
    transmission = begin()
    got: list[Request] = []
    assert callable(cut)
    for piece in cut(said):
        got += transmission.receive(piece)
    assert [(r.command, r.cookie, r.offset, r.length, bytes(r.payload), r.error) for r in got] == [
        (Command.WRITE, 7, 512, 700, b"x" * 700, 0),
        (Command.READ, 9, 0, 4096, b"", 0),
    ]
    assert transmission.is_over
    transmission.receive_end()


@pytest.mark.parametrize(
    ("offer", "said", "error"),
    [
        (LIVE, request(Command.READ, 4096, 1), ErrorNumber.EINVAL),
        (LIVE, request(Command.READ, (1 << 64) - 1, 2), ErrorNumber.EINVAL),
        (Offer("big", 1 << 40, read_only=True), request(Command.READ, 0, (32 << 20) + 1), ErrorNumber.EOVERFLOW),
        (LIVE, write(4095, b"xy"), ErrorNumber.ENOSPC),
        (LIVE, request(Command.TRIM, 4096, 4096), ErrorNumber.ENOSPC),
        (LIVE, request(Command.WRITE_ZEROES, 1, (1 << 32) - 1), ErrorNumber.ENOSPC),
        (ROOT, write(0, b"x"), ErrorNumber.EPERM),
        (ROOT, request(Command.TRIM, 0, 512), ErrorNumber.EPERM),
        (ROOT, request(Command.WRITE_ZEROES, 0, 512), ErrorNumber.EPERM),
        (LIVE, request(99), ErrorNumber.EINVAL),
        (LIVE, request(Command.READ, 0, 1, flags=1 << 15), ErrorNumber.EINVAL),
        (LIVE, request(Command.WRITE_ZEROES, 0, 1, flags=16), ErrorNumber.EINVAL),
        (LIVE, request(Command.BLOCK_STATUS, 0, 0), ErrorNumber.EINVAL),
        (LIVE, request(Command.BLOCK_STATUS, 0, 4097), ErrorNumber.EINVAL),
    ],
)
def test_what_an_export_cannot_take_is_refused_and_the_next_is_served(
    offer: Offer, said: bytes, error: ErrorNumber
) -> None:
    transmission = begin(offer)
    refused, fine = transmission.receive(said + request(Command.READ, 0, 512, cookie=8))
    assert refused.error == error and not fine.error
    answers = heard(transmission, transmission.error_reply(refused, error, "no"))
    assert answers.done[7].error == error


def test_status_needs_that_it_was_agreed_on() -> None:
    assert only(begin(allocation=False), request(Command.BLOCK_STATUS, 0, 512)).error == ErrorNumber.EINVAL
    assert only(begin(structured=False), request(Command.READ, 0, 5, flags=CommandFlag.DF)).error == ErrorNumber.EINVAL


def test_who_sends_no_requests_is_cut_off() -> None:
    for said in (b"\0" * 28, request(Command.WRITE, 0, REQUEST_BYTES_MAX + 1)):
        with pytest.raises(NbdError):
            begin().receive(said)
    transmission = begin()
    transmission.receive(write(0, b"xyz")[:-1])
    with pytest.raises(NbdError, match="middle"):
        transmission.receive_end()


def test_a_simple_read_has_zeros_for_holes() -> None:
    transmission = begin(structured=False)
    asked = only(transmission, request(Command.READ, 0, 1024))
    answers = Answers()
    answers.reads[7] = (0, 1024)
    answers.feed(b"".join(transmission.read_reply(asked, [Piece(0, 512, b"x" * 512), Piece(512, 512, None)])))
    assert answers.done[7].content(0, 1024) == b"x" * 512 + bytes(512)
    assert not transmission.may_have_holes(asked)


def test_a_structured_read_tells_holes() -> None:
    transmission = begin()
    asked = only(transmission, request(Command.READ, 512, 1024))
    assert transmission.may_have_holes(asked)
    said = transmission.read_reply(asked, [Piece(512, 512, None), Piece(1024, 512, b"y" * 512)])
    answer = heard(transmission, said).done[7]
    assert answer.is_structured and answer.holes == [(512, 512)]
    assert answer.content(512, 1024) == bytes(512) + b"y" * 512
    assert not transmission.may_have_holes(only(transmission, request(Command.READ, 0, 1, flags=CommandFlag.DF)))
    nothing = only(transmission, request(Command.READ, 0, 0))
    assert heard(transmission, transmission.read_reply(nothing, [])).done[7].content(0, 0) == b""


def test_a_structured_read_that_fails_says_why() -> None:
    transmission = begin()
    asked = only(transmission, request(Command.READ, 0, 512))
    answer = heard(transmission, transmission.error_reply(asked, ErrorNumber.EIO, "LSN 4 is damaged")).done[7]
    assert (answer.error, answer.text) == (ErrorNumber.EIO, "LSN 4 is damaged")


def test_status_is_cut_at_what_was_asked_and_at_one_if_one_was() -> None:
    transmission = begin()
    asked = only(transmission, request(Command.BLOCK_STATUS, 0, 4096))
    extents = [Extent(1024, True), Extent(1024, False), Extent(9000, True)]
    answer = heard(transmission, transmission.status_reply(asked, extents)).done[7]
    assert answer.extents == [(1024, 3), (1024, 0), (2048, 3)]
    one = only(transmission, request(Command.BLOCK_STATUS, 0, 4096, flags=CommandFlag.REQ_ONE))
    assert heard(transmission, transmission.status_reply(one, extents)).done[7].extents == [(1024, 3)]
