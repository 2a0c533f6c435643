"""The consistency groups of an agent: what they need of the machine, the port its members come in at.

The port is open only while this machine coordinates a group. Whoever comes in, or is dialled, shows a certificate of
the vault's authority; it counts only if it is the one that the store says is good for a member of the group.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import msgspec
import structlog
import trio

from asrfs.consistency.group_member import Machine
from asrfs.consistency.group_share import HoldingServer
from asrfs.consistency.groups import Groups
from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_ages import ages_s
from asrfs.consistency.points import Point, PointLog
from asrfs.daemon.enrolment import AUTHORITY_FILE, MACHINE_KEY_FILE, certificate_of, is_enrolled
from asrfs.daemon.group_instants import GroupInstants
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, AuthenticationError, TemporaryError
from asrfs.model.configuration import HostConfiguration, Member
from asrfs.model.marker import Consistency, MarkerRecord
from asrfs.replication.alarms import Alarms
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.stream import ByteStream, SecureStream, connect, listen, listener_of, serve
from asrfs.transport.tls import machine_identity, member_context, server_context

LISTEN_HOST = "0.0.0.0"
ALARM = "group-port"
TRY_AGAIN_S = 5.0
SHARES_KEPT = 32

T = TypeVar("T")


class AgentGroups:
    """`run` for ever. `settled` waits until the store has acknowledged an LSN; `points`: the host's list."""

    def __init__(
        self,
        state: StateDirectory,
        *,
        machine_id: str,
        server: HoldingServer,
        maker: PointMaker,
        alarms: Alarms,
        settings: Callable[[], Settings],
        settled: Callable[[int], Awaitable[None]],
        threads: trio.CapacityLimiter,
        points: PointLog,
    ) -> None:
        self._state = state
        self._settings = settings
        self._alarms = alarms
        self._machine_id = machine_id
        self._threads = threads
        self._changed = trio.Event()
        self._port_scope = trio.CancelScope()
        self._points = points
        self._shares: dict[str, Point] = {}
        self._last_words: dict[str, MarkerRecord] = {}
        self._came = trio.Event()
        self._log = structlog.get_logger("asrfs.group")

        async def confirmed(point: Point) -> None:
            if (hold_ms := instants.hold_ms(point.id)) is not None:
                point = msgspec.structs.replace(point, hold_ms=hold_ms)
            await maker.note(point)
            self._keep_share(point)
            if (word := self._last_words.get(point.id)) is not None:
                await self._complete(word)

        instants = GroupInstants(maker, server, lambda: settings().policy.on_failure, self._complete)
        machine = Machine(
            id=machine_id,
            server=instants,
            instants=instants,
            confirmed=confirmed,
            settled=settled,
            confirm=maker.mark,
        )
        self.groups = Groups(
            machine,
            self._dial,
            hold_s=lambda: self._settings().group_deadline,
            freeze_s=lambda: self._settings().freeze_deadline,
            alarms=alarms,
            ages_s=self._ages_s,
        )

    async def share_of(self, point_id: str, seconds_max: float) -> Point | None:
        """This machine's share of a group's point that has just been made, if it can be with its last word; None if it
        has none."""
        with trio.move_on_after(seconds_max):
            while (share := self._shares.get(point_id)) is None or share.unfinished:
                await self._came.wait()
        return self._shares.get(point_id)

    def _keep_share(self, point: Point) -> None:
        self._shares[point.id] = point
        while len(self._shares) > SHARES_KEPT:
            self._shares.pop(next(iter(self._shares)))
        self._came.set()
        self._came = trio.Event()

    async def _complete(self, word: MarkerRecord) -> None:
        """The last word on a share, which may come before it is confirmed or afterwards."""
        self._last_words[word.id] = word
        while len(self._last_words) > SHARES_KEPT:
            self._last_words.pop(next(iter(self._last_words)))
        share = self._shares.get(word.id)
        if share is None:
            return
        await self._in_thread(partial(self._points.complete, word))
        if share.unfinished:
            self._keep_share(share.completed_by(word))

    def _ages_s(self, group: str) -> dict[Consistency, float]:
        return ages_s(self._points.newest_of_group(group), SystemClock().time_ns())

    def follow(self, configuration: HostConfiguration) -> None:
        """What the store wants now."""
        self.groups.follow(configuration.groups)
        self.changed()

    def changed(self) -> None:
        """Settings or enrolment are new: the port is opened anew."""
        self._changed.set()

    async def run(self) -> None:
        """Serve groups and port, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.groups.run)
            wanted = None
            while True:
                self._changed = trio.Event()
                before, wanted = wanted, await self._in_thread(self._wanted_port)
                if wanted != before:
                    self._port_scope.cancel()
                    self._port_scope = trio.CancelScope()
                    if wanted is not None:
                        nursery.start_soon(self._keep_port, wanted[0], self._port_scope)
                await self._changed.wait()

    # ---- coming in --------------------------------------------------------------------------------------------------

    def _wanted_port(self) -> tuple[int, bytes] | None:
        """The port to listen on and the certificate to show there; None unless this machine coordinates. Blocks."""
        is_coordinator = any(order.coordinator == self._machine_id for order in self.groups.orders)
        if not is_coordinator or not is_enrolled(self._state):
            return None
        return self._settings().group_port, certificate_of(self._state)

    async def _keep_port(self, port: int, scope: trio.CancelScope) -> None:
        """Listen until the scope is cancelled."""
        with scope:
            while True:
                try:
                    context = await self._in_thread(lambda: server_context(*self._files()))
                    listener = listener_of(listen(LISTEN_HOST, port))
                    break
                except AsrfsError as error:
                    self._alarms.set(ALARM, "warning", f"members of groups cannot come in: {error}: see group_port")
                    await trio.sleep(TRY_AGAIN_S)
            self._alarms.clear(ALARM)
            self._log.info("members may come in", port=port)
            async with listener:
                await serve([listener], context, self._on_connection, refused=self._refused)
        self._alarms.clear(ALARM)

    async def _on_connection(self, connection: SecureStream) -> None:
        try:
            identity = machine_identity(connection.peer_certificate())
        except AsrfsError as error:
            self._refused(str(error))
            return
        if not any(
            member.machine_id == identity.machine_id and member.serial == identity.serial
            for order in self.groups.orders
            for member in order.members
        ):
            self._refused(f"machine {identity.name} with certificate {identity.serial} belongs to no group of this one")
            return
        await self.groups.receive(connection, identity)

    def _refused(self, reason: str) -> None:
        self._log.info("connection refused", reason=reason)

    # ---- going out --------------------------------------------------------------------------------------------------

    async def _dial(self, coordinator: Member) -> ByteStream:
        if not coordinator.address or not coordinator.port:
            raise TemporaryError(f"the store does not know yet where coordinator {coordinator.name} is reached")
        context = await self._in_thread(lambda: member_context(*self._files()))
        name = f"{coordinator.machine_id}.machine.asrfs"
        connection = await connect(coordinator.address, coordinator.port, context, name)
        try:
            identity = machine_identity(connection.peer_certificate())
            if (identity.machine_id, identity.serial) != (coordinator.machine_id, coordinator.serial):
                raise AuthenticationError(
                    f"at {coordinator.address}:{coordinator.port} is machine {identity.name}, "
                    f"not coordinator {coordinator.name}"
                )
        except BaseException:
            await connection.aclose()
            raise
        return connection

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._threads)

    def _files(self) -> tuple[str, str, str]:
        key = os.path.join(self._state.keys, MACHINE_KEY_FILE)
        return key, key, os.path.join(self._state.keys, AUTHORITY_FILE)
