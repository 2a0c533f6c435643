"""A policy from the store's catalog to the points a host makes: real listener, sessions, shipper, keeper and schedule.

Wire, disks and time are in memory. The store goes away, the agent dies, what is set here overrides.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from asrfs.consistency.points import Point, PointLog
from asrfs.consistency.schedule import SPREAD_S_MAX
from asrfs.consistency.scheduler import Scheduler
from asrfs.daemon.settings_in_force import SettingsInForce
from asrfs.daemon.state import CONFIGURATION_FILE, StateDirectory
from asrfs.journal.reader import JournalReader
from asrfs.model.marker import Consistency
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.alarms import Alarms
from asrfs.replication.configuration_keeper import ConfigurationKeeper
from asrfs.replication.link import Link
from asrfs.replication.object_builder import MachineKeys, ObjectBuilder
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.shipper import Shipper, StoreAccess
from asrfs.replication.source import Source
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.backoff import Backoff
from asrfs.transport.stream import LinkError
from replica_store.vault.policy_changes import assign, set_policy
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_store import Wire
from tests.fakes.virtual_time import pass_time

TOLD_S_MAX = 2.0
T = TypeVar("T")


class InlineSource(Source):
    """Works in the task: virtual time would run on while a thread works."""

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class InlineKeeper(ConfigurationKeeper):
    async def in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        await trio.lowlevel.checkpoint()
        function(*arguments)


class Machine:
    """A host and the store it is enrolled with. `agent` is one life of its agent."""

    def __init__(self, world: StoreWorld, scratch: Path) -> None:
        self.store = world
        self.history = world.enrol("web1", int.from_bytes(MACHINE_ID))
        self.journal = JournalWorld(CrashStorage(), seed=1)
        self.state = StateDirectory.create(str(scratch / "state"), "web1")
        self.points = PointLog(CrashStorage(), "points.jsonl")
        self.made: list[float] = []
        self.is_store_away = False
        self.streams: list[Wire] = []

    async def connect(self) -> Wire:
        await trio.lowlevel.checkpoint()
        if self.is_store_away:
            raise LinkError("connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        certificate = self.store.certificates[self.history.machine_id]
        self.store.nursery.start_soon(self.store.listener.handle, Wire(theirs), certificate, "memory")
        self.streams.append(Wire(theirs))
        return Wire(ours)

    async def store_dies(self) -> None:
        self.is_store_away = True
        for wire in self.streams:
            await wire.aclose()
        self.streams.clear()

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        async with trio.open_nursery() as nursery:
            yield Agent(self, nursery)
            nursery.cancel_scope.cancel()


class Agent:
    """As `asrfs.daemon.agent` puts these together."""

    def __init__(self, machine: Machine, nursery: trio.Nursery) -> None:
        self.machine = machine
        self.alarms = Alarms()
        threads = trio.CapacityLimiter(1)
        files = DirectoryStorage(machine.state.root)
        self.keeper = InlineKeeper(files, CONFIGURATION_FILE, self.alarms, threads)
        self.in_force = SettingsInForce(machine.state, self.alarms, lambda: 0)
        journal = machine.journal
        positions = PositionsFile(Positions(), lambda positions: None)
        progress = Progress(positions.current)
        keys = machine.history.keys
        source = InlineSource(
            machine_id=MACHINE_ID,
            machine_name="web1",
            journal=journal.journal_storage,
            reader=JournalReader(journal.journal_storage, MACHINE_ID),
            builder=ObjectBuilder(JournalReader(journal.journal_storage, MACHINE_ID)),
            positions=positions,
            progress=progress,
            settings=self.in_force.shipping(),
            threads=threads,
            journal_turn=trio.Lock(),
            configured=self.keeper.offer,
        )
        store = StoreAccess(machine.connect, MachineKeys(MACHINE_ID, keys.index_key, keys.payload_key))
        self.shipper = Shipper(source, store, self.alarms, Link(), Backoff(random.Random(1)))
        self.scheduler = Scheduler(
            MACHINE_ID.hex(),
            lambda: self.in_force.current.policy,
            self.make,
            machine.points,
            self.alarms,
            SystemClock(),
        )
        self.in_force.follow(source, self.scheduler.policy_changed)
        self.keeper.follow(self.in_force.told)
        progress.note_host(appended_lsn=0, durable=Cursor(), epoch=1)
        for task in (self.keeper.run, self.shipper.run, self.scheduler.run):
            nursery.start_soon(task)

    async def make(self, kind: Consistency) -> Point:
        await trio.lowlevel.checkpoint()
        number = len(self.machine.made) + 1
        point = Point(id=f"{number:032x}", lsn=number, epoch=1, time_ns=SystemClock().time_ns(), consistency=kind)
        self.machine.points.add(point)
        self.machine.made.append(trio.current_time())
        return point

    def crash_interval_s(self) -> float:
        return self.in_force.current.policy.crash_interval_s


@asynccontextmanager
async def enrolled(scratch: Path) -> AsyncIterator[Machine]:
    async with make_world(scratch) as world:
        world.nursery.start_soon(world.listener.configurations.run)
        machine = Machine(world, scratch)
        assign(world.vault, "default", "machine", machine.history.machine_id)
        yield machine
        machine.journal.close()


async def test_a_changed_policy_is_followed_within_seconds(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with enrolled(scratch) as machine, machine.agent() as agent:
        await pass_time(5)
        assert machine.made == [] and agent.crash_interval_s() == 300
        for seconds in (1, 7, 2):
            set_policy(machine.store.vault, "default", {"crash_interval": f"{seconds}s", "application_interval": "off"})
            await pass_time(TOLD_S_MAX)
            assert agent.crash_interval_s() == seconds
            before = len(machine.made)
            await pass_time(10 * seconds)
            assert len(machine.made) - before in range(9, 12)
        set_policy(machine.store.vault, "gold", {"bandwidth_limit": "5M"})
        assign(machine.store.vault, "gold", "machine", machine.history.machine_id)
        await pass_time(TOLD_S_MAX)
        assert agent.crash_interval_s() == 300
        assert agent.shipper.source.settings.bandwidth_limit == 5 << 20


async def test_it_goes_on_while_the_store_is_away_and_after_the_agent_died(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with enrolled(scratch) as machine:
        set_policy(machine.store.vault, "default", {"crash_interval": "10s", "application_interval": "off"})
        async with machine.agent():
            await pass_time(TOLD_S_MAX)
            await machine.store_dies()
            before = len(machine.made)
            await pass_time(1000)
            assert len(machine.made) - before in range(99, 102)
        async with machine.agent() as agent:
            assert agent.crash_interval_s() == 10, "before any store was heard"
            before = len(machine.made)
            await pass_time(100)
            assert len(machine.made) - before in range(9, 12)
            set_policy(machine.store.vault, "default", {"crash_interval": "50s"})
            machine.is_store_away = False
            agent.shipper.retry_now()
            await pass_time(TOLD_S_MAX)
            assert agent.crash_interval_s() == 50, "what changed meanwhile is told when it is back"


async def test_what_is_set_here_overrides_what_is_told_until_it_is_taken_back(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with enrolled(scratch) as machine, machine.agent() as agent:
        set_policy(machine.store.vault, "default", {"crash_interval": "100s"})
        await pass_time(TOLD_S_MAX)
        machine.state.change_settings({"crash_interval": "1s"})
        agent.in_force._settle(machine.state.load_overrides())
        await pass_time(SPREAD_S_MAX)
        assert len(machine.made) >= 5
        set_policy(machine.store.vault, "default", {"crash_interval": "200s", "point_alarm": "5m"})
        await pass_time(TOLD_S_MAX)
        assert (agent.crash_interval_s(), agent.in_force.current.policy.point_alarm_s) == (1, 300)
        machine.state.change_settings({"crash_interval": "default"})
        agent.in_force._settle(machine.state.load_overrides())
        assert agent.crash_interval_s() == 200


@pytest.mark.parametrize("seed", range(3))
async def test_however_often_both_sides_die_the_last_word_is_followed_in_the_end(
    seed: int, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    rng = random.Random(seed)
    async with enrolled(scratch) as machine:
        for _ in range(12):
            async with machine.agent() as agent:
                for _ in range(rng.randrange(4)):
                    step = rng.randrange(4)
                    if step == 0:
                        await machine.store_dies()
                    elif step == 1:
                        machine.is_store_away = False
                    else:
                        told_s = rng.randrange(1, 86_400)
                        set_policy(machine.store.vault, "default", {"crash_interval": f"{told_s}s"})
                    await pass_time(rng.choice((0.01, 0.3, 3.0)))
                kept_s = machine.state.load_settings().policy.crash_interval_s
                assert kept_s == agent.crash_interval_s(), "what is followed is what the next agent will find"
        machine.is_store_away = False
        set_policy(machine.store.vault, "default", {"crash_interval": "77s"})
        async with machine.agent() as agent:
            await pass_time(TOLD_S_MAX)
            assert agent.crash_interval_s() == 77
        assert machine.state.load_settings().policy.crash_interval_s == 77
