"""The one place where points are made: its queue, and what becomes of a point whose process dies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.point_request import PointRequest, request_of
from asrfs.consistency.points import Point, PointLog
from asrfs.consistency.procedure import Held, Outcome, PointOrder
from asrfs.errors import BadInputError, TemporaryError
from asrfs.model.marker import MarkerRecord, decode_marker
from asrfs.storage.directory import DirectoryStorage


class FakeQuiescer:
    """Makes points when it is let, one LSN after the other."""

    def __init__(self) -> None:
        self.orders: list[PointOrder] = []
        self.at_once = 0
        self.error: TemporaryError | None = None
        self.go = trio.Event()
        self.post_failures: tuple[str, ...] = ()

    async def make(self, order: PointOrder) -> Outcome:
        self.orders.append(order)
        self.at_once += 1
        assert self.at_once == 1, "two points at the same time"
        await self.go.wait()
        await trio.testing.wait_all_tasks_blocked()
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        marker = MarkerRecord(id=order.id, consistency=order.consistency, name=order.name, hold_ms=4.0)
        lsn = 100 + len(self.orders)
        if order.on_failure == "none":
            return Outcome(marker=msgspec.structs.replace(marker, failed="hook h: exit code 1"))
        return Outcome(marker=marker, lsn=lsn, time_ns=lsn, post_failures=self.post_failures)

    @asynccontextmanager
    async def quiesce(self, order: PointOrder) -> AsyncIterator[object]:
        assert order.is_external
        self.orders.append(order)
        yield Held(marker=MarkerRecord(id=order.id, consistency=order.consistency))


class World:
    def __init__(self) -> None:
        self.quiescer = FakeQuiescer()
        self.markers: list[MarkerRecord] = []
        self.noted: list[Point] = []
        self.maker = PointMaker(
            machine_name="web1",
            quiescer=self.quiescer,  # type: ignore[arg-type]
            mark=self.mark,
            note=self.note,
            epoch=lambda: 1,
            deadline_s=lambda: 7.0,
        )

    async def mark(self, payload: bytes) -> tuple[int, int]:
        self.markers.append(decode_marker(payload))
        return len(self.markers), 1

    async def note(self, point: Point) -> None:
        self.noted.append(point)


@pytest.fixture
async def made() -> World:
    return World()


async def test_points_that_quiet_something_queue_up_and_crash_points_wait_for_nobody(
    made: World, autojump_clock: trio.testing.MockClock
) -> None:
    done: list[str] = []

    async def make(name: str, consistency: str) -> None:
        point, _ = await made.maker.make(PointRequest(name=name, consistency=consistency))  # type: ignore[arg-type]
        done.append(str(point.name))

    async with trio.open_nursery() as nursery:
        for name in ("one", "two", "three"):
            nursery.start_soon(make, name, "application")
            await trio.testing.wait_all_tasks_blocked()
        await make("crash", "crash")
        assert done == ["crash"] and len(made.quiescer.orders) == 1
        made.quiescer.go.set()
    assert done == ["crash", "one", "two", "three"]
    assert [order.deadline_s for order in made.quiescer.orders] == [7.0] * 3
    assert [point.name for point in made.noted] == done


async def test_a_point_whose_process_is_killed_is_a_crash_point_that_says_so_or_none(made: World) -> None:
    made.quiescer.go.set()
    made.quiescer.error = TemporaryError("the process that made the point ended with -9 before it had")
    point, _ = await made.maker.make(PointRequest(consistency="filesystem", name="n", note="a note"))
    assert (point.consistency, point.wanted, point.name, point.note) == ("crash", "filesystem", "n", "a note")
    assert "-9" in str(point.failed) and made.markers[0].id == made.quiescer.orders[0].id
    with pytest.raises(TemporaryError, match="no point was made: the process"):
        await made.maker.make(PointRequest(consistency="filesystem", on_failure="none"))
    assert len(made.markers) == 1


async def test_a_point_that_was_not_made_is_an_error_and_what_fails_after_it_is_none(made: World) -> None:
    made.quiescer.go.set()
    with pytest.raises(TemporaryError, match="no point was made: hook h: exit code 1"):
        await made.maker.make(PointRequest(consistency="application", on_failure="none"))
    made.quiescer.post_failures = ("hook wake: exit code 2",)
    point, failures = await made.maker.make(PointRequest(consistency="application"))
    assert point.consistency == "application" and failures == ("hook wake: exit code 2",)


async def test_who_appends_the_marker_itself_has_the_machine_quiet_meanwhile(made: World) -> None:
    async with made.maker.quiesced(PointRequest(consistency="filesystem")) as held:
        assert held.marker.consistency == "filesystem" and made.maker._turn.locked()
    assert not made.maker._turn.locked()


@pytest.mark.parametrize(
    "fields",
    [
        {"consistency": "so-so"},
        {"name": 5},
        {"note": ["x"]},
        {"on_failure": "maybe"},
        {"name": "../x"},
        {"name": "latest"},
        {"note": "two\nlines"},
        {"note": "x" * 1001},
        {"note": "\udcff"},
    ],
)
async def test_points_that_cannot_be_are_refused_before_anything_is_quieted(
    made: World, fields: dict[str, object]
) -> None:
    with pytest.raises(BadInputError):
        await made.maker.make(request_of(dict(fields)))
    assert not made.quiescer.orders and not made.markers


def test_the_hosts_list_takes_over_the_last_word_and_keeps_it(scratch: Path) -> None:
    storage = DirectoryStorage(str(scratch))
    log = PointLog(storage, "points.jsonl")
    unfinished = MarkerRecord(id="1" * 32, consistency="filesystem", name="n", unfinished=True)
    log.add(Point.of(unfinished, lsn=7, epoch=1, time_ns=5))
    log.complete(MarkerRecord(id="1" * 32, consistency="filesystem", completes=8, hold_ms=9.0))
    assert log.points()[0].unfinished, "of another place"
    log.complete(MarkerRecord(id="1" * 32, consistency="filesystem", completes=7, hold_ms=2.0))
    log.complete(MarkerRecord(id="1" * 32, consistency="crash", completes=7, hold_ms=9.0))
    for each in (log, PointLog(storage, "points.jsonl")):
        (point,) = each.points()
        assert (point.hold_ms, point.consistency, point.unfinished, point.name) == (2.0, "filesystem", False, "n")
    with (scratch / "points.jsonl").open("ab") as file:
        file.write(b'{"id":"x","lsn":1,"epoch":1,"time_ns":1}\n{"torn')
    assert len(PointLog(storage, "points.jsonl").points()) == 1, "what cannot be is left out"
