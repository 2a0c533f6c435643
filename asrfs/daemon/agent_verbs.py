"""What the agent's control socket answers. Each verb takes a request and returns the fields of its reply."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest, request_of
from asrfs.consistency.points import Point, PointLog
from asrfs.daemon.agent_groups import AgentGroups
from asrfs.daemon.control import Fields
from asrfs.daemon.control_trio import AsyncHandler
from asrfs.daemon.verification import Verification
from asrfs.errors import AsrfsError, BadInputError, RefusedError, TemporaryError
from asrfs.model.dirty_map import GivenUp
from asrfs.model.point_filter import PointFilter
from asrfs.model.policy import OnFailure
from asrfs.replication.applier_task import ApplierTask
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.link import Link
from asrfs.replication.progress import Progress
from asrfs.replication.shipper import Shipper
from asrfs.replication.ticker import Ticker

LOOK_S_MAX = 1.0
RESTART_S_MAX = 10.0
RETRY_S = 0.05
GROUP_WAIT_S_MAX = 86400.0
LIST_BYTES_MAX = 512 << 10
"""Of one answer that lists points: half of what a control message may have."""

T = TypeVar("T")


@dataclass(slots=True)
class AgentVerbs:
    """`status`, `set_paused`, `reload` and `stop` belong to the composition; `on_failure`: what the policy says."""

    machine_name: str
    server: DiskServer
    progress: Progress
    ticker: Ticker
    applier: ApplierTask
    shipper: Shipper
    link: Link
    points: PointLog
    maker: PointMaker
    groups: AgentGroups
    verification: Verification
    on_failure: Callable[[], OnFailure]
    threads: trio.CapacityLimiter
    dirty: DirtyMapFile
    resync: AsyncHandler
    status: Callable[[], Awaitable[dict[str, Any]]]
    set_paused: Callable[[bool], Awaitable[None]]
    reload: Callable[[], Awaitable[None]]
    stop: Callable[[], None]

    def table(self) -> dict[str, AsyncHandler]:
        return {
            "status": self.on_status,
            "point_create": self.on_point_create,
            "point_list": self.on_point_list,
            "drain": self.on_drain,
            "verify": self.on_verify,
            "apply": self.on_apply,
            "wait_acknowledged": self.on_wait_acknowledged,
            "pause": self.on_pause,
            "resume": self.on_resume,
            "resync": self.resync,
            "reload": self.on_reload,
            "stop": self.on_stop,
        }

    async def on_status(self, _request: Fields) -> dict[str, Any]:
        with contextlib.suppress(AsrfsError), trio.move_on_after(LOOK_S_MAX):
            await self.ticker.look()  # else it says what was last heard
        return await self.status()

    async def on_point_create(self, request: Fields) -> dict[str, Any]:
        """A recovery point; with `wait`, returns when the store has it."""
        wanted, wait = request_of({"on_failure": self.on_failure()} | _given(request)), bool(request.get("wait"))
        if wait:
            self._check_enrolled()
        if (group := request.get("group")) is not None:
            return await self._create_for_group(group, wanted, _timeout(request) if wait else None)
        point, post_failures = await self.maker.make(wanted)
        self.hurry(point.lsn)
        if wait:
            try:
                await self.wait_acknowledged(point.lsn, _timeout(request), is_point=True)
            except TemporaryError as error:
                raise TemporaryError(
                    f"point {point.id} is made at LSN {point.lsn} and not at the store yet: {error}"
                ) from None
        return self._describe(point) | {"post_failures": list(post_failures)}

    async def _create_for_group(self, group: object, wanted: PointRequest, wait_s: float | None) -> dict[str, Any]:
        """A point of a group, by its coordinator; this machine's share of it."""
        if not isinstance(group, str):
            raise BadInputError("a group is called by its name")
        wanted.check()
        wait_s = None if wait_s is None else min(wait_s, GROUP_WAIT_S_MAX)
        asked = await self.groups.groups.create(
            group, wanted.consistency, point_name=wanted.name, note=wanted.note, wait_s=wait_s
        )
        point = await self.groups.share_of(asked.id, LOOK_S_MAX)
        if point is None:
            raise TemporaryError(
                f"point {asked.id} of group {group} is made: {asked.ready} of {asked.members} members, not this one"
            )
        self.hurry(point.lsn)
        return self._describe(point) | {"post_failures": []}

    async def on_point_list(self, request: Fields) -> dict[str, Any]:
        """As many of the points behind `after_lsn` as an answer can hold, and whether there are `more`."""
        wanted, after_lsn = _filter(request), request.get("after_lsn", 0)
        if not isinstance(after_lsn, int):
            raise BadInputError("point_list goes on behind an LSN")
        points = wanted.choose(await trio.to_thread.run_sync(self.points.points, limiter=self.threads))
        described: list[dict[str, Any]] = []
        room = LIST_BYTES_MAX
        for point in points:
            if point.lsn <= after_lsn:
                continue
            document = self._describe(point)
            room -= len(msgspec.json.encode(document))
            if room < 0 and described:
                return {"points": described, "more": True}
            described.append(document)
        return {"points": described, "more": False}

    async def on_drain(self, request: Fields) -> dict[str, Any]:
        """Wait until the store has what was appended at the call."""
        self._check_enrolled()
        started = trio.current_time()
        target = (await through_a_restart(self.server.positions)).appended_lsn
        self.hurry(target)
        await self.wait_acknowledged(target, _timeout(request))
        return {
            "lsn": target,
            "acknowledged": self.progress.acknowledged.lsn,
            "seconds": round(trio.current_time() - started, 3),
        }

    async def on_verify(self, request: Fields) -> dict[str, Any]:
        """Compare all disks with the replica: how far that is, or its outcome; to be asked again and again."""
        self._check_enrolled()
        if self.shipper.paused:
            raise RefusedError("shipping to the store is paused: go on with `asrfs resume` first")
        return await self.verification.ask(request.get("job"))

    async def on_apply(self, _request: Fields) -> dict[str, Any]:
        """Wait until the images hold what was appended at the call."""
        target = (await through_a_restart(self.server.positions)).appended_lsn
        self.applier.hurry(target)
        self.ticker.poke()
        await self.progress.wait_until(lambda: self.progress.applied.lsn >= target)
        return {"lsn": target, "applied": self.progress.applied.lsn}

    async def on_wait_acknowledged(self, request: Fields) -> dict[str, Any]:
        lsn = request.get("lsn")
        if not isinstance(lsn, int) or lsn < 0:
            raise BadInputError("wait_acknowledged needs an LSN")
        self.hurry(lsn)
        await self.wait_acknowledged(lsn, _timeout(request))
        return {"acknowledged": self.progress.acknowledged.lsn}

    async def on_pause(self, _request: Fields) -> dict[str, Any]:
        await self.set_paused(True)
        return {}

    async def on_resume(self, _request: Fields) -> dict[str, Any]:
        await self.set_paused(False)
        return {}

    async def on_reload(self, _request: Fields) -> dict[str, Any]:
        await self.reload()
        return {}

    async def on_stop(self, _request: Fields) -> dict[str, Any]:
        self.stop()
        return {}

    def hurry(self, lsn: int) -> None:
        """Somebody waits for this LSN."""
        self.shipper.hurry(lsn)
        self.ticker.poke()

    async def wait_acknowledged(self, lsn: int, seconds_max: float, *, is_point: bool = False) -> None:
        """Raises TemporaryError, with the link's own words, when time runs out; RefusedError for a point that the store
        will never have."""

        def is_over() -> bool:
            return self.progress.acknowledged.lsn >= lsn or (is_point and self.dirty.given_up.is_lost(lsn))

        with trio.move_on_after(seconds_max):
            await self.progress.wait_until(is_over)
            if is_point:
                check_is_kept(self.dirty.given_up, lsn)
            return
        why = f"{self.link.state}: {self.link.reason}" if self.link.reason else self.link.state
        raise TemporaryError(
            f"the store has acknowledged LSN {self.progress.acknowledged.lsn} of {lsn} after {seconds_max:g} s; "
            f"the link is {why}"
        )

    def _check_enrolled(self) -> None:
        if not self.shipper.is_enrolled:
            raise RefusedError("this machine is not enrolled with a store: use `asrfs enroll` first")

    def _describe(self, point: Point) -> dict[str, Any]:
        document = point.described(self.machine_name)
        is_lost = self.dirty.given_up.is_lost(point.lsn)
        return document | {"acknowledged": point.lsn <= self.progress.acknowledged.lsn and not is_lost, "lost": is_lost}


def check_is_kept(given_up: GivenUp, lsn: int) -> None:
    """Raise RefusedError for a state of the machine that the store will never have."""
    if given_up.is_lost(lsn):
        raise RefusedError(
            f"the point at LSN {lsn} will never be recoverable: records were given up, and until the resync is over "
            "the store has no state of this machine: make a point when `asrfs status` says protected"
        )


async def through_a_restart(call: Callable[[], Awaitable[T]]) -> T:
    """Ask the disk server, again if it died meanwhile: its death is a pause here too. Raises the last TemporaryError.

    A marker whose reply was lost with the connection may be in the history twice: both name a moment of this call.
    """
    deadline = trio.current_time() + RESTART_S_MAX
    while True:
        try:
            return await call()
        except TemporaryError:
            if trio.current_time() >= deadline:
                raise
        await trio.sleep(RETRY_S)


def _given(request: Fields) -> dict[str, Any]:
    return {key: value for key, value in request.items() if value is not None}


def _filter(request: Fields) -> PointFilter:
    try:
        return msgspec.convert(request.get("filter") or {}, PointFilter)
    except msgspec.ValidationError as error:
        raise BadInputError(f"points cannot be chosen like that: {error}") from None


def _timeout(request: Fields) -> float:
    seconds = request.get("timeout")
    if seconds is None:
        return math.inf
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise BadInputError("a timeout is a number of seconds")
    return float(seconds)
