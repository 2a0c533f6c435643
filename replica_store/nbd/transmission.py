"""PURE, sans-IO: the second half of a connection: requests in, replies out, in any order.

Feed `receive` what arrives; it gives the requests that are complete. Each is answered once, by the bytes that one of
`read_reply`, `status_reply`, `done_reply` and `error_reply` makes. A request that the export cannot take comes with the
`error` it is to be answered with. DISC ends it: what was asked before is still answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from replica_store.nbd.offer import Offer
from replica_store.nbd.wire import (
    CHUNK,
    CHUNK_CONTEXT,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_MAGIC,
    CHUNK_OFFSET,
    CONTEXT_ID,
    EXTENT_STATUS,
    REQUEST,
    REQUEST_BYTES_MAX,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_HOLE,
    STATUS_ZERO,
    Bytes,
    ChunkType,
    Command,
    CommandFlag,
    ErrorNumber,
    NbdError,
)

STATUS_EXTENTS_MAX = 1 << 16
"""In one reply to BLOCK_STATUS; who asked asks again for the rest."""
_LENGTH_MAX = (1 << 32) - 1
_FLAGS_OF: dict[Command, CommandFlag] = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
"""FUA may be set on anything, and means something where something is written."""
_WRITES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


class Request(NamedTuple):
    """One thing to do. `payload`: of a WRITE. `error` other than NONE: nothing is to be done but to answer so."""

    command: Command
    cookie: int
    offset: int
    length: int
    flags: CommandFlag
    payload: Bytes
    error: ErrorNumber


class Piece(NamedTuple):
    """Of what was read: `content` None is `length` bytes of zeros that lie in a hole."""

    offset: int
    length: int
    content: Bytes | None


class Extent(NamedTuple):
    """A stretch of an export that is a hole and reads as zeros, or is not."""

    length: int
    is_hole: bool


class Transmission:
    """One client's requests to the export it has chosen."""

    def __init__(self, offer: Offer, *, structured: bool, allocation: bool) -> None:
        self.is_over = False
        """The client has said that it ends."""
        self._offer = offer
        self._structured = structured
        self._allocation = allocation
        self._buffer = bytearray()

    def receive(self, received: Bytes) -> list[Request]:
        """Requests completed by these bytes. Raises NbdError for what is no request, or a WRITE of more than 32 MiB."""
        self._buffer += received
        requests = []
        while not self.is_over and (request := self._take()) is not None:
            requests.append(request)
        if self.is_over:
            self._buffer.clear()
        return requests

    def receive_end(self) -> None:
        """The client closed its side. Raises NbdError if that was within a request."""
        if self._buffer:
            raise NbdError("the connection ended in the middle of a request")

    def _take(self) -> Request | None:
        if len(self._buffer) < REQUEST.size:
            return None
        magic, flags, number, cookie, offset, length = REQUEST.unpack_from(self._buffer)
        if magic != REQUEST_MAGIC:
            raise NbdError("a client sent something else than a request")
        carries = length if number == Command.WRITE else 0
        if carries > REQUEST_BYTES_MAX:
            raise NbdError(f"a client sent a write of {length} bytes")
        end = REQUEST.size + carries
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[REQUEST.size : end]) if carries else b""
        del self._buffer[:end]
        if number == Command.DISC:
            self.is_over = True
            return None
        try:
            command = Command(number)
        except ValueError:
            return Request(Command.FLUSH, cookie, offset, length, CommandFlag(0), b"", ErrorNumber.EINVAL)
        error = self._judge(command, flags, offset, length)
        return Request(command, cookie, offset, length, CommandFlag(flags & 0x0F), payload, error)

    def _judge(self, command: Command, flags: int, offset: int, length: int) -> ErrorNumber:
        if flags & ~int(_FLAGS_OF[command]) or (flags & CommandFlag.DF and not self._structured):
            return ErrorNumber.EINVAL
        if command is Command.FLUSH:
            return ErrorNumber.NONE
        if command in _WRITES:
            if self._offer.read_only:
                return ErrorNumber.EPERM
            return ErrorNumber.ENOSPC if offset + length > self._offer.size_bytes else ErrorNumber.NONE
        if offset + length > self._offer.size_bytes:
            return ErrorNumber.EINVAL
        if command is Command.BLOCK_STATUS:
            return ErrorNumber.NONE if self._allocation and length else ErrorNumber.EINVAL
        return ErrorNumber.EOVERFLOW if length > REQUEST_BYTES_MAX else ErrorNumber.NONE

    # ---- replies --------------------------------------------------------------------------------------------------

    def read_reply(self, request: Request, pieces: Sequence[Piece]) -> list[Bytes]:
        """The buffers of the answer to a READ: `pieces` are all that was asked for, in order of offset."""
        assert sum(piece.length for piece in pieces) == request.length, "what was read is not what was asked for"
        if not self._structured:
            said: list[Bytes] = [_simple(request, ErrorNumber.NONE)]
            said += [bytes(piece.length) if piece.content is None else piece.content for piece in pieces]
            return said
        if not pieces:
            return [_chunk(request, ChunkType.NONE, 0, CHUNK_DONE)]
        said = []
        for piece in pieces:
            done = CHUNK_DONE if piece is pieces[-1] else 0
            if piece.content is None:
                hole = CHUNK_HOLE.pack(piece.offset, piece.length)
                said.append(_chunk(request, ChunkType.OFFSET_HOLE, len(hole), done) + hole)
            else:
                head = _chunk(request, ChunkType.OFFSET_DATA, CHUNK_OFFSET.size + piece.length, done)
                said += [head + CHUNK_OFFSET.pack(piece.offset), piece.content]
        return said

    def may_have_holes(self, request: Request) -> bool:
        """Whether pieces of the answer may be holes, and there may be several."""
        return self._structured and not request.flags & CommandFlag.DF

    def status_reply(self, request: Request, extents: Iterable[Extent]) -> list[Bytes]:
        """The answer to a BLOCK_STATUS: what lies from its offset on, at least one extent, cut where it ends."""
        described, room = bytearray(), request.length
        count_max = 1 if request.flags & CommandFlag.REQ_ONE else STATUS_EXTENTS_MAX
        for count, extent in enumerate(extents):
            if not room or count == count_max:
                break
            length = min(extent.length, room)
            described += EXTENT_STATUS.pack(length, STATUS_HOLE | STATUS_ZERO if extent.is_hole else 0)
            room -= length
        assert described, "there is always something at an offset"
        content = CHUNK_CONTEXT.pack(CONTEXT_ID) + described
        return [_chunk(request, ChunkType.BLOCK_STATUS, len(content), CHUNK_DONE) + content]

    def done_reply(self, request: Request) -> list[Bytes]:
        """The answer to what needs no other."""
        return [_simple(request, ErrorNumber.NONE)]

    def error_reply(self, request: Request, error: ErrorNumber, text: str = "") -> list[Bytes]:
        """The answer to what failed; `text` is for people."""
        if not self._structured or request.command not in (Command.READ, Command.BLOCK_STATUS):
            return [_simple(request, error)]
        said = text.encode()[:1000]
        content = CHUNK_ERROR.pack(error, len(said)) + said
        return [_chunk(request, ChunkType.ERROR, len(content), CHUNK_DONE) + content]


def _simple(request: Request, error: ErrorNumber) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)


def _chunk(request: Request, kind: ChunkType, length: int, flags: int) -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, flags, kind, request.cookie, length)
