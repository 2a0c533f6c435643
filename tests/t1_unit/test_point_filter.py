"""Choosing points: by everything they are chosen by at once, in the order of the history."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.errors import BadInputError
from asrfs.model.marker import CONSISTENCIES, Consistency
from asrfs.model.point_filter import PointFilter, parse_moment
from asrfs.model.quantities import NS_PER_SECOND, format_time

DAY_NS = 86_400 * NS_PER_SECOND


@dataclass(frozen=True)
class Point:
    lsn: int
    time_ns: int = 0
    consistency: Consistency = "crash"
    group: str | None = None
    name: str | None = None


maybe = st.sampled_from([None, "a", "b"])
points = st.lists(
    st.builds(
        Point,
        lsn=st.integers(1, 99),
        time_ns=st.integers(0, 9),
        consistency=st.sampled_from(CONSISTENCIES),
        group=maybe,
        name=maybe,
    ),
    unique_by=lambda point: point.lsn,
)
times = st.none() | st.integers(0, 9)
filters = st.builds(
    PointFilter,
    since_ns=times,
    until_ns=times,
    consistency=st.none() | st.sampled_from(CONSISTENCIES),
    group=maybe,
    name=maybe,
    limit=st.none() | st.integers(0, 5),
)


@given(points, filters)
def test_what_is_chosen_is_what_is_wanted_and_the_newest_of_it(points: list[Point], wanted: PointFilter) -> None:
    expected = []
    for point in sorted(points, key=lambda point: point.lsn):
        if wanted.since_ns is not None and point.time_ns < wanted.since_ns:
            continue
        if wanted.until_ns is not None and point.time_ns > wanted.until_ns:
            continue
        pairs = ((wanted.consistency, point.consistency), (wanted.group, point.group), (wanted.name, point.name))
        if all(want in (None, is_at) for want, is_at in pairs):
            expected.append(point)
    if wanted.limit is not None:
        expected = expected[len(expected) - min(wanted.limit, len(expected)) :]
    assert wanted.choose(points) == expected


def test_a_clock_that_was_set_back_a_day_does_not_change_the_order() -> None:
    clock = [10 * DAY_NS, 10 * DAY_NS + 60, 9 * DAY_NS, 9 * DAY_NS + 60]
    history = [Point(lsn, time_ns) for lsn, time_ns in enumerate(clock, 1)]
    assert [point.lsn for point in PointFilter().choose(reversed(history))] == [1, 2, 3, 4]
    assert [point.lsn for point in PointFilter(limit=2).choose(history)] == [3, 4], "the newest by LSN"
    assert [point.lsn for point in PointFilter(since_ns=10 * DAY_NS).choose(history)] == [1, 2]


def test_moments_are_times_or_how_long_ago() -> None:
    now_ns = 1_700_000_000 * NS_PER_SECOND
    assert parse_moment(format_time(now_ns), 0) == now_ns
    assert parse_moment("90m", now_ns) == now_ns - 5400 * NS_PER_SECOND
    for text in ("yesterday", "", "2026-13-01T00:00:00Z", "-4h"):
        with pytest.raises(BadInputError, match="neither a time"):
            parse_moment(text, now_ns)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "99999999d", "9999-12-31T23:59:59Z"])
def test_moments_that_no_point_can_have_are_asked_for_as_the_nearest_that_one_can(text: str) -> None:
    moment_ns = parse_moment(text, 1_700_000_000 * NS_PER_SECOND)
    assert 0 <= moment_ns < 1 << 63
    msgspec.msgpack.encode(PointFilter(since_ns=moment_ns))
    earliest, latest = Point(1), Point(2, (1 << 63) - 1)
    wanted = [latest] if text.startswith("9999-") else [earliest, latest]
    assert PointFilter(since_ns=moment_ns).choose([earliest, latest]) == wanted
