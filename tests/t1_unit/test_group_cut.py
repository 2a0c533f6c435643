"""The coordinator's decisions: who is told what when all answer, when somebody does not, what becomes of it."""

from __future__ import annotations

import random

import pytest

from asrfs.consistency.cut import RELEASED_S_MAX, Cut, CutOrder, Phase, Said
from asrfs.model.marker import Consistency
from asrfs.protocol.group_messages import (
    Declined,
    Gather,
    Gathered,
    Prepare,
    Ready,
    Release,
    Released,
    Void,
    Word,
)

POINT = "c" * 32
A, B, C = ("a" * 32, "b" * 32, "d" * 32)
ALL = (A, B, C)
HOLD_S, GATHER_S = 1.0, 30.0


def order(*, partial: bool = False, consistency: Consistency = "crash", members: tuple[str, ...] = ALL) -> CutOrder:
    return CutOrder(
        point=POINT,
        group="shop",
        generation=4,
        members=members,
        consistency=consistency,
        hold_s=HOLD_S,
        gather_s=GATHER_S,
        partial=partial,
    )


def told(said: Said) -> dict[str, type[Word]]:
    assert len({member for member, _ in said}) == len(said), "one word each"
    return {member: type(word) for member, word in said}


def ready(lsn: int = 7) -> Ready:
    return Ready(point=POINT, lsn=lsn)


def released(*, holding: bool = True, consistency: Consistency = "crash") -> Released:
    return Released(point=POINT, holding=holding, hold_ms=3.0, consistency=consistency)


def gathered(cut: Cut, members: tuple[str, ...] = ALL, now: float = 0.0) -> Said:
    """Begin, and all say that they are ready to hold: what is said then."""
    assert told(cut.begin(members, now)) == dict.fromkeys(members, Gather)
    said: Said = []
    for member in members:
        assert said == []
        said = cut.hear(member, Gathered(point=POINT), now)
    return said


def test_release_is_said_to_all_when_the_last_is_ready_and_to_none_before() -> None:
    cut = Cut(order())
    assert told(gathered(cut)) == dict.fromkeys(ALL, Prepare)
    assert cut.hear(A, ready(1), 0.1) == []
    assert cut.hear(B, ready(2), 0.2) == []
    assert cut.hear(B, ready(2), 0.2) == [], "said twice"
    assert told(cut.hear(C, ready(3), 0.3)) == dict.fromkeys(ALL, Release)
    for member in ALL:
        assert cut.outcome is None
        assert cut.hear(member, released(), 0.4) == []
    assert cut.outcome is not None
    assert [(share.machine, share.lsn) for share in cut.outcome.shares] == [(A, 1), (B, 2), (C, 3)]
    assert cut.outcome.consistency == "crash"


def test_who_has_held_for_longest_is_released_first() -> None:
    cut = Cut(order())
    gathered(cut)
    cut.hear(C, ready(), 0.1)
    cut.hear(A, ready(), 0.2)
    assert [member for member, _ in cut.hear(B, ready(), 0.3)] == [C, A, B]


@pytest.mark.parametrize("consistency", ["crash", "application"])
def test_nobody_is_prepared_before_all_are_ready_to_hold(consistency: Consistency) -> None:
    cut = Cut(order(consistency=consistency))
    assert told(cut.begin(ALL, 0.0)) == dict.fromkeys(ALL, Gather)
    assert cut.hear(A, ready(), 0.1) == [], "out of turn"
    for member in (A, B):
        assert cut.hear(member, Gathered(point=POINT), 1.0) == []
    assert told(cut.hear(C, Gathered(point=POINT), 2.0)) == dict.fromkeys(ALL, Prepare)
    for member in ALL:
        cut.hear(member, ready(), 2.1)
    cut.hear(A, released(consistency=consistency), 2.2)
    cut.hear(B, released(consistency="crash"), 2.2)
    cut.hear(C, released(consistency=consistency), 2.2)
    assert cut.outcome is not None
    assert cut.outcome.consistency == "crash", "the least of any share"


@pytest.mark.parametrize("partial", [False, True])
def test_who_had_let_go_is_not_in_the_point(partial: bool) -> None:
    cut = Cut(order(partial=partial))
    gathered(cut)
    for member in ALL:
        cut.hear(member, ready(), 0.1)
    cut.hear(A, released(), 0.2)
    assert cut.hear(B, released(holding=False), 0.2) == [], "everyone was told to let go already"
    cut.hear(C, released(), 0.2)
    assert cut.outcome is not None
    assert [share.machine for share in cut.outcome.shares] == ([A, C] if partial else [])
    assert B in cut.outcome.reasons


@pytest.mark.parametrize("phase", [Phase.GATHERING, Phase.PREPARING, Phase.RELEASING])
@pytest.mark.parametrize("how", ["declines", "is lost", "is late"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_member_that_fails_in_a_phase(phase: Phase, how: str, partial: bool) -> None:
    cut = Cut(order(consistency="filesystem", partial=partial))
    cut.begin(ALL, 0.0)
    words: dict[Phase, Word] = {
        Phase.GATHERING: Gathered(point=POINT),
        Phase.PREPARING: ready(),
        Phase.RELEASING: released(),
    }
    for step in (Phase.GATHERING, Phase.PREPARING, Phase.RELEASING):
        if step is phase:
            break
        for member in ALL:
            cut.hear(member, words[step], 0.1)
    assert cut.phase is phase
    for member in (A, B):
        assert cut.hear(member, words[phase], 0.2) == []
    if how == "declines":
        said = cut.hear(C, Declined(point=POINT, text="no"), 0.3)
    elif how == "is lost":
        said = cut.lose(C, 0.3)
    else:
        assert cut.tick(0.3) == []
        said = cut.tick(cut.wake_at)
    if phase is Phase.RELEASING:
        assert said == []
        assert cut.outcome is not None
        assert [share.machine for share in cut.outcome.shares] == ([A, B] if partial else [])
    elif partial:
        following = Prepare if phase is Phase.GATHERING else Release
        assert told(said) == {A: following, B: following, C: Void}
    else:
        assert told(said) == dict.fromkeys(ALL, Void)
        assert cut.outcome is not None
        assert cut.outcome.shares == ()
    assert cut.lose(C, 0.4) == []


def test_partial_points_give_up_the_late_while_the_others_still_hold() -> None:
    cut = Cut(order(partial=True))
    gathered(cut)
    assert cut.wake_at <= HOLD_S / 2
    whole = Cut(order())
    gathered(whole)
    assert whole.wake_at == HOLD_S


def test_one_of_many_is_no_point_of_a_group() -> None:
    cut = Cut(order(partial=True))
    assert told(cut.begin([A], 0.0)) == {B: Void, C: Void, A: Void}
    assert cut.outcome is not None
    assert cut.outcome.shares == ()
    alone = Cut(order(members=(A,)))
    gathered(alone, (A,))
    alone.hear(A, ready(), 0.1)
    alone.hear(A, released(), 0.1)
    assert alone.outcome is not None
    assert len(alone.outcome.shares) == 1


def test_members_that_cannot_be_reached_void_the_point_before_anybody_holds() -> None:
    cut = Cut(order())
    assert Prepare not in told(cut.begin([A, B], 0.0)).values()
    assert cut.outcome is not None
    assert cut.outcome.reasons == {C: "it is not connected"}


@pytest.mark.parametrize("partial", [False, True])
def test_whatever_comes_in_any_order_a_release_follows_ready_of_all_in_the_point(
    partial: bool, rng: random.Random
) -> None:
    """Random words, losses and instants: nobody is released into a point before all of it is ready, and it ends."""
    ends = 0
    for _ in range(400):
        cut = Cut(order(partial=partial, consistency=rng.choice(("crash", "filesystem"))))
        now = 0.0
        said = cut.begin(rng.sample(ALL, rng.randint(2, 3)), now)
        ready_of: set[str] = set()
        released_to: set[str] = set()
        while cut.outcome is None and now < GATHER_S + HOLD_S + RELEASED_S_MAX + 5:
            newly = {member for member, word in said if isinstance(word, Release)}
            assert newly <= ready_of
            released_to |= newly
            is_long = rng.random() < 0.01 and cut.wake_at > now
            now = cut.wake_at if is_long else now + rng.choice((0.0, 0.001, 0.01))
            member = rng.choice(ALL)
            word: Word = rng.choice((Gathered(point=POINT), ready(), released(), released(holding=rng.random() < 0.95)))
            if rng.random() < 0.01:
                said = cut.lose(member, now)
            elif now >= cut.wake_at:
                said = cut.tick(now)
            else:
                if isinstance(word, Ready) and cut.phase is Phase.PREPARING:
                    ready_of.add(member)
                said = cut.hear(member, word, now)
        assert cut.outcome is not None
        if cut.outcome.shares:
            ends += 1
            assert {share.machine for share in cut.outcome.shares} <= released_to
            assert partial or len(cut.outcome.shares) == 3
    assert ends > 10
