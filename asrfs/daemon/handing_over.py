"""Making way for a planned failover, when the store says so, and taking that back.

    HANDOVER ─▶ hooks ─▶ drain ─▶ quiet ─▶ fenced.json, fence ─▶ marker at LSN n ─▶ thaw ─▶ drain and apply to n
        ─▶ compare all disks ─▶ answer written down ─▶ HANDED_OVER n ─▶ … commit, or HANDOVER take-back

Behind the fence no guest writes, so n has everything, and what is equal then is equal for good. Until the answer is
written down this host may take the fence back, and does: when a disk differs, when time is up, when the store is away.
After that the store may have gone on, so only its word counts, or a person's (`asrfs resync --full-scan`).

A kill between any two steps leaves a fence that says for whom it is: the store asks again, and what is done already is
not done twice. Where nobody asks again for a while, the fence was for nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from asrfs.daemon.agent_verbs import through_a_restart
from asrfs.errors import AsrfsError, IntegrityError, RefusedError, TemporaryError, foreign_line
from asrfs.model.rejoining import Handed
from asrfs.protocol.messages import HandedOver, Handover
from asrfs.replication.comparer import Comparison
from asrfs.replication.outlet import Outlet
from asrfs.replication.rejoiner import Rejoiner

AWAY_S_MAX = 60.0
"""For so long the store may be away before writes go on without it."""
LOOK_EVERY_S = 1.0


class DiffersError(IntegrityError):
    """Host and store are not the same."""

    def __init__(self, found: Comparison, lsn: int) -> None:
        super().__init__(
            f"{found.chunks_different} of {found.chunks_compared} chunks differ between host and store at LSN {lsn}: "
            "`asrfs resync --full-scan` on the host heals that"
        )
        self.found = found


Fencing = Callable[[], Awaitable[None]]


class Stopping(Protocol):
    """What stops the machine, and starts it again."""

    @property
    def is_stopped(self) -> bool: ...

    async def stop(self, failover: str) -> None:
        """Raises AsrfsError, OSError."""

    async def start_again(self, failover: str) -> None:
        """If it was stopped."""


@dataclass(slots=True)
class HandingOver:
    """`check` raises RefusedError where no disk could be handed over; `hooks` stop what uses the disks; `drain` returns
    when the store has what was appended at the call; `fence_and_mark` fences by the function given, while all is quiet,
    and returns the LSN of a marker behind that; `settle` waits until that LSN is acknowledged and applied; `compare`
    compares all disks.
    """

    rejoiner: Rejoiner
    outlet: Outlet
    check: Callable[[], None]
    hooks: Stopping
    drain: Callable[[], Awaitable[None]]
    fence_and_mark: Callable[[str, Fencing], Awaitable[int]]
    settle: Callable[[int], Awaitable[None]]
    compare: Callable[[], Awaitable[Comparison]]
    _wanted: Handover | None = None
    _doing: Handover | None = None
    _heard: trio.Event = field(default_factory=trio.Event)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def heard(self, word: Handover) -> None:
        """The store's word; what is being done for another one ends."""
        if self._doing is not None and (self._doing.id, self._doing.wanted) == (word.id, word.wanted):
            return
        self._wanted = word
        self._scope.cancel()
        self._heard.set()

    async def run(self) -> None:
        """For ever: do what the store wants."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_unasked)
            while True:
                await self._heard.wait()
                self._heard = trio.Event()
                self._doing, self._wanted = self._wanted, None
                assert self._doing is not None
                with trio.CancelScope() as self._scope:
                    await self._obey(self._doing)
                self._doing = None

    async def _obey(self, word: Handover) -> None:
        log = structlog.get_logger("asrfs.handover").bind(failover=word.id)
        fence = self.rejoiner.fence
        try:
            if fence is not None and not fence.handover:
                raise RefusedError("this host was superseded, and has nothing to hand over or to take back")
            if word.wanted == "take-back":
                await self._take_back(word.id)
                log.warning("taken back")
                answer = HandedOver(id=word.id, outcome="taken-back")
            else:
                log.warning("the machine is to be handed over")
                answer = await self._hand_over(word)
                log.warning("answered", outcome=answer.outcome, lsn=answer.lsn, error=answer.error)
            if word.id:  # else nobody asked
                await self.outlet.say(answer)
        except (AsrfsError, OSError) as error:  # the store says it again
            log.warning("not answered", reason=str(error))

    # ---- handing over ----

    async def _hand_over(self, word: Handover) -> HandedOver:
        fence = self.rejoiner.fence
        if fence is not None and fence.handover == word.id and fence.handed is not None:
            return _handed_over(word.id, fence.handed)
        try:
            handed = await self._within(word.seconds_max, word.id)
            await self.rejoiner.handed(word.id, handed)
        except (AsrfsError, OSError) as error:
            await self._take_back(word.id)
            why = foreign_line(str(error)) or type(error).__name__
            found = error.found if isinstance(error, DiffersError) else Comparison()
            return HandedOver(
                id=word.id,
                outcome="failed",
                chunks_compared=found.chunks_compared,
                chunks_different=found.chunks_different,
                error=why,
            )
        return _handed_over(word.id, handed)

    async def _within(self, seconds_max: float, failover: str) -> Handed:
        """Raises TemporaryError when time is up or the store is away for too long, and what it failed with."""
        handed: Handed | None = None
        failure: Exception | None = None

        async def hand_over() -> None:
            nonlocal handed, failure
            try:
                handed = await self._fenced_and_equal(failover)
            except (AsrfsError, OSError) as error:
                failure = error
            nursery.cancel_scope.cancel()

        is_away = False
        with trio.move_on_after(seconds_max):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hand_over)
                is_away = await self._until_away()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if handed is None:
            away = f"the store was away for {AWAY_S_MAX:g} s"
            raise TemporaryError(away if is_away else f"it was not handed over within {seconds_max:g} s")
        return handed

    async def _fenced_and_equal(self, failover: str) -> Handed:
        rejoiner = self.rejoiner
        if rejoiner.order is not None or (rejoiner.fence is not None and rejoiner.fence.handover != failover):
            raise RefusedError("this host goes on in a new epoch, or makes way for another failover already")
        self.check()
        epoch = rejoiner.progress.epoch
        if rejoiner.fence is None:
            await self.hooks.stop(failover)
        await self.drain()  # so that little is left to send while nothing can be written
        why = f"this host makes way for planned failover {failover[:12]}"

        async def fence() -> None:
            await through_a_restart(lambda: rejoiner.hand_over(failover, why))

        lsn = await self.fence_and_mark(failover, fence)
        await self.settle(lsn)
        found = await self.compare()
        if found.chunks_different:
            raise DiffersError(found, lsn)
        if rejoiner.progress.epoch != epoch:
            raise RefusedError("this host went on in a new epoch meanwhile")
        return Handed(lsn=lsn, chunks_compared=found.chunks_compared)

    async def _take_back(self, failover: str) -> None:
        await through_a_restart(lambda: self.rejoiner.take_back(failover))
        if self.rejoiner.fence is None:
            await self.hooks.start_again(failover)

    async def _until_away(self) -> bool:
        """Until there was no connection to the store for too long."""
        since = trio.current_time()
        while trio.current_time() < since + AWAY_S_MAX:
            await trio.sleep(LOOK_EVERY_S)  # sleep: a look now and then
            if self.outlet.is_open:
                since = trio.current_time()
        return True

    async def _give_up_unasked(self) -> None:
        """Take a fence back that nobody asks for any more, and of which the store was not told that it holds."""
        since = trio.current_time()
        while True:
            await trio.sleep(LOOK_EVERY_S)  # sleep: a look now and then
            fence = self.rejoiner.fence
            is_ours = fence is not None and bool(fence.handover) and fence.handed is None
            is_ours = is_ours or (fence is None and self.hooks.is_stopped)
            if not is_ours or self._doing is not None or self._wanted is not None:
                since = trio.current_time()
            elif trio.current_time() >= since + AWAY_S_MAX:
                self.heard(Handover(id=fence.handover if fence is not None else "", wanted="take-back"))


def _handed_over(failover: str, handed: Handed) -> HandedOver:
    return HandedOver(id=failover, outcome="handed-over", lsn=handed.lsn, chunks_compared=handed.chunks_compared)
