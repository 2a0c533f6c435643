"""The files of a journal: their names, which there are, their headers, and the records between two bytes of one.

A segment is `{number:016x}.segment`. A spare is a file that can be made one without new space: `spare-{number:016x}`
was segment `number`, `fresh-{count:016x}` never held a record. The number in a file's durable name is never less than
that of any segment whose records may still lie in the file, and a new segment's number is greater than every number
in the directory. So no segment number is used twice, and checksums, which cover it, tell old records from new ones.

Disk server and agent rename here without a lock between them. That is safe because no rename ever replaces a name:
only the disk server gives a spare another name, only the agent frees a segment, and a count is not a segment's number.
"""

from __future__ import annotations

import re
import struct
from enum import Enum
from typing import NamedTuple

from crc32c import crc32c

from asrfs.errors import FormatError, IntegrityError
from asrfs.format.record import (
    PAYLOAD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Kind,
    RecordHeader,
    decode_record_header,
)
from asrfs.format.segment import (
    SEGMENT_HEADER_BYTES,
    SEGMENT_MAGIC,
    SEGMENT_VERSION,
    SegmentHeader,
    decode_segment_header,
)
from asrfs.storage.interface import File, Storage

_SEGMENT = re.compile(r"([0-9a-f]{16})\.segment")
_SPARE = re.compile(r"spare-([0-9a-f]{16})")
_FRESH = re.compile(r"fresh-([0-9a-f]{16})")
_INDEX = re.compile(r"([0-9a-f]{16})\.index")
_RECORD = struct.Struct("<4sIQQQQQIIHHI")
_WRITE = int(Kind.WRITE)
HOUSEKEEPING_PREFIX = ".spare-"
"""A spare in the making. What is left over when its maker died goes when the next one is made."""


class Listing(NamedTuple):
    """Numbers of what there is, ascending; of `fresh` ones their counts."""

    segments: list[int]
    spares: list[int]
    fresh: list[int]

    def spare_names(self) -> list[str]:
        """Files that can become a segment, those to take first before the others."""
        return [*map(spare_name, self.spares), *map(fresh_name, self.fresh)]

    def largest(self) -> int:
        return max([0, *self.segments[-1:], *self.spares[-1:]])


class Stop(Enum):
    """Why a scan of a buffer ended."""

    MORE = "the next record may go on behind the buffer"
    INVALID = "no valid record follows"
    LIMIT = "enough was read"


class Scan(NamedTuple):
    """Records found, in order, with their payloads as views of the buffer; `end`: the byte behind the last one."""

    records: list[tuple[RecordHeader, memoryview]]
    payload_bytes: int
    end: int
    stop: Stop


def segment_name(number: int) -> str:
    return f"{number:016x}.segment"


def spare_name(number: int) -> str:
    return f"spare-{number:016x}"


def fresh_name(count: int) -> str:
    return f"fresh-{count:016x}"


def index_name(number: int) -> str:
    return f"{number:016x}.index"


def list_indexes(storage: Storage) -> list[int]:
    """Numbers of the segments that have an index, ascending, be there a segment or not."""
    return sorted(int(match[1], 16) for match in map(_INDEX.fullmatch, storage.names("")) if match)


def remove_index(storage: Storage, number: int) -> None:
    """A segment that goes takes its index along; what a crash brings back is swept by the next recovery."""
    try:
        storage.unlink(index_name(number))
    except FileNotFoundError:
        pass


def list_journal(storage: Storage) -> Listing:
    """Segments and spares in the journal's directory; other names are not ours."""
    names = storage.names("")
    numbers = ([int(match[1], 16) for match in map(of.fullmatch, names) if match] for of in (_SEGMENT, _SPARE, _FRESH))
    return Listing(*map(sorted, numbers))


def read_header(file: File, number: int, machine_id: bytes, epoch_min: int = 0) -> SegmentHeader | None:
    """The header of segment `number`, or None where there is none that was written for this number.

    Raises IntegrityError for a header of another machine, an epoch below `epoch_min` or an unknown format.
    """
    where = segment_name(number)
    raw = file.read_at(SEGMENT_HEADER_BYTES, 0)
    try:
        header = decode_segment_header(raw, where)
    except FormatError:
        version = int.from_bytes(raw[len(SEGMENT_MAGIC) : len(SEGMENT_MAGIC) + 4], "little")
        if raw.startswith(SEGMENT_MAGIC) and version != SEGMENT_VERSION:
            raise
        return None
    if header.number != number:
        return None
    if header.machine_id != machine_id:
        raise IntegrityError(f"{where}: belongs to machine {header.machine_id.hex()}, not {machine_id.hex()}")
    if header.epoch < epoch_min:
        raise IntegrityError(
            f"{where}: epoch {header.epoch} follows epoch {epoch_min} at LSN {header.first_lsn}, offset 0"
        )
    return header


def scan(
    view: memoryview,
    at: int,
    seed: int,
    expected_lsn: int,
    *,
    lsn_max: int = (1 << 64) - 1,
    payload_bytes_max: int = 1 << 62,
    check_payloads: bool = True,
) -> Scan:
    """The valid consecutive records of `view` from byte `at` on, the first of which has `expected_lsn`.

    Stops behind `lsn_max`, and behind the record that brings the payloads to `payload_bytes_max`.
    """
    records: list[tuple[RecordHeader, memoryview]] = []
    add = records.append
    unpack = _RECORD.unpack_from
    make = RecordHeader._make
    size = len(view)
    taken = 0
    while expected_lsn <= lsn_max and taken < payload_bytes_max:
        start = at + RECORD_HEADER_BYTES
        if start > size:
            return Scan(records, taken, at, Stop.MORE)
        fields = unpack(view, at)
        length = fields[7]
        # WRITE is nearly all there is: what `decode_record_header` checks, without its calls. A test compares the two.
        if (
            fields[9] == _WRITE
            and fields[0] == RECORD_MAGIC
            and fields[1] == crc32c(view[at + 8 : start], seed)
            and 0 < length <= PAYLOAD_BYTES_MAX
            and length == fields[6]
            and not fields[11]
            and fields[5] + length < 1 << 64
        ):
            header: RecordHeader | None = make(fields[2:11])
        else:
            header = decode_record_header(view, at, seed)
        if header is None or fields[2] != expected_lsn:
            return Scan(records, taken, at, Stop.INVALID)
        end = start + length
        if end > size:
            return Scan(records, taken, at, Stop.MORE)
        payload = view[start:end]
        if check_payloads and crc32c(payload) != fields[8]:
            return Scan(records, taken, at, Stop.INVALID)
        add((header, payload))
        taken += length
        at = end
        expected_lsn += 1
    return Scan(records, taken, at, Stop.LIMIT)
