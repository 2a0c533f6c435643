"""The status document is a pure function of facts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asrfs.daemon.agent_status import NS_PER_S, Facts, status
from asrfs.daemon.protection import Healing, standing_of
from asrfs.model.dirty_map import DirtyMap, Gap, GivenUp, Reason
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.policy import Policy
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.alarms import Alarm
from asrfs.replication.resyncer import Phase

DISK = DiskConfig(slot=0, id="a" * 32, name="root", size_bytes=1 << 30)
NOW_NS = 1_000 * NS_PER_S
WHOLE = Healing({}, {}, GivenUp())


def cursor(lsn: int, segment: int = 1, offset: int = 0, seconds: int = 0) -> Cursor:
    return Cursor(lsn=lsn, segment=segment, offset=offset, time_ns=seconds * NS_PER_S)


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "machine": MachineConfig(id="b" * 32, name="web1", disks=(DISK,)),
        "images": {0: "root.img"},
        "is_enrolled": True,
        "positions": Positions(applied=cursor(8), acknowledged=cursor(7, 1, 8192, 990)),
        "appended_lsn": 10,
        "durable": cursor(9, 2, 4096, 998),
        "epoch": 1,
        "now_ns": NOW_NS,
        "first_unacknowledged_ns": 995 * NS_PER_S,
        "oldest_segment": 1,
        "quota_bytes": 1 << 29,
        "healing": WHOLE,
        "fence": None,
        "link": "connected",
    }
    return Facts(**(values | changes))


def test_the_whole_document() -> None:
    document = status(facts(alarms=[Alarm("link", "warning", "gone")], processes={"agent": 7}))
    assert document == {
        "machine": "web1",
        "state": "protected",
        "reason": "",
        "epoch": 1,
        "lsn": {"appended": 10, "durable": 9, "applied": 8, "acknowledged": 7},
        "lag": {"records": 2, "bytes": (64 << 20) - 4096, "seconds": 3.0},
        "achieved_rpo_seconds": 5.0,
        "journal": {"bytes": (64 << 20) + 4096, "quota_bytes": 1 << 29},
        "link": "connected",
        "link_reason": "",
        "processes": {"agent": 7},
        "disks": [{"name": "root", "size_bytes": 1 << 30, "image": "root.img", "dirty_bytes": 0, "hydration": None}],
        "resync": {"bytes_left": 0, "bytes_per_second": 0, "seconds_left": 0.0},
        "groups": [],
        "alarms": [{"id": "link", "severity": "warning", "text": "gone"}],
    }
    msgspec.msgpack.encode(document)


def test_what_lags_behind_a_short_segment_is_what_the_segments_hold() -> None:
    short_by = (64 << 20) - 12288  # segment 1 was cut behind the record at 8192 when its disk server started again
    document = status(facts(cut_bytes=short_by, lag_cut_bytes=short_by))
    assert document["lag"]["bytes"] == 4096 + 4096
    assert document["journal"]["bytes"] == 12288 + 4096


def test_nothing_lags_when_all_that_is_durable_is_acknowledged() -> None:
    document = status(facts(positions=Positions(acknowledged=cursor(9, 2, 4096, 998)), first_unacknowledged_ns=None))
    assert document["achieved_rpo_seconds"] == 0
    assert document["lag"] == {"records": 0, "bytes": 0, "seconds": 0}


def test_what_cannot_be_known_is_none() -> None:
    document = status(facts(positions=Positions(), first_unacknowledged_ns=None))
    assert document["achieved_rpo_seconds"] is None


def test_a_clock_that_was_set_back_gives_no_negative_times() -> None:
    document = status(facts(now_ns=0))
    assert document["achieved_rpo_seconds"] == 0


GAP = MachineConfig(id="b" * 32, name="web1", disks=(msgspec.structs.replace(DISK, gap=True),))
GIVEN_UP = GivenUp(2, cursor(9), (), (Gap(2),))


def healing(chunks: int, reasons: Reason, phase: Phase = "idle", given_up: GivenUp = GIVEN_UP, **more: Any) -> Healing:
    """Of a disk of which so many chunks are marked, for these reasons."""
    dirty = DirtyMap()
    dirty.enter(0, reasons)
    if chunks:
        dirty.mark(0, 0, chunks << 16)
    return standing_of(dirty, given_up, GAP, phase, **more)


@pytest.mark.parametrize(
    ("changes", "state", "dirty_bytes", "said"),
    [
        ({"is_enrolled": False}, "unprotected", 0, "not enrolled"),
        ({"positions": Positions()}, "initial-replication", 0, "nothing of this machine"),
        (
            {"machine": GAP, "healing": standing_of(DirtyMap(), GivenUp(), GAP)},
            "initial-replication",
            1 << 30,
            "disk root was adopted with",
        ),
        (
            {"machine": GAP, "healing": healing(16, Reason.INITIAL, given_up=GivenUp())},
            "initial-replication",
            1 << 20,
            "disk root was adopted with",
        ),
        (
            {"healing": healing(0, Reason.INITIAL, given_up=GivenUp())},
            "initial-replication",
            0,
            "disk root was adopted with",
        ),
        (
            {"healing": healing(16, Reason.GIVEN_UP, "store")},
            "resync-required",
            1 << 20,
            "LSN 2 was given up: 1.0 MiB are to be sent once the store is there",
        ),
        (
            {"healing": healing(16, Reason.GIVEN_UP, "window")},
            "resync-required",
            1 << 20,
            "between 18:30 and 06:00, or at once by `asrfs resync --now`",
        ),
        (
            {"healing": healing(16, Reason.GIVEN_UP, "failed", failure="no")},
            "resync-required",
            1 << 20,
            "the last try failed: no",
        ),
        ({"healing": healing(16, Reason.GIVEN_UP, "running")}, "resyncing", 1 << 20, "quota"),
        ({"healing": healing(16, Reason.DIFFERS, "running")}, "resyncing", 1 << 20, "comparing"),
        ({}, "protected", 0, ""),
    ],
)
def test_states(changes: dict[str, Any], state: str, dirty_bytes: int, said: str) -> None:
    document = status(facts(**changes))
    assert document["state"] == state
    assert bool(document["reason"]) == (state != "protected")
    assert said in document["reason"]
    assert document["disks"][0]["dirty_bytes"] == document["resync"]["bytes_left"] == dirty_bytes
    warned = [alarm["id"] for alarm in document["alarms"]]
    assert ("resync-required" in warned) == (state == "resync-required")


def test_how_long_a_resync_takes_is_said_once_it_is_known() -> None:
    standing = healing(16, Reason.GIVEN_UP, "running", pace=float(1 << 18))
    known = {"bytes_left": 1 << 20, "bytes_per_second": 1 << 18, "seconds_left": 4.0}
    assert status(facts(healing=standing))["resync"] == known
    assert status(facts(healing=healing(16, Reason.GIVEN_UP, "store")))["resync"]["seconds_left"] is None


def test_an_rpo_beyond_the_policy_is_an_alarm_of_an_enrolled_machine() -> None:
    policy = Policy(rpo_warning_s=5.0, rpo_critical_s=9.0)
    (alarm,) = status(facts(policy=policy))["alarms"]
    assert (alarm["id"], alarm["severity"]) == ("rpo", "warning")
    assert status(facts(policy=policy, is_enrolled=False))["alarms"] == []
