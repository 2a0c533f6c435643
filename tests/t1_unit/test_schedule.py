"""When scheduled points are due, whatever the clock, the interval and the machine."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asrfs.consistency.schedule import SPREAD_S_MAX, Schedule, phase_of

phases = st.floats(0, 1, exclude_max=True)
intervals = st.floats(1, 86400)
starts = st.floats(0, 1e7)
NEARLY = 1e-6


def points_until(schedule: Schedule[str], now: float, end: float) -> list[float]:
    """When each was made, by one who is never late."""
    made = []
    while schedule.next_at() <= end:
        now = max(now, schedule.next_at())
        made += [now for _ in schedule.take_due(now)]
    return made


@given(phase=phases, interval_s=intervals, start=starts)
def test_the_first_comes_within_an_interval_and_not_before_half_of_it(
    phase: float, interval_s: float, start: float
) -> None:
    schedule = Schedule(phase, {"crash": interval_s}, start)
    assert start + interval_s / 2 - NEARLY <= schedule.next_at() <= start + interval_s + NEARLY


@given(phase=phases, interval_s=intervals, start=starts)
def test_they_are_an_interval_apart(phase: float, interval_s: float, start: float) -> None:
    made = points_until(Schedule(phase, {"crash": interval_s}, start), start, start + 10 * interval_s)
    assert len(made) in (9, 10)
    for before, after in pairwise(made):
        assert after - before == pytest.approx(interval_s, rel=1e-6, abs=NEARLY)


@given(phase=phases, interval_s=intervals, start=starts, late_s=st.floats(0, 1e6))
def test_what_was_missed_is_not_made_up_for(phase: float, interval_s: float, start: float, late_s: float) -> None:
    schedule = Schedule(phase, {"crash": interval_s}, start)
    grid = schedule.next_at()
    now = grid + late_s
    assert schedule.take_due(now) == ["crash"]
    assert schedule.take_due(now) == [], "one, however many were missed"
    assert now < schedule.next_at() <= now + interval_s * (1 + NEARLY) + NEARLY
    places = (schedule.next_at() - grid) / interval_s
    assert places == pytest.approx(round(places), abs=1e-3), "the grid stays where it is"


@given(phase=phases, before_s=intervals, after_s=intervals, start=starts, share=st.floats(0, 0.999))
def test_a_new_interval_holds_at_once(
    phase: float, before_s: float, after_s: float, start: float, share: float
) -> None:
    assume(before_s != after_s)
    schedule = Schedule(phase, {"crash": before_s}, start)
    schedule.take_due(schedule.next_at())
    last = schedule.next_at() - before_s
    now = last + before_s * share
    schedule.change({"crash": after_s}, now)
    soonest = now + min(after_s / 2, SPREAD_S_MAX)
    assert schedule.next_at() <= max(last + after_s, soonest) + NEARLY
    assert schedule.next_at() >= max(now, last + after_s) - NEARLY


@given(phase=phases, interval_s=intervals, start=starts, looks=st.lists(st.floats(0, 100), max_size=20))
def test_saying_the_same_again_changes_nothing(
    phase: float, interval_s: float, start: float, looks: list[float]
) -> None:
    """A policy is told again at every connection, more often than some intervals are long."""
    schedule = Schedule(phase, {"crash": interval_s}, start)
    due = schedule.next_at()
    for step in sorted(looks):
        if start + step < due:
            schedule.change({"crash": interval_s}, start + step)
            assert schedule.next_at() == due


@given(phase=phases, interval_s=intervals, start=starts, age_s=st.floats(-1e9, 1e9))
def test_a_schedule_goes_on_where_it_was_and_no_clock_puts_it_off(
    phase: float, interval_s: float, start: float, age_s: float
) -> None:
    """An agent that dies more often than points are due makes them all the same."""
    schedule = Schedule(phase, {"crash": interval_s}, start, {"crash": age_s})
    assert start <= schedule.next_at() <= start + interval_s
    if 0 <= age_s < interval_s / 2:
        assert schedule.next_at() == pytest.approx(start - age_s + interval_s)
    if age_s >= interval_s:
        assert schedule.next_at() <= start + min(interval_s / 2, SPREAD_S_MAX) + NEARLY


def test_kinds_come_and_go() -> None:
    schedule = Schedule(0.0, {"crash": 300.0, "application": 600.0}, 0.0)
    assert schedule.take_due(600) == ["crash", "application"]
    schedule.change({"crash": 300.0}, 700)
    assert schedule.next_at() == 900
    schedule.change({}, 800)
    assert schedule.next_at() == math.inf
    assert schedule.take_due(1e9) == []
    schedule.change({"application": 60.0}, 1000)
    assert schedule.next_at() == 1060


def test_machines_are_spread() -> None:
    phases_of = sorted(phase_of(f"{n:032x}") for n in range(1000))
    assert phases_of[0] >= 0 and phases_of[-1] < 1
    assert all(abs(phase - n / 1000) < 0.06 for n, phase in enumerate(phases_of))
    assert phase_of("a" * 32) == phase_of("a" * 32)
