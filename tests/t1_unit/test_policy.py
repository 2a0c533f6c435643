"""Policies: every key's limits, all errors at once, contradictions, and what a host makes of one it cannot read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.errors import BadInputError
from asrfs.model.calendar import ALWAYS, DAY_MINUTES, Window, parse_bandwidth, parse_window
from asrfs.model.policy import (
    DEFAULT_TEXTS,
    Policy,
    RetentionStep,
    follow_policy,
    parse_policy,
    texts_in_force,
)
from asrfs.model.quantities import format_duration, parse_duration

DAY = 86400.0


def test_the_defaults_are_what_their_texts_say() -> None:
    chosen = parse_policy(DEFAULT_TEXTS)
    assert parse_policy({}) == Policy()
    assert chosen.point_alarm_s == 3600
    assert parse_policy({key: text for key, text in DEFAULT_TEXTS.items() if key != "point_alarm"}) == Policy()
    assert texts_in_force({}).keys() == DEFAULT_TEXTS.keys()
    assert parse_policy(texts_in_force({})) == chosen


ALLOWED = [
    {"crash_interval": "1s"},
    {"crash_interval": "24h"},
    {"filesystem_interval": "1s"},
    {"filesystem_interval": "off"},
    {"filesystem_interval": "23h"},
    {"application_interval": "0"},
    {"application_interval": "off"},
    {"application_interval": "23h"},
    {"application_interval": "364d", "retention": "365d"},
    {"retention": "365d"},
    {"retention": "10m"},
    {"retention": "24h, 7d/1h, 30d/1d"},
    {"rpo_warning": "2h"},
    {"rpo_critical": "1m"},
    {"resync_window": "always"},
    {"resync_window": "6:00-18:30"},
    {"bandwidth_limit": "none"},
    {"bandwidth_limit": "20M"},
    {"bandwidth_limit": "08:00-18:00 20M; else 200M"},
    {"on_failure": "none"},
    {"point_alarm": "5s"},
    {"partial_points": "yes"},
]


@pytest.mark.parametrize("texts", ALLOWED, ids=str)
def test_what_is_allowed(texts: dict[str, str]) -> None:
    policy = parse_policy(texts)
    assert follow_policy(texts) == (policy, [])
    assert parse_policy(texts_in_force(texts)).application_interval_s == policy.application_interval_s


REFUSED = [
    ({"crash_interval": "0"}, "from 1s to 24h"),
    ({"crash_interval": "0.9s"}, "from 1s to 24h"),
    ({"crash_interval": "24.01h"}, "from 1s to 24h"),
    ({"crash_interval": "soon"}, "not a duration"),
    ({"crash_interval": "nan"}, "not a duration"),
    ({"filesystem_interval": "0.5s"}, "0 for none"),
    ({"filesystem_interval": "24h"}, "filesystem_interval of 24h is not shorter than retention of 24h"),
    ({"application_interval": "0.5s"}, "0 for none"),
    ({"application_interval": "24h"}, "not shorter than retention of 24h"),
    ({"application_interval": "4h", "retention": "4h"}, "not shorter than retention of 4h"),
    ({"crash_interval": "2h", "retention": "1h"}, "longer than retention"),
    ({"retention": "366d"}, "to 365d"),
    ({"retention": "0"}, "from 1s"),
    ({"retention": "24h,12h/1h"}, "further back"),
    ({"retention": "24h,7d"}, "fewer points"),
    ({"retention": "24h,7d/8d"}, "whole time"),
    ({"retention": "24h,"}, "not a duration"),
    ({"rpo_warning": "2h", "rpo_critical": "1h"}, "rpo_warning of 2h is more"),
    ({"resync_window": "18:30"}, "two times of the day"),
    ({"resync_window": "25:00-06:00"}, "two times of the day"),
    ({"resync_window": "06:00-06:00"}, "begins"),
    ({"bandwidth_limit": "08:00-18:00"}, "not a size"),
    ({"bandwidth_limit": "08:00-18:00 20M; 200M"}, "the last else"),
    ({"bandwidth_limit": "else 20M; 08:00-18:00 20M"}, "last part"),
    ({"bandwidth_limit": "10"}, "at least 1K"),
    ({"on_failure": "panic"}, "choose from crash, none"),
    ({"point_alarm": "0"}, "from 1s"),
    ({"partial_points": "maybe"}, "choose from yes, no"),
    ({"crash_intervall": "1s"}, "did you mean crash_interval?"),
    ({"Retention": "1d"}, "did you mean retention?"),
    ({"xyzzy": "blue"}, "choose from application_interval, "),
]


@pytest.mark.parametrize(("texts", "said"), REFUSED, ids=str)
def test_what_is_refused_says_why(texts: dict[str, str], said: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(said)):
        parse_policy(texts)
    policy, errors = follow_policy(texts)
    assert said in "; ".join(errors)
    assert policy == parse_policy({}), "at the default"


def test_all_that_is_wrong_is_said_at_once() -> None:
    texts = {
        "crash_interval": "2d",
        "retain": "1d",
        "on_failure": "x",
        "application_interval": "48h",
        "rpo_warning": "",
    }
    with pytest.raises(BadInputError) as raised:
        parse_policy(texts)
    said = str(raised.value)
    for part in ("crash_interval=2d", "did you mean retention?", "on_failure=x", "not shorter", "rpo_warning="):
        assert part in said, part
    assert "\n" not in said


@pytest.mark.parametrize(
    ("retention", "interval_s"), [("24h", 14400.0), ("4h", 7200.0), ("2m", 60.0), ("100s", 0.0), ("30d", 14400.0)]
)
def test_a_default_interval_gives_way_to_a_shorter_retention(retention: str, interval_s: float) -> None:
    policy = parse_policy({"retention": retention, "crash_interval": "1s"})
    assert policy.application_interval_s == interval_s
    assert policy.application_interval_s < policy.retention_s


def test_a_grid_is_steps_by_age() -> None:
    policy = parse_policy({"retention": "24h, 7d/1h, 30d/1d"})
    assert policy.retention == (RetentionStep(DAY), RetentionStep(7 * DAY, 3600.0), RetentionStep(30 * DAY, DAY))
    assert policy.retention_s == 30 * DAY


def test_when_the_alarm_is_raised() -> None:
    default = Policy()
    assert default.alarm_after_s("crash") == 3600
    assert default.alarm_after_s("application") == 5 * 3600, "it leaves a longer interval its time"
    rare = parse_policy({"crash_interval": "24h", "retention": "7d"})
    assert rare.alarm_after_s("crash") == 25 * 3600
    assert parse_policy({"crash_interval": "24h", "point_alarm": "5s"}).alarm_after_s("crash") == 5, "as it was said"
    off = parse_policy({"application_interval": "0"})
    assert off.intervals_s() == {"crash": 300.0}


@given(st.dictionaries(st.sampled_from(sorted([*DEFAULT_TEXTS, "junk"])), st.text(max_size=12), max_size=5))
def test_a_host_follows_whatever_it_is_told_as_far_as_it_can(texts: dict[str, str]) -> None:
    policy, errors = follow_policy(texts)
    if not errors:
        assert parse_policy(texts) == policy
    assert 1 <= policy.crash_interval_s <= DAY
    assert policy.application_interval_s < policy.retention_s <= 365 * DAY
    assert policy.rpo_warning_s <= policy.rpo_critical_s


minutes = st.integers(0, DAY_MINUTES - 1)


@given(start=minutes, end=minutes, minute=minutes)
def test_a_window_holds_the_minutes_between_its_ends_also_past_midnight(start: int, end: int, minute: int) -> None:
    text = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    if start == end:
        with pytest.raises(BadInputError):
            parse_window(text)
        return
    inside = {(start + step) % DAY_MINUTES for step in range((end - start) % DAY_MINUTES)}
    assert parse_window(text).contains(minute) == (minute in inside)
    limits = parse_bandwidth(f"{text} 20K; else 2M")
    assert limits.limit_at(minute) == (20 << 10 if minute in inside else 2 << 20)


def test_windows_that_are_the_whole_day() -> None:
    for text in ("always", "00:00-24:00", "0:00-24:00"):
        assert parse_window(text) == ALWAYS == Window(0, 0)
        assert all(parse_window(text).contains(minute) for minute in range(DAY_MINUTES))


def test_the_first_window_that_fits_counts_and_outside_all_there_is_no_limit() -> None:
    limits = parse_bandwidth("08:00-18:00 20M; 12:00-20:00 40M")
    assert [limits.limit_at(hour * 60) >> 20 for hour in (7, 9, 13, 19, 21)] == [0, 20, 20, 40, 0]


@given(st.integers(1, 10**9))
def test_durations_are_written_as_they_are_read(seconds: int) -> None:
    assert parse_duration(format_duration(float(seconds))) == pytest.approx(seconds, rel=1e-9)
