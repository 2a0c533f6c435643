"""The schedule at work in virtual time: points come, failures do not end it, and their absence is noticed."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
import trio.testing

from asrfs.consistency import points as points_room
from asrfs.consistency.points import Point, PointLog
from asrfs.consistency.schedule import SPREAD_S_MAX
from asrfs.consistency.scheduler import LOOK_EVERY_S, Scheduler
from asrfs.daemon.settings_in_force import CALENDAR_INTERVAL_S, SettingsInForce
from asrfs.daemon.state import CONFIGURATION_FILE, StateDirectory
from asrfs.errors import IntegrityError, RefusedError, TemporaryError
from asrfs.model.configuration import HostConfiguration
from asrfs.model.marker import Consistency, MarkerRecord
from asrfs.model.policy import Policy, parse_policy
from asrfs.model.quantities import NS_PER_SECOND
from asrfs.replication.alarms import Alarms
from asrfs.replication.configuration_keeper import ConfigurationKeeper
from asrfs.replication.source import Source
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.virtual_time import pass_time

DAY_NS = 86_400 * NS_PER_SECOND
MACHINE_ID = "5" * 32


@dataclass
class World:
    """A host's schedule, wall clock and points. `failure`: what making a point comes to; `takes_s`: how long."""

    policy: Policy = field(default_factory=Policy)
    storage: CrashStorage = field(default_factory=CrashStorage)
    wall_ns: int = 1_700_000_000 * NS_PER_SECOND
    lsn: int = 0
    failure: Exception | None = None
    falls_back: str | None = None
    takes_s: dict[str, float] = field(default_factory=dict)
    made: list[tuple[float, Consistency]] = field(default_factory=list)
    alarms: Alarms = field(default_factory=Alarms)

    def __post_init__(self) -> None:
        self.points = PointLog(self.storage, "points.jsonl")
        self.scheduler = Scheduler(MACHINE_ID, lambda: self.policy, self.make, self.points, self.alarms, self)

    def time_ns(self) -> int:
        return self.wall_ns + int(trio.current_time() * NS_PER_SECOND)

    def monotonic(self) -> float:
        return trio.current_time()

    async def make(self, kind: Consistency) -> Point:
        await trio.sleep(self.takes_s.get(kind, 0))  # sleep: virtual, what it takes
        if self.failure is not None:
            raise self.failure
        return self.cut("crash" if self.falls_back else kind, self.falls_back)

    def cut(self, kind: Consistency, failed: str | None = None) -> Point:
        """As somebody does who asks for a point."""
        self.lsn += 1
        point = Point(
            id=f"{self.lsn:032x}", lsn=self.lsn, epoch=1, time_ns=self.time_ns(), consistency=kind, failed=failed
        )
        self.points.add(point)
        self.made.append((trio.current_time(), kind))
        return point

    def change(self, **texts: str) -> None:
        self.policy = parse_policy(texts)
        self.scheduler.policy_changed()

    def alarm_ids(self) -> set[str]:
        return {alarm.id for alarm in self.alarms.now()}

    def times(self, kind: Consistency = "crash") -> list[float]:
        return [at for at, made in self.made if made == kind]


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.scheduler.run)
        await trio.testing.wait_all_tasks_blocked()
        yield world
        nursery.cancel_scope.cancel()


async def test_points_come_by_default_and_none_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World()) as world:
        await pass_time(149)
        assert world.made == [], "a machine that has just begun is left alone"
        await pass_time(3600 - 149)
        assert len(world.times()) in (11, 12)
        await pass_time(23 * 3600)
        assert len(world.times()) in range(287, 289)
        assert len(world.times("application")) in (5, 6)
        assert world.alarm_ids() == set()


async def test_a_new_interval_and_a_new_kind_hold_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World(parse_policy({"application_interval": "0"}))) as world:
        await pass_time(60)
        world.change(crash_interval="1s", application_interval="0")
        await pass_time(SPREAD_S_MAX)
        assert len(world.times()) in range(8, 12)
        world.change(crash_interval="24h", application_interval="2s")
        count = len(world.times())
        await pass_time(10)
        assert len(world.times()) == count
        assert len(world.times("application")) in (4, 5)


async def test_a_failed_point_is_told_tried_again_at_the_next_time_and_ends_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(World(parse_policy({"crash_interval": "10s", "application_interval": "0"}))) as world:
        for failure in (TemporaryError("away"), RefusedError("no"), OSError(errno.EIO, os.strerror(errno.EIO))):
            world.failure = failure
            await pass_time(20)
            assert "crash-point-failed" in world.alarm_ids()
            assert str(failure) in world.alarms.now()[0].text
        assert world.made == []
        world.failure = None
        await pass_time(20)
        assert len(world.made) == 2
        assert world.alarm_ids() == set()


async def test_a_point_that_is_less_than_was_wanted_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World(parse_policy({"crash_interval": "24h", "application_interval": "10s"}))) as world:
        world.falls_back = "hook db: exit code 1"
        await pass_time(10)
        (alarm,) = world.alarms.now()
        assert alarm.id == "application-point-failed"
        assert "hook db: exit code 1" in alarm.text
        world.falls_back = None
        await pass_time(10)
        assert world.alarm_ids() == set()
        world.falls_back = "again"
        await pass_time(10)
        world.change(application_interval="0")
        await pass_time(2)
        assert world.alarm_ids() == set(), "what is not wanted any more cannot have failed"


async def test_a_slow_point_holds_up_no_other_kind_and_no_queue_grows(autojump_clock: trio.testing.MockClock) -> None:
    texts = {"crash_interval": "1s", "application_interval": "10s"}
    async with running(World(parse_policy(texts))) as world:
        world.takes_s = {"application": 35.0}
        await pass_time(100)
        assert len(world.times()) in range(98, 101)
        times = world.times("application")
        assert len(times) in (2, 3), "while one was being made, no other was begun"


async def test_points_missed_while_asleep_are_not_made_up_for(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World(parse_policy({"crash_interval": "1s", "application_interval": "0"}))) as world:
        await pass_time(5)
        count = len(world.made)
        world.takes_s = {"crash": 1000.0}
        await pass_time(1002)
        world.takes_s = {}
        assert len(world.made) <= count + 2
        await pass_time(998 - SPREAD_S_MAX)


async def test_an_alarm_when_none_appears_and_when_there_never_was_one(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World()) as world:
        world.failure = TemporaryError("away")
        await pass_time(3599)
        assert world.alarm_ids() == {"crash-point-failed"}
        await pass_time(2)
        (text,) = (alarm.text for alarm in world.alarms.now() if alarm.id == "no-crash-point")
        assert "never" in text
        await pass_time(4 * 3600)
        assert "no-application-point" in world.alarm_ids()
        world.failure = None
        await pass_time(301)
        assert world.alarm_ids() == {"application-point-failed", "no-application-point"}
        world.failure = TemporaryError("away")
        await pass_time(3601)
        (text,) = (alarm.text for alarm in world.alarms.now() if alarm.id == "no-crash-point")
        assert "has appeared for 60m" in text


async def test_the_alarm_can_be_set_and_looks_at_all_points_there_are(autojump_clock: trio.testing.MockClock) -> None:
    async with running(World(parse_policy({"crash_interval": "24h", "point_alarm": "5s"}))) as world:
        await pass_time(5 + LOOK_EVERY_S)
        assert world.alarm_ids() == {"no-crash-point"}
        world.cut("filesystem")
        await pass_time(1.5 * LOOK_EVERY_S)
        assert world.alarm_ids() == set(), "every point is at least crash-consistent, and made by whomever"
        await pass_time(5 + LOOK_EVERY_S)
        assert world.alarm_ids() == {"no-crash-point"}
        world.change(crash_interval="24h")
        await pass_time(2 * LOOK_EVERY_S)
        assert world.alarm_ids() == set()


@pytest.mark.parametrize("jump_ns", [-DAY_NS, DAY_NS, 365 * DAY_NS])
async def test_a_clock_that_jumps_changes_nothing(jump_ns: int, autojump_clock: trio.testing.MockClock) -> None:
    async with running(World(parse_policy({"crash_interval": "10s", "application_interval": "0"}))) as world:
        await pass_time(25)
        count = len(world.made)
        world.wall_ns += jump_ns
        await pass_time(100)
        assert len(world.made) in range(count + 9, count + 12)
        assert world.alarm_ids() == set()
        lsns = [point.lsn for point in world.points.points()]
        assert lsns == list(range(1, len(world.made) + 1)), "listed by LSN, whatever their clocks say"


@pytest.mark.parametrize("life_s", [20.0, 200.0, 290.0])
async def test_an_agent_that_keeps_dying_makes_points_all_the_same(
    life_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(parse_policy({"application_interval": "0"}))
    world.cut("crash")
    for _ in range(int(7200 / life_s)):
        world.scheduler = Scheduler(MACHINE_ID, lambda: world.policy, world.make, world.points, world.alarms, world)
        async with running(world):
            await pass_time(life_s)
    assert len(world.made) in range(int(7200 / (300 + life_s)) - 1, 26)
    assert "no-crash-point" not in world.alarm_ids()


def test_the_newest_of_each_kind_also_of_one_that_became_less() -> None:
    storage = CrashStorage()
    log = PointLog(storage, "points.jsonl")
    assert log.newest() == {}
    for lsn, kind in ((5, "application"), (3, "application"), (7, "crash"), (6, "filesystem")):
        log.add(Point(id=f"{lsn:032x}", lsn=lsn, epoch=1, time_ns=lsn, consistency=kind, unfinished=lsn == 5))
    assert {kind: point.lsn for kind, point in log.newest().items()} == {
        "crash": 7, "filesystem": 6, "application": 5,
    }  # fmt: skip
    log.complete(MarkerRecord(id=f"{5:032x}", consistency="crash", completes=5, failed="thawed"))
    for read in (log, PointLog(storage, "points.jsonl")):
        assert {kind: point.lsn for kind, point in read.newest().items()} == {
            "crash": 7, "filesystem": 6, "application": 3,
        }  # fmt: skip


def test_the_list_of_points_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_room, "POINTS_MAX", 20)
    monkeypatch.setattr(points_room, "POINTS_TOO_MANY", 5)
    storage = CrashStorage()
    log = PointLog(storage, "points.jsonl")
    for lsn in range(1, 200):
        log.add(Point(id=f"{lsn:032x}", lsn=lsn, epoch=1, time_ns=lsn))
        assert len(log.points()) <= 25
        assert storage.contents()["points.jsonl"].count(b"\n") <= 25
        assert log.points()[-1].lsn == lsn
    again = PointLog(storage, "points.jsonl").points()
    assert again == log.points()[-len(again) :] and len(again) >= 20


# ---- settings over the policy ---------------------------------------------------------------------------------------


@dataclass
class Clockwork:
    """A state directory, what is in force, and the source it is told to."""

    state: StateDirectory
    minute: int = 0
    changes: int = 0

    def __post_init__(self) -> None:
        self.alarms = Alarms()
        self.in_force = SettingsInForce(self.state, self.alarms, lambda: self.minute)
        self.source = Source.__new__(Source)
        self.in_force.follow(self.source, self.note)

    def note(self) -> None:
        self.changes += 1


@pytest.fixture
def clockwork(scratch: os.PathLike[str]) -> Clockwork:
    return Clockwork(StateDirectory.create(os.path.join(scratch, "state"), "web1"))


def told(**keys: str) -> HostConfiguration:
    return HostConfiguration(generation=3, policy="gold", keys=keys)


async def test_a_policy_holds_where_nothing_is_set_here_and_again_when_that_is_taken_back(
    clockwork: Clockwork, autojump_clock: trio.testing.MockClock
) -> None:
    in_force, threads = clockwork.in_force, trio.CapacityLimiter(1)
    assert in_force.current.policy == Policy()
    in_force.told(told(crash_interval="60s", point_alarm="10m"))
    assert in_force.current.policy.crash_interval_s == 60
    clockwork.state.change_settings({"crash_interval": "5s"})
    await in_force.reload(threads)
    assert (in_force.current.policy.crash_interval_s, in_force.current.policy.point_alarm_s) == (5, 600)
    in_force.told(told(crash_interval="70s"))
    assert (in_force.current.policy.crash_interval_s, in_force.current.policy.point_alarm_s) == (5, None)
    clockwork.state.change_settings({"crash_interval": "default"})
    await in_force.reload(threads)
    assert in_force.current.policy.crash_interval_s == 70
    assert clockwork.changes == 4
    assert clockwork.alarms.now() == []


async def test_what_of_a_policy_cannot_be_followed_is_told_and_the_rest_is(clockwork: Clockwork) -> None:
    clockwork.in_force.told(told(crash_interval="60s", retention="for ever", mood="good"))
    assert clockwork.in_force.current.policy == parse_policy({"crash_interval": "60s"})
    (alarm,) = clockwork.alarms.now()
    assert alarm.id == "policy" and "retention=for ever" in alarm.text and "mood" in alarm.text
    clockwork.in_force.told(told(crash_interval="60s"))
    assert clockwork.alarms.now() == []


async def test_a_damaged_override_leaves_what_is_in_force(clockwork: Clockwork) -> None:
    clockwork.in_force.told(told(crash_interval="60s"))
    with open(clockwork.state.path("settings.json"), "w") as file:  # noqa: ASYNC230 - a test's
        file.write('{"crash_interval": "never"}')
    with pytest.raises(IntegrityError, match="crash_interval=never"):
        await clockwork.in_force.reload(trio.CapacityLimiter(1))
    assert clockwork.in_force.current.policy.crash_interval_s == 60


async def test_the_limit_of_bandwidth_follows_the_time_of_the_day(
    clockwork: Clockwork, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clockwork.in_force.watch_calendar)
        clockwork.in_force.told(told(bandwidth_limit="08:00-18:00 20M; else 200M"))
        for minute, limit in ((0, 200), (8 * 60, 20), (18 * 60 - 1, 20), (18 * 60, 200)):
            clockwork.minute = minute
            await pass_time(CALENDAR_INTERVAL_S + 0.1)
            assert clockwork.source.settings.bandwidth_limit == limit << 20
        clockwork.in_force.told(told())
        assert clockwork.source.settings.bandwidth_limit == 0
        nursery.cancel_scope.cancel()


async def test_a_policy_holds_through_keeper_and_restart_while_the_store_is_away(clockwork: Clockwork) -> None:
    """What a connection brought is in force at once; the next agent starts with it and no store."""

    class InlineKeeper(ConfigurationKeeper):
        async def in_thread(self, function: Callable[..., None], *arguments: object) -> None:
            await trio.lowlevel.checkpoint()
            function(*arguments)

    from asrfs.storage.directory import DirectoryStorage

    files = DirectoryStorage(clockwork.state.root)
    keeper = InlineKeeper(files, CONFIGURATION_FILE, clockwork.alarms, trio.CapacityLimiter(1))
    keeper.follow(clockwork.in_force.told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        keeper.offer(told(crash_interval="7s"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert clockwork.in_force.current.policy.crash_interval_s == 7
    assert Clockwork(clockwork.state).in_force.current.policy.crash_interval_s == 7
    assert clockwork.state.load_settings().policy.crash_interval_s == 7
    assert msgspec.structs.replace(keeper.current, keys={}) == msgspec.structs.replace(told(), keys={})
