"""Stretches: log objects that stand for more LSNs than they have records of. What cannot be one is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.errors import FormatError
from asrfs.format import log_object as lo
from asrfs.format import object_index
from asrfs.format.object_encoder import ObjectEncoder
from asrfs.format.record import Kind

MACHINE = bytes(range(16))
SALT = bytes(32)
KEYS = lo.derive_keys(b"i" * 32, b"p" * 32, MACHINE, 1, SALT)
BLOCK = 4096

Row = tuple[Kind, int, int]
"""Kind, slot, LSN."""


def make_index(rows: Sequence[Row], first_lsn: int) -> object_index.Index:
    """Extents of one block each, notes of one byte."""
    kinds = np.array([kind for kind, _, _ in rows], np.uint16)
    carries = (kinds == Kind.WRITE) | (kinds == Kind.FILL)
    noted = (kinds == Kind.MARKER) | (kinds == Kind.DISK)
    position = np.zeros(len(rows), np.uint64)
    position[carries] = np.arange(carries.sum()) * BLOCK
    position[noted] = np.arange(noted.sum())
    return object_index.Index(
        first_lsn=first_lsn,
        time_ns=np.arange(1000, 1000 + len(rows), dtype=np.uint64),
        offset=np.zeros(len(rows), np.uint64),
        length=np.where(noted, 0, BLOCK).astype(np.uint64),
        payload_position=position,
        note_length=noted.astype(np.uint32),
        kind=kinds,
        slot=np.array([slot for _, slot, _ in rows], np.uint16),
        notes=b"n" * int(noted.sum()),
        stretch_lsn=np.array([lsn for _, _, lsn in rows], np.uint64),
    )


def make_object(index: object_index.Index) -> bytes:
    carried = int(((index.kind == Kind.WRITE) | (index.kind == Kind.FILL)).sum())
    _, content = ObjectEncoder().encode(
        machine_id=MACHINE,
        epoch=1,
        session_salt=SALT,
        previous_digest=lo.NO_DIGEST,
        index=index,
        payloads=[bytes([i]) * BLOCK for i in range(carried)],
        keys=KEYS,
    )
    return bytes(content)


def opened(content: bytes) -> tuple[lo.ObjectHeader, object_index.Index]:
    header = lo.decode_object_header(content, "x")
    return header, object_index.decode_index(header, content, KEYS, "x")


SOUND: dict[str, tuple[int, list[Row]]] = {
    "folded": (10, [(Kind.WRITE, 0, 12), (Kind.DISK, 1, 13), (Kind.ZERO, 1, 40), (Kind.MARKER, 0xFFFF, 41)]),
    "of one record": (10, [(Kind.WRITE, 0, 1 << 40)]),
    "nothing left out": (10, [(Kind.WRITE, 0, 10), (Kind.WRITE, 0, 11)]),
    "a gap of many records": (10, [(Kind.DISK, 0, 99), (Kind.DISK, 2, 99), (Kind.DISK, 7, 99)]),
    "a gap of one record": (10, [(Kind.DISK, 0, 10), (Kind.DISK, 1, 10)]),
    "disks share the end of what is folded": (10, [(Kind.FILL, 0, 12), (Kind.DISK, 0, 20), (Kind.DISK, 1, 20)]),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_stretch_comes_back(name: str) -> None:
    first_lsn, rows = SOUND[name]
    content = make_object(make_index(rows, first_lsn))
    header, index = opened(content)
    assert (header.version, header.first_lsn, header.last_lsn) == (2, first_lsn, rows[-1][2])
    assert header.record_count == header.stretch_count == len(index) == len(rows)
    assert header.is_stretch and index.is_stretch
    assert index.lsn.tolist() == [lsn for _, _, lsn in rows]
    assert index.last_lsn == rows[-1][2]
    assert [(int(kind), int(slot)) for kind, slot in zip(index.kind, index.slot, strict=True)] == [
        (kind, slot) for kind, slot, _ in rows
    ]
    assert lo.check_digest(content, "x") == content[-32:]


WRONG: dict[str, list[Row]] = {
    "before its beginning": [(Kind.WRITE, 0, 9), (Kind.WRITE, 0, 12)],
    "backwards": [(Kind.WRITE, 0, 13), (Kind.WRITE, 0, 12), (Kind.WRITE, 0, 14)],
    "two records with one LSN": [(Kind.WRITE, 0, 12), (Kind.WRITE, 0, 12), (Kind.WRITE, 0, 14)],
    "two disks with one LSN inside": [(Kind.DISK, 0, 12), (Kind.DISK, 1, 12), (Kind.WRITE, 0, 14)],
    "extents at one end": [(Kind.WRITE, 0, 14), (Kind.WRITE, 1, 14)],
    "a disk and an extent at one end": [(Kind.DISK, 0, 14), (Kind.DISK, 1, 14), (Kind.WRITE, 1, 14)],
    "a disk and a marker at one end": [(Kind.DISK, 0, 14), (Kind.MARKER, 0xFFFF, 14)],
    "one slot twice at the end": [(Kind.DISK, 3, 14), (Kind.DISK, 3, 14)],
    "a point inside": [(Kind.MARKER, 0xFFFF, 12), (Kind.WRITE, 0, 14)],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_stretch_is_refused(name: str) -> None:
    content = make_object(make_index(WRONG[name], 10))
    with pytest.raises(FormatError, match="stretch"):
        opened(content)


def test_it_must_end_with_its_last_record() -> None:
    """A header that says more than the records do, sealed with the right key: a hostile host can do that."""
    index = make_index([(Kind.WRITE, 0, 12), (Kind.WRITE, 0, 14)], 10)

    class Longer(object_index.Index):
        @property
        def last_lsn(self) -> int:
            return 15

    columns = {name: getattr(index, name) for name in object_index.Index.__slots__}
    with pytest.raises(FormatError, match="stretch"):
        opened(make_object(Longer(**columns)))


def test_times_and_counts_are_held_to_the_header() -> None:
    index = make_index([(Kind.WRITE, 0, 12), (Kind.WRITE, 0, 14)], 10)
    index.time_ns[:] = [5, 4]
    with pytest.raises(FormatError, match="contradict"):
        opened(make_object(index))
    header = lo.decode_object_header(make_object(make_index(SOUND["folded"][1], 10)), "x")
    for wrong in (0, lo.RECORDS_MAX + 1):
        with pytest.raises(FormatError, match="impossible"):
            lo.decode_object_header(lo.encode_object_header(header._replace(stretch_count=wrong)), "x")
    with pytest.raises(FormatError, match="of its own"):
        lo.decode_object_header(lo.encode_object_header(header._replace(version=1)), "x")
    with pytest.raises(FormatError, match="not known"):
        lo.decode_object_header(lo.encode_object_header(header._replace(version=3)), "x")


def test_the_index_of_one_version_is_not_read_as_the_others() -> None:
    stretch = make_index([(Kind.WRITE, 0, 10), (Kind.WRITE, 0, 11)], 10)
    header, _ = opened(make_object(stretch))
    plain = object_index.encode_index(
        object_index.Index(
            **{name: getattr(stretch, name) for name in object_index.Index.__slots__} | {"stretch_lsn": None}
        )
    )
    assert len(object_index.encode_index(stretch)) == len(plain) + 8 * 2
    with pytest.raises(FormatError, match="holds 2 records"):
        object_index._decode_index(header, plain, "x")
    with pytest.raises(FormatError, match="holds 2 records"):
        object_index._decode_index(header._replace(version=1, stretch_count=0), object_index.encode_index(stretch), "x")


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([Kind.WRITE, Kind.ZERO, Kind.DISK, Kind.MARKER]), st.integers(0, 2), st.integers(8, 16)
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(8, 12),
)
def test_whatever_is_read_is_a_stretch(rows: list[Row], first_lsn: int) -> None:
    """What a reader lets through has each LSN once, but for disks at the end, and nothing outside."""
    if first_lsn > rows[-1][2]:
        return
    try:
        header, index = opened(make_object(make_index(rows, first_lsn)))
    except FormatError:
        assert not _is_stretch(rows, first_lsn)
        return
    assert _is_stretch(rows, first_lsn)
    assert header.first_lsn <= int(index.lsn[0]) and int(index.lsn[-1]) == header.last_lsn


def _is_stretch(rows: list[Row], first_lsn: int) -> bool:
    last = rows[-1][2]
    inside = [lsn for _, _, lsn in rows if lsn != last]
    at_end = [row for row in rows if row[2] == last]
    ends = len(at_end) == 1 or (
        all(kind == Kind.DISK for kind, _, _ in at_end) and len({slot for _, slot, _ in at_end}) == len(at_end)
    )
    in_order = [lsn for _, _, lsn in rows] == sorted(lsn for _, _, lsn in rows) and len(set(inside)) == len(inside)
    no_point = not any(kind == Kind.MARKER and lsn != last for kind, _, lsn in rows)
    return ends and in_order and no_point and min(lsn for _, _, lsn in rows) >= first_lsn
