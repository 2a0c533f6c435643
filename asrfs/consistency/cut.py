"""The coordinator's decisions about one point of a group. Pure: words and instants in, words out.

    gathering ──all GATHERED──▶ preparing ──all READY──▶ releasing ──all RELEASED──▶ done: real, or void
        │                           │                        │
        └── declined, lost, too late: void, or, where partial points are allowed, without that member

Why a point is a cut: RELEASE is said to anyone only when everyone who shall be in it has said READY. Whoever was still
holding when RELEASE came, held from before that instant until after it. So there is an instant at which all of them
held, what each acknowledged before it is in its cut, and what it acknowledged after it is not: no effect is in the
point without its cause. Who was not holding any more has acknowledged something nobody knows about, so it is not in the
point, and where all are wanted there is none.

What is decided here becomes a point only when it is written into the coordinator's history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from asrfs.errors import foreign_line
from asrfs.model.marker import CONSISTENCIES, Consistency
from asrfs.protocol.group_messages import (
    TEXT_CHARACTERS_MAX,
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

RELEASED_S_MAX = 10.0
"""How long an answer to RELEASE may take: the marker becomes durable before it."""
PARTIAL_MEMBERS_MIN = 2


@dataclass(frozen=True, slots=True)
class CutOrder:
    """What is to be cut. `members`: ids of machines; `hold_s`: for how long each may hold; `gather_s`: for how long all
    may take to be ready to; `partial`: whether a point without some of them is one."""

    point: str
    group: str
    generation: int
    members: tuple[str, ...]
    consistency: Consistency = "crash"
    name: str | None = None
    note: str | None = None
    hold_s: float = 1.0
    gather_s: float = 60.0
    partial: bool = False


@dataclass(frozen=True, slots=True)
class HeldShare:
    """A member's part of a point: the record that is its marker, what that is, how long the member held."""

    machine: str
    lsn: int
    hold_ms: float
    consistency: Consistency


@dataclass(frozen=True, slots=True)
class Outcome:
    """`shares` is empty where the point is void; `reasons`: why a member is not in it, by its id."""

    shares: tuple[HeldShare, ...]
    reasons: dict[str, str]

    @property
    def consistency(self) -> Consistency:
        """Of the whole: the least of any share."""
        return min((share.consistency for share in self.shares), key=CONSISTENCIES.index)


class Phase(Enum):
    GATHERING = "gathering"
    PREPARING = "preparing"
    RELEASING = "releasing"
    DONE = "done"


class _Part(Enum):
    ASKED = "asked"
    GATHERED = "gathered"
    READY = "ready"
    HELD = "held"
    OUT = "out"


Said = list[tuple[str, Word]]
"""`(member, word for it)`, to be said in this order."""


class Cut:
    """One point. `wake_at`: call `tick` then, when nothing else has come. `outcome` is set when it is done."""

    def __init__(self, order: CutOrder) -> None:
        self.order = order
        self.phase = Phase.GATHERING
        self.wake_at = math.inf
        self.outcome: Outcome | None = None
        self._parts = dict.fromkeys(order.members, _Part.ASKED)
        self._lsns: dict[str, int] = {}
        self._shares: dict[str, HeldShare] = {}
        self._reasons: dict[str, str] = {}

    def begin(self, present: Sequence[str], now: float) -> Said:
        """Start with the members that can be reached."""
        order = self.order
        said: Said = []
        for member in order.members:
            if member not in present:
                said += self._drop(member, "it is not connected", now)
        if self.phase is Phase.DONE:
            return said
        self.wake_at = now + order.gather_s
        word = Gather(
            point=order.point,
            generation=order.generation,
            consistency=order.consistency,
            seconds=order.gather_s,
            hold_s=order.hold_s,
            name=order.name,
            note=order.note,
        )
        return said + [(member, word) for member in self._taking_part()]

    def hear(self, member: str, word: Word, now: float) -> Said:
        """What a member says of this point."""
        if self.phase is Phase.DONE or self._parts.get(member, _Part.OUT) is _Part.OUT:
            return []
        if getattr(word, "point", None) != self.order.point:
            return []  # of an earlier one, which that member was slow to end
        if isinstance(word, Declined):
            return self._drop(member, foreign_line(word.text), now)
        if isinstance(word, Gathered) and self.phase is Phase.GATHERING:
            self._parts[member] = _Part.GATHERED
        elif isinstance(word, Ready) and self.phase is Phase.PREPARING:
            self._parts[member] = _Part.READY
            self._lsns[member] = word.lsn
        elif isinstance(word, Released) and self.phase is Phase.RELEASING:
            if not word.holding:
                return self._drop(member, "it had let go before it was told to", now)
            self._parts[member] = _Part.HELD
            self._shares[member] = HeldShare(member, self._lsns[member], word.hold_ms, word.consistency)
        return self._go_on(now)

    def lose(self, member: str, now: float) -> Said:
        """The connection to a member is gone."""
        return self._drop(member, "the connection to it was lost", now)

    def tick(self, now: float) -> Said:
        """Time has passed: who has not answered by `wake_at` is out."""
        if now < self.wake_at or self.phase is Phase.DONE:
            return []
        why = {
            Phase.GATHERING: "it was not ready to hold in time",
            Phase.PREPARING: "it did not hold in time",
            Phase.RELEASING: "it did not say in time whether it was still holding",
        }[self.phase]
        due = _DUE[self.phase]
        said: Said = []
        for member in self._taking_part():
            if self._parts[member] is not due:
                said += self._drop(member, why, now, going_on=False)
        return said + self._go_on(now)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _taking_part(self) -> list[str]:
        return [member for member, part in self._parts.items() if part is not _Part.OUT]

    def _drop(self, member: str, why: str, now: float, *, going_on: bool = True) -> Said:
        if self.phase is Phase.DONE or self._parts.get(member, _Part.OUT) is _Part.OUT:
            return []
        self._parts[member] = _Part.OUT
        self._reasons[member] = why[:TEXT_CHARACTERS_MAX]
        said: Said = []
        if self.phase is not Phase.RELEASING:  # else it was told to let go already
            said.append((member, Void(point=self.order.point, text=self._reasons[member])))
        left = len(self._taking_part())
        if not self.order.partial or left < min(PARTIAL_MEMBERS_MIN, len(self.order.members)):
            return said + self._give_up(f"{member}: {why}")
        return said + (self._go_on(now) if going_on else [])

    def _give_up(self, why: str) -> Said:
        said: Said = []
        if self.phase is not Phase.RELEASING:
            void = Void(point=self.order.point, text=why[:TEXT_CHARACTERS_MAX])
            said = [(member, void) for member in self._taking_part()]
        self._finish(())
        return said

    def _go_on(self, now: float) -> Said:
        """To the next phase, if everyone who takes part has done with this one."""
        if self.phase is Phase.DONE or any(self._parts[each] is not _DUE[self.phase] for each in self._taking_part()):
            return []
        if self.phase is Phase.GATHERING:
            return self._prepare(now)
        if self.phase is Phase.PREPARING:
            self.phase = Phase.RELEASING
            self.wake_at = now + RELEASED_S_MAX
            # Who has held for longest is told first.
            release = Release(point=self.order.point)
            return [(member, release) for member in self._lsns if self._parts[member] is _Part.READY]
        self._finish(tuple(self._shares[member] for member in self._taking_part()))
        return []

    def _prepare(self, now: float) -> Said:
        order = self.order
        self.phase = Phase.PREPARING
        # Who is late must be given up while the others still hold.
        self.wake_at = now + (order.hold_s / 2 if order.partial else order.hold_s)
        word = Prepare(point=order.point)
        return [(member, word) for member in self._taking_part()]

    def _finish(self, shares: tuple[HeldShare, ...]) -> None:
        self.phase = Phase.DONE
        self.wake_at = math.inf
        self.outcome = Outcome(shares, dict(self._reasons))


_DUE = {Phase.GATHERING: _Part.GATHERED, Phase.PREPARING: _Part.READY, Phase.RELEASING: _Part.HELD}
"""What everyone must have come to before the next phase begins."""
