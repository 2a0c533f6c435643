"""Listing a host's points through its agent: more than one answer can hold, chosen, and in the order of the history."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio

from asrfs.cli import point as point_verbs
from asrfs.consistency.points import Point, PointLog
from asrfs.daemon.agent_verbs import AgentVerbs, check_is_kept
from asrfs.daemon.control import MESSAGE_BYTES_MAX
from asrfs.daemon.state import StateDirectory
from asrfs.errors import BadInputError, RefusedError
from asrfs.model.dirty_map import Gap, GivenUp
from asrfs.model.marker import FAILED_CHARACTERS_MAX
from asrfs.model.point_filter import PointFilter
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.progress import Progress
from tests.fakes.crash_storage import CrashStorage

POINTS = 3000


@pytest.fixture
def verbs() -> AgentVerbs:
    """Of an agent whose store has half of its points."""
    verbs = AgentVerbs.__new__(AgentVerbs)
    verbs.machine_name = "web1"
    verbs.points = PointLog(CrashStorage(), "points.jsonl")
    verbs.points._points = {f"{lsn:032x}": _point(lsn) for lsn in range(1, POINTS + 1)}
    verbs.progress = Progress(Positions(acknowledged=Cursor(lsn=POINTS // 2)))
    verbs.dirty = DirtyMapFile(CrashStorage(), "dirty.map")
    verbs.threads = trio.CapacityLimiter(1)
    verbs.dirty = DirtyMapFile(CrashStorage(), "dirty.map")
    return verbs


def _point(lsn: int) -> Point:
    why = "x" * FAILED_CHARACTERS_MAX
    name = "noon" if lsn % 1000 == 0 else None
    return Point(id=f"{lsn:032x}", lsn=lsn, epoch=1, time_ns=lsn, consistency="crash", failed=why, name=name)


def read(verbs: AgentVerbs, wanted: PointFilter, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As `asrfs point list` does."""
    sizes = []

    def call_agent(_state: StateDirectory, verb: str, **fields: Any) -> dict[str, Any]:
        assert verb == "point_list"
        answer = trio.run(verbs.on_point_list, msgspec.json.decode(msgspec.json.encode(fields)))
        sizes.append(len(msgspec.json.encode(answer)))
        return answer

    monkeypatch.setattr(point_verbs, "call_agent", call_agent)
    points = point_verbs.read_points(StateDirectory("/nowhere"), wanted)
    assert max(sizes) < MESSAGE_BYTES_MAX
    return points


def test_all_are_listed_however_many_there_are(verbs: AgentVerbs, monkeypatch: pytest.MonkeyPatch) -> None:
    points = read(verbs, PointFilter(), monkeypatch)
    assert [point["lsn"] for point in points] == list(range(1, POINTS + 1))
    assert [point["acknowledged"] for point in points] == [lsn <= POINTS // 2 for lsn in range(1, POINTS + 1)]


def test_they_are_chosen_by_the_agent(verbs: AgentVerbs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [point["lsn"] for point in read(verbs, PointFilter(name="noon"), monkeypatch)] == [1000, 2000, 3000]
    assert [point["lsn"] for point in read(verbs, PointFilter(limit=2), monkeypatch)] == [POINTS - 1, POINTS]
    assert len(read(verbs, PointFilter(since_ns=10, until_ns=2500, limit=2000), monkeypatch)) == 2000
    assert read(verbs, PointFilter(consistency="application"), monkeypatch) == []


@pytest.mark.parametrize(
    "request_", [{"filter": {"limit": -1}}, {"filter": {"consistency": "odd"}}, {"filter": 5}, {"after_lsn": "x"}]
)
def test_a_request_that_makes_no_sense_is_refused(verbs: AgentVerbs, request_: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        trio.run(verbs.on_point_list, request_)


def test_what_lies_in_a_gap_will_never_be_at_the_store(verbs: AgentVerbs, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs.dirty.save(GivenUp(100, Cursor(lsn=200), (), (Gap(100, 300),)))
    listed = read(verbs, PointFilter(), monkeypatch)
    assert [point["lsn"] for point in listed if point["lost"]] == list(range(101, 300))
    assert not any(point["lost"] and point["acknowledged"] for point in listed)


@pytest.mark.parametrize("until_lsn", [0, 300])
async def test_who_waits_for_a_point_in_a_gap_is_told_at_once(verbs: AgentVerbs, until_lsn: int) -> None:
    verbs.dirty.save(GivenUp(100, Cursor(lsn=200), (), (Gap(100, until_lsn),)))
    await verbs.wait_acknowledged(200, 0.0)  # the history goes on, whatever becomes of the point
    with pytest.raises(RefusedError, match="LSN 200 will never be recoverable"):
        await verbs.wait_acknowledged(200, 10.0, is_point=True)
    with pytest.raises(RefusedError):
        check_is_kept(verbs.dirty.given_up, 101)
    check_is_kept(verbs.dirty.given_up, 100)
