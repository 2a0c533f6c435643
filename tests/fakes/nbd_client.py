"""An NBD client's side in bytes: what it says, and what it makes of the answers. No I/O."""

from __future__ import annotations

import struct
from typing import NamedTuple

from replica_store.nbd.wire import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_MAGIC,
    FIXED_NEWSTYLE,
    NO_ZEROES,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    ChunkType,
    Command,
    Option,
)

FLAGS = struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES)


class OptionAnswer(NamedTuple):
    option: int
    kind: int
    content: bytes


def option(number: int, content: bytes = b"") -> bytes:
    return OPTION.pack(OPTION_MAGIC, number, len(content)) + content


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def go(name: str, *facts: int, number: int = Option.GO) -> bytes:
    wanted = struct.pack(">H", len(facts)) + b"".join(struct.pack(">H", fact) for fact in facts)
    return option(number, string(name) + wanted)


def contexts(name: str, *queries: str, number: int = Option.SET_META_CONTEXT) -> bytes:
    return option(number, string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries)))


def option_answers(said: bytes) -> list[OptionAnswer]:
    """All of it must be whole answers to options."""
    found = []
    while said:
        magic, number, kind, length = OPTION_REPLY.unpack_from(said)
        assert magic == OPTION_REPLY_MAGIC
        end = OPTION_REPLY.size + length
        assert end <= len(said), "an answer is cut"
        found.append(OptionAnswer(number, kind, said[OPTION_REPLY.size : end]))
        said = said[end:]
    return found


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 7, flags: int = 0, payload: bytes = b""
) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def write(offset: int, payload: bytes, *, cookie: int = 7, flags: int = 0) -> bytes:
    return request(Command.WRITE, offset, len(payload), cookie=cookie, flags=flags, payload=payload)


class Answer:
    """What was answered to one request. `content`: what was read, holes as zeros; `extents`: length and status."""

    def __init__(self) -> None:
        self.error = 0
        self.text = ""
        self.pieces: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []
        self.extents: list[tuple[int, int]] = []
        self.is_structured = False

    def content(self, offset: int, length: int) -> bytes:
        """Every byte must have been told exactly once."""
        told = sum(len(piece) for _, piece in self.pieces) + sum(size for _, size in self.holes)
        assert told == length, f"{told} bytes of {length} were told"
        content = bytearray(length)
        for at, piece in self.pieces:
            content[at - offset : at - offset + len(piece)] = piece
        assert len(content) == length
        return bytes(content)


class Answers:
    """Takes what a server sends after the handshake. `reads`: length of each READ by cookie, for simple replies."""

    def __init__(self) -> None:
        self.reads: dict[int, tuple[int, int]] = {}
        self.done: dict[int, Answer] = {}
        self._open: dict[int, Answer] = {}
        self._buffer = bytearray()

    def feed(self, received: bytes | bytearray) -> None:
        self._buffer += received
        while self._take():
            pass

    def is_empty(self) -> bool:
        return not self._buffer and not self._open

    def _take(self) -> bool:
        if len(self._buffer) < 4:
            return False
        (magic,) = struct.unpack_from(">I", self._buffer)
        return self._simple() if magic == SIMPLE_REPLY_MAGIC else self._chunk()

    def _simple(self) -> bool:
        if len(self._buffer) < SIMPLE_REPLY.size:
            return False
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer)
        offset, length = self.reads.get(cookie, (0, 0)) if not error else (0, 0)
        end = SIMPLE_REPLY.size + length
        if len(self._buffer) < end:
            return False
        answer = Answer()
        answer.error = error
        if length:
            answer.pieces.append((offset, bytes(self._buffer[SIMPLE_REPLY.size : end])))
        del self._buffer[:end]
        assert cookie not in self.done, "a request was answered twice"
        self.done[cookie] = answer
        return True

    def _chunk(self) -> bool:
        if len(self._buffer) < CHUNK.size:
            return False
        magic, flags, kind, cookie, length = CHUNK.unpack_from(self._buffer)
        assert magic == CHUNK_MAGIC, f"{magic:#x} is no answer"
        end = CHUNK.size + length
        if len(self._buffer) < end:
            return False
        content = bytes(self._buffer[CHUNK.size : end])
        del self._buffer[:end]
        answer = self._open.setdefault(cookie, Answer())
        answer.is_structured = True
        if kind == ChunkType.OFFSET_DATA:
            answer.pieces.append((int.from_bytes(content[:8], "big"), content[8:]))
        elif kind == ChunkType.OFFSET_HOLE:
            offset, size = struct.unpack(">QI", content)
            answer.holes.append((offset, size))
        elif kind == ChunkType.BLOCK_STATUS:
            assert content[:4] == struct.pack(">I", 1)
            answer.extents += struct.iter_unpack(">II", content[4:])
        elif kind == ChunkType.ERROR:
            answer.error, size = struct.unpack_from(">IH", content)
            answer.text = content[6 : 6 + size].decode()
        else:
            assert kind == ChunkType.NONE and not content
        if flags & CHUNK_DONE:
            assert cookie not in self.done, "a request was answered twice"
            self.done[cookie] = self._open.pop(cookie)
        return True
