"""PURE, sans-IO: the first half of a connection, from the greeting until an export is chosen.

    server                              client
      NBDMAGIC IHAVEOPT flags  ──▶
                               ◀──      flags
                               ◀──      STARTTLS              then both begin TLS, and haggling begins anew
                               ◀──      LIST, INFO, STRUCTURED_REPLY, SET_META_CONTEXT …
                               ◀──      GO or EXPORT_NAME     then requests follow: `transmission.py`
                               ◀──      ABORT

Feed `receive` what arrives and send what it returns; then look at `step`. Nothing that was said before TLS holds after
it, and bytes that came along with STARTTLS in the clear end the connection: else whoever sits between could put words
into the client's mouth.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum

from replica_store.nbd.offer import Offer
from replica_store.nbd.wire import (
    BASE_ALLOCATION,
    BLOCK_BYTES_PREFERRED,
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_REPLY,
    EXPORT_REPLY_PADDING,
    FIXED_NEWSTYLE,
    GREETING,
    GREETING_MAGIC,
    INFO_BLOCK_SIZES,
    INFO_EXPORT,
    NAME_BYTES_MAX,
    NO_ZEROES,
    OPTION,
    OPTION_BYTES_MAX,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    OPTIONS_MAX,
    REQUEST_BYTES_MAX,
    Bytes,
    Fact,
    NbdError,
    Option,
    Reply,
)

_COUNT = struct.Struct(">I")
_FACTS = struct.Struct(">H")


class Step(Enum):
    """What comes next on the connection."""

    HAGGLING = "haggling"
    START_TLS = "start tls"
    """Begin TLS, call `secured`, and go on."""
    CHOSEN = "chosen"
    """`chosen` is the export; `rest` are bytes of requests that came already."""
    ENDED = "ended"


class _Malformed(Exception):
    """An option's content is not what the option has."""


class Negotiation:
    """One client's haggling. `tls`: nothing is told or given before the client has begun TLS; else TLS is not offered.

    The name of an export may be left empty where there is only one.
    """

    def __init__(self, offers: Mapping[str, Offer], *, tls: bool = False) -> None:
        self.step = Step.HAGGLING
        self.chosen: Offer | None = None
        self.structured = False
        self.allocation = False
        """Whether BLOCK_STATUS was agreed on for what was chosen."""
        self.rest = b""
        self._offers = offers
        self._tls = tls
        self._is_secured = False
        self._buffer = bytearray()
        self._client_flags: int | None = None
        self._options = 0
        self._context_of: str | None = None

    def greeting(self) -> bytes:
        """The server speaks first."""
        return GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES)

    def secured(self) -> None:
        """TLS has begun; what was agreed before it is forgotten."""
        assert self.step is Step.START_TLS
        self._is_secured = True
        self.structured, self._context_of = False, None
        self.step = Step.HAGGLING

    def receive(self, received: Bytes) -> bytes:
        """What to answer. Raises NbdError for what is no NBD client, or one that does not come to a choice."""
        self._buffer += received
        if self._client_flags is None and not self._take_flags():
            return b""
        said = bytearray()
        while (option := self._take_option()) is not None:
            said += self._answer(*option)
        if self.step is Step.START_TLS and self._buffer:
            raise NbdError("a client went on in the clear after it had asked for TLS")
        if self.step is Step.CHOSEN:
            self.rest = bytes(self._buffer)
        return bytes(said)

    def _take_flags(self) -> bool:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        if not flags & FIXED_NEWSTYLE or flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise NbdError(f"a client has flags {flags:#x}: only the fixed newstyle handshake is spoken")
        self._client_flags = flags
        del self._buffer[: CLIENT_FLAGS.size]
        return True

    def _take_option(self) -> tuple[int, bytes] | None:
        if self.step is not Step.HAGGLING or len(self._buffer) < OPTION.size:
            return None
        magic, number, length = OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            raise NbdError("a client sent something else than an option")
        if length > OPTION_BYTES_MAX:
            raise NbdError(f"a client sent an option of {length} bytes")
        end = OPTION.size + length
        if len(self._buffer) < end:
            return None
        content = bytes(self._buffer[OPTION.size : end])
        del self._buffer[:end]
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise NbdError(f"a client sent more than {OPTIONS_MAX} options and chose nothing")
        return number, content

    def _answer(self, number: int, content: bytes) -> bytes:
        if number == Option.ABORT:
            self.step = Step.ENDED
            return _reply(number, Reply.ACK)
        if number == Option.STARTTLS:
            return self._start_tls(content)
        if self._tls and not self._is_secured:
            if number == Option.EXPORT_NAME:  # which cannot be refused in words
                raise NbdError("a client wants an export without TLS")
            return _refuse(number, Reply.TLS_REQUIRED, "TLS comes first")
        if number == Option.EXPORT_NAME:
            return self._export_name(content)
        answer = {
            Option.LIST: self._list,
            Option.INFO: self._tell,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
        }.get(number)  # type: ignore[call-overload]
        if answer is None:
            return _refuse(number, Reply.UNSUPPORTED, "this option is not known here")
        try:
            said: bytes = answer(content)
        except _Malformed as error:
            return _refuse(number, Reply.INVALID, str(error))
        return said

    def _start_tls(self, content: bytes) -> bytes:
        if content:
            return _refuse(Option.STARTTLS, Reply.INVALID, "STARTTLS has no content")
        if not self._tls:
            return _refuse(Option.STARTTLS, Reply.POLICY, "TLS is not used here")
        if self._is_secured:
            return _refuse(Option.STARTTLS, Reply.INVALID, "TLS has begun already")
        self.step = Step.START_TLS
        return _reply(Option.STARTTLS, Reply.ACK)

    def _export_name(self, content: bytes) -> bytes:
        offer = self._find(content.decode(errors="replace"))
        if offer is None:
            raise NbdError(f"a client wants an export {content[:80].decode(errors='replace')!r} that is not here")
        self._choose(offer)
        said = EXPORT_REPLY.pack(offer.size_bytes, offer.flags(structured=self.structured))
        assert self._client_flags is not None
        return said if self._client_flags & NO_ZEROES else said + EXPORT_REPLY_PADDING

    def _list(self, content: bytes) -> bytes:
        if content:
            raise _Malformed("LIST has no content")
        names = [name.encode() for name in sorted(self._offers)]
        entries = [_reply(Option.LIST, Reply.SERVER, _COUNT.pack(len(name)) + name) for name in names]
        return b"".join([*entries, _reply(Option.LIST, Reply.ACK)])

    def _tell(self, content: bytes) -> bytes:
        return self._facts(Option.INFO, content)[1]

    def _go(self, content: bytes) -> bytes:
        offer, said = self._facts(Option.GO, content)
        if offer is not None:
            self._choose(offer)
        return said

    def _facts(self, option: Option, content: bytes) -> tuple[Offer | None, bytes]:
        reader = _Reader(content)
        name = reader.text()
        (count,) = reader.take(_FACTS)
        wanted = {reader.take(_FACTS)[0] for _ in range(count)}
        reader.end()
        offer = self._find(name)
        if offer is None:
            return None, _refuse(option, Reply.UNKNOWN, "there is no such export")
        facts = [INFO_EXPORT.pack(Fact.EXPORT, offer.size_bytes, offer.flags(structured=self.structured))]
        if Fact.NAME in wanted:
            facts.append(_FACTS.pack(Fact.NAME) + offer.name.encode())
        if Fact.DESCRIPTION in wanted and offer.description:
            facts.append(_FACTS.pack(Fact.DESCRIPTION) + offer.description.encode())
        if Fact.BLOCK_SIZE in wanted:
            facts.append(INFO_BLOCK_SIZES.pack(Fact.BLOCK_SIZE, 1, BLOCK_BYTES_PREFERRED, REQUEST_BYTES_MAX))
        said = b"".join(_reply(option, Reply.INFO, fact) for fact in facts)
        return offer, said + _reply(option, Reply.ACK)

    def _structured_reply(self, content: bytes) -> bytes:
        if content:
            raise _Malformed("STRUCTURED_REPLY has no content")
        self.structured = True
        return _reply(Option.STRUCTURED_REPLY, Reply.ACK)

    def _list_contexts(self, content: bytes) -> bytes:
        return self._contexts(Option.LIST_META_CONTEXT, content)

    def _set_contexts(self, content: bytes) -> bytes:
        self._context_of = None
        return self._contexts(Option.SET_META_CONTEXT, content)

    def _contexts(self, option: Option, content: bytes) -> bytes:
        if not self.structured:
            raise _Malformed("structured replies come first")
        reader = _Reader(content)
        offer = self._find(reader.text())
        (count,) = reader.take(_COUNT)
        queries = [reader.string() for _ in range(min(count, OPTION_BYTES_MAX))]
        reader.end()
        if offer is None:
            return _refuse(option, Reply.UNKNOWN, "there is no such export")
        if option is Option.SET_META_CONTEXT:
            has_it = BASE_ALLOCATION in queries
            self._context_of = offer.name if has_it else None
        else:
            has_it = not queries or BASE_ALLOCATION in queries or b"base:" in queries
        said = _reply(option, Reply.META_CONTEXT, _COUNT.pack(CONTEXT_ID) + BASE_ALLOCATION) if has_it else b""
        return said + _reply(option, Reply.ACK)

    def _find(self, name: str) -> Offer | None:
        if not name and len(self._offers) == 1:
            return next(iter(self._offers.values()))
        return self._offers.get(name)

    def _choose(self, offer: Offer) -> None:
        self.chosen, self.step = offer, Step.CHOSEN
        self.allocation = self.structured and self._context_of == offer.name


class _Reader:
    """The content of an option, from the front. Raises _Malformed where it ends too early or too late."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        end = self._at + layout.size
        if end > len(self._content):
            raise _Malformed("the option ends too early")
        fields = layout.unpack_from(self._content, self._at)
        self._at = end
        return fields

    def string(self) -> bytes:
        (length,) = self.take(_COUNT)
        if length > NAME_BYTES_MAX or self._at + length > len(self._content):
            raise _Malformed("a name is too long")
        self._at += length
        return self._content[self._at - length : self._at]

    def text(self) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise _Malformed("a name is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._content):
            raise _Malformed("the option has more than it should")


def _reply(option: int, kind: Reply, content: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(content)) + content


def _refuse(option: int, kind: Reply, text: str) -> bytes:
    return _reply(option, kind, text.encode())
