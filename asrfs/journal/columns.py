"""Records as columns: what appliers and shippers read, where one object for each record would cost more than its bytes.

`scan` of `segments.py` gives each record as a tuple; this gives all of them as one table of headers and the places of
their payloads, found and checked by the same rules. A test holds the two together: what one calls valid the other does.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from asrfs.format.record import (
    CARRIES_EXTENT_BYTES,
    PAYLOAD_BYTES_MAX,
    READS_AS_ZEROS,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Kind,
    RecordHeader,
)
from asrfs.journal.segments import Stop

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("crc", "<u4"),
        ("lsn", "<u8"),
        ("time_ns", "<u8"),
        ("durable_lsn", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("payload_length", "<u4"),
        ("payload_crc", "<u4"),
        ("kind", "<u2"),
        ("slot", "<u2"),
        ("reserved", "<u4"),
    ]
)
"""A record's header as FORMAT.md lays it out; its fields are those of `RecordHeader`."""
assert HEADER.itemsize == RECORD_HEADER_BYTES

_MAGIC = int.from_bytes(RECORD_MAGIC, "little")
_PAYLOAD_LENGTH = struct.Struct("<I")
_PAYLOAD_LENGTH_AT = 48
_CHECKED_FROM = 8
_ANY = np.dtype(f"V{RECORD_HEADER_BYTES}")
_KINDS = 256
_WITH_BYTES, _WITH_ZEROS, _WITH_NOTE = 1, 2, 3
_CLASS_OF_KIND = np.zeros(_KINDS, np.uint8)
_CLASS_OF_KIND[list(CARRIES_EXTENT_BYTES)] = _WITH_BYTES
_CLASS_OF_KIND[list(READS_AS_ZEROS)] = _WITH_ZEROS
_CLASS_OF_KIND[[Kind.MARKER, Kind.DISK]] = _WITH_NOTE

Table = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


class Columns(NamedTuple):
    """Consecutive records: their headers (dtype HEADER), and for each the byte of `view` where its payload begins."""

    view: memoryview
    headers: Table
    payload_at: Places

    def __len__(self) -> int:
        return len(self.headers)

    def carries_bytes(self) -> Mask:
        """Which records are WRITE or FILL."""
        return self._is_of(_WITH_BYTES)

    def reads_as_zeros(self) -> Mask:
        """Which records are ZERO or DISCARD."""
        return self._is_of(_WITH_ZEROS)

    def has_note(self) -> Mask:
        """Which records are MARKER or DISK."""
        return self._is_of(_WITH_NOTE)

    def _is_of(self, kinds: int) -> Mask:
        found: Mask = _class_of(self.headers["kind"]) == kinds
        return found

    def header(self, i: int) -> RecordHeader:
        """Record i by itself."""
        return RecordHeader._make(self.headers[i].item()[2:11])

    def payloads(self, chosen: Mask) -> list[memoryview]:
        """Views of the payloads of some records, in order."""
        view = self.view
        start = self.payload_at[chosen]
        end = start + self.headers["payload_length"][chosen]
        return [view[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]

    def payload(self, i: int) -> memoryview:
        start = int(self.payload_at[i])
        return self.view[start : start + int(self.headers["payload_length"][i])]


class ColumnScan(NamedTuple):
    """As `segments.Scan`, the records as columns."""

    columns: Columns
    payload_bytes: int
    end: int
    stop: Stop


def scan_columns(
    view: memoryview,
    at: int,
    seed: int,
    expected_lsn: int,
    *,
    lsn_max: int = (1 << 64) - 1,
    payload_bytes_max: int = 1 << 62,
    check_payloads: bool = True,
) -> ColumnScan:
    """The valid consecutive records of `view` from byte `at` on, as `segments.scan` finds them."""
    places, cut, end, stop = _walk(view, at, lsn_max - expected_lsn + 1, payload_bytes_max)
    starts = np.array(places + cut, np.int64)
    headers = _headers_at(view, starts)
    sound = _are_sound(headers, expected_lsn)
    sound &= headers["crc"] == _checksums(view, starts + _CHECKED_FROM, starts + RECORD_HEADER_BYTES, seed)
    payload_at = starts + RECORD_HEADER_BYTES
    if cut:
        stop = Stop.MORE if sound[-1] else Stop.INVALID
        headers, sound, payload_at = headers[:-1], sound[:-1], payload_at[:-1]
    if check_payloads:
        sound &= headers["payload_crc"] == _checksums(view, payload_at, payload_at + headers["payload_length"], 0)
    if not sound.all():
        good = int(sound.argmin())
        headers, payload_at, end, stop = headers[:good], payload_at[:good], places[good], Stop.INVALID
    taken = int(headers["payload_length"].sum(dtype=np.int64))
    return ColumnScan(Columns(view, headers, payload_at), taken, end, stop)


def _walk(view: memoryview, at: int, count_max: int, payload_bytes_max: int) -> tuple[list[int], list[int], int, Stop]:
    """Where whole records seem to begin, the beginning of one whose payload goes on behind `view` (or none), the byte
    behind the last whole one, and why no more are looked for. Lengths are believed for now."""
    places: list[int] = []
    length_of = _PAYLOAD_LENGTH.unpack_from
    last_header = len(view) - RECORD_HEADER_BYTES
    size = len(view)
    taken = 0
    while len(places) < count_max and taken < payload_bytes_max:
        if at > last_header:
            return places, [], at, Stop.MORE
        (length,) = length_of(view, at + _PAYLOAD_LENGTH_AT)
        following = at + RECORD_HEADER_BYTES + length
        if following > size:
            return places, [at], at, Stop.MORE
        places.append(at)
        taken += length
        at = following
    return places, [], at, Stop.LIMIT


def _headers_at(view: memoryview, starts: Places) -> Table:
    if not len(starts):
        return np.zeros(0, HEADER)
    # Every place of the view, taken for a header; only those at `starts` are copied.
    any_place = np.ndarray(len(view) - RECORD_HEADER_BYTES + 1, _ANY, view, strides=(1,))
    return any_place[starts].view(HEADER)


def _are_sound(headers: Table, expected_lsn: int) -> Mask:
    """What `decode_record_header` asks of each header besides its checksum, and whether LSNs are consecutive."""
    lsn, kind = headers["lsn"], _class_of(headers["kind"])
    offset, length, payload_length = headers["offset"], headers["length"], headers["payload_length"]
    sound: Mask = (
        (headers["magic"] == _MAGIC)
        & (headers["reserved"] == 0)
        & (lsn == np.arange(len(lsn), dtype=np.uint64) + np.uint64(expected_lsn))
        & (payload_length <= PAYLOAD_BYTES_MAX)
        & (offset + length >= offset)  # else it is 2**64 or more, and wrapped
    )
    of_extent = np.where(kind == _WITH_BYTES, payload_length == length, payload_length == 0) & (length > 0)
    sound &= np.where(kind == _WITH_NOTE, length == 0, of_extent) & (kind != 0)
    return sound


def _checksums(view: memoryview, starts: Places, ends: Places, seed: int) -> npt.NDArray[np.uint32]:
    """CRC-32C of each piece of `view`."""
    crcs = [crc32c(view[a:b], seed) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.array(crcs, np.uint32)


def _class_of(kind: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    return _CLASS_OF_KIND[np.minimum(kind, _KINDS - 1)]
