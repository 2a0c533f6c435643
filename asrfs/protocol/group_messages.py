"""What the members of a consistency group say to their coordinator, and it to them. Fields are checked by the decoder.

All of them travel as the one frame type GROUP and say themselves which they are (`t`).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from asrfs.model.marker import MEMBERS_MAX, NOTE_CHARACTERS_MAX, Consistency
from asrfs.protocol.frames import Bytes, ProtocolError

GROUP_PROTOCOL_VERSION = 1
TEXT_CHARACTERS_MAX = 500

Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARACTERS_MAX)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Join(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="join"):
    """Member's first word. `generation`: of the group's order as the member has it from the store."""

    protocol: int
    group: Id
    generation: Number


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="joined"):
    """Coordinator's answer: it has the same order."""


class NotJoined(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="not joined"):
    """Coordinator's other answer, and the end: the orders differ, or the machine does not belong to the group."""

    text: Text


class Gather(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="gather"):
    """Make ready for a point: whatever can be done before anybody holds anything, hooks and freeze too where the point
    is to be more than crash consistent; for `seconds` at the most. Once prepared, hold for `hold_s` at the most."""

    point: Id
    generation: Number
    consistency: Consistency
    seconds: Seconds
    hold_s: Seconds
    name: Name | None = None
    note: Annotated[str, msgspec.Meta(max_length=NOTE_CHARACTERS_MAX)] | None = None


class Gathered(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="gathered"):
    """Ready to hold at once. Where a member could not freeze, it says so in its marker and takes part with a lesser
    consistency."""

    point: Id


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="prepare"):
    """All are: append the marker and hold every change behind it."""

    point: Id


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="ready"):
    """Changes are held; the marker is record `lsn`, not durable yet."""

    point: Id
    lsn: Number


class Declined(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="declined"):
    """This member cannot take part. It holds nothing, or lets go with the coordinator's next word."""

    point: Id
    text: Text


class Release(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="release"):
    """All are ready: let go, and say whether you were still holding."""

    point: Id


class Void(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="void"):
    """There will be no point, not with you: let go."""

    point: Id
    text: Text


class Released(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="released"):
    """Let go. `holding`: nothing from behind the marker was acknowledged before RELEASE came, and it is durable.

    `consistency`: what the marker says of this member, which may be less than what was wanted.
    """

    point: Id
    holding: bool
    hold_ms: Milliseconds
    consistency: Consistency = "crash"


class Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="confirmed"):
    """The point is real: the coordinator's history says so, durably. `ready`: on how many of `members` it was cut."""

    point: Id
    ready: Number
    members: Annotated[tuple[Id, ...], msgspec.Meta(max_length=MEMBERS_MAX)]


class Settle(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="settle"):
    """Say when the store has acknowledged your marker of this point, record `lsn`."""

    point: Id
    lsn: Number


class Settled(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="settled"):
    """It has."""

    point: Id


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="ask"):
    """A member wants a point of the group. `request` numbers what this member asks; `wait`: answer when it is at the
    store, or after so many seconds."""

    request: Number
    consistency: Consistency
    name: Name | None = None
    note: Annotated[str, msgspec.Meta(max_length=NOTE_CHARACTERS_MAX)] | None = None
    wait: Seconds | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="answer"):
    """What became of it: the point's id and how many took part, or why there is none."""

    request: Number
    point: Id | None = None
    ready: Number = 0
    members: Number = 0
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    text: Text = ""


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="beat"):
    """Sent by both when nothing else is."""


Word = (
    Join | Joined | NotJoined | Gather | Gathered | Prepare | Ready | Declined | Release | Void | Released | Confirmed
    | Settle | Settled | Ask | Answer | Beat
)  # fmt: skip

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Word)
_encoder = msgspec.msgpack.Encoder()


def encode_word(word: Word) -> bytes:
    return _encoder.encode(word)


def decode_word(payload: Bytes) -> Word:
    """Raises ProtocolError."""
    try:
        word: Word = _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a word of a group cannot be read: {error}") from None
    return word
