"""What recovery points say of themselves: it comes back whole over every path, and what cannot be is not let in."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.consistency.points import Point
from asrfs.errors import FormatError, IntegrityError
from asrfs.model.marker import (
    CONSISTENCIES,
    Consistency,
    HookResult,
    MarkerRecord,
    completed,
    decode_marker,
    encode_marker,
)
from replica_store.vault.point_columns import POINT_COLUMNS, columns_of, point_of
from replica_store.vault.rows import PointRow

ID = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32
HOOK = HookResult(name="10-postgresql", phase="pre", exit_code=0, seconds=0.25, output="CHECKPOINT")
FULL = MarkerRecord(
    id=ID,
    consistency="crash",
    group="shop",
    name="noon",
    hold_ms=1.5,
    note="before the upgrade",
    wanted="application",
    failed="hook 20-mysql: timed out after 5 s",
    freeze_ms=12.25,
    hooks=(HOOK, HookResult(name="20-mysql", phase="pre", happened="timed out", seconds=5.0)),
    group_point=OTHER,
    members=(ID, OTHER),
    ready=1,
)
ROW = PointRow("a" * 32, 7, 1, 70, FULL, True)
COLUMNS = POINT_COLUMNS.split(", ")

short = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), max_size=20).filter(
    str.isprintable
)
label = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
ids = st.integers(0, (1 << 128) - 1).map(lambda number: f"{number:032x}")
times = st.none() | st.floats(0, 1e9)
results = st.builds(
    HookResult,
    name=label,
    phase=st.sampled_from(("pre", "post")),
    exit_code=st.none() | st.integers(0, 255),
    happened=st.none() | short,
    seconds=st.floats(0, 1e6),
    output=short,
)


@st.composite
def markers(draw: st.DrawFn) -> MarkerRecord:
    marker = MarkerRecord(
        id=draw(ids),
        consistency=draw(st.sampled_from(CONSISTENCIES)),
        name=draw(st.none() | label),
        note=draw(st.none() | short),
        hold_ms=draw(times),
        wanted=draw(st.none() | st.sampled_from(CONSISTENCIES)),
        failed=draw(st.none() | short),
        freeze_ms=draw(times),
        hooks=tuple(draw(st.lists(results, max_size=4))),
        unfinished=draw(st.booleans()),
    )
    if draw(st.booleans()):
        members = tuple(draw(st.lists(ids, max_size=4, unique=True)))
        ready = draw(st.none() | st.integers(0, len(members)))
        changes = {"group": draw(label), "group_point": draw(ids), "members": members, "ready": ready}
        marker = msgspec.structs.replace(marker, **changes)
    return marker


@given(markers(), st.integers(1, 1 << 62))
def test_i5_a_marker_is_the_same_in_history_list_and_catalog(marker: MarkerRecord, lsn: int) -> None:
    assert decode_marker(encode_marker(marker)) == marker
    point = Point.of(marker, lsn=lsn, epoch=1, time_ns=5)
    assert msgspec.json.decode(msgspec.json.encode(point), type=Point) == point
    row = PointRow("a" * 32, lsn, 1, 5, marker)
    assert point_of(columns_of(row)) == row


def test_points_of_older_histories_are_read() -> None:
    older = {"id": ID, "consistency": "crash", "group": None, "name": "noon", "hold_ms": 0.0, "note": None}
    assert decode_marker(msgspec.msgpack.encode(older)) == MarkerRecord(id=ID, name="noon", hold_ms=0.0)
    assert decode_marker(msgspec.msgpack.encode({**older, "later": [1]})).name == "noon", "keys of later versions"


HOSTILE = (
    {"id": ""},
    {"name": "a/b"},
    {"group": "x" * 64},
    {"note": "n" * 1001},
    {"note": "two\nlines"},
    {"failed": "f" * 501},
    {"failed": "\x1b[2J"},
    {"consistency": "so-so"},
    {"wanted": "so-so"},
    *({key: value} for key in ("hold_ms", "freeze_ms") for value in (-1.0, math.nan, math.inf)),
    {"hooks": (HOOK,) * 65},
    {"hooks": (msgspec.structs.replace(HOOK, name="../x"),)},
    {"hooks": (msgspec.structs.replace(HOOK, exit_code=256),)},
    {"hooks": (msgspec.structs.replace(HOOK, exit_code=-1),)},
    {"hooks": (msgspec.structs.replace(HOOK, seconds=math.nan),)},
    {"hooks": (msgspec.structs.replace(HOOK, output="o" * 201),)},
    {"hooks": (msgspec.structs.replace(HOOK, output="\r"),)},
    {"hooks": (msgspec.structs.replace(HOOK, happened="h" * 201),)},
    {"hooks": (msgspec.structs.replace(HOOK, phase="during"),)},  # type: ignore[arg-type]
    {"group_point": "x"},
    {"members": (ID, ID)},
    {"members": ("x",)},
    {"members": tuple(f"{n:032x}" for n in range(257))},
    {"ready": 3},
    {"ready": -1},
    {"group": None},
)
HOSTILE_LAST_WORDS = ({"completes": 0}, {"completes": -1}, {"completes": 1 << 63}, {"completes": 5, "unfinished": True})


@pytest.mark.parametrize("changes", HOSTILE)
def test_hostile_markers_are_refused_from_the_wire_and_from_the_catalog(changes: dict[str, object]) -> None:
    hostile = msgspec.structs.replace(FULL, **changes)
    with pytest.raises(FormatError):
        decode_marker(encode_marker(hostile))
    with pytest.raises(IntegrityError, match=r"point '7' cannot be.*rebuild"):
        point_of(columns_of(PointRow("a" * 32, 7, 1, 70, hostile)))


@pytest.mark.parametrize("changes", HOSTILE_LAST_WORDS)
def test_last_words_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="completes"):
        decode_marker(encode_marker(msgspec.structs.replace(FULL, **changes)))


@pytest.mark.parametrize("first", CONSISTENCIES)
@pytest.mark.parametrize("last", CONSISTENCIES)
def test_i5_a_last_word_says_what_was_measured_and_never_makes_more_of_a_point(
    first: Consistency, last: Consistency
) -> None:
    marker = msgspec.structs.replace(FULL, consistency=first, unfinished=True, hold_ms=None)
    word = msgspec.structs.replace(
        FULL, consistency=last, completes=7, name="other", note="other", group="other", members=(), hold_ms=3.0
    )
    whole = completed(marker, word)
    least = CONSISTENCIES[min(CONSISTENCIES.index(first), CONSISTENCIES.index(last))]
    assert whole == msgspec.structs.replace(marker, consistency=least, unfinished=False, hold_ms=3.0)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("lsn", 0), ("lsn", "x"), ("epoch", 1 << 32), ("epoch", -1), ("time_ns", -1), ("id", None), ("id", 5)),
        *(("name", b"noon"), ("hold_ms", "1"), ("hooks", "["), ("hooks", "{}"), ("hooks", "[" * 100_000), ("hooks", 5)),
        *(("members", "[1]"), ("members", '["x"]'), ("members", ""), ("ready", 1.5), ("consistency", None)),
        *(("unfinished", "x"), ("protected", "x")),
    ],
)
def test_rows_of_points_that_cannot_be_are_refused(column: str, value: object) -> None:
    good = columns_of(ROW)
    assert point_of(good) == ROW and len(good) == len(COLUMNS)
    at = COLUMNS.index(column)
    with pytest.raises(IntegrityError):
        point_of((*good[:at], value, *good[at + 1 :]))
