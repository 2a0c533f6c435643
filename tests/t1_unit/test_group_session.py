"""What may be said between a member and its coordinator: the table, the bytes, and words that cross."""

from __future__ import annotations

import msgspec
import pytest

from asrfs.protocol.frames import FrameType, ProtocolError, encode_frame_header
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
from asrfs.protocol.group_session import GROUP_TABLE, GroupRole, GroupSession, GroupState

POINT, OTHER = "a" * 32, "b" * 32
JOIN = Join(protocol=1, group="c" * 32, generation=3)
GATHER = Gather(point=POINT, generation=3, consistency="filesystem", seconds=5.0, hold_s=1.0, name="n", note="x y")
WORDS: tuple[tuple[GroupRole, Word], ...] = (
    ("member", JOIN),
    ("coordinator", Joined()),
    ("coordinator", NotJoined(text="no")),
    ("coordinator", GATHER),
    ("member", Gathered(point=POINT)),
    ("coordinator", Prepare(point=POINT)),
    ("member", Ready(point=POINT, lsn=9)),
    ("member", Declined(point=POINT, text="busy")),
    ("coordinator", Release(point=POINT)),
    ("coordinator", Void(point=POINT, text="late")),
    ("member", Released(point=POINT, holding=True, hold_ms=1.5)),
    ("coordinator", Confirmed(point=POINT, ready=2, members=("d" * 32, "e" * 32))),
    ("coordinator", Settle(point=POINT, lsn=9)),
    ("member", Settled(point=POINT)),
    ("member", Ask(request=1, consistency="crash", wait=3.0)),
    ("coordinator", Answer(request=1, point=POINT, ready=2, members=2)),
    ("member", Beat()),
    ("coordinator", Beat()),
)
BY_KIND = {(role, type(word)): word for role, word in WORDS}


class Pair:
    """Two ends with nothing between them."""

    def __init__(self) -> None:
        self.ends: dict[GroupRole, GroupSession] = {
            "member": GroupSession("member"),
            "coordinator": GroupSession("coordinator"),
        }

    def say(self, role: GroupRole, word: Word) -> None:
        other: GroupRole = "coordinator" if role == "member" else "member"
        for at, byte in enumerate(sent := self.ends[role].send(word)):
            heard = self.ends[other].receive(bytes([byte]))
            assert heard == ([word] if at == len(sent) - 1 else [])
        assert self.ends["member"].state is self.ends["coordinator"].state

    def go(self, *kinds: tuple[GroupRole, type[Word]]) -> Pair:
        for kind in kinds:
            self.say(kind[0], BY_KIND[kind])
        return self


WAYS: dict[GroupState, tuple[tuple[GroupRole, type[Word]], ...]] = {
    GroupState.START: (),
    GroupState.JOINING: (("member", Join),),
}
_IDLE: tuple[tuple[GroupRole, type[Word]], ...] = (("member", Join), ("coordinator", Joined))
_PREPARING = (*_IDLE, ("coordinator", Gather), ("member", Gathered), ("coordinator", Prepare))
WAYS |= {
    GroupState.IDLE: _IDLE,
    GroupState.GATHERING: (*_IDLE, ("coordinator", Gather)),
    GroupState.GATHERED: (*_IDLE, ("coordinator", Gather), ("member", Gathered)),
    GroupState.PREPARING: _PREPARING,
    GroupState.READY: (*_PREPARING, ("member", Ready)),
    GroupState.DECLINED: (*_PREPARING, ("member", Declined)),
    GroupState.ENDING: (*_PREPARING, ("coordinator", Void)),
    GroupState.CLOSED: (("member", Join), ("coordinator", NotJoined)),
}


def test_every_state_has_a_way_to_it_and_every_word_is_tried() -> None:
    assert set(WAYS) == set(GROUP_TABLE) == set(GroupState)
    assert {kind for row in GROUP_TABLE.values() for kind in row} == set(BY_KIND)


@pytest.mark.parametrize("state", list(GroupState), ids=lambda state: state.value)
@pytest.mark.parametrize("kind", list(BY_KIND), ids=lambda kind: f"{kind[0]}-{kind[1].__name__}")
def test_the_table_is_what_may_be_said(state: GroupState, kind: tuple[GroupRole, type[Word]]) -> None:
    pair = Pair().go(*WAYS[state])
    role, word = kind[0], BY_KIND[kind]
    following = GROUP_TABLE[state].get(kind)
    assert pair.ends[role].may_send(kind[1]) == (following is not None)
    if following is not None:
        pair.say(role, word)
        assert pair.ends[role].state is following
        return
    with pytest.raises(AssertionError):
        pair.ends[role].send(word)
    other: GroupRole = "coordinator" if role == "member" else "member"
    payload = encode_word(word)
    sequence = pair.ends[role]._sequence
    with pytest.raises(ProtocolError):
        pair.ends[other].receive(encode_frame_header(FrameType.GROUP, len(payload), sequence) + payload)
    assert pair.ends[other].state is GroupState.CLOSED


@pytest.mark.parametrize("word", [Gathered, Ready, Declined])
def test_a_void_may_cross_what_the_member_says(word: type[Word]) -> None:
    start = WAYS[GroupState.GATHERING if word is Gathered else GroupState.PREPARING]
    pair = Pair().go(*start)
    crossing = pair.ends["member"].send(BY_KIND["member", word])
    void = pair.ends["coordinator"].send(BY_KIND["coordinator", Void])
    assert pair.ends["coordinator"].receive(crossing) == [BY_KIND["member", word]]
    pair.ends["member"].receive(void)
    pair.say("member", BY_KIND["member", Released])
    assert pair.ends["coordinator"].state is GroupState.IDLE


def test_words_of_another_point_are_refused() -> None:
    pair = Pair().go(*WAYS[GroupState.PREPARING])
    payload = encode_word(Ready(point=OTHER, lsn=1))
    sequence = pair.ends["member"]._sequence
    with pytest.raises(ProtocolError, match="another point"):
        pair.ends["coordinator"].receive(encode_frame_header(FrameType.GROUP, len(payload), sequence) + payload)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\x81\xa1t\xa5ready",
        encode_word(Ready(point="x", lsn=1)),
        encode_word(Ready(point=POINT, lsn=-1)),
        encode_word(Ready(point=POINT, lsn=1 << 63)),
        encode_word(Released(point=POINT, holding=True, hold_ms=float("nan"))),
        encode_word(Declined(point=POINT, text="x" * 501)),
        encode_word(msgspec.structs.replace(GATHER, name="../x")),
        encode_word(msgspec.structs.replace(GATHER, hold_s=float("inf"))),
        encode_word(msgspec.structs.replace(GATHER, seconds=-1.0)),
        encode_word(Confirmed(point=POINT, ready=1, members=(POINT,) * 300)),
        b"\x91" * 5000,
    ],
)
def test_hostile_words_are_refused(hostile: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_word(hostile)


def test_frames_of_other_conversations_are_refused() -> None:
    session = GroupSession("coordinator")
    with pytest.raises(ProtocolError, match="HELLO"):
        session.receive(encode_frame_header(FrameType.HELLO, 0, 0))


@pytest.mark.parametrize("beats", [0, 1])
def test_words_that_were_foreseen_are_heard_like_any_other(beats: int) -> None:
    pair = Pair().go(*WAYS[GroupState.GATHERED])
    member, coordinator = pair.ends["member"], pair.ends["coordinator"]
    for _ in range(beats):  # the frames that follow are not the ones that were foreseen
        assert member.receive(coordinator.send(Beat())) == [Beat()]
    assert member.receive(coordinator.send(Prepare(point=POINT))) == [Prepare(point=POINT)]
    coordinator.receive(member.send(Ready(point=POINT, lsn=9)))
    assert member.receive(coordinator.send(Release(point=POINT))) == [Release(point=POINT)]
    assert member.state is coordinator.state is GroupState.ENDING
    pair.go(("member", Released), ("coordinator", Gather), ("coordinator", Void))


def test_a_word_that_was_foreseen_counts_in_its_turn_only() -> None:
    """A frame of it too early, or once more, is a frame out of sequence."""
    early = Pair().go(*WAYS[GroupState.READY]).ends["coordinator"].send(Release(point=POINT))
    with pytest.raises(ProtocolError, match="was due"):
        Pair().go(*WAYS[GroupState.GATHERED]).ends["member"].receive(early)
    pair = Pair().go(*WAYS[GroupState.GATHERED])
    prepare = pair.ends["coordinator"].send(Prepare(point=POINT))
    pair.ends["member"].receive(prepare)
    with pytest.raises(ProtocolError, match="was due"):
        pair.ends["member"].receive(prepare)
