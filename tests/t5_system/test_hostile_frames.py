"""Frames of wrong type, length or epoch on the real data port, from a peer with a good certificate.

Each is refused or the connection is closed, nothing of it is stored, and a real host is served as if nothing happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asrfs.format.log_object import OBJECT_BYTES_MAX
from asrfs.protocol.frames import FRAME_PAYLOAD_BYTES_MAX, FrameType, encode_frame_header
from asrfs.protocol.messages import Acknowledge, Heartbeat, ObjectBegin, Refused, Welcome, encode_message
from asrfs.transport.tls import client_context
from tests.fakes.scripted_host import BuiltObject, HostHistory
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.raw_client import RawClient
from tests.t5_system.stamps import Stamper, StampWriter
from tests.t5_system.store import Enrolled, StoreUnderTest


class Site:
    """A store, a real host that ships to it, and another machine with a certificate that is as good."""

    def __init__(self, scratch: Path) -> None:
        self.store = StoreUnderTest(scratch)
        self.store.ask("init", "--name", "site-b")
        self.store.serve()
        (scratch / "host").mkdir()
        self.host = HostUnderTest(scratch / "host")
        self.host.init(disk="1M")
        self.host.asrfs("enroll", "--store", self.store.manage, "--token", self.store.token(self.host.name))
        self.host.serve()
        self.writer = StampWriter(Stamper(3, 1, 256), [self.host.mount / "disk.img"])
        self.other: Enrolled = self.store.enrol("db1", 2)
        self.other.history.disk(0)
        for _ in range(6):
            self.other.history.write()

    def connect(self) -> RawClient:
        return RawClient(self.other.context(), self.store.data, self.other.server_name)

    def check(self, scratch: Path) -> None:
        """The store runs, the real host's new writes arrive, and nothing of the other machine has."""
        assert self.store.process is not None
        assert self.store.process.poll() is None
        done = self.writer.write(5)
        self.writer.fsync()
        self.host.asrfs("drain", "--timeout", "30s")
        output = scratch / "export"
        output.unlink(missing_ok=True)
        self.store.ask("export", self.host.name, "disk", "--point", "latest", "--output", output)
        self.writer.stamper.check([output], exactly=done)
        machines = {each["machine"]: each["acknowledged_lsn"] for each in self.store.ask("machine", "list")}
        assert machines["db1"] == 0

    def close(self) -> None:
        self.writer.close()
        self.host.close()
        self.store.close()


@pytest.fixture(scope="module")
def site(make_scratch: Callable[[str], Path]) -> Iterator[Site]:
    site = Site(make_scratch("hostile-frames"))
    try:
        yield site
    finally:
        site.close()


Attack = Callable[[RawClient, HostHistory], None]

BEFORE_GREETING: dict[str, Attack] = {
    "a type that is none": lambda raw, h: raw.header(99, 0),
    "type zero": lambda raw, h: raw.header(0, 4),
    "an object before HELLO": lambda raw, h: raw.say(ObjectBegin(first_lsn=1, last_lsn=1, length=5000)),
    "bytes before HELLO": lambda raw, h: raw.frame(FrameType.OBJECT_BYTES, b"x" * 5000),
    "what only a store says": lambda raw, h: raw.say(Acknowledge(lsn=1, digest="00" * 32)),
    "a frame that is too long": lambda raw, h: raw.header(FrameType.HELLO, FRAME_PAYLOAD_BYTES_MAX + 1),
    "a frame of four gigabytes": lambda raw, h: raw.header(FrameType.HELLO, 0xFFFFFFFF),
    "a HELLO of no bytes": lambda raw, h: raw.frame(FrameType.HELLO, b""),
    "a HELLO of junk": lambda raw, h: raw.frame(FrameType.HELLO, random.Random(1).randbytes(2000)),
    "a HELLO of another kind": lambda raw, h: raw.frame(FrameType.HELLO, encode_message(Heartbeat())),
    "a HELLO with more behind it": lambda raw, h: raw.frame(FrameType.HELLO, encode_message(h.hello()) + b"\0"),
    "a header that was changed": lambda raw, h: raw.header(FrameType.HELLO, 10, crc=1),
    "another magic": lambda raw, h: raw.header(FrameType.HELLO, 10, magic=b"B1"),
    "a byte that must be zero": lambda raw, h: raw.header(FrameType.HELLO, 10, zero=1),
    "a frame out of order": lambda raw, h: raw.header(FrameType.HELLO, 10, skip=1),
    "no frames at all": lambda raw, h: raw.connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
}

HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "I6: an old epoch": ({"epoch": 0}, "fenced"),
    "an impossible epoch": ({"epoch": (1 << 64) - 1}, "state"),
    "the last epoch, to rejoin": ({"epoch": (1 << 32) - 1, "rejoin": True}, "state"),
    "another machine": ({"machine_id": "0" * 31 + "1"}, "authentication"),
    "no machine": ({"machine_id": "../x"}, "authentication"),
    "another protocol": ({"protocol": 99}, "state"),
}


def built(history: HostHistory, welcome: Welcome, **changes: Any) -> BuiltObject:
    return history.build(1, 4, welcome.session_salt, **changes)


def truncated(raw: RawClient, whole: BuiltObject) -> None:
    """Announced as less than it is."""
    raw.say(ObjectBegin(first_lsn=1, last_lsn=4, length=whole.begin.length - 100))
    raw.frame(FrameType.OBJECT_BYTES, whole.content)


def flipped(raw: RawClient, whole: BuiltObject) -> None:
    content = bytearray(whole.content)
    content[len(content) // 2] ^= 1
    raw.ship(BuiltObject(whole.begin, [bytes(content)], whole.digest))


Streamed = Callable[[RawClient, HostHistory, Welcome], None]

# What breaks the protocol closes the connection; what is wrong with an object is refused by name.
AFTER_GREETING: dict[str, tuple[Streamed, str]] = {
    "HELLO again": (lambda raw, h, w: raw.say(h.hello()), ""),
    "what only a store says": (lambda raw, h, w: raw.say(w), ""),
    "bytes of no object": (lambda raw, h, w: raw.frame(FrameType.OBJECT_BYTES, b"x"), ""),
    "a type that is none": (lambda raw, h, w: raw.header(200, 0), ""),
    "a frame that is too long": (lambda raw, h, w: raw.header(FrameType.OBJECT_BYTES, 1 << 30), ""),
    "an object of no bytes": (lambda raw, h, w: raw.say(ObjectBegin(first_lsn=1, last_lsn=1, length=0)), ""),
    "an object that is too long": (
        lambda raw, h, w: raw.say(ObjectBegin(first_lsn=1, last_lsn=1, length=OBJECT_BYTES_MAX + 1)),
        "",
    ),
    "LSNs that run backwards": (
        lambda raw, h, w: raw.say(ObjectBegin(first_lsn=9, last_lsn=3, length=5000)),
        "",
    ),
    "LSN 0": (lambda raw, h, w: raw.say(ObjectBegin(first_lsn=0, last_lsn=3, length=5000)), ""),
    "more bytes than announced": (lambda raw, h, w: truncated(raw, built(h, w)), ""),
    "I6: an object of an old epoch": (lambda raw, h, w: raw.ship(built(h, w, epoch=0)), "fenced"),
    "an object of an epoch nobody gave out": (lambda raw, h, w: raw.ship(built(h, w, epoch=7)), "state"),
    "an object of another machine": (lambda raw, h, w: raw.ship(built(h, w, machine_id="0" * 31 + "1")), "corrupt"),
    "an object with a flipped bit": (lambda raw, h, w: flipped(raw, built(h, w)), "corrupt"),
    "an object of junk": (
        lambda raw, h, w: raw.ship(
            BuiltObject(ObjectBegin(first_lsn=1, last_lsn=4, length=9000), [random.Random(2).randbytes(9000)], b"")
        ),
        "corrupt",
    ),
}


def test_i6_frames_of_wrong_type_length_or_epoch_before_and_in_the_greeting(site: Site, scratch: Path) -> None:
    for what, attack in BEFORE_GREETING.items():
        raw = site.connect()
        attack(raw, site.other.history)
        assert raw.last_word() is None, f"{what}: closed without a word"
        raw.close()
    for what, (changes, code) in HELLOS.items():
        raw = site.connect()
        answer = raw.greet(site.other.history, **changes)
        assert isinstance(answer, Refused) and answer.code == code, f"{what}: {answer}"
        raw.close()
    site.check(scratch)


def test_i6_frames_of_wrong_type_length_or_epoch_in_a_session(site: Site, scratch: Path) -> None:
    for what, (attack, code) in AFTER_GREETING.items():
        raw = site.connect()
        welcome = raw.greet(site.other.history)
        assert isinstance(welcome, Welcome), what
        attack(raw, site.other.history, welcome)
        refused = raw.last_word()
        said = refused.code if isinstance(refused, Refused) else ""
        assert said == code, f"{what}: {refused}"
        raw.close()
    site.check(scratch)
    stored = [path for path in (site.store.path / "objects").rglob("*.obj") if f"{2:032x}/log" in str(path)]
    assert stored == []
    assert list((site.store.path / "objects" / ".incoming").glob("*")) == []


def test_who_stops_in_the_middle_holds_nobody_up(site: Site, scratch: Path) -> None:
    """Halves of frames and objects stay open, by the real host's own certificate too, while it is served."""
    history = site.other.history
    halves = [site.connect() for _ in range(8)]
    for number, raw in enumerate(halves):
        if number % 2:
            raw.connection.sendall(b"A1\x01")
        else:
            assert isinstance(raw.greet(history), Welcome)
            raw.say(ObjectBegin(first_lsn=1, last_lsn=4, length=1 << 20))
            raw.connection.sendall(encode_frame_header(FrameType.OBJECT_BYTES, 1 << 19, raw.sequence) + b"x" * 1000)
    keys = site.host.path / "keys"
    own = client_context(str(keys / "machine.crt"), str(keys / "machine.key"), str(keys / "ca.crt"))
    twin = RawClient(own, site.store.data, site.other.server_name)
    twin.connection.sendall(b"A1")
    site.check(scratch)
    for raw in [*halves, twin]:
        raw.close()
    site.check(scratch)
