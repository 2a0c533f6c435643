"""Words between the members of a group: a hostile member, a hostile coordinator.

Only ProtocolError leaves, and ends the connection for good. A `Cut` that is told such words never releases anybody into
a point before all of it is ready.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asrfs.consistency.cut import Cut, CutOrder, Phase
from asrfs.protocol.frames import FrameType, ProtocolError
from asrfs.protocol.group_messages import (
    Answer,
    Ask,
    Confirmed,
    Gather,
    Gathered,
    Join,
    Joined,
    Prepare,
    Ready,
    Release,
    Released,
    Settle,
    Settled,
    Void,
    Word,
    encode_word,
)
from asrfs.protocol.group_session import GROUP_TABLE, GroupRole, GroupSession, GroupState
from tests.proof.fuzzing.mutations import Strike
from tests.proof.fuzzing.target import Target, Trial
from tests.proof.fuzzing.wire import Piece, break_conversation

POINT, OTHER = "a" * 32, "d" * 32
MEMBER, COORDINATOR = "b" * 32, "c" * 32
_FROM_MEMBER: tuple[Word, ...] = (
    Join(protocol=1, group="e" * 32, generation=3),
    Ask(request=1, consistency="crash", name="before", note="a note", wait=5.0),
    Gathered(point=POINT),
    Ready(point=POINT, lsn=9),
    Released(point=POINT, holding=True, hold_ms=2.0, consistency="filesystem"),
    Settled(point=POINT),
    Gathered(point=OTHER),
    Ready(point=OTHER, lsn=11),
    Released(point=OTHER, holding=False, hold_ms=3.0),
)
_FROM_COORDINATOR: tuple[Word, ...] = (
    Joined(),
    Gather(point=POINT, generation=3, consistency="filesystem", seconds=5.0, hold_s=1.0, name="before"),
    Prepare(point=POINT),
    Release(point=POINT),
    Confirmed(point=POINT, ready=2, members=(MEMBER, COORDINATOR)),
    Settle(point=POINT, lsn=9),
    Answer(request=1, point=POINT, ready=2, members=2),
    Gather(point=OTHER, generation=3, consistency="crash", seconds=1.0, hold_s=1.0),
    Prepare(point=OTHER),
    Void(point=OTHER, text="too late"),
)
_ORDER: tuple[tuple[GroupRole, int], ...] = (
    *(("member", 0), ("coordinator", 0), ("member", 1), ("coordinator", 1), ("member", 2), ("coordinator", 2)),
    *(("member", 3), ("coordinator", 3), ("member", 4), ("coordinator", 4), ("coordinator", 5), ("member", 5)),
    *(("coordinator", 6), ("coordinator", 7), ("member", 6), ("coordinator", 8), ("member", 7)),
    *(("coordinator", 9), ("member", 8)),
)
"""Who speaks when, where nothing is broken."""


def _conversation(role: GroupRole) -> list[Piece]:
    words = _FROM_MEMBER if role == "member" else _FROM_COORDINATOR
    return [Piece(FrameType.GROUP, encode_word(word)) for word in words]


def _hear(role: GroupRole, stream: bytes, pieces: list[bytes]) -> tuple[list[Word], GroupState]:
    """What an end makes of a stream that it gets bit by bit, while it says its own part whenever it may."""
    end = GroupSession(role)
    heard: list[Word] = []
    own = list(_FROM_MEMBER if role == "member" else _FROM_COORDINATOR)
    try:
        for piece in pieces:
            while own and end.may_send(type(own[0])) and end._is_of_this_point(own[0]):
                end.send(own.pop(0))
            state = end.state
            for word in end.receive(piece):
                assert any((end.peer, type(word)) in row for row in GROUP_TABLE.values()), state
                heard.append(word)
    except ProtocolError:
        assert end.state is GroupState.CLOSED
    return heard, end.state


@contextmanager
def _open_session(_path: Path) -> Iterator[Trial]:
    def trial(rng: random.Random, strike: Strike) -> None:
        role: GroupRole = rng.choice(("member", "coordinator"))
        peer: GroupRole = "coordinator" if role == "member" else "member"
        stream = break_conversation(rng, _conversation(peer), strike)
        single = [stream[at : at + 1] for at in range(len(stream))]
        heard, _ = _hear(role, stream, single)
        assert len(heard) <= len(_ORDER), "more words than were said"
        if role == "coordinator":
            _tell(rng, heard)

    yield trial


def _tell(rng: random.Random, heard: list[Word]) -> None:
    """A cut is told what a hostile member says, beside an honest one."""
    order = CutOrder(
        point=POINT, group="shop", generation=3, members=(MEMBER, COORDINATOR), consistency="filesystem", partial=False
    )
    cut = Cut(order)
    said = cut.begin(order.members, 0.0)
    ready: set[str] = set()
    for word in [
        *heard,
        Gathered(point=POINT),
        Ready(point=POINT, lsn=1),
        Released(point=POINT, holding=True, hold_ms=1),
    ]:
        for member in rng.sample(order.members, 2):
            if isinstance(word, Ready) and cut.phase is Phase.PREPARING:
                ready.add(member)
            said = cut.hear(member, word, 0.1)
            assert not any(isinstance(each, Release) for _, each in said) or ready == set(order.members)
    assert cut.outcome is None or len(cut.outcome.shares) in (0, 2)


TARGETS = (Target("words of a group", 3, _open_session),)
