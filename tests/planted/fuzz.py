"""Bugs that let hostile input through: each one a check that is left out, or made too late."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from asrfs.daemon import control
from asrfs.format import dirty_map, log_object, object_index, record
from asrfs.format.kept_leaves import LEAVES_HEADER_BYTES
from asrfs.journal import segments
from asrfs.model import machine, names
from asrfs.model.marker import MarkerRecord
from asrfs.protocol import frames, messages
from asrfs.transport import enrolment
from replica_store.points import kept_leaves
from replica_store.vault import catalog
from replica_store.vault.rows import PointRow
from tests.planted import Plant

_LEVEL = "fuzz"
_CASES = 10_000
"""Inputs to the one place of each. Every bug is found within a tenth of them, whatever the seed."""


class Believed(int):
    """Equal to every checksum."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def cap_after_allocation(patch: pytest.MonkeyPatch) -> None:
    """Room for a whole frame is made as soon as its header came, before anybody looks at the length."""
    sound = frames.FrameReader._begin

    def begin(self: frames.FrameReader, header: bytes) -> tuple[frames.FrameType, int]:
        bytearray(int.from_bytes(header[4:8], "little"))
        return sound(self, header)

    patch.setattr(frames.FrameReader, "_begin", begin)


def frame_length_before_its_checksum(patch: pytest.MonkeyPatch) -> None:
    """The checksum of a frame's header is not compared."""
    patch.setattr(frames, "crc32c", lambda content: Believed(0))


def frame_number_not_compared(patch: pytest.MonkeyPatch) -> None:
    """Frames may be lost, come twice, or in another order."""
    sound = frames.FrameReader._begin

    def begin(self: frames.FrameReader, header: bytes) -> tuple[frames.FrameType, int]:
        self._sequence = int.from_bytes(header[8:12], "little")
        return sound(self, header)

    patch.setattr(frames.FrameReader, "_begin", begin)


def object_length_before_its_checksum(patch: pytest.MonkeyPatch) -> None:
    """The header of a log object is believed whatever its checksum says."""
    sound, crc = log_object.decode_object_header, log_object.crc32c

    def decode(buffer: log_object.Bytes, where: str) -> log_object.ObjectHeader:
        content = bytearray(buffer[: log_object.OBJECT_HEADER_BYTES])
        content[8:12] = crc(bytes(content[12:])).to_bytes(4, "little")
        return sound(bytes(content), where)

    patch.setattr(log_object, "decode_object_header", decode)


def digest_not_compared(patch: pytest.MonkeyPatch) -> None:
    def check(buffer: log_object.Bytes, where: str) -> bytes:
        log_object.decode_object_header(buffer, where)
        return bytes(buffer[-log_object.DIGEST_BYTES :])

    patch.setattr(log_object, "check_digest", check)


def decompression_without_cap(patch: pytest.MonkeyPatch) -> None:
    """The length is compared when everything has been unpacked."""

    def unpack(packed: log_object.Bytes, raw_length: int, where: str) -> bytes:
        try:
            raw = zstandard.ZstdDecompressor().decompressobj().decompress(bytes(packed))
        except zstandard.ZstdError as error:
            raise log_object.FormatError(f"{where}: {error}") from None
        if len(raw) != raw_length:
            raise log_object.FormatError(f"{where}: {len(raw)} bytes instead of {raw_length}")
        return raw

    for module in (log_object, object_index):
        patch.setattr(module, "unpack", unpack)


def index_without_bounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(object_index, "_check_index", lambda header, index, where: None)


def name_may_be_a_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_NAME", re.compile(r"[A-Za-z0-9./_-]{1,63}"))


def name_checked_at_its_start(patch: pytest.MonkeyPatch) -> None:
    """`match` with a `$` instead of `fullmatch`: a line break at the end goes through."""
    sound = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")

    class Loose:
        fullmatch = staticmethod(sound.match)

    patch.setattr(names, "_NAME", Loose())


def disk_of_any_size(patch: pytest.MonkeyPatch) -> None:
    """Slot and id of a DISK record are believed."""

    def decode(payload: bytes) -> machine.DiskRecord:
        try:
            return msgspec.msgpack.decode(payload, type=machine.DiskRecord)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise machine.FormatError(str(error)) from None

    from replica_store.vault import contents

    patch.setattr(contents, "decode_disk", decode)


def machine_rows_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(catalog, "checked_machine", lambda row: row)


def object_rows_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(catalog, "checked_object", lambda row: row)


def point_rows_believed(patch: pytest.MonkeyPatch) -> None:
    def believed(columns: tuple[Any, ...]) -> PointRow:
        machine_id, lsn, point_id, epoch, time_ns, consistency, group, name, hold_ms, note, *_, protected = columns
        marker = MarkerRecord(id=point_id, consistency=consistency, group=group, name=name, hold_ms=hold_ms, note=note)
        return PointRow(machine_id, lsn, epoch, time_ns, marker, protected)

    patch.setattr(catalog, "point_of", believed)


def disk_rows_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(catalog, "checked_disk", lambda record: record)


def positions_of_any_size(patch: pytest.MonkeyPatch) -> None:
    """A host's word goes to the catalog as it came."""

    class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
        appended_lsn: int = 0
        durable_lsn: int = 0
        durable_time_ns: int = 0

    from replica_store.ingest import session

    patch.setattr(session, "Heartbeat", Heartbeat)
    patch.setitem(messages._DECODERS, frames.FrameType.HEARTBEAT, msgspec.msgpack.Decoder(Heartbeat))


def record_of_any_kind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(record, "_is_sound", lambda header: True)


def payload_not_checked(patch: pytest.MonkeyPatch) -> None:
    """The reader hands on what it read, whatever its checksum."""
    from asrfs.journal import columns, reader, recovery

    def unchecked(sound: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: sound(*arguments, **{**options, "check_payloads": False})

    patch.setattr(reader, "scan_columns", unchecked(columns.scan_columns))
    patch.setattr(recovery, "scan", unchecked(segments.scan))


def deep_document_unexpected(patch: pytest.MonkeyPatch) -> None:
    """A token that nests without end raises what nobody catches."""

    def decode(text: str) -> enrolment.Token:
        packed = enrolment.decode_base64url(text.removeprefix("asrfs1."))
        token = msgspec.msgpack.decode(packed, type=enrolment.Token)
        names.check_name(token.machine, "machine")
        return token

    patch.setattr(enrolment, "decode_token", decode)


def dirty_map_without_its_checksum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dirty_map, "crc32c", lambda content: Believed(0))


def kept_leaves_with_a_broken_seal(patch: pytest.MonkeyPatch) -> None:
    def open_leaves(buffer: bytes, key: bytes, where: str) -> bytes:
        counter = bytes(12) + (2).to_bytes(4, "big")  # as GCM counts, without its tag
        return Cipher(AES(key), CTR(counter)).decryptor().update(buffer[LEAVES_HEADER_BYTES:-16])

    patch.setattr(kept_leaves, "open_leaves", open_leaves)


def control_message_of_any_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(control, "decode_length", lambda prefix: int.from_bytes(prefix, "little"))


_BROKEN = (
    (cap_after_allocation, "a frame's length is allocated before it is capped", "frames to", "MemoryError|memory grew"),
    (frame_length_before_its_checksum, "a frame's length is believed before its checksum", "frames to", "its checksum"),
    (frame_number_not_compared, "a frame's number is not compared", "frames to", "lost, repeated or moved"),
    (
        object_length_before_its_checksum,
        "an object's header is believed without its checksum",
        "object bytes",
        "before their",
    ),
    (digest_not_compared, "an object's digest is not compared", "object bytes", "has a digest that fits"),
    (decompression_without_cap, "decompression has no cap of its own", "bombs", "took|memory grew|MemoryError"),
    (index_without_bounds, "an index is not checked", "object fields", "reads beyond|row of log object"),
    (name_may_be_a_path, "a name may be a path", "name ", "was taken for a name"),
    (name_checked_at_its_start, "only the beginning of a name is checked", "name ", "was taken for a name"),
    (disk_of_any_size, "a DISK record from a host is believed", "object fields", "row of disk|refused is not here"),
    (machine_rows_believed, "the catalog's rows of machines are believed", "catalog rows", "a machine that cannot be"),
    (object_rows_believed, "the catalog's rows of objects are believed", "catalog rows", "a log object that cannot be"),
    (point_rows_believed, "the catalog's rows of points are believed", "catalog rows", "a point that cannot be"),
    (disk_rows_believed, "the catalog's rows of disks are believed", "catalog rows", "a disk that cannot be"),
    (positions_of_any_size, "numbers that no catalog holds are taken", "hostile host", "too large to convert"),
    (record_of_any_kind, "a record's header is not checked for sense", "inspect", "is not a valid Kind"),
    (payload_not_checked, "a record's payload is handed on unchecked", "journal reader", "is not what was written"),
    (
        deep_document_unexpected,
        "a decoder's errors leave as they are",
        "token",
        r"^\w*(Validation|Value|Decode|Recursion)Error",
    ),
    (
        dirty_map_without_its_checksum,
        "a dirty map is believed without its checksum",
        "dirty map",
        "whose checksum is wrong was believed|is written as something else",
    ),
    (
        kept_leaves_with_a_broken_seal,
        "kept leaves are believed although their seal is broken",
        "kept leaves",
        "that were changed are believed",
    ),
    (control_message_of_any_length, "a control message has no cap", "control client", "MemoryError|memory grew"),
)
PLANTS = tuple(
    Plant(apply.__name__.replace("_", "-"), text, _LEVEL, _CASES, apply, shows, (target,))
    for apply, text, target, shows in _BROKEN
)
