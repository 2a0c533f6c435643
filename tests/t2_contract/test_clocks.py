"""One contract for every clock: the kernel's, and those that tests own and set."""

from __future__ import annotations

import pytest
import trio.testing

from asrfs.model.clock import Clock
from asrfs.storage.system_clock import SystemClock
from tests.fakes.journal_world import StepClock
from tests.fakes.virtual_time import pass_time
from tests.proof.sim.host import JumpingClock
from tests.proof.sim.watch import Watch

LOOKS = 200


@pytest.fixture(params=["system", "step", "jumping"])
def clock(request: pytest.FixtureRequest) -> Clock:
    made = {"system": SystemClock, "step": StepClock, "jumping": lambda: JumpingClock(Watch())}
    return made[request.param]()


async def test_wall_time_is_of_this_age_and_fits_the_formats(
    autojump_clock: trio.testing.MockClock, clock: Clock
) -> None:
    for _ in range(LOOKS):
        time_ns = clock.time_ns()
        assert isinstance(time_ns, int)
        assert 1_600_000_000_000_000_000 < time_ns < 1 << 62


async def test_monotonic_time_never_goes_back(autojump_clock: trio.testing.MockClock, clock: Clock) -> None:
    before = clock.monotonic()
    for number in range(LOOKS):
        clock.time_ns()
        if isinstance(clock, JumpingClock) and number % 10 == 0:
            clock.jump(-3600.0)
        now = clock.monotonic()
        assert isinstance(now, float)
        assert now >= before
        before = now


async def test_both_go_on(autojump_clock: trio.testing.MockClock, clock: Clock) -> None:
    wall, since = clock.time_ns(), clock.monotonic()
    for _ in range(LOOKS):
        await pass_time(0.001)
        if clock.time_ns() != wall and clock.monotonic() > since:
            return
    raise AssertionError("the clock stands")


async def test_setting_the_wall_clock_leaves_intervals_alone(autojump_clock: trio.testing.MockClock) -> None:
    watch = Watch()
    clock = JumpingClock(watch)
    wall, since = clock.time_ns(), clock.monotonic()
    clock.jump(-60.0)
    assert clock.time_ns() - wall == -60_000_000_000
    clock.jump(90.0)
    assert clock.time_ns() - wall == 30_000_000_000
    assert clock.monotonic() == since
    assert watch.faults["clock jumped"] == 2
