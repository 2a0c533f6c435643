"""A machine as coordinator of one group: takes its members' connections and cuts points, one after the other.

    asked, or due ─▶ Cut ─▶ words to members, this one among them ─▶ all held ─▶ confirming record, durable ─▶ CONFIRMED

The confirming record in this machine's own history is what makes a point: until it is durable there is none, whoever
dies; from then on there is one as soon as the store has it and the marker of everyone it names.
"""

from __future__ import annotations

import select
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from asrfs.consistency.cut import Cut, CutOrder, Outcome, Phase, Said
from asrfs.consistency.group_member import Machine, Taking
from asrfs.consistency.group_stream import GroupStream
from asrfs.errors import AsrfsError, TemporaryError, foreign_line
from asrfs.model.configuration import GroupOrder
from asrfs.model.marker import Consistency, MarkerRecord, Share, encode_marker
from asrfs.protocol.group_messages import (
    GROUP_PROTOCOL_VERSION,
    TEXT_CHARACTERS_MAX,
    Answer,
    Ask,
    Confirmed,
    Join,
    Joined,
    Prepare,
    Settle,
    Settled,
    Word,
)
from asrfs.transport.tls import MachineIdentity

IDLE_S_MAX = 2.0
"""How long a point waits for a member that has not finished with the one before."""
ASKS_MAX = 64
GATHER_SLACK_S = 50.0


@dataclass(frozen=True, slots=True)
class GroupPoint:
    """A point that is real. `lsn`: of the coordinator's own marker, if it is in it; `confirmed_lsn`: of what makes it
    a point; `hold_ms`: of who held longest; `reasons`: why a member is not in it, by its id."""

    id: str
    group: str
    name: str | None
    consistency: Consistency
    lsn: int | None
    hold_ms: float
    shares: tuple[Share, ...]
    members: tuple[str, ...]
    reasons: dict[str, str]
    confirmed_lsn: int

    @property
    def ready(self) -> int:
        return len(self.shares)


class GroupCoordinator:
    """`run` for ever; `cut` from any task; `serve` for each connection of a member.

    `hold_s`: for how long members hold at the most, `freeze_s`: for how long they may be frozen before that.
    """

    def __init__(
        self, machine: Machine, order: GroupOrder, *, hold_s: Callable[[], float], freeze_s: Callable[[], float]
    ) -> None:
        self._machine = machine
        self._order = order
        self._hold_s = hold_s
        self._freeze_s = freeze_s
        self._names = {member.machine_id: member.name for member in order.members}
        self._streams: dict[str, GroupStream] = {}
        self._turn = trio.Lock()
        self._cut: Cut | None = None
        self._went_on = trio.Event()
        """Set when the point that is being cut has come to another phase, or to its end."""
        self._settling: dict[tuple[str, str], trio.Event] = {}
        self._roster_changed = trio.Event()
        self._own: Taking | None = None
        self._own_said = Phase.DONE
        """In which phase this machine said its last word about the point."""
        self._nursery: trio.Nursery | None = None
        self._log = structlog.get_logger("asrfs.group").bind(group=order.name)

    @property
    def connected(self) -> tuple[str, ...]:
        """Members that can be reached now, this machine among them."""
        return (self._machine.id, *self._streams)

    async def run(self) -> None:
        """Be ready to cut, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._own = Taking(self._machine, self._order, self._hear_own, nursery, self._attend)
            try:
                await trio.sleep_forever()
            finally:
                self._own.lose()
                self._own = self._nursery = None
                self._went_on.set()
                for stream in self._streams.values():
                    stream.close()

    async def wait_until_complete(self) -> None:
        """Until every member is connected."""
        while len(self.connected) < len(self._order.members):
            await self._roster_changed.wait()

    def _note_roster(self) -> None:
        self._roster_changed.set()
        self._roster_changed = trio.Event()

    # ---- members ------------------------------------------------------------------------------------------------

    def refusal(self, identity: MachineIdentity, join: Join) -> str:
        """Why this machine may not be a member of this group here; empty if it may."""
        if join.protocol != GROUP_PROTOCOL_VERSION:
            return f"this machine speaks version {GROUP_PROTOCOL_VERSION} of the group protocol, not {join.protocol}"
        if identity.machine_id not in self._names or identity.machine_id == self._machine.id:
            return f"machine {identity.name} is not a member of group {self._order.name}"
        if join.generation != self._order.generation:
            return (
                f"its order of the group is {join.generation}, the coordinator's is {self._order.generation}: "
                "the store has not told both of them yet"
            )
        return ""

    def enter(self, stream: GroupStream, identity: MachineIdentity) -> None:
        """A machine that may be a member is one from now on, until `leave`."""
        member = identity.machine_id
        if (before := self._streams.pop(member, None)) is not None:
            before.close()
            self._hear(member, None)
        self._streams[member] = stream
        self._note_roster()
        stream.say(Joined())
        self._log.info("member joined", member=identity.name)

    def leave(self, stream: GroupStream, identity: MachineIdentity) -> None:
        """Its connection is over."""
        if self._streams.get(identity.machine_id) is stream:
            del self._streams[identity.machine_id]
            self._note_roster()
            self._hear(identity.machine_id, None)
            self._log.info("member left", member=identity.name)

    def on_word(self, member: str, word: Word) -> None:
        """What a member that has entered says."""
        if isinstance(word, Ask):
            if self._nursery is not None and len(self._nursery.child_tasks) < ASKS_MAX:
                self._nursery.start_soon(self._answer, member, word)
            else:
                self._say(member, Answer(request=word.request, exit_code=1, text="too many points are asked for"))
        elif isinstance(word, Settled):
            self._on_settled(member, word)
        else:
            self._hear(member, word)

    def _on_settled(self, member: str, word: Settled) -> None:
        if (event := self._settling.get((word.point, member))) is not None:
            event.set()

    def _hear(self, member: str, word: Word | None) -> None:
        """A word about the point that is being cut, None for a connection that is lost.

        What follows from it is said from here: no task has to be woken first while members hold.
        """
        if isinstance(word, Settled):
            self._on_settled(member, word)
        elif (cut := self._cut) is not None and self._own is not None:
            now, phase = trio.current_time(), cut.phase
            self._say_all(cut.lose(member, now) if word is None else cut.hear(member, word, now))
            if cut.phase is not phase:
                self._went_on.set()

    def _hear_own(self, word: Word) -> None:
        if self._cut is not None:
            self._own_said = self._cut.phase
        self._hear(self._machine.id, word)

    def _attend(self, seconds_max: float) -> None:
        """As `GroupStream.attend`, for this machine's own share: wait for what everyone else has to say before it is
        its turn again, and hand that on."""
        if self._cut is None:
            return
        # Who is late is given up in time, by the task that waits for that.
        deadline = time.monotonic() + min(seconds_max, self._cut.wake_at - trio.current_time())
        poll, streams = select.poll(), dict[int, GroupStream]()
        for stream in self._streams.values():
            if (fd := stream.fileno()) >= 0:
                poll.register(fd, select.POLLIN)
                streams[fd] = stream
        while streams and self._cut is not None and self._cut.phase is self._own_said:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for fd, _ in poll.poll(left * 1000):
                if not streams[fd].attend_at_hand():
                    poll.unregister(fd)
                    del streams[fd]

    def _say(self, member: str, word: Word) -> None:
        if member == self._machine.id:
            if self._own is None:
                raise self._over()
            self._own.hear(word)
        elif (stream := self._streams.get(member)) is not None:
            stream.say(word)

    async def _answer(self, member: str, ask: Ask) -> None:
        """What a member asks for. Errors go to it."""
        try:
            point = await self.cut(ask.consistency, ask.name, ask.note)
            if ask.wait is not None:
                await self.settle(point, ask.wait)
        except AsrfsError as error:
            text = foreign_line(str(error))[:TEXT_CHARACTERS_MAX]
            self._say(member, Answer(request=ask.request, exit_code=error.exit_code, text=text))
            return
        self._say(member, Answer(request=ask.request, point=point.id, ready=point.ready, members=len(point.members)))

    # ---- points -------------------------------------------------------------------------------------------------

    async def cut(self, consistency: Consistency, name: str | None = None, note: str | None = None) -> GroupPoint:
        """Cut a point of the group; it is real when this returns. Raises TemporaryError: there is none.

        Points that are asked for while one is being cut are cut afterwards.
        """
        async with self._turn:
            await self._wait_until_idle()
            order = CutOrder(
                point=uuid.uuid4().hex,
                group=self._order.name,
                generation=self._order.generation,
                members=tuple(member.machine_id for member in self._order.members),
                consistency=consistency,
                name=name,
                note=note,
                hold_s=self._hold_s(),
                gather_s=self._hold_s() if consistency == "crash" else self._freeze_s() + GATHER_SLACK_S,
                partial=self._order.partial,
            )
            outcome = await self._decide(Cut(order))
            if not outcome.shares:
                reasons = "; ".join(f"{self._names[each]}: {why}" for each, why in outcome.reasons.items())
                self._log.warning("point is void", point=order.point, reasons=reasons)
                raise TemporaryError(f"no point of group {self._order.name} was made: {reasons}")
            return await self._confirm(order, outcome)

    async def _wait_until_idle(self) -> None:
        """Until nobody is busy with the point before any more, or for a while: who still is cannot take part."""
        with trio.move_on_after(IDLE_S_MAX):
            if self._own is not None:
                await self._own.idle.wait()
            for stream in list(self._streams.values()):
                await stream.idle.wait()

    async def _decide(self, cut: Cut) -> Outcome:
        self._cut = cut
        try:
            present = [member for member, stream in self._streams.items() if stream.idle.is_set()]
            if self._own is not None and self._own.idle.is_set():
                present.append(self._machine.id)
            self._say_all(cut.begin(present, trio.current_time()))
            while cut.outcome is None:
                with trio.move_on_at(cut.wake_at):
                    await self._went_on.wait()
                self._went_on = trio.Event()
                if self._own is None:
                    raise self._over()
                self._say_all(cut.tick(trio.current_time()))
            return cut.outcome
        finally:
            self._cut = None

    def _over(self) -> TemporaryError:
        return TemporaryError(f"group {self._order.name} is not coordinated here any more: try again")

    def _say_all(self, said: Said) -> None:
        if all(isinstance(word, Prepare) for _, word in said):  # who hears it first waits for who hears it last
            for member, word in said:
                if (stream := self._streams.get(member)) is not None:
                    stream.seal(word)
            for member, _ in said:
                if (stream := self._streams.get(member)) is not None:
                    stream.send_sealed()
            said = [each for each in said if each[0] == self._machine.id]
        for member, word in said:
            self._say(member, word)

    async def _confirm(self, order: CutOrder, outcome: Outcome) -> GroupPoint:
        """Make it a point. Raises TemporaryError."""
        shares = tuple(Share(machine=each.machine, lsn=each.lsn, hold_ms=each.hold_ms) for each in outcome.shares)
        record = MarkerRecord(
            id=order.point,
            consistency=outcome.consistency,
            group=order.group,
            name=order.name,
            group_point=order.point,
            members=order.members,
            ready=len(shares),
            confirms=shares,
        )
        lsn, _ = await self._machine.confirm(encode_marker(record))
        word = Confirmed(point=order.point, ready=len(shares), members=order.members)
        own = [share.lsn for share in shares if share.machine == self._machine.id]
        for share in shares:
            self._say(share.machine, word)
        self._log.info("point", point=order.point, ready=len(shares), members=len(order.members))
        return GroupPoint(
            id=order.point,
            group=order.group,
            name=order.name,
            consistency=outcome.consistency,
            lsn=own[0] if own else None,
            hold_ms=max(share.hold_ms for share in shares),
            shares=shares,
            members=order.members,
            reasons=outcome.reasons,
            confirmed_lsn=lsn,
        )

    async def settle(self, point: GroupPoint, seconds_max: float) -> None:
        """Return when the store has all of the point. Raises TemporaryError when it takes longer."""
        waiting = {share.machine: trio.Event() for share in point.shares if share.machine != self._machine.id}
        self._settling |= {(point.id, machine): event for machine, event in waiting.items()}
        try:
            with trio.fail_after(seconds_max):
                for share in point.shares:
                    if share.machine != self._machine.id:
                        self._say(share.machine, Settle(point=point.id, lsn=share.lsn))
                await self._machine.settled(point.confirmed_lsn)
                for event in waiting.values():
                    await event.wait()
        except trio.TooSlowError:
            missing = ", ".join(self._names[machine] for machine, event in waiting.items() if not event.is_set())
            raise TemporaryError(
                f"point {point.id} of group {point.group} is made and not at the store yet after {seconds_max:g} s"
                + (f": {missing} is behind" if missing else "")
            ) from None
        finally:
            for machine in waiting:
                self._settling.pop((point.id, machine), None)
