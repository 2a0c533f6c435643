"""A peer with a certificate that says over TLS whatever a test likes: frames of any kind, captured bytes, halves."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from typing import Any

import msgspec
from crc32c import crc32c

from asrfs.protocol.frames import FrameReader, FrameType, encode_frame_header
from asrfs.protocol.messages import (
    Acknowledge,
    Heartbeat,
    Hello,
    Message,
    ObjectBegin,
    Refused,
    Welcome,
    decode_message,
    encode_message,
)
from asrfs.transport.stream import parse_address
from tests.fakes.scripted_host import BuiltObject, HostHistory

ANSWER_S_MAX = 15.0
TYPE_OF: dict[type, FrameType] = {
    Hello: FrameType.HELLO,
    Welcome: FrameType.WELCOME,
    Acknowledge: FrameType.ACKNOWLEDGE,
    Heartbeat: FrameType.HEARTBEAT,
    ObjectBegin: FrameType.OBJECT_BEGIN,
    Refused: FrameType.REFUSED,
}


class RawClient:
    """A TLS connection that says whatever the test likes. `sequence`: of the next frame it sends properly."""

    def __init__(self, context: ssl.SSLContext, address: str, server_name: str) -> None:
        host, port = parse_address(address, 9443)
        plain = socket.create_connection((host, port), timeout=ANSWER_S_MAX)
        self.connection = context.wrap_socket(plain, server_hostname=server_name)
        self.sequence = 0
        self._reader = FrameReader()
        self._heard: list[Message] = []

    def frame(self, frame_type: FrameType, payload: bytes) -> None:
        self.connection.sendall(encode_frame_header(frame_type, len(payload), self.sequence) + payload)
        self.sequence += 1

    def say(self, message: Message) -> None:
        self.frame(TYPE_OF[type(message)], encode_message(message))

    def header(
        self, code: int, length: int, *, magic: bytes = b"A1", zero: int = 0, skip: int = 0, crc: int = 0
    ) -> None:
        """A header with anything in it; its checksum is right unless `crc` is given to flip bits of it."""
        fields = struct.pack("<2sBBII", magic, code, zero, length, self.sequence + skip)
        self.connection.sendall(fields + struct.pack("<I", crc32c(fields) ^ crc))
        self.sequence += 1

    def ship(self, built: BuiltObject) -> None:
        self.say(built.begin)
        self.frame(FrameType.OBJECT_BYTES, built.content)

    def hear(self) -> Message | None:
        """The store's next word except heartbeats; None when it has closed."""
        while True:
            while self._heard:
                message = self._heard.pop(0)
                if not isinstance(message, Heartbeat):
                    return message
            try:
                received = self.connection.recv(65536)
            except (ConnectionError, ssl.SSLError):
                return None
            if not received:
                return None
            self._heard += [decode_message(frame.type, frame.payload) for frame in self._reader.feed(received)]

    def last_word(self) -> Message | None:
        """REFUSED, or else what the store said last before it closed. Raises TimeoutError if it does neither."""
        last = None
        while not isinstance(last, Refused) and (heard := self.hear()) is not None:
            last = heard
        return last

    def greet(self, history: HostHistory, **changes: Any) -> Message | None:
        self.say(msgspec.structs.replace(history.hello(), **changes))
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
