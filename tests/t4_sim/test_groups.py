"""Points of groups while members are slow, die, are cut off in every phase: real words, decisions, tasks; virtual time.

A listed point has no effect without its cause, a void one is never listed, and nobody is held beyond the deadline.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from asrfs.consistency.group_stream import SILENCE_S_MAX
from asrfs.errors import AsrfsError, NotFoundError, TemporaryError
from asrfs.model.marker import Consistency
from asrfs.protocol.group_messages import Confirmed, Gather, Gathered, Prepare, Ready, Release, Released, Word
from tests.fakes.group_world import GROUP, HOLD_S, GroupWorld, MemberMachine, Strike
from tests.fakes.virtual_time import pass_time

PHASES: tuple[type[Word], ...] = (Gather, Gathered, Prepare, Ready, Release, Released, Confirmed)


@asynccontextmanager
async def running(world: GroupWorld) -> AsyncIterator[None]:
    """All machines, two players for each of them, and the way to the store."""
    async with trio.open_nursery() as nursery:
        world.nursery = nursery
        for machine in world.machines:
            nursery.start_soon(machine.run)
        for player in range(2 * len(world.machines)):
            nursery.start_soon(world.ping_pong, player)
        nursery.start_soon(world.ship)
        await until_joined(world)
        yield
        nursery.cancel_scope.cancel()
    world.check_holds()
    await world.ship_everything()
    world.check_listed_points()


async def until_joined(world: GroupWorld) -> None:
    with trio.fail_after(60):
        while True:
            await pass_time(0.05)
            standings = [standing for machine in world.machines for standing in machine.groups.standing()]
            if (
                len(standings) == len(world.machines)
                and not any(standing["reason"] for standing in standings)
                and standings[0]["connected"] == len(world.machines)
            ):
                return


async def cut(world: GroupWorld, consistency: Consistency = "crash") -> str | None:
    """A point asked for on any machine: its id, None if it came to nothing."""
    machine = world.rng.choice(world.machines)
    try:
        with trio.move_on_after(60):
            return (await machine.groups.create(GROUP, consistency, point_name=None, note=None, wait_s=None)).id
    except AsrfsError:
        return None
    return None


@pytest.mark.parametrize("size", [1, 2, 4])
async def test_no_effect_without_its_cause_in_two_hundred_points(
    size: int, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, size)
    async with running(world):
        made = [await cut(world) for _ in range(200)]
        await pass_time(0.1)
    assert all(made), "nothing went wrong, so every point is real"
    assert world.check_listed_points() == len(set(made)) == 200
    assert all(len(machine.confirmed) == 200 for machine in world.machines)


async def test_points_that_need_a_freeze_are_cut_when_all_are_frozen(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 3)
    async with running(world):
        made = [await cut(world, rng.choice(("filesystem", "application"))) for _ in range(20)]
    assert all(made)
    assert world.check_listed_points() == 20


def _die(machine: MemberMachine) -> None:
    machine.kill_agent()


def _cut_off(machine: MemberMachine) -> None:
    machine.cut_off()


def _coordinator_dies(machine: MemberMachine) -> None:
    machine.world.coordinator.kill_agent()


def _server_restarts(machine: MemberMachine) -> None:
    machine.server.restart()


def _break(machine: MemberMachine) -> None:
    for wire in machine.wires:
        wire.cut()


def _late(machine: MemberMachine) -> None:
    """For longer than the hold: what is said comes afterwards."""
    for wire in machine.wires:
        for lane in (wire.upward, wire.downward):
            wire.stall(lane)

    async def go_on() -> None:
        await pass_time(HOLD_S * 1.5)
        for wire in machine.wires:
            for lane in (wire.upward, wire.downward):
                wire.release(lane)

    machine.world.nursery.start_soon(go_on)


STRIKES: dict[str, Strike] = {
    "dies": _die,
    "is cut off": _cut_off,
    "is late": _late,
    "loses its connection": _break,
    "coordinator dies": _coordinator_dies,
    "disk server restarts": _server_restarts,
}


@pytest.mark.parametrize("partial", [False, True], ids=["all", "partial"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
@pytest.mark.parametrize("strike", STRIKES)
async def test_a_fault_in_each_phase_lets_everyone_go_and_lists_nothing_void(
    strike: str, phase: type[Word], partial: bool, rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 3, partial=partial)
    async with running(world):
        for _ in range(3):
            assert await cut(world)
            world.strike_at(phase, STRIKES[strike])
            made = await cut(world)
            await pass_time(SILENCE_S_MAX + 2.0)
            await world.ship_everything()
            found = world.listed()
            if made is not None:
                assert made in found, "what was said to be a point is one"
            world.check_listed_points()
            for machine in world.machines:
                machine.is_cut_off = False
            await until_joined(world)
        assert world.fired[phase.__name__] == 3
        assert await cut(world), "afterwards all is well again"


@pytest.mark.parametrize("phase", [Prepare, Gathered], ids=lambda phase: phase.__name__)
async def test_a_member_that_is_lost_while_it_is_frozen_voids_the_point(
    phase: type[Word], rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 3)
    async with running(world):
        world.strike_at(phase, _cut_off, world.machines[1])
        assert await cut(world, "filesystem") is None
        assert world.fired[phase.__name__] == 1
        await world.ship_everything()
        assert world.listed() == {}


async def test_points_of_each_kind_come_on_schedule_and_one_that_cannot_be_is_an_alarm(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 3)
    world.intervals_s = {"interval_s": 2.0, "filesystem_interval_s": 15.0, "application_interval_s": 40.0}
    async with running(world):
        alarms = world.coordinator.alarms
        await pass_time(120)
        made = Counter(point.consistency for point in world.machines[2].confirmed)
        assert made["crash"] in range(57, 61) and made["filesystem"] in (7, 8) and made["application"] in (2, 3), made
        assert len(world.coordinator.confirmed) == made.total(), "each for all of them"
        assert alarms.now() == []
        world.machines[2].cut_off()
        await pass_time(100)
        assert [(alarm.id, alarm.severity) for alarm in alarms.now()] == [
            (f"group-shop-{kind}-point-failed", "warning") for kind in ("application", "crash", "filesystem")
        ]
        assert "crash-consistent point of group shop was not made" in alarms.now()[1].text
        assert "m2: it is not connected" in alarms.now()[1].text
        world.machines[2].is_cut_off = False
        await until_joined(world)
        await pass_time(60)
        assert alarms.now() == []


async def test_a_schedule_goes_on_where_it_was_when_the_coordinator_starts_again(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    """Its agent lives for less than the interval each time; what is due at the start waits for the members."""
    world = GroupWorld(rng, 2)
    world.intervals_s = {"application_interval_s": 20.0}
    async with running(world):
        assert await cut(world, "application")
        for _ in range(20):
            await pass_time(8)
            world.coordinator.kill_agent()
            await pass_time(2)
        made = [point.time_ns / 1e9 for point in world.machines[1].confirmed]
        assert len(made) in range(8, 12), made
        assert all(after - before > 15 for before, after in itertools.pairwise(made)), made


async def test_a_member_that_lets_go_early_is_never_in_a_point(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    """Its disk server is killed between READY and RELEASE: it says so, whatever has become of the writes by then."""
    world = GroupWorld(rng, 3)
    async with running(world):
        for _ in range(5):
            world.strike_at(Ready, _server_restarts)
            assert await cut(world) is None
            await world.ship_everything()
            assert world.listed() == {}
        assert world.fired["Ready"] == 5


async def test_partial_points_say_on_how_many_they_were_cut(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 4, partial=True)
    async with running(world):
        world.machines[2].cut_off()
        await pass_time(SILENCE_S_MAX + 1)
        point = await world.coordinator.groups.create(GROUP, "crash", point_name="p", note=None, wait_s=None)
        assert (point.ready, point.members) == (3, 4)
        await world.ship_everything()
        (shares,) = world.listed().values()
        assert sorted(shares) == [0, 1, 3]
        assert {(row.marker.ready, len(row.marker.members), row.marker.name) for row in shares.values()} == {
            (3, 4, "p")
        }


async def test_waiting_for_the_store_waits_for_every_member(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    world = GroupWorld(rng, 3)
    async with running(world):
        for machine in (world.machines[0], world.machines[1]):
            point = await machine.groups.create(GROUP, "crash", point_name=None, note=None, wait_s=60.0)
            assert point.id in world.listed()


async def test_changed_orders_are_followed_while_points_are_cut(
    rng: random.Random, autojump_clock: trio.testing.MockClock
) -> None:
    """A new generation: members and coordinator agree on it, or there is no point."""
    world = GroupWorld(rng, 3)
    async with running(world):
        assert await cut(world)
        world.generation = 2
        world.coordinator.groups.follow(world.orders_of(world.coordinator))
        await pass_time(0.01)
        with pytest.raises(TemporaryError, match="not connected"):
            await world.coordinator.groups.create(GROUP, "crash", point_name=None, note=None, wait_s=None)
        for machine in world.machines[1:]:
            machine.groups.follow(world.orders_of(machine))
        await until_joined(world)
        assert await cut(world)
        with pytest.raises(NotFoundError, match="belongs to no group 'other': it belongs to shop"):
            await world.coordinator.groups.create("other", "crash", point_name=None, note=None, wait_s=None)
