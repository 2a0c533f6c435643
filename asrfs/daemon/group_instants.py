"""This machine's instants for points of groups: quieted by the maker, held by the disk server, with a last word each.

    quiet ─▶ share's marker, unfinished ─▶ let go ─▶ thaw, let hooks go, post hooks ─▶ last word

Whether all was quiet at the marker is known only afterwards: who quiets the machine may have died, a filesystem may
have been thawed by somebody else, a hook may have lost its lock. So a share that claims more than a crash says that it
is unfinished, and the last word takes the claim back where it was not true. A crash share claims nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import structlog
import trio

from asrfs.consistency.group_share import AtInstant, Held, HoldingServer
from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest
from asrfs.consistency.procedure import no_point
from asrfs.errors import AsrfsError, foreign_line
from asrfs.model.marker import FAILED_CHARACTERS_MAX, MarkerRecord, encode_marker
from asrfs.model.policy import OnFailure

T = TypeVar("T")

KEPT = 32
"""Points of which what was heard is kept until they are confirmed."""


class GroupInstants:
    """`group_share.Instants`, and `group_share.HoldingServer` in front of `server`: it sees where the marker lies.

    `finished` is told each last word, once it is durable.
    """

    def __init__(
        self,
        maker: PointMaker,
        server: HoldingServer,
        on_failure: Callable[[], OnFailure],
        finished: Callable[[MarkerRecord], Awaitable[None]],
    ) -> None:
        self._maker = maker
        self._server = server
        self._on_failure = on_failure
        self._finished = finished
        self._turn = trio.Lock()
        self._marked: dict[str, Held] = {}
        self._hold_ms: dict[str, float] = {}
        self._log = structlog.get_logger("asrfs.group")

    def hold_ms(self, point_id: str) -> float | None:
        """For how long writes were held for a point, if that was lately."""
        return self._hold_ms.get(point_id)

    # ---- the disk server ----------------------------------------------------------------------------------------

    async def arm(self, hold_id: str, marker: bytes, seconds_max: float, not_after: float | None) -> None:
        await self._server.arm(hold_id, marker, seconds_max, not_after)

    async def hold(self, hold_id: str) -> Held:
        held = await self._server.hold(hold_id)
        _keep(self._marked, hold_id, held)
        return held

    def let_go(self, hold_id: str, quiet_s: float) -> None:
        self._server.let_go(hold_id, quiet_s)

    async def release(self, hold_id: str, quiet_s: float) -> tuple[bool, float]:
        holding, exact_ms = await self._server.release(hold_id, quiet_s)
        hold_ms = round(exact_ms, 3)
        _keep(self._hold_ms, hold_id, hold_ms)
        return holding, hold_ms

    async def make_durable(self) -> None:
        await self._server.make_durable()

    # ---- instants -----------------------------------------------------------------------------------------------

    async def at_instant(self, marker: MarkerRecord, do: AtInstant) -> None:
        if marker.consistency == "crash":
            async with self._turn:
                await do(marker, None)
            return
        claim = None
        request = PointRequest(consistency=marker.consistency, on_failure=self._on_failure())
        try:
            async with self._maker.quiesced(request) as quiet, self._turn:
                if quiet.held is not None:
                    claim = msgspec.structs.replace(_said(marker, quiet.held.marker), unfinished=True)
                    await do(claim, quiet.held.deadline)
                    quiet.marked()
                elif request.on_failure == "none":
                    raise no_point(quiet.outcome)
                else:
                    said = _said(marker, quiet.outcome.marker)
                    await do(msgspec.structs.replace(said, consistency="crash", wanted=marker.consistency), None)
        except AsrfsError as error:
            if claim is not None:
                why = foreign_line(str(error))[:FAILED_CHARACTERS_MAX]
                await self._say_last(
                    msgspec.structs.replace(claim, consistency="crash", wanted=marker.consistency, failed=why)
                )
            raise
        if claim is not None:
            await self._say_last(_said(claim, quiet.outcome.marker))

    async def _say_last(self, word: MarkerRecord) -> None:
        """Of a share that has a marker; one that has none is void."""
        held = self._marked.pop(word.id, None)
        if held is None:
            return
        word = msgspec.structs.replace(word, unfinished=False, completes=held.lsn)
        try:
            await self._maker.mark(encode_marker(word))
        except AsrfsError as error:
            self._log.warning("the last word on a point is missing", point=word.id, reason=str(error))
            return
        if word.failed:
            self._log.warning("the point is not what was asked for", point=word.id, reason=word.failed)
        await self._finished(word)


def _said(marker: MarkerRecord, said: MarkerRecord) -> MarkerRecord:
    """The marker with what may be said of the instant."""
    return msgspec.structs.replace(
        marker,
        consistency=said.consistency,
        wanted=said.wanted,
        failed=said.failed,
        hold_ms=said.hold_ms,
        freeze_ms=said.freeze_ms,
        hooks=said.hooks,
    )


def _keep(kept: dict[str, T], point_id: str, value: T) -> None:
    kept[point_id] = value
    while len(kept) > KEPT:
        kept.pop(next(iter(kept)))
