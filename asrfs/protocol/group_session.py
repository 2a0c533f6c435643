"""One connection between a member of a group and its coordinator: states, what may be said in each, and its bytes.

The table below is the protocol. An illegal word from the peer raises ProtocolError; one of our own is our bug.

    member                               coordinator
      JOIN               ──▶
                         ◀──             JOINED | NOT JOINED
                         ◀──             GATHER                  what can be done before anybody holds
      GATHERED           ──▶
                         ◀──             PREPARE
      READY              ──▶
                         ◀──             RELEASE | VOID          every point that was begun is ended by one of them
      RELEASED           ──▶                                     and each of these is answered, whatever happened

DECLINED may stand in the place of GATHERED and READY. VOID may cross what the member says: until it answers RELEASED,
its words about the point still come and mean nothing any more. Of one group there is one point at a time.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from asrfs.protocol.frames import Bytes, FrameReader, FrameType, ProtocolError, encode_frame_header
from asrfs.protocol.group_messages import (
    Answer,
    Ask,
    Beat,
    Confirmed,
    Declined,
    Gather,
    Gathered,
    Join,
    Joined,
    NotJoined,
    Prepare,
    Ready,
    Release,
    Released,
    Settle,
    Settled,
    Void,
    Word,
    decode_word,
    encode_word,
)

GroupRole = Literal["member", "coordinator"]


class GroupState(Enum):
    __hash__ = object.__hash__  # an Enum's own is written in Python

    START = "start"
    JOINING = "joining"
    IDLE = "idle"
    GATHERING = "gathering"
    GATHERED = "gathered"
    PREPARING = "preparing"
    READY = "ready"
    DECLINED = "declined"
    ENDING = "ending"
    CLOSED = "closed"


_S = GroupState
_Said = tuple[GroupRole, type[Word]]

GROUP_TABLE: dict[GroupState, dict[_Said, GroupState]] = {
    _S.START: {("member", Join): _S.JOINING},
    _S.JOINING: {("coordinator", Joined): _S.IDLE, ("coordinator", NotJoined): _S.CLOSED},
    _S.IDLE: {("coordinator", Gather): _S.GATHERING},
    _S.GATHERING: {
        ("member", Gathered): _S.GATHERED,
        ("member", Declined): _S.DECLINED,
        ("coordinator", Void): _S.ENDING,
    },
    _S.GATHERED: {("coordinator", Prepare): _S.PREPARING, ("coordinator", Void): _S.ENDING},
    _S.PREPARING: {
        ("member", Ready): _S.READY,
        ("member", Declined): _S.DECLINED,
        ("coordinator", Void): _S.ENDING,
    },
    _S.READY: {("coordinator", Release): _S.ENDING, ("coordinator", Void): _S.ENDING},
    _S.DECLINED: {("coordinator", Void): _S.ENDING},
    _S.ENDING: {
        ("member", Gathered): _S.ENDING,
        ("member", Ready): _S.ENDING,
        ("member", Declined): _S.ENDING,
        ("member", Released): _S.IDLE,
    },
    _S.CLOSED: {},
}
"""What concerns a point that is being cut; and, in every state between JOINED and the end:"""

for _state in (_S.IDLE, _S.GATHERING, _S.GATHERED, _S.PREPARING, _S.READY, _S.DECLINED, _S.ENDING):
    GROUP_TABLE[_state] |= {
        ("member", Ask): _state,
        ("coordinator", Answer): _state,
        ("coordinator", Confirmed): _state,
        ("coordinator", Settle): _state,
        ("member", Settled): _state,
        ("member", Beat): _state,
        ("coordinator", Beat): _state,
        ("coordinator", NotJoined): _S.CLOSED,
    }

_POINT_WORDS = (Gathered, Declined, Prepare, Ready, Release, Void, Released)


class GroupSession:
    """One end. Feed it what arrives, send what `send` returns. `point`: the one that is being cut, or the last."""

    def __init__(self, role: GroupRole) -> None:
        self.role: GroupRole = role
        self.peer: GroupRole = "coordinator" if role == "member" else "member"
        self.state = GroupState.START
        self.point = ""
        self._reader = FrameReader()
        self._sequence = 0
        self._foreseen: dict[bytes, tuple[int, Word]] = {}
        """Frames that are likely to come next, for which others are held: known by their bytes, if it is their turn."""

    def may_send(self, word: type[Word]) -> bool:
        return (self.role, word) in GROUP_TABLE[self.state]

    def send(self, word: Word) -> bytes:
        """The bytes of a word."""
        following = GROUP_TABLE[self.state].get((self.role, type(word)))
        assert following is not None, f"{self.role} may not say {type(word).__name__} when {self.state.value}"
        assert self._is_of_this_point(word), f"{self.role} may not speak of another point than {self.point}"
        self._follow(word, following)
        message = _frame(word, self._sequence)
        self._sequence += 1
        if isinstance(word, Gathered):
            self._foreseen.clear()
            likely: tuple[Word, ...] = (Prepare(point=word.point), Release(point=word.point))
            for sequence, each in enumerate(likely, self._reader.sequence):
                self._foreseen[_frame(each, sequence)] = (sequence & 0xFFFFFFFF, each)
        return message

    def receive(self, received: Bytes) -> list[Word]:
        """Words completed by these bytes. Raises ProtocolError; then the session is closed."""
        try:
            if self._foreseen and (found := self._foreseen.get(bytes(received))) is not None:
                sequence, word = found
                if sequence == self._reader.sequence and self._reader.is_empty():
                    self._reader.pass_over()
                    return [self._admit(word)]
            return [self._hear(frame.type, frame.payload) for frame in self._reader.feed(received)]
        except ProtocolError:
            self.state = GroupState.CLOSED
            raise

    def _hear(self, frame_type: FrameType, payload: Bytes) -> Word:
        if frame_type is not FrameType.GROUP:
            raise ProtocolError(f"{self.peer} sent a {frame_type.name} frame to a group")
        return self._admit(decode_word(payload))

    def _admit(self, word: Word) -> Word:
        following = GROUP_TABLE[self.state].get((self.peer, type(word)))
        if following is None:
            raise ProtocolError(f"{self.peer} said {type(word).__name__} when {self.state.value}")
        if not self._is_of_this_point(word):
            raise ProtocolError(f"{self.peer} said {type(word).__name__} of another point than {self.point}")
        self._follow(word, following)
        return word

    def _is_of_this_point(self, word: Word) -> bool:
        return not isinstance(word, _POINT_WORDS) or word.point == self.point

    def _follow(self, word: Word, following: GroupState) -> None:
        if isinstance(word, Gather):
            self.point = word.point
        self.state = following


def _frame(word: Word, sequence: int) -> bytes:
    payload = encode_word(word)
    return encode_frame_header(FrameType.GROUP, len(payload), sequence) + payload
