"""When what a replica lacks is sent, and how hard."""

from __future__ import annotations

import pytest

from asrfs.model.calendar import ALWAYS, parse_window
from asrfs.model.dirty_map import Reason
from asrfs.model.healing import (
    LAG_BYTES_MAX,
    LAG_BYTES_MIN,
    SMALL_BYTES,
    Sick,
    is_due,
    lag_bytes_max,
    retry_delay_s,
)

NIGHT = parse_window("18:30-06:00")
LARGE = SMALL_BYTES + 1
NOON, EVENING, MIDNIGHT, MORNING = 12 * 60, 18 * 60 + 30, 0, 6 * 60


@pytest.mark.parametrize(
    ("reasons", "dirty_bytes", "due"),
    [
        (Reason.GIVEN_UP, LARGE, {EVENING, MIDNIGHT}),
        (Reason.DIFFERS, LARGE, {EVENING, MIDNIGHT}),
        (Reason.GIVEN_UP, SMALL_BYTES, {NOON, EVENING, MIDNIGHT, MORNING}),
        (Reason.GIVEN_UP | Reason.NOW, LARGE, {NOON, EVENING, MIDNIGHT, MORNING}),
        (Reason.INITIAL, LARGE, {NOON, EVENING, MIDNIGHT, MORNING}),
        (Reason.INITIAL | Reason.GIVEN_UP, LARGE, {NOON, EVENING, MIDNIGHT, MORNING}),
        (Reason.GIVEN_UP | Reason.UNREAD, LARGE, {NOON, EVENING, MIDNIGHT, MORNING}),
    ],
)
def test_what_is_large_waits_for_its_window(reasons: Reason, dirty_bytes: int, due: set[int]) -> None:
    sick = Sick(reasons, dirty_bytes)
    assert {minute for minute in (NOON, EVENING, MIDNIGHT, MORNING) if is_due(sick, NIGHT, minute)} == due
    assert is_due(sick, ALWAYS, NOON)


def test_the_window_is_exact_to_the_minute() -> None:
    sick = Sick(Reason.GIVEN_UP, LARGE)
    due = [minute for minute in range(24 * 60) if is_due(sick, NIGHT, minute)]
    assert due == [*range(6 * 60), *range(18 * 60 + 30, 24 * 60)]


def test_a_failed_job_is_tried_again_after_these_minutes() -> None:
    assert [retry_delay_s(failures) / 60 for failures in range(1, 9)] == [1, 2, 4, 8, 10, 30, 30, 30]


def test_new_writes_come_first() -> None:
    assert lag_bytes_max(0.0, 900.0, 1 << 40) == LAG_BYTES_MIN, "before anything is known"
    assert lag_bytes_max(1e9, 900.0, 1 << 40) == LAG_BYTES_MAX
    assert lag_bytes_max(1e6, 60.0, 1 << 40) == 15_000_000, "a quarter of the RPO at the link's speed"
    assert lag_bytes_max(1e9, 900.0, 256 << 20) == 64 << 20, "filling alone never fills the journal"
