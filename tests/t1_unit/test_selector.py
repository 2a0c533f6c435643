"""Selectors: what may be written, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from asrfs.errors import BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.record import Kind
from asrfs.model.quantities import format_time
from replica_store.points import builder, selector
from replica_store.points.point_disk import FrameCache
from replica_store.points.selector import AtLsn, AtPoint, AtTime, Newest, parse_selector
from tests.fakes.memory_history import BEGIN_NS, MemoryHistory

ID = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Listed:
    id: str
    lsn: int
    consistency: str = "crash"
    name: str | None = None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latest", Newest("latest")),
        ("latest-processed", Newest("latest-processed")),
        ("latest-application", Newest("latest-application")),
        ("lsn:1", AtLsn(1)),
        ("lsn:00018446744073709551", AtLsn(18446744073709551)),
        ("time:1970-01-01T00:00:01Z", AtTime(1_000_000_000)),
        ("time:1970-01-01T01:00:00.000000001+01:00", AtTime(1)),
        (f"time:{format_time(BEGIN_NS)}", AtTime(BEGIN_NS)),
        (ID, AtPoint(ID)),
        ("before-upgrade_2.0", AtPoint("before-upgrade_2.0")),
        ("lsn", AtPoint("lsn")),
    ],
)
def test_parse(text: str, expected: selector.Selector) -> None:
    assert parse_selector(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "../x", "a/b", "x" * 64, "%2F", "latest ", "-latest", "point:x", ":", "lsn:", "lsn:-1", "lsn:1x",
        "lsn: 1", "lsn:0x10", "lsn:१", "lsn:" + "9" * 21, "LSN:1", "time:", "time:yesterday", "time:2026-11-21",
        "time:2026-11-21T10:00:00", "time:2026-13-21T10:00:00Z", "time:2026-11-21T10:00:00.1234567890Z", "a\nb", "\0",
    ],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_selector(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_name_means_its_newest_point_and_an_id_only_itself() -> None:
    other = "f" * 32
    points = [Listed(ID, 5, name="daily"), Listed("a" * 32, 9, name="daily"), Listed(other, 7, name=ID)]
    assert selector.choose_point("daily", points) == points[1]
    assert selector.choose_point(ID, points) == points[0], "an id comes before a name that looks like it"
    assert selector.choose_point("weekly", points) is None


def test_choose_lsn() -> None:
    points = [Listed("a" * 32, 5, "application"), Listed("b" * 32, 9, "filesystem"), Listed("c" * 32, 7)]

    def choose(text: str, received: int = 12) -> int:
        parsed = parse_selector(text)
        assert not isinstance(parsed, AtTime)
        return selector.choose_lsn(parsed, points, received)

    assert choose("latest") == 12
    assert choose("latest-processed") == 9
    assert choose("latest-application") == 5
    assert choose("lsn:1") == 1
    assert choose("lsn:12") == 12
    assert choose("c" * 32) == 7
    for text in ("lsn:0", "lsn:13", "lsn:99999999999999999999", "nobody"):
        with pytest.raises(NotFoundError):
            choose(text)
    with pytest.raises(NotFoundError):
        choose("latest", 0)
    points = [Listed("b" * 32, 9)]
    with pytest.raises(NotFoundError, match="application-consistent"):
        choose("latest-application")
    points = []
    with pytest.raises(NotFoundError):
        choose("latest-processed")


def test_time_means_the_last_record_at_or_before_it() -> None:
    times = np.array([BEGIN_NS, BEGIN_NS + 1, BEGIN_NS + 1, BEGIN_NS + 3], np.uint64)
    expected = {0: 10, 1: 12, 2: 12, 3: 13, 4: 13}
    for later_ns, lsn in expected.items():
        assert selector.lsn_at_time(BEGIN_NS + later_ns, 10, times) == lsn, "to the nanosecond"
    assert selector.lsn_at_time(1 << 70, 10, times) == 13


def history_of_two_epochs() -> MemoryHistory:
    """LSN 1..4 in epoch 1, then 5..7 by a host whose clock is 10 s behind."""
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.write(0, 0, bytes([1]) * 4096)
    history.seal()
    history.marker("early")
    history.write(0, 4096, bytes([2]) * 4096)
    history.begin_epoch(history.time_ns - 10_000_000_000)
    history.write(0, 0, bytes([3]) * 4096)
    history.marker("late", "application")
    history.write(0, 0, bytes([4]) * 4096, Kind.FILL)
    history.seal()
    return history


def test_resolve_gives_lsn_time_epoch_and_point() -> None:
    history = history_of_two_epochs()
    early, late = history.points(history.id)
    expected = {
        "latest": (7, 2, None),
        "latest-processed": (6, 2, late),
        "latest-application": (6, 2, late),
        "early": (3, 1, early),
        early.id: (3, 1, early),
        "lsn:3": (3, 1, early),
        "lsn:4": (4, 1, None),
        "time:2200-01-01T00:00:00Z": (7, 2, None),
    }
    for text, (lsn, epoch, point) in expected.items():
        cut = builder.resolve(history, "web1", text)
        assert (cut.lsn, cut.epoch, cut.point) == (lsn, epoch, point), text
        assert cut.time_ns == history.time_at(lsn)
    history.hidden_after = 4
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(2))}").lsn == 2
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(3) + 999)}").point == early
    assert builder.resolve(history, "web1", "time:2200-01-01T00:00:00Z").lsn == 4


def test_time_in_two_epochs_means_the_later_lsn() -> None:
    history = history_of_two_epochs()
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(5))}").lsn == 5
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(2))}").lsn == 7
    with pytest.raises(NotFoundError, match="history begins"):
        builder.resolve(history, "web1", f"time:{format_time(history.time_at(5) - 1)}")


def test_before_the_first_record_and_unknown_machine() -> None:
    history = history_of_two_epochs()
    for text in ("time:1969-12-31T23:59:59Z", "time:1800-01-01T00:00:00Z"):
        with pytest.raises(NotFoundError):
            builder.resolve(history, "web1", text)
    with pytest.raises(NotFoundError):
        builder.resolve(history, "web2", "latest")
    empty = MemoryHistory()
    for text in ("latest", "lsn:1", "time:2026-01-01T00:00:00Z", "latest-processed", "x"):
        with pytest.raises(NotFoundError):
            builder.resolve(empty, "web1", text)


def test_i5_a_cut_inside_a_gap_is_refused() -> None:
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.marker("before")
    history.disk(1, "old", 8192, gap=True)
    inside = history.marker("inside")
    history.write(1, 0, bytes([1]) * 8192, Kind.FILL)
    history.disk(1, "old", 8192)
    history.marker("after")
    history.seal()
    assert [point.name for point in history.points(history.id)] == ["before", "after"]
    for text in ("before", "lsn:2", "after", "latest", f"lsn:{history.lsn - 1}"):
        builder.resolve(history, "web1", text)
    for text in (f"lsn:{inside.lsn}", f"lsn:{inside.lsn + 1}", f"time:{format_time(inside.time_ns)}"):
        with pytest.raises(RefusedError, match="gap"):
            builder.resolve(history, "web1", text)
    with pytest.raises(NotFoundError):
        builder.resolve(history, "web1", inside.id)


def test_i9_a_hole_in_the_catalog_is_noticed() -> None:
    history = history_of_two_epochs()
    disks = [disk for disk in history.disks_at(history.id, 7) if not disk.removed]
    del history._rows[1]
    with pytest.raises(IntegrityError, match="LSN 3 to 4"):
        builder.build_states(history, history.id, 7, disks)
    del history._rows[1]
    with pytest.raises(IntegrityError, match="ends at LSN 2"):
        builder.build_states(history, history.id, 7, disks)


def test_i9_inside_a_stretch_there_is_no_state() -> None:
    """Records 4 to 7 came as one, and 8 to 9 behind a point: what lies within is refused, the nearest are named."""
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.seal()
    history.write(0, 0, bytes([1]) * 4096)
    history.write(0, 0, bytes([2]) * 4096)
    history.seal()
    for number in range(3, 6):
        history.write(0, 0, bytes([number]) * 4096)
    history.marker("noon")
    history.write(0, 4096, bytes([7]) * 4096)
    history.write(0, 4096, bytes([8]) * 4096)
    history.seal_folded()
    for lsn, nearest in ((4, "3 and LSN 7"), (6, "3 and LSN 7"), (8, "7 and LSN 9")):
        with pytest.raises(NotFoundError, match=f"at LSN {lsn}: .* choose LSN {nearest}$"):
            builder.resolve(history, "web1", f"lsn:{lsn}")
    (noon,) = history.points(history.id)
    times = {1: 1, 2: 2, 3: 3, 4: 3, 5: 3, 6: 3, 7: 7, 8: 7, 9: 9}
    for lsn, expected in times.items():
        cut = builder.resolve(history, "web1", f"time:{format_time(history.time_at(lsn))}")
        assert (cut.lsn, cut.time_ns) == (expected, history.time_at(expected))
    for text, lsn in {"latest": 9, "noon": 7, "lsn:7": 7, "lsn:3": 3, "latest-processed": 7}.items():
        cut = builder.resolve(history, "web1", text)
        assert (cut.lsn, cut.time_ns) == (lsn, history.time_at(lsn))
        assert cut.point == (noon if lsn == 7 else None)
    disks = history.disks_at(history.id, 9)
    for lsn in (4, 8):  # nor is one made by whoever has not asked for it by a selector
        with pytest.raises(IntegrityError, match="one stretch"):
            builder.build_states(history, history.id, lsn, disks)


def test_a_history_that_begins_with_a_stretch() -> None:
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.write(0, 0, bytes([1]) * 4096)
    history.seal_folded()
    with pytest.raises(NotFoundError, match=r"choose LSN 2$"):
        builder.resolve(history, "web1", "lsn:1")
    with pytest.raises(NotFoundError, match="history begins"):
        builder.resolve(history, "web1", f"time:{format_time(history.time_at(1))}")
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(2))}").lsn == 2


def test_i5_records_that_were_given_up_open_a_gap_until_they_are_healed() -> None:
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    before = history.marker("before")
    history.seal()
    history.write(0, 0, bytes([1]) * 4096)
    history.marker("lost")
    history.write(0, 4096, bytes([2]) * 4096)
    history.give_up()
    inside = history.marker("inside")
    history.heal()
    after = history.marker("after")
    history.seal()
    assert history.points(history.id) == [before, after]
    for text in ("lsn:3", "lsn:4"):
        with pytest.raises(NotFoundError, match=r"choose LSN 2 and LSN 5$"):
            builder.resolve(history, "web1", text)
    for text in ("lsn:5", f"lsn:{inside.lsn}", f"time:{format_time(history.time_at(5))}"):
        with pytest.raises(RefusedError, match="gap"):
            builder.resolve(history, "web1", text)
    assert builder.resolve(history, "web1", f"time:{format_time(history.time_at(4))}").lsn == 2
    cut = builder.resolve(history, "web1", "after")
    disk = builder.open_disks(history, cut, ["root"], FrameCache(history))["root"]
    assert disk.read(0, 8192) == history.state_at(after.lsn)[0] == bytes([1]) * 4096 + bytes([2]) * 4096
