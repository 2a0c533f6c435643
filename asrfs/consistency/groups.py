"""The consistency groups of this machine: one task each, as coordinator or as member, made anew when the store changes
its order; what it coordinates is cut on schedule, too; and members of those groups come in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import trio

from asrfs.consistency.group_coordinator import GroupCoordinator
from asrfs.consistency.group_member import GroupMember, Machine
from asrfs.consistency.group_stream import GroupStream
from asrfs.consistency.scheduled_points import ScheduledPoints
from asrfs.errors import AsrfsError, NotFoundError, error_class, foreign_line
from asrfs.model.configuration import GroupOrder, Member
from asrfs.model.marker import Consistency
from asrfs.protocol.group_messages import TEXT_CHARACTERS_MAX, Ask, Join, NotJoined, Word
from asrfs.replication.alarms import Alarms
from asrfs.transport.stream import ByteStream
from asrfs.transport.tls import MachineIdentity

JOIN_S_MAX = 10.0
ABSENT_S_MAX = 30.0
"""So long a scheduled point waits for members that are not connected: all come anew when an agent was restarted."""
ANSWER_SLACK_S = 120.0
"""How much longer than the wait it asks for a member waits for its coordinator: freezing takes its time."""

Dial = Callable[[Member], Awaitable[ByteStream]]


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a scheduled point; `failed` says why it is less than was wanted."""

    consistency: Consistency
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of a point of a group that was asked for."""

    id: str
    ready: int
    members: int


class _Group:
    """A group that is served here, by one of the two."""

    def __init__(self, order: GroupOrder) -> None:
        self.order = order
        self.scope = trio.CancelScope()
        self.coordinator: GroupCoordinator | None = None
        self.member: GroupMember | None = None


class Groups:
    """`run` for ever. `follow` may be called before and at any time. `hold_s`, `freeze_s`: the settings as they are.

    `ages_s`: how old the newest points of a group of that name are, by kind, so that the schedule goes on where it was.
    """

    def __init__(
        self,
        machine: Machine,
        dial: Dial,
        *,
        hold_s: Callable[[], float],
        freeze_s: Callable[[], float],
        alarms: Alarms,
        ages_s: Callable[[str], Mapping[Consistency, float]],
    ) -> None:
        self._machine = machine
        self._dial = dial
        self._hold_s = hold_s
        self._freeze_s = freeze_s
        self._alarms = alarms
        self._ages_s = ages_s
        self._wanted: tuple[GroupOrder, ...] = ()
        self._changed = trio.Event()
        self._groups: dict[str, _Group] = {}
        self._log = structlog.get_logger("asrfs.group")

    def follow(self, orders: Sequence[GroupOrder]) -> None:
        """What the store wants now."""
        self._wanted = tuple(orders)
        self._changed.set()

    @property
    def orders(self) -> tuple[GroupOrder, ...]:
        return self._wanted

    def standing(self) -> list[dict[str, Any]]:
        """Each group as `asrfs status` shows it."""
        return [
            {
                "name": group.order.name,
                "role": "coordinator" if group.coordinator is not None else "member",
                "members": len(group.order.members),
                "connected": len(group.coordinator.connected) if group.coordinator is not None else None,
                "reason": group.member.reason if group.member is not None else "",
            }
            for group in self._groups.values()
        ]

    def coordinated(self) -> list[GroupCoordinator]:
        """The groups that this machine coordinates."""
        return [group.coordinator for group in self._groups.values() if group.coordinator is not None]

    async def run(self) -> None:
        """Serve the groups that are wanted, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                self._adopt(nursery)
                await self._changed.wait()

    def _adopt(self, nursery: trio.Nursery) -> None:
        wanted = {order.id: order for order in self._wanted}
        for group_id, group in list(self._groups.items()):
            if wanted.get(group_id) != group.order:
                group.scope.cancel()
                del self._groups[group_id]
        for group_id, order in wanted.items():
            if group_id not in self._groups:
                group = self._groups[group_id] = self._make(order)
                nursery.start_soon(self._serve, group)

    def _make(self, order: GroupOrder) -> _Group:
        group = _Group(order)
        if order.coordinator == self._machine.id:
            group.coordinator = GroupCoordinator(self._machine, order, hold_s=self._hold_s, freeze_s=self._freeze_s)
        else:
            (coordinator,) = (member for member in order.members if member.machine_id == order.coordinator)
            group.member = GroupMember(self._machine, order, partial(self._dial, coordinator))
        return group

    async def _serve(self, group: _Group) -> None:
        with group.scope:
            if group.coordinator is not None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cut_on_schedule, group.coordinator, group.order)
                    await group.coordinator.run()
            elif group.member is not None:
                await group.member.run()

    async def _cut_on_schedule(self, coordinator: GroupCoordinator, order: GroupOrder) -> None:
        """For ever."""

        async def make(kind: Consistency) -> Made:
            with trio.move_on_after(min(ABSENT_S_MAX, order.intervals_s()[kind] / 2)):
                await coordinator.wait_until_complete()
            point = await coordinator.cut(kind)
            is_less = point.consistency != kind
            return Made(point.consistency, "that is all that some member could have" if is_less else None)

        await ScheduledPoints(order.id, order.intervals_s, make, self._alarms, order.name).run(self._ages_s(order.name))

    # ---- members that come in ---------------------------------------------------------------------------------------

    async def receive(self, connection: ByteStream, identity: MachineIdentity) -> None:
        """A machine of this vault has connected: until it goes. Nothing is raised."""
        stream = GroupStream(connection, "coordinator")
        coordinator: GroupCoordinator | None = None

        def on_word(word: Word) -> None:
            nonlocal coordinator
            if isinstance(word, Join):
                coordinator = self._admit(word, stream, identity)
            elif coordinator is not None:
                coordinator.on_word(identity.machine_id, word)

        try:
            await stream.converse(on_word)
        except AsrfsError as error:
            self._log.info("connection of a member ended", member=identity.name, reason=str(error))
        finally:
            if coordinator is not None:
                coordinator.leave(stream, identity)

    def _admit(self, join: Join, stream: GroupStream, identity: MachineIdentity) -> GroupCoordinator | None:
        group = self._groups.get(join.group)
        coordinator = group.coordinator if group is not None else None
        if coordinator is None:
            refusal = "this machine does not coordinate the group"
        else:
            refusal = coordinator.refusal(identity, join)
        if coordinator is None or refusal:
            self._log.info("a machine was not taken as member", machine=identity.name, reason=refusal)
            stream.say(NotJoined(text=refusal[:TEXT_CHARACTERS_MAX]))
            return None
        coordinator.enter(stream, identity)
        return coordinator

    # ---- points -----------------------------------------------------------------------------------------------------

    async def create(
        self, name: str, consistency: Consistency, *, point_name: str | None, note: str | None, wait_s: float | None
    ) -> Asked:
        """Cut a point of the group of that name, by its coordinator. Raises NotFoundError, TemporaryError and what the
        coordinator raised."""
        group = next((each for each in self._groups.values() if each.order.name == name), None)
        if group is None:
            known = ", ".join(sorted(order.name for order in self._wanted)) or "none"
            raise NotFoundError(f"this machine belongs to no group {name!r}: it belongs to {known}")
        if group.coordinator is not None:
            point = await group.coordinator.cut(consistency, point_name, note)
            if wait_s is not None:
                await group.coordinator.settle(point, wait_s)
            return Asked(point.id, point.ready, len(point.members))
        assert group.member is not None
        ask = Ask(request=0, consistency=consistency, name=point_name, note=note, wait=wait_s)
        answer = await group.member.ask(ask, (wait_s or 0.0) + ANSWER_SLACK_S)
        if answer.point is None:
            raise error_class(answer.exit_code)(foreign_line(answer.text) or "the coordinator made no point")
        return Asked(answer.point, answer.ready, answer.members)
