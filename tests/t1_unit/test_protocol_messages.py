"""Messages: what is encoded is decoded, and anything else is a ProtocolError, whatever the bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.model.configuration import GroupOrder, HostConfiguration, Member
from asrfs.model.machine import DiskRecord
from asrfs.protocol.frames import FrameType, ProtocolError
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
    Hello,
    Match,
    Matched,
    Message,
    ObjectBegin,
    Promote,
    Promoted,
    Refused,
    Welcome,
    check_fetched,
    decode_message,
    encode_message,
    region_of,
)

PROMOTED_DISK = DiskRecord(slot=2, id="e" * 32, name="root", size_bytes=5 << 20)
FETCH = Fetch(number=1, slot=2, disk_id="e" * 32, size_bytes=5 << 20, lsn=9, offset=4096)
MESSAGES: list[Message] = [
    Hello(
        protocol=1,
        machine_id="a" * 32,
        machine_name="web1",
        epoch=1,
        appended_lsn=3,
        durable_lsn=2,
        acknowledged_lsn=1,
        last_digest="",
        takes_configuration=True,
        group_port=20004,
        group_address="10.0.0.7",
    ),
    Welcome(
        protocol=1,
        store_id="b" * 32,
        session_salt=bytes(32),
        epoch=1,
        acknowledged_lsn=1,
        acknowledged_time_ns=5,
        last_digest="",
        compares=4,
        takes_matches=True,
    ),
    Refused(code="space", text="full"),
    ObjectBegin(first_lsn=1, last_lsn=2, length=1000),
    ObjectBegin(first_lsn=1, last_lsn=2, length=1000, omitted=b"\x06", level=-5),
    Match(number=7, disks=(ChunksOfDisk(name="root", runs=((3, 2), (9, 1)), digests=bytes(48)),)),
    Matched(number=7, equal=(b"\x05", b"")),
    Acknowledge(lsn=2, digest="c" * 64),
    Heartbeat(appended_lsn=1, durable_lsn=1, durable_time_ns=1),
    Goodbye(reason="done"),
    Compare(number=1, slot=2, disk_id="e" * 32, size_bytes=5 << 20, first=0, digests=bytes(64), lsn=9),
    Compared(number=1, lsn=9, differs=b"\x02", leaves=bytes(range(32)) * 16),
    Compared(number=1, exit_code=3, text="no such disk"),
    Handover(id="f" * 32, wanted="hand-over", seconds_max=600),
    HandedOver(id="f" * 32, outcome="handed-over", lsn=77, chunks_compared=16),
    HandedOver(id="f" * 32, outcome="failed", error="a disk differs"),
    Promote(id="f" * 32, wanted="write", lsn=9, disks=(PROMOTED_DISK,), left=(3,), boot=b"{}"),
    Promote(id="f" * 32, wanted="release"),
    Promoted(id="f" * 32, outcome="written", lsn=77, bytes_written=4096),
    Promoted(id="f" * 32, outcome="failed", exit_code=4, error="a disk is in use"),
    FETCH,
    Fetched(number=1, next=16384, extents=((4096, 512),), zeros=((8192, 8192),), content=bytes(512), total=8704),
    Fetched(number=1, exit_code=3, text="no such disk"),
    Configure(
        configuration=HostConfiguration(
            generation=7,
            policy="gold",
            keys={"crash_interval": "60s"},
            groups=(
                GroupOrder(
                    id="d" * 32,
                    name="shop",
                    coordinator="a" * 32,
                    members=(Member(machine_id="a" * 32, name="web1", address="10.0.0.7", port=20004),),
                    consistency="application",
                    interval_s=60.0,
                    partial=True,
                ),
            ),
        )
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    assert decode_message(TYPE_OF[type(message)], encode_message(message)) == message


def test_every_type_has_a_message_but_object_bytes_and_what_groups_say_to_each_other() -> None:
    assert set(TYPE_OF.values()) == set(FrameType) - {FrameType.OBJECT_BYTES, FrameType.GROUP}
    assert {type(message) for message in MESSAGES} == set(TYPE_OF)


def test_fields_that_later_versions_add_are_passed_over() -> None:
    later = msgspec.msgpack.encode({"lsn": 2, "digest": "", "mood": "good"})
    assert decode_message(FrameType.ACKNOWLEDGE, later) == Acknowledge(lsn=2, digest="")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({"lsn": "2", "digest": ""}),
        msgspec.msgpack.encode({"lsn": 2}),
        msgspec.msgpack.encode({"lsn": 2.5, "digest": ""}),
        b"\x91" * 5000,
    ],
)
def test_what_is_no_message_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(FrameType.ACKNOWLEDGE, payload)


def test_peers_of_before_configure_go_on() -> None:
    """A HELLO without the new fields is one of a host that is told nothing; one with them is read by an old store."""
    hello = next(message for message in MESSAGES if isinstance(message, Hello))
    old = {"protocol": 1, "machine_id": "a" * 32, "machine_name": "web1", "epoch": 1}
    old |= {"appended_lsn": 3, "durable_lsn": 2, "acknowledged_lsn": 1, "last_digest": ""}
    heard = decode_message(FrameType.HELLO, msgspec.msgpack.encode(old))
    assert isinstance(heard, Hello)
    assert (heard.takes_configuration, heard.group_port, heard.group_address) == (False, 0, "")
    assert set(msgspec.msgpack.decode(encode_message(hello))) >= set(old)


def test_a_store_of_before_compare_cannot_compare() -> None:
    welcome = next(message for message in MESSAGES if isinstance(message, Welcome))
    old = {name: field for name, field in msgspec.to_builtins(welcome).items() if name != "compares"}
    heard = decode_message(FrameType.WELCOME, msgspec.msgpack.encode(old | {"session_salt": bytes(32)}))
    assert isinstance(heard, Welcome)
    assert heard.compares == 0


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 0xFFFF},
        {"slot": -1},
        {"number": 1 << 63},
        {"lsn": -1},
        {"size_bytes": 0},
        {"size_bytes": 1 << 63},
        {"disk_id": "../../etc"},
        {"digests": b""},
        {"digests": bytes(33 * 32)},
    ],
)
def test_a_comparison_of_what_no_disk_has_is_not_read(change: dict[str, object]) -> None:
    compare = next(message for message in MESSAGES if isinstance(message, Compare))
    good = msgspec.msgpack.decode(encode_message(compare))
    decode_message(FrameType.COMPARE, msgspec.msgpack.encode(good))
    with pytest.raises(ProtocolError):
        decode_message(FrameType.COMPARE, msgspec.msgpack.encode(good | change))


@pytest.mark.parametrize("change", [{"first": 1}, {"first": 1 << 62}, {"digests": bytes(33)}, {"size_bytes": 5000}])
def test_a_region_lies_on_its_disk(change: dict[str, object]) -> None:
    compare = next(message for message in MESSAGES if isinstance(message, Compare))
    assert region_of(compare).nodes == 2
    with pytest.raises(ProtocolError):
        region_of(msgspec.structs.replace(compare, **change))


@pytest.mark.parametrize("change", [{"differs": bytes(5)}, {"leaves": bytes((64 << 10) + 1)}, {"exit_code": 7}])
def test_an_answer_is_as_long_as_one_can_be(change: dict[str, object]) -> None:
    good = {"number": 1, "lsn": 2, "differs": b"", "leaves": b"", "exit_code": 0, "text": ""}
    decode_message(FrameType.COMPARED, msgspec.msgpack.encode(good))
    with pytest.raises(ProtocolError):
        decode_message(FrameType.COMPARED, msgspec.msgpack.encode(good | change))


@pytest.mark.parametrize("change", [{"group_port": 65536}, {"group_port": -1}, {"group_address": "a" * 256}])
def test_a_host_that_says_it_is_nowhere_is_not_believed(change: dict[str, object]) -> None:
    hello = msgspec.msgpack.decode(encode_message(MESSAGES[0]))
    with pytest.raises(ProtocolError):
        decode_message(FrameType.HELLO, msgspec.msgpack.encode(hello | change))


GOOD = Fetched(number=1, next=16384, extents=((4096, 512), (5120, 512)), zeros=((8192, 8192),), content=bytes(1024))


@pytest.mark.parametrize(
    "change",
    [
        {"next": 4096},
        {"next": (5 << 20) + 512},
        {"next": 8192},
        {"content": bytes(512)},
        {"extents": ((0, 512), (5120, 512))},
        {"extents": ((4096, 512), (4096, 512))},
        {"extents": ((4096, 1), (5120, 1023))},
        {"zeros": ((4096, 512),)},
        {"zeros": ((8193, 512),)},
    ],
    ids=str,
)
def test_what_a_store_gives_back_is_of_what_was_asked_for(change: dict[str, object]) -> None:
    check_fetched(GOOD, FETCH)
    check_fetched(Fetched(number=1, exit_code=3), FETCH)
    with pytest.raises(ProtocolError):
        check_fetched(msgspec.structs.replace(GOOD, **change), FETCH)


def test_a_refusal_has_a_code_we_know() -> None:
    with pytest.raises(ProtocolError):
        decode_message(FrameType.REFUSED, msgspec.msgpack.encode({"code": "because", "text": ""}))


@given(frame_type=st.sampled_from(sorted(TYPE_OF.values())), payload=st.binary(max_size=100))
def test_random_bytes_are_a_message_or_a_protocol_error(frame_type: FrameType, payload: bytes) -> None:
    try:
        message = decode_message(frame_type, payload)
    except ProtocolError:
        return
    assert TYPE_OF[type(message)] is frame_type
