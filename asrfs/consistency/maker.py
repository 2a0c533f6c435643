"""The one place where an agent makes points, whoever wants them: a person, the schedule, a group.

A crash point is one marker and waits for nobody. For any other something is quiesced, by a process of its own; of
these there is one at a time, and the others queue up in the order they came.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import trio

from asrfs.consistency.point_request import PointRequest
from asrfs.consistency.points import Point
from asrfs.consistency.procedure import Held, Outcome, PointOrder, no_point
from asrfs.errors import TemporaryError, foreign_line
from asrfs.model.marker import FAILED_CHARACTERS_MAX, MarkerRecord, encode_marker

log = logging.getLogger(__name__)


class Quiescing(Protocol):
    """Something is quiet until the block ends. `held` is None where it could not be: `outcome` then says why."""

    held: Held | None
    outcome: Outcome | None

    def marked(self) -> None:
        """The marker is durable: thaw when the block ends. Without this the claim is not made."""


class Quiescer(Protocol):
    """The processes that quiesce."""

    async def make(self, order: PointOrder) -> Outcome:
        """Raises AsrfsError; TemporaryError if the process was killed."""

    def quiesce(self, order: PointOrder) -> AbstractAsyncContextManager[Quiescing]: ...


@dataclass(slots=True)
class PointMaker:
    """`mark` appends a marker, through a restart of the disk server; `note` writes a point down."""

    machine_name: str
    quiescer: Quiescer
    mark: Callable[[bytes], Awaitable[tuple[int, int]]]
    note: Callable[[Point], Awaitable[None]]
    epoch: Callable[[], int]
    deadline_s: Callable[[], float]
    _turn: trio.Lock = field(default_factory=trio.Lock)

    async def make(self, request: PointRequest) -> tuple[Point, tuple[str, ...]]:
        """The point, and what went wrong after it, which changes nothing of it. Raises AsrfsError if there is none."""
        request.check()
        if request.consistency == "crash":
            marker = MarkerRecord(id=uuid.uuid4().hex, name=request.name, note=request.note, hold_ms=0.0)
            return await self._mark_now(marker), ()
        order = self._order(request)
        async with self._turn:
            try:
                outcome = await self.quiescer.make(order)
            except TemporaryError as error:
                return await self._fall_back(order, str(error)), ()
        for failure in outcome.post_failures:
            log.warning("after point %s: %s", order.id, failure)
        if outcome.lsn is None or outcome.time_ns is None:
            raise no_point(outcome)
        if outcome.marker.failed:
            log.warning("point %s is not what was asked for: %s", order.id, outcome.marker.failed)
        point = Point.of(outcome.marker, lsn=outcome.lsn, epoch=self.epoch(), time_ns=outcome.time_ns)
        await self.note(point)
        return point, outcome.post_failures

    @asynccontextmanager
    async def quiesced(self, request: PointRequest) -> Any:
        """For who appends the marker itself, such as a group: everything is quiet within the block, see `Quiescing`."""
        request.check()
        async with self._turn:
            async with self.quiescer.quiesce(msgspec.structs.replace(self._order(request), is_external=True)) as held:
                yield held

    async def _fall_back(self, order: PointOrder, why: str) -> Point:
        """Whoever made it has died: what can be had now is a crash point."""
        log.error("point %s: %s", order.id, why)
        if order.on_failure == "none":
            raise TemporaryError(f"no point was made: {why}")
        marker = MarkerRecord(
            id=order.id,
            name=order.name,
            note=order.note,
            wanted=order.consistency,
            failed=foreign_line(why)[:FAILED_CHARACTERS_MAX],
        )
        return await self._mark_now(marker)

    async def _mark_now(self, marker: MarkerRecord) -> Point:
        lsn, time_ns = await self.mark(encode_marker(marker))
        point = Point.of(marker, lsn=lsn, epoch=self.epoch(), time_ns=time_ns)
        await self.note(point)
        return point

    def _order(self, request: PointRequest) -> PointOrder:
        return PointOrder(
            id=uuid.uuid4().hex,
            machine=self.machine_name,
            consistency=request.consistency,
            name=request.name,
            note=request.note,
            on_failure=request.on_failure,
            deadline_s=self.deadline_s(),
        )
