"""Machines of a consistency group in virtual time: the real words, decisions and tasks, between disk servers, wires
and a store of memory.

Writers play ping-pong: a write is begun only when another one, on any machine, has been acknowledged, and says which.
So a cut that has an effect without its cause is seen by looking at nothing but the cut. What the store would list is
decided by its own rules from the records that have come there, in any order between machines.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from asrfs.consistency.group_member import Machine
from asrfs.consistency.group_share import AtInstant, Held
from asrfs.consistency.groups import Groups
from asrfs.consistency.point_ages import Newest, ages_s
from asrfs.consistency.points import Point
from asrfs.errors import RefusedError, TemporaryError
from asrfs.model.configuration import GroupOrder, Member
from asrfs.model.marker import Consistency, MarkerRecord, decode_marker
from asrfs.model.point_alarms import kinds_of
from asrfs.protocol.frames import FrameReader
from asrfs.protocol.group_messages import Beat, Word, decode_word
from asrfs.replication.alarms import Alarms
from asrfs.transport.stream import ByteStream, LinkError
from asrfs.transport.tls import MachineIdentity
from replica_store.vault.cuts import ConfirmationRow, listed
from replica_store.vault.rows import PointRow
from tests.fakes.wire import Bytes, Wire, WireEnd

HOLD_S = 1.0
LIVELY_S = 0.05
"""Players begin writes for so long after a word about a point was said: nothing else is of interest."""
GROUP_ID = "ee" * 16
GROUP = "shop"


@dataclass(frozen=True)
class Token:
    """A write. `cause`: the one that had been acknowledged when it was begun, `(machine, number of its write)`."""

    number: int
    cause: tuple[int, int] | None


@dataclass
class Hold:
    id: str
    began: float
    deadline: float
    over: trio.Event = field(default_factory=trio.Event)


class MemoryServer:
    """A disk server: appends, holds, dies. Its history survives it; what it held does not."""

    def __init__(self, latency: Callable[[], float]) -> None:
        self.history: list[Token | MarkerRecord] = []
        self.markers: list[tuple[int, MarkerRecord]] = []
        """The same, with their LSNs."""
        self.lsn_of: dict[int, int] = {}
        """By the number of a write."""
        self.durable = 0
        self.is_away = False
        self.held_s: list[float] = []
        self._latency = latency
        self._armed: tuple[str, bytes, float] | None = None
        self._hold: Hold | None = None
        self._released: tuple[str, bool, float] = ("", False, 0.0)

    # ---- writers ----

    async def write(self, token: Token) -> None:
        """Returns when it is acknowledged."""
        await trio.sleep(self._latency())  # sleep: virtual
        while (hold := self._current()) is not None:
            with trio.move_on_at(hold.deadline):
                await hold.over.wait()
            await trio.lowlevel.checkpoint()
        self.history.append(token)
        self.lsn_of[token.number] = len(self.history)

    # ---- what a share asks ----

    async def arm(self, hold_id: str, marker: bytes, seconds_max: float, not_after: float | None) -> None:
        await self._reached()
        self._armed = (hold_id, marker, seconds_max)

    async def hold(self, hold_id: str) -> Held:
        await self._reached()
        if self._current() is not None:
            raise RefusedError("writes are being held already")
        if self._armed is None or self._armed[0] != hold_id:
            raise RefusedError("the disk server was not made ready for this point")
        (_, marker, seconds_max), self._armed = self._armed, None
        self._append_marker(marker)
        now = trio.current_time()
        self._hold = Hold(hold_id, now, now + seconds_max)
        return Held(len(self.history), int(now * 1e9), 1)

    def let_go(self, hold_id: str, quiet_s: float) -> None:
        """`release` does it all."""

    async def release(self, hold_id: str, quiet_s: float) -> tuple[bool, float]:
        await self._reached()
        hold = self._current()
        if hold is not None and hold.id == hold_id:
            self._let_go(in_time=True)
        known, holding, seconds = self._released
        self._released = ("", holding, seconds)
        await trio.sleep(quiet_s)  # sleep: virtual
        return (holding, seconds * 1000) if known == hold_id else (False, 0.0)

    async def make_durable(self) -> None:
        until = len(self.history)
        await self._reached()
        self.durable = max(self.durable, until)

    async def marker(self, payload: bytes) -> tuple[int, int]:
        await self._reached()
        lsn = self._append_marker(payload)
        await self.make_durable()
        return lsn, 0

    def restart(self) -> None:
        """Killed and started again: the kernel's requests are answered by one that holds nothing."""
        self._hold_ends()
        self._armed = None
        self._released = ("", False, 0.0)

    def _append_marker(self, payload: bytes) -> int:
        record = decode_marker(payload)
        self.history.append(record)
        self.markers.append((len(self.history), record))
        return len(self.history)

    def _current(self) -> Hold | None:
        if self._hold is not None and trio.current_time() >= self._hold.deadline:
            self._let_go(in_time=False)
        return self._hold

    def _let_go(self, *, in_time: bool) -> None:
        assert self._hold is not None
        until = min(trio.current_time(), self._hold.deadline)
        self._released = (self._hold.id, in_time, until - self._hold.began)
        self._hold_ends()

    def _hold_ends(self) -> None:
        if self._hold is not None:
            self.held_s.append(min(trio.current_time(), self._hold.deadline) - self._hold.began)
            self._hold.over.set()
            self._hold = None

    async def _reached(self) -> None:
        await trio.sleep(self._latency())  # sleep: virtual
        if self.is_away:
            raise TemporaryError("the disk server is away")


class OneAtATime:
    """Instants of a machine without filesystems: what was wanted is had after `seconds` of freezing."""

    def __init__(self, freeze_s: Callable[[], float]) -> None:
        self._turn = trio.Lock()
        self._freeze_s = freeze_s

    async def at_instant(self, marker: MarkerRecord, do: AtInstant) -> None:
        async with self._turn:
            if marker.consistency != "crash":
                await trio.sleep(self._freeze_s())  # sleep: virtual
            await do(marker, None)


Strike = Callable[["MemberMachine"], None]


class _WatchedEnd:
    """One end of a connection: tells the world of each word that is said on it, before it goes out."""

    def __init__(self, world: GroupWorld, end: WireEnd, machine: MemberMachine) -> None:
        self._world = world
        self._end = end
        self._machine = machine
        self._reader = FrameReader()

    async def send_all(self, data: Bytes) -> None:
        for frame in self._reader.feed(data):
            self._world.on_word(self._machine, decode_word(frame.payload))
        await self._end.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._end.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._end.aclose()


class MemberMachine:
    """One machine: disk server, agent with its groups. The agent may die, the connections may break."""

    def __init__(self, world: GroupWorld, number: int) -> None:
        self.world = world
        self.number = number
        self.id = f"{number:032x}"
        self.name = f"m{number}"
        self.server = MemoryServer(world.latency)
        self.confirmed: list[Point] = []
        self.alarms = Alarms()
        self.wires: list[Wire] = []
        self.is_cut_off = False
        self.groups: Groups
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """An agent after another, for ever."""
        while True:
            with trio.CancelScope() as self._scope:
                machine = Machine(
                    id=self.id,
                    server=self.server,
                    instants=OneAtATime(self.world.freeze_s),
                    confirmed=self._confirmed,
                    settled=self._settled,
                    confirm=self.server.marker,
                )
                self.groups = Groups(
                    machine,
                    self._dial,
                    hold_s=lambda: HOLD_S,
                    freeze_s=lambda: 10.0,
                    alarms=self.alarms,
                    ages_s=self._ages_s,
                )
                self.groups.follow(self.world.orders_of(self))
                await self.groups.run()
            await trio.sleep(0.2)  # sleep: virtual, until the next agent

    def kill_agent(self) -> None:
        for wire in self.wires:
            wire.cut()
        self._scope.cancel()

    def cut_off(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self.is_cut_off = True
        for wire in self.wires:
            wire.silence(wire.upward)
            wire.silence(wire.downward)

    async def _dial(self, member: Member) -> ByteStream:
        await trio.sleep(self.world.latency())  # sleep: virtual
        other = self.world.machine(member.machine_id)
        if self.is_cut_off or other.is_cut_off:
            raise LinkError("no route")
        wire = Wire(latency=self.world.latency, chop=self.world.rng)
        for each in (self, other):
            each.wires = [*(old for old in each.wires if old.is_alive), wire]
        identity = MachineIdentity(self.id, self.name, "1")
        self.world.nursery.start_soon(other.groups.receive, _WatchedEnd(self.world, wire.store, self), identity)
        return _WatchedEnd(self.world, wire.host, self)

    async def _confirmed(self, point: Point) -> None:
        self.confirmed.append(point)

    def _ages_s(self, group: str) -> dict[Consistency, float]:
        newest = {
            kind: Newest(point.lsn, point.time_ns)
            for point in self.confirmed
            if point.group == group
            for kind in kinds_of(point.consistency)
        }
        return ages_s(newest, int(trio.current_time() * 1e9))

    async def _settled(self, lsn: int) -> None:
        while self.world.received[self.number] < lsn:
            await self.world.came.wait()


class GroupWorld:
    """`size` machines, the first is the coordinator. `strikes`: what happens once a word of this type is said."""

    def __init__(self, rng: random.Random, size: int, *, partial: bool = False) -> None:
        self.rng = rng
        self.partial = partial
        self.generation = 1
        self.intervals_s: dict[str, float] = {}
        self.fired: Counter[str] = Counter()
        self._strike: tuple[type[Word], MemberMachine | None, Strike] | None = None
        self.machines = [MemberMachine(self, number) for number in range(size)]
        self.received = [0] * size
        self.nursery: trio.Nursery
        self._writes = 0
        self._checked: set[str] = set()
        self._looked_at = 0
        self._stirred = trio.Event()
        self._stirred_at = 0.0
        self.came = trio.Event()
        """Set, and made anew, when something has come to the store."""

    def latency(self) -> float:
        return self.rng.choice((0.0002, 0.001, 0.003, 0.01)) * self.rng.random()

    def freeze_s(self) -> float:
        return self.rng.random() * 0.2

    @property
    def coordinator(self) -> MemberMachine:
        return self.machines[0]

    def machine(self, machine_id: str) -> MemberMachine:
        return next(machine for machine in self.machines if machine.id == machine_id)

    def orders_of(self, _machine: MemberMachine) -> list[GroupOrder]:
        members = tuple(Member(machine_id=each.id, name=each.name) for each in self.machines)
        return [
            GroupOrder(
                id=GROUP_ID,
                name=GROUP,
                coordinator=self.coordinator.id,
                members=members,
                partial=self.partial,
                generation=self.generation,
                **self.intervals_s,
            )
        ]

    # ---- what happens -----------------------------------------------------------------------------------------------

    def strike_at(self, word: type[Word], strike: Strike, machine: MemberMachine | None = None) -> None:
        """Once, when this word is said to or by that machine, or to or by any."""
        self._strike = (word, machine, strike)

    def on_word(self, machine: MemberMachine, word: Word) -> None:
        if not isinstance(word, Beat):
            self._stirred_at = trio.current_time()
            self._stirred.set()
            self._stirred = trio.Event()
        if self._strike is None:
            return
        kind, wanted, strike = self._strike
        if isinstance(word, kind) and wanted in (None, machine):
            self._strike = None
            self.fired[kind.__name__] += 1
            strike(machine)

    async def ping_pong(self, player: int) -> None:
        """Write on one machine, then on another, for ever; each names the write before it as its cause."""
        cause: tuple[int, int] | None = None
        rng = random.Random(f"{player} {self.rng.random()}")
        while True:
            if trio.current_time() > self._stirred_at + LIVELY_S:
                await self._stirred.wait()
            machine = rng.choice(self.machines)
            self._writes += 1
            token = Token(self._writes, cause)
            await machine.server.write(token)
            cause = (machine.number, token.number)
            await trio.sleep(rng.random() * 0.002)  # sleep: virtual

    async def ship(self) -> None:
        """Records come to the store, machine by machine, each at its own pace."""
        while True:
            self.came.set()
            self.came = trio.Event()
            for number, machine in enumerate(self.machines):
                durable = machine.server.durable
                if durable > self.received[number]:
                    self.received[number] = self.rng.randint(self.received[number], durable)
            marked = sum(len(machine.server.markers) for machine in self.machines)
            if marked != self._looked_at or self.rng.random() < 0.1:
                self.check_listed_points()
            self._looked_at = marked
            await trio.sleep(0.05 * self.rng.random())  # sleep: virtual

    async def ship_everything(self) -> None:
        for number, machine in enumerate(self.machines):
            machine.server.durable = self.received[number] = len(machine.server.history)

    # ---- what must hold ---------------------------------------------------------------------------------------------

    def listed(self) -> dict[str, dict[int, PointRow]]:
        """What the store lists: by group point, by number of the machine."""
        points: dict[int, list[PointRow]] = {}
        confirmations: list[ConfirmationRow] = []
        shares: set[tuple[str, int, str]] = set()
        for number, machine in enumerate(self.machines):
            points[number] = []
            for lsn, record in machine.server.markers:
                if lsn > self.received[number]:
                    break
                if record.confirms:
                    confirmations.append(ConfirmationRow(machine.id, lsn, record))
                else:
                    points[number].append(PointRow(machine.id, lsn, 1, 0, record, False))
                    shares.add((machine.id, lsn, record.group_point or ""))
        found: dict[str, dict[int, PointRow]] = {}
        for number in points:
            for point in listed(points[number], confirmations, lambda *share: share in shares):
                found.setdefault(point.marker.group_point or "", {})[number] = point
        return found

    def check_listed_points(self) -> int:
        """Every listed point is there for all it was cut on, and no effect in it is without its cause. How many."""
        found = self.listed()
        for point, shares in found.items():
            assert {row.marker.ready for row in shares.values()} == {len(shares)}, f"{point} is not listed for all"
            assert self.partial or len(shares) == len(self.machines), f"{point} is listed without some members"
            if point not in self._checked:
                self._check_causes(point, {number: row.lsn for number, row in shares.items()})
                self._checked.add(point)
        return len(found)

    def _check_causes(self, point: str, cut: dict[int, int]) -> None:
        for number, lsn in cut.items():
            for record in self.machines[number].server.history[:lsn]:
                if isinstance(record, Token) and record.cause is not None and record.cause[0] in cut:
                    machine, cause = record.cause
                    assert self.machines[machine].server.lsn_of[cause] <= cut[machine], (
                        f"point {point}: write {record.number} of m{number} is in it, its cause {cause} of m{machine} "
                        "is not"
                    )

    def check_holds(self) -> None:
        """Nobody was held for longer than the deadline."""
        for machine in self.machines:
            longest = max(machine.server.held_s, default=0.0)
            assert longest <= HOLD_S + 1e-9, f"{machine.name} was held for {longest} s"
