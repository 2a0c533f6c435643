"""`asrfs inspect`: what is in a journal segment or a log object, without any daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.errors import (
    BadInputError,
    FormatError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    TemporaryError,
)
from asrfs.format.log_object import OBJECT_BYTES_MAX, OBJECT_MAGIC, check_digest, decode_object_header
from asrfs.format.record import RECORD_HEADER_BYTES, Kind, check_payload, decode_record_header, segment_seed
from asrfs.format.segment import (
    SEGMENT_BYTES,
    SEGMENT_HEADER_BYTES,
    SEGMENT_MAGIC,
    SegmentHeader,
    decode_segment_header,
)
from asrfs.journal.write_log import segment_names, write_log
from asrfs.model.machine import SLOT_MAX
from asrfs.model.quantities import format_time
from asrfs.storage.directory import DirectoryStorage, open_path
from asrfs.terminal.output import pairs, table

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("path", metavar="PATH")
@click.option("--log-writes", "output", metavar="FILE", help="Write the disk's write log to FILE instead.")
@click.option("--slot", type=click.IntRange(0, SLOT_MAX), help="Of which disk, if there are several.")
@pass_invocation
def inspect(invocation: Invocation, path: str, output: str | None, slot: int | None) -> int:
    """Print the journal segment or log object at PATH. Exit code 5 if it is damaged.

    With --log-writes, PATH is a segment or a whole journal (the directory STATE/journal), and FILE becomes a log in the
    format of Linux's dm-log-writes, for programs that replay such logs: writes, discards, recovery points as marks
    under their names, and a flush wherever the disk's content is known to have been durable.
    """
    if output is not None:
        document = log_writes(path, output, slot)
        invocation.answer(document, lambda out: out.print(pairs(document)))
        return 0
    if slot is not None:
        raise BadInputError("--slot goes with --log-writes")
    content = read(path)
    if content[: len(OBJECT_MAGIC)] == OBJECT_MAGIC:
        document = describe_object(content, path)
        invocation.answer(document, lambda out: out.print(pairs(document)))
        return 0
    if len(content) >= SEGMENT_HEADER_BYTES and not any(content[:SEGMENT_HEADER_BYTES]):
        unused = {"type": "journal segment", "records": [], "note": "made ahead of use: nothing was written to it yet"}
        invocation.answer(unused, lambda out: out.print(pairs(unused)))
        return 0
    if content[: len(SEGMENT_MAGIC)] != SEGMENT_MAGIC:
        raise FormatError(f"{path}: neither a journal segment nor a log object")
    document = describe_segment(content, path)
    invocation.answer(document, lambda out: draw(document, out))
    if document["damaged"]:
        raise IntegrityError(f"{path}: {document['damaged']}")
    return 0


def log_writes(path: str, output: str, slot: int | None) -> dict[str, Any]:
    """Make the write log at `output`, whole or not at all; what it holds."""
    whole = os.path.isdir(path)
    if not os.path.exists(path):
        raise NotFoundError(f"{path} does not exist")
    if os.path.lexists(output):
        raise RefusedError(f"{output} exists: choose another name")
    directory, name = os.path.split(os.path.abspath(output))
    if not os.path.isdir(directory):
        raise NotFoundError(f"{directory} is not a directory: make it first")
    journal = DirectoryStorage(path if whole else os.path.dirname(os.path.abspath(path)))
    names = segment_names(journal) if whole else [os.path.basename(os.path.abspath(path))]
    place = DirectoryStorage(directory)
    try:
        file = place.create(name)
        try:
            done = write_log(journal, names, file, slot)
        except BaseException:
            place.unlink(name)
            raise
        finally:
            file.close()
    except FileNotFoundError:
        raise TemporaryError(f"{path}: a segment was freed while it was read: try again") from None
    except OSError as error:
        raise NoSpaceError(f"cannot make {output}: {error.strerror}") from None
    return {"type": "dm-log-writes", "output": os.path.join(directory, name), **done._asdict()}


def draw(document: dict[str, Any], out: Console) -> None:
    columns = ("lsn", "time", "kind", "slot", "offset", "length", "at", "detail")
    rows = [[record.get(column) for column in columns] for record in document["records"]]
    head = {key: value for key, value in document.items() if key != "records"}
    out.print(pairs(head))
    out.print(table([column.upper() for column in columns], rows))


def read(path: str) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInputError(f"{path} is not a file: name a journal segment or a log object")
    try:
        file = open_path(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    try:
        return file.read_at(max(SEGMENT_BYTES, OBJECT_BYTES_MAX) + 1, 0)
    finally:
        file.close()


def describe_object(content: bytes, path: str) -> dict[str, Any]:
    digest = check_digest(content, path)
    header = decode_object_header(content, path)
    return {
        "type": "log object",
        "machine_id": header.machine_id.hex(),
        "epoch": header.epoch,
        "first_lsn": header.first_lsn,
        "last_lsn": header.last_lsn,
        "first_time": format_time(header.first_time_ns),
        "last_time": format_time(header.last_time_ns),
        "records": header.record_count,
        "is_stretch": header.is_stretch,
        "bytes": len(content),
        "payload_raw_bytes": header.payload_raw_length,
        "frames": header.frame_count,
        "digest": digest.hex(),
        "previous_digest": header.previous_digest.hex(),
    }


def describe_segment(content: bytes, path: str) -> dict[str, Any]:
    """`damaged` says where a record's payload does not match; a torn end is not damage."""
    header = decode_segment_header(content, path)
    records: list[dict[str, Any]] = []
    damaged = None
    for record in segment_records(content, header):
        at = record["at"]
        try:
            check_payload(record.pop("header"), record.pop("payload"), f"byte {at}")
        except FormatError as error:
            damaged = str(error)
            break
        records.append(record)
    return {
        "type": "journal segment",
        "machine_id": header.machine_id.hex(),
        "number": header.number,
        "epoch": header.epoch,
        "first_lsn": header.first_lsn,
        "last_lsn": records[-1]["lsn"] if records else header.first_lsn - 1,
        "after": format_time(header.last_time_ns) if header.last_time_ns else None,
        "damaged": damaged,
        "records": records,
    }


def segment_records(content: bytes, segment: SegmentHeader) -> Iterator[dict[str, Any]]:
    view = memoryview(content)
    seed = segment_seed(segment.number, segment.salt)
    at = SEGMENT_HEADER_BYTES
    lsn = segment.first_lsn
    while (header := decode_record_header(view, at, seed)) is not None and header.lsn == lsn:
        start = at + RECORD_HEADER_BYTES
        payload = view[start : start + header.payload_length]
        yield {
            "lsn": header.lsn,
            "time": format_time(header.time_ns),
            "kind": Kind(header.kind).name,
            "slot": None if header.kind == Kind.MARKER else header.slot,
            "offset": header.offset,
            "length": header.length,
            "at": at,
            "detail": detail(header.kind, bytes(payload)),
            "header": header,
            "payload": payload,
        }
        at = start + header.payload_length
        lsn += 1


def detail(kind: int, payload: bytes) -> str | None:
    if kind not in (Kind.MARKER, Kind.DISK):
        return None
    try:
        fields = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return "unreadable"
    if not isinstance(fields, dict):
        return "unreadable"
    return " ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
