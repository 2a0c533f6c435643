"""One machine's part in one point of a group, whoever its coordinator is and wherever.

    GATHER:  [hooks, freeze ─▶] arm the disk server with the marker ─▶ GATHERED
    PREPARE: append the marker and hold ─▶ READY
    RELEASE or VOID: let go ─▶ marker durable ─▶ RELEASED ─▶ thaw

What lies between PREPARE and letting go is what the writers of all members wait for: it is two short questions to the
disk server, and everything else is done before or afterwards.

The wait for the coordinator ends by its word, by the loss of the connection, or when the hold has run out by itself;
whichever it is, letting go is asked of the disk server, which alone knows whether it was still holding. That the
marker is durable is waited for after the release: it costs the writers nothing that way, and a marker that is lost with
the power is missing at the store, so that there is no point.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio

from asrfs.consistency.points import Point
from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.marker import Consistency, MarkerRecord, encode_marker
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

_RELEASE_S_MAX = 5.0
_HOLD_SLACK_S = 0.5
_ATTENTION_S = 0.2
"""For so long at the most nothing else is done by this process while a word is awaited for which others are held."""
_LET_GO_S = 0.001
"""For each member, before anything is done behind the release: those that share a processor with this one are being let
go just now."""


class Held(NamedTuple):
    """Where a hold began: the marker's place in the history."""

    lsn: int
    time_ns: int
    epoch: int


class HoldingServer(Protocol):
    """What is asked of the machine's disk server. Raises TemporaryError while it is away."""

    async def arm(self, hold_id: str, marker: bytes, seconds_max: float, not_after: float | None) -> None:
        """Be ready for `hold`: to append this marker, unless it is later than `not_after` (monotonic), and to hold for
        so long at the most."""

    async def hold(self, hold_id: str) -> Held:
        """Append the marker and hold every change behind it."""

    def let_go(self, hold_id: str, quiet_s: float) -> None:
        """The first half of `release`, done at once. Nothing is raised."""

    async def release(self, hold_id: str, quiet_s: float) -> tuple[bool, float]:
        """Let go, if that was not asked for yet; then do nothing for `quiet_s`, and say whether it was holding until it
        let go, and for how many milliseconds it did."""

    async def make_durable(self) -> None:
        """Return when everything appended before the call is durable."""


AtInstant = Callable[[MarkerRecord, float | None], Awaitable[None]]
"""Given the marker as it may be said, and until when (monotonic)."""


class Instants(Protocol):
    """Makes instants of some consistency on this machine, one at a time."""

    async def at_instant(self, marker: MarkerRecord, do: AtInstant) -> None:
        """Bring the machine into the state that `marker.consistency` wants, call `do` with the marker as it may be said
        by then (it may be of less, and say why), and undo it afterwards. Raises AsrfsError when nothing came of it."""


@dataclass(frozen=True, slots=True)
class GroupNames:
    """What a share says of its group: its name and the ids of its members."""

    group: str
    members: tuple[str, ...]


class GroupShare:
    """`say`: to the coordinator, at once; `told`: what it says of this point after its first word; `attend`: do nothing
    but wait for that, for so long at the most. `made`: the marker's place, once it has one."""

    def __init__(
        self,
        server: HoldingServer,
        instants: Instants,
        names: GroupNames,
        say: Callable[[Word], None],
        told: trio.MemoryReceiveChannel[Word],
        attend: Callable[[float], None],
    ) -> None:
        self._server = server
        self._instants = instants
        self._names = names
        self._say = say
        self._told = told
        self._attend = attend
        self.made: Point | None = None
        self._consistency: Consistency = "crash"
        self._hold_ms = 0.0
        self._end: Release | Void | None = None
        self._is_lost = False
        self._is_over = False

    async def run(self, first: Gather) -> None:
        """From the coordinator's first word to RELEASED."""
        self._first = first
        try:
            await self._instants.at_instant(self._marker(first), self._at_instant)
        except AsrfsError as error:
            if not self._is_over:  # else the coordinator may be at its next point, and no word of this one is due
                self._decline(error)
        if not self._is_over:
            while self._end is None and not self._is_lost:
                if isinstance(await self._hear(math.inf), Prepare):
                    self._decline(TemporaryError("it was not asked in time to hold its writes"))
            self._finish(holding=False)

    async def _at_instant(self, marker: MarkerRecord, not_after: float | None) -> None:
        self._consistency = marker.consistency
        self._look()  # it may be over by now, after a wait for another group's point
        if self._end is not None or self._is_lost:
            return
        first = self._first
        try:
            try:
                await self._server.arm(first.point, encode_marker(marker), first.hold_s, not_after)
                self._say(Gathered(point=first.point))
                if not_after is None:  # else others may freeze for long
                    self._attend(min(_ATTENTION_S, first.seconds))
                if not isinstance(await self._hear(first.seconds), Prepare):
                    return
                held = await self._server.hold(first.point)
            except (AsrfsError, OSError) as error:
                self._decline(error)
                return
            self._say(Ready(point=first.point, lsn=held.lsn))
            self._attend(min(_ATTENTION_S, first.hold_s))
            await self._hear(first.hold_s + _HOLD_SLACK_S)
        finally:
            holding, self._hold_ms = await self._let_go(first.point)
        self.made = Point.of(marker, lsn=held.lsn, epoch=held.epoch, time_ns=held.time_ns)
        if self._end is not None:
            self._finish(holding=holding and isinstance(self._end, Release) and await self._is_durable())

    async def _hear(self, seconds_max: float) -> Word | None:
        """The coordinator's next word; None when the connection is lost or the time is over."""
        if (word := self._look()) is not None or self._is_lost:
            return word
        with trio.move_on_after(seconds_max):
            try:
                return self._note(await self._told.receive())
            except (trio.EndOfChannel, trio.ClosedResourceError):
                self._is_lost = True
        return None

    def _look(self) -> Word | None:
        """The next of what has been said already."""
        try:
            return self._note(self._told.receive_nowait())
        except (trio.EndOfChannel, trio.ClosedResourceError):
            self._is_lost = True
        except trio.WouldBlock:
            pass
        return None

    def _note(self, word: Word) -> Word:
        if isinstance(word, Release | Void):
            self._end = word
        return word

    async def _let_go(self, point: str) -> tuple[bool, float]:
        """A disk server that does not answer lets go by itself; what it held is not known and taken for nothing."""
        quiet_s = _LET_GO_S * len(self._names.members) if self._consistency == "crash" else 0.0
        self._server.let_go(point, quiet_s)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _RELEASE_S_MAX):
            try:
                return await self._server.release(point, quiet_s)
            except (AsrfsError, OSError):
                return False, 0.0
        return False, 0.0

    async def _is_durable(self) -> bool:
        try:
            await self._server.make_durable()
        except (AsrfsError, OSError):
            return False
        return True

    def _decline(self, error: Exception) -> None:
        self._say(Declined(point=self._first.point, text=str(error)[:TEXT_CHARACTERS_MAX]))

    def _finish(self, *, holding: bool) -> None:
        """The answer to RELEASE or VOID, once."""
        self._is_over = True
        word = Released(point=self._first.point, holding=holding, hold_ms=self._hold_ms, consistency=self._consistency)
        self._say(word)

    def _marker(self, first: Gather) -> MarkerRecord:
        return MarkerRecord(
            id=first.point,
            consistency=first.consistency,
            name=first.name,
            note=first.note,
            group=self._names.group,
            group_point=first.point,
            members=self._names.members,
        )


LATER_WORDS = (Prepare, Release, Void)
