"""Alarms at the store: listed points that do not appear, by the store's clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asrfs.model.marker import Consistency, MarkerRecord
from asrfs.model.policy import Policy, parse_policy
from asrfs.model.quantities import NS_PER_SECOND
from replica_store.vault.rows import MachineRow, PointRow
from replica_store.vault.standing import point_alarms

MACHINE = MachineRow("a" * 32, "web1", 1, "abc", False, 0, 1, b"sealed")
HOUR_NS = 3600 * NS_PER_SECOND


def point(lsn: int, hours: float, kind: Consistency = "crash") -> PointRow:
    return PointRow(MACHINE.id, lsn, 1, int(hours * HOUR_NS), MarkerRecord(id=f"{lsn:032x}", consistency=kind))


def ids(
    points: list[PointRow], hours: float, appeared: dict[int, int] | None = None, policy: Policy | None = None
) -> list[str]:
    found = point_alarms(MACHINE, points, appeared or {}, policy or Policy(), int(hours * HOUR_NS))
    return [alarm.id for alarm in found]


def test_never_had_one() -> None:
    assert ids([], 0.99) == []
    assert ids([], 1.0) == ["no-crash-point"]
    assert ids([], 5.0) == ["no-crash-point", "no-application-point"]
    (crash, _) = point_alarms(MACHINE, [], {}, Policy(), 5 * HOUR_NS)
    assert "never" in crash.text


def test_none_for_too_long() -> None:
    points = [point(1, 1.0), point(2, 2.0, "application"), point(3, 2.0, "filesystem")]
    assert ids(points, 2.9) == []
    assert ids(points, 3.0) == ["no-crash-point"], "any point is crash-consistent"
    assert ids(points, 7.0) == ["no-crash-point", "no-application-point"]
    assert ids(points, 7.0, policy=parse_policy({"application_interval": "off"})) == ["no-crash-point"]


def test_a_point_will_do_for_each_kind_that_it_is_at_least() -> None:
    policy = parse_policy({"filesystem_interval": "1h"})
    assert ids([point(1, 9.9)], 10.0, policy=policy) == ["no-filesystem-point", "no-application-point"]
    assert ids([point(1, 9.9, "filesystem")], 10.0, policy=policy) == ["no-application-point"]
    assert ids([point(1, 9.9, "application")], 10.0, policy=policy) == []
    assert ids([point(1, 7.9, "application")], 10.0, policy=policy) == ["no-crash-point", "no-filesystem-point"]


def test_the_stores_clock_counts_where_it_saw_the_point_come() -> None:
    assert ids([point(1, 90.0)], 10.0, {1: 8 * HOUR_NS}) == ["no-crash-point", "no-application-point"]
    assert ids([point(1, -90.0)], 10.0, {1: int(9.5 * HOUR_NS)}) == ["no-application-point"]
    assert ids([point(1, 9.5), point(2, 9.0)], 9.9, {7: 0}) == ["no-application-point"], "one that is not listed"


def test_a_revoked_machine_has_none() -> None:
    assert point_alarms(replace(MACHINE, revoked=True), [], {}, Policy(), 99 * HOUR_NS) == ()


@pytest.mark.parametrize("seconds", [4, 5])
def test_the_policy_says_how_long(seconds: int) -> None:
    policy = parse_policy({"point_alarm": "5s", "application_interval": "off"})
    expected = ["no-crash-point"] if seconds >= 5 else []
    assert ids([], seconds / 3600, policy=policy) == expected
