"""Alarms that hold whether or not an agent is there to raise them."""

from __future__ import annotations

import pytest

from asrfs.daemon.health import process_alarms, quota_alarms, rpo_alarms, space_alarms
from asrfs.model.policy import parse_policy
from asrfs.replication.alarms import Alarm, in_order

ALL = {"supervisor": 1, "disk_server": 2, "agent": 3}
NONE = dict.fromkeys(ALL)


@pytest.mark.parametrize(
    ("processes", "has_mount", "agent_answers", "expected"),
    [
        (ALL, True, True, []),
        (ALL, True, False, [("agent", "critical")]),
        (ALL | {"agent": None}, True, False, [("agent", "critical")]),
        (ALL | {"supervisor": None}, True, True, [("supervisor", "warning")]),
        (ALL | {"disk_server": None}, True, True, [("disk-server", "critical")]),
        (NONE | {"disk_server": 2}, True, False, [("supervisor", "warning"), ("agent", "critical")]),
        (NONE, True, False, [("not-served", "critical")]),
        (NONE, False, False, [("not-served", "warning")]),
    ],
)
def test_missing_processes(
    processes: dict[str, int | None], has_mount: bool, agent_answers: bool, expected: list[tuple[str, str]]
) -> None:
    alarms = process_alarms(processes, has_mount=has_mount, agent_answers=agent_answers)
    assert [(alarm.id, alarm.severity) for alarm in alarms] == expected


def test_quota_and_space() -> None:
    assert quota_alarms(90, 100) == []
    assert ["will send what differs" in alarm.text for alarm in quota_alarms(91, 100)] == [True]
    assert ["is given up" in alarm.text for alarm in quota_alarms(101, 100)] == [True]
    assert space_alarms("/state", 100, 21) == []
    assert [alarm.severity for alarm in space_alarms("/state", 100, 20)] == ["warning"]
    assert [alarm.severity for alarm in space_alarms("/state", 100, 5)] == ["critical"]
    assert [alarm.severity for alarm in space_alarms("/state", 0, 0)] == ["critical"]


def test_the_worst_comes_first_and_what_was_said_first_stays() -> None:
    alarms = [
        Alarm("b", "warning", ""),
        Alarm("c", "critical", "own"),
        Alarm("a", "warning", ""),
        Alarm("c", "critical", ""),
    ]
    assert [(alarm.id, alarm.text) for alarm in in_order(alarms)] == [("c", "own"), ("a", ""), ("b", "")]


@pytest.mark.parametrize(
    ("rpo_s", "severity"),
    [(None, None), (0.0, None), (59.9, None), (60.0, "warning"), (599.0, "warning"), (600.0, "critical")],
)
def test_an_rpo_that_is_not_kept_is_told(rpo_s: float | None, severity: str | None) -> None:
    policy = parse_policy({"rpo_warning": "60s", "rpo_critical": "10m"})
    alarms = rpo_alarms(rpo_s, policy)
    assert [alarm.severity for alarm in alarms] == ([severity] if severity else [])
    assert all(alarm.id == "rpo" for alarm in alarms)
