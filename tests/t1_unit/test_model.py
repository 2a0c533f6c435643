"""Names, sizes, durations, times, extents and what travels inside the history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.errors import BadInputError, FormatError, NotFoundError
from asrfs.model import machine as m
from asrfs.model.extents import BLOCK_BYTES, block_range, is_block_aligned, widen_to_blocks
from asrfs.model.marker import decode_marker
from asrfs.model.names import check_name, id_bytes, is_id
from asrfs.model.quantities import (
    check_disk_size,
    format_size,
    format_time,
    parse_duration,
    parse_size,
    parse_time,
)

DISK_ID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("name", ["a", "web1", "A.b_c-d", "9", "x" * 63])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name, "disk") == name


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "x" * 64, "%2F", "-a", ".", "..", ".hidden", "a b", "a\n", "a\0", "ä", "a\u0661"]
)
def test_names_that_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadInputError) as caught:
        check_name(name, "disk")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("512M", 512 << 20), ("10G", 10 << 30), ("1k", 1024), ("2TiB", 2 << 40), ("3 GB", 3 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "G", "10Q", "1e9", "ten", "0x10", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInputError):
        parse_size(text)


@pytest.mark.parametrize("size", [0, -512, 511, 513, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70])
def test_sizes_no_disk_can_have(size: int) -> None:
    with pytest.raises(BadInputError):
        check_disk_size(size, "disk a")


def test_the_smallest_and_the_largest_disk() -> None:
    assert check_disk_size(512, "disk a") == 512
    assert check_disk_size((1 << 63) - 512, "disk a") == (1 << 63) - 512


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("4h", 14400), ("250ms", 0.25), ("7", 7), ("1.5s", 1.5), ("2d", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5 minutes", "-5s", "s", "inf", "nan", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadInputError):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=4 * 10**18))
def test_a_time_that_is_printed_can_be_given_back(time_ns: int) -> None:
    assert parse_time(format_time(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01T01:00:00.5+01:00", 5 * 10**8),
        ("1970-01-01 00:00:00.000000001z", 1),
    ],
)
def test_times(text: str, time_ns: int) -> None:
    assert parse_time(text) == time_ns


@pytest.mark.parametrize("text", ["", "noon", "2026-13-01T00:00:00Z", "2026-11-21T10:03:07", "2026-11-21", "25:00Z"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadInputError):
        parse_time(text)


def test_sizes_for_people() -> None:
    shown = [format_size(n) for n in (0, 1023, 1024, 10 << 30, 5 << 60)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "10.0 GiB", "5.0 EiB"]


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 16), st.integers(1, 1 << 11))
def test_widening_covers_the_extent_with_the_fewest_blocks(offset: int, length: int, sectors: int) -> None:
    size = sectors * 512
    offset %= size
    length = min(length, size - offset)
    wide_offset, wide_length = widen_to_blocks(offset, length, size)
    assert wide_offset <= offset
    assert wide_offset + wide_length >= offset + length
    assert is_block_aligned(wide_offset, wide_length, size)
    assert offset - wide_offset < BLOCK_BYTES
    assert wide_offset + wide_length - offset - length < BLOCK_BYTES
    assert list(block_range(offset, length)) == list(block_range(wide_offset, wide_length))


def test_ids() -> None:
    assert is_id(DISK_ID)
    assert id_bytes(DISK_ID).hex() == DISK_ID
    for text in ("", DISK_ID.upper(), DISK_ID + "0", "g" * 32, "../" + DISK_ID[3:]):
        assert not is_id(text)
        with pytest.raises(BadInputError):
            id_bytes(text)


def disk(**changes: object) -> m.DiskConfig:
    fields = {"slot": 0, "id": DISK_ID, "name": "root", "size_bytes": 4096} | changes
    return m.DiskConfig(**fields)  # type: ignore[arg-type]


def test_removed_disks_keep_their_slot_but_not_their_name() -> None:
    config = m.MachineConfig(id=DISK_ID, name="web1", disks=(disk(removed=True), disk(slot=1)))
    assert config.disk("root").slot == 1
    assert [each.slot for each in config.live_disks()] == [1]
    with pytest.raises(NotFoundError):
        config.disk("data")


def test_disk_records_come_back() -> None:
    record = m.DiskRecord.of(disk(gap=True))
    assert m.decode_disk(m.encode_disk(record)) == record


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"size_bytes": 0},
        {"size_bytes": 513},
        {"slot": 0xFFFF},
        {"slot": -1},
        {"id": "x"},
        {"name": ""},
    ],
)
def test_hostile_disk_records_are_refused(changes: dict[str, object]) -> None:
    fields = {"slot": 0, "id": DISK_ID, "name": "root", "size_bytes": 4096} | changes
    with pytest.raises(FormatError):
        m.decode_disk(m.encode_disk(m.DiskRecord(**fields)))  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_any_bytes_as_notes_raise_only_format_errors(payload: bytes) -> None:
    for decode in (m.decode_disk, decode_marker):
        try:
            decode(payload)
        except FormatError:
            pass
