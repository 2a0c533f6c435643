"""FORMAT.md is the specification: each byte table is held against the code that packs it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

import asrfs.format
from asrfs.format import (
    dirty_map,
    kept_leaves,
    log_object,
    log_writes,
    map_checkpoint,
    object_index,
    record,
    seed_file,
    segment,
    segment_index,
)
from asrfs.model import marker
from asrfs.model.dirty_map import CHUNK_SHIFT, GAPS_MAX, Gap, Reason
from asrfs.model.marker import MarkerRecord
from asrfs.protocol import frames

TEXT = (Path(asrfs.format.__file__).parent / "FORMAT.md").read_text()


def table(heading: str, nth: int = 0) -> list[list[str]]:
    """Cells of the nth table below a heading, without its head rows."""
    section = re.split(rf"^#+ {re.escape(heading)}$", TEXT, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in blocks[nth].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def fields_of(layout: struct.Struct, names: list[str], at: int = 0) -> list[tuple[int, int, str]]:
    """`(offset, size, name)` of each field of a packed little-endian layout."""
    assert layout.format.startswith("<")
    fields = []
    sizes = [struct.calcsize("<" + code) for code in expand(layout.format[1:])]
    assert len(sizes) == len(names)
    for size, name in zip(sizes, names, strict=True):
        fields.append((at, size, name))
        at += size
    return fields


def expand(codes: str) -> list[str]:
    """`2Q16s` → ['Q', 'Q', '16s']."""
    out: list[str] = []
    for count, code in re.findall(r"(\d*)([a-zA-Z])", codes):
        out += [count + code] if code == "s" else [code] * int(count or 1)
    return out


LAYOUTS = {
    "Segment header": [
        *fields_of(segment._HEADER, ["magic", "version", *segment.SegmentHeader._fields]),
        (segment._HEADER.size, 4, "crc"),
    ],
    "Record header": fields_of(record._PREFIX, ["magic", "crc"])
    + fields_of(record._BODY, [*record.RecordHeader._fields, "reserved"], record._PREFIX.size),
    "Segment index header": fields_of(segment_index._PREFIX, ["magic", "version", "crc"])
    + fields_of(
        segment_index._FIELDS, [*segment_index.SealedSegment._fields, "disk_count"], segment_index._PREFIX.size
    ),
    "Segment index disk": fields_of(segment_index._DISK, ["slot", "zero", "block_count", "zero_count", "reserved"]),
    "Dirty map header": fields_of(dirty_map._PREFIX, ["magic", "version", "crc"])
    + fields_of(
        dirty_map._HEADER,
        ["since_lsn", "lsn", "segment", "time_ns", "offset", "disk_count", "gap_count", "reserved"],
        dirty_map._PREFIX.size,
    ),
    "Dirty map disk": fields_of(dirty_map._DISK, list(dirty_map._Disk._fields)),
    "Dirty map gap": fields_of(dirty_map._GAP, list(Gap._fields)),
    "Write log super block": fields_of(log_writes._SUPER, ["magic", "version", "nr_entries", "sectorsize"]),
    "Write log entry": fields_of(log_writes._ENTRY, ["sector", "nr_sectors", "flags", "data_len"]),
    "Log object header": fields_of(log_object._PREFIX, ["magic", "crc"])
    + fields_of(log_object._HEADER, list(log_object.ObjectHeader._fields), log_object._PREFIX.size),
    "Frame table entry": fields_of(log_object.FRAME, ["stored_length", "flags"]),
    "Map checkpoint header": fields_of(map_checkpoint._PREFIX, ["magic", "crc"])
    + fields_of(map_checkpoint._HEADER, list(map_checkpoint.MapHeader._fields), map_checkpoint._PREFIX.size),
    "Kept leaves header": fields_of(kept_leaves._PREFIX, ["magic", "crc"])
    + fields_of(kept_leaves._HEADER, list(kept_leaves.LeavesHeader._fields), kept_leaves._PREFIX.size),
    "Seed header": fields_of(seed_file._PREFIX, ["magic", "crc"])
    + fields_of(seed_file._HEADER, list(seed_file.SeedHeader._fields), seed_file._PREFIX.size),
    "Frame header": fields_of(frames._HEADER, ["magic", "type", "zero", "length", "sequence"])
    + fields_of(frames._CRC, ["crc"], frames._HEADER.size),
}


@pytest.mark.parametrize("heading", LAYOUTS)
def test_byte_table_is_the_layout_in_the_code(heading: str) -> None:
    documented = [(int(row[0]), int(row[1]), row[2]) for row in table(heading)]
    assert documented == LAYOUTS[heading]


def test_index_columns() -> None:
    documented = [(row[0], int(row[1])) for row in table("Index")]
    assert documented == [(name, np.dtype(dtype).itemsize) for name, dtype in object_index._STRETCH_COLUMNS]


def test_record_kinds() -> None:
    documented = {int(row[0]): row[1] for row in table("Record header", 1)}
    assert documented == {kind.value: kind.name for kind in record.Kind}


def test_keys_of_a_marker() -> None:
    assert [row[0].strip("`") for row in table("Marker")] == ["id", *list(MarkerRecord.__struct_fields__)[1:]]
    text = TEXT.split("### Marker")[1].split("\n## ")[0]
    for limit in (marker.NOTE_CHARACTERS_MAX, marker.FAILED_CHARACTERS_MAX, marker.HOOKS_MAX, marker.MEMBERS_MAX):
        assert re.search(rf"at most {limit:,} ", text), f"a limit of {limit}"
    assert all(f"`{name}`" in text for name in marker.HookResult.__struct_fields__)


def test_frame_types() -> None:
    documented = {int(row[0]): row[1] for row in table("Frame header", 1)}
    assert documented == {kind.value: kind.name for kind in frames.FrameType}


def test_reasons_of_a_dirty_map() -> None:
    documented = {int(row[0]): row[1] for row in table("Dirty map disk", 1)}
    assert documented == {reason.value: reason.name for reason in Reason} | {dirty_map._IS_IN_MAP: "in the map"}


def test_write_log_flags() -> None:
    documented = {int(row[0]): row[1] for row in table("Write log entry", 1)}
    assert documented == {flag.value: name for name, flag in log_writes.LogFlag.__members__.items()}


def test_sizes_named_in_the_text() -> None:
    assert (seed_file.SEED_HEADER_BYTES, seed_file.CHUNK_DIGEST_BYTES, seed_file.SEALED_CHUNK_BYTES) == (
        4096,
        16,
        65552,
    )
    assert record.RECORD_HEADER_BYTES == 64
    assert segment.SEGMENT_HEADER_BYTES == 8192
    assert segment.SEGMENT_BYTES == 64 << 20
    assert log_object.OBJECT_HEADER_BYTES == 256
    assert map_checkpoint.MAP_HEADER_BYTES == 256
    assert map_checkpoint.PART_EXTENTS == 32_768
    assert CHUNK_SHIFT == 16
    assert GAPS_MAX == 128
    assert frames.FRAME_PAYLOAD_BYTES_MAX == 4 << 20
    assert record.PAYLOAD_BYTES_MAX == 1 << 20
