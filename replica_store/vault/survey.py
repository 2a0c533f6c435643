"""What log objects say of themselves, read without the catalog: for rebuild and after a crash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from asrfs.errors import AsrfsError, IntegrityError
from asrfs.format.log_object import (
    DIGEST_BYTES,
    NO_DIGEST,
    ObjectKeys,
    decode_object_header,
    derive_keys,
)
from asrfs.format.object_index import decode_index
from replica_store.vault.chain import Found, best_chain
from replica_store.vault.contents import entry_of
from replica_store.vault.keys import MachineKeys
from replica_store.vault.objects import Objects
from replica_store.vault.rows import Entry, LogName, ObjectRow, log_prefix, parse_log_name

_HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A log object that could be read, and the digest it names as the one before it."""

    entry: Entry
    previous_digest: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A log object that could not, by what its name says."""

    name: LogName
    where: str
    text: str


def survey(
    objects: Objects, machine_id: str, keys: MachineKeys, names: Iterable[str]
) -> Iterator[Surveyed | Unreadable]:
    """Read heads and digests of these log objects. Payload is not looked at."""
    for name in names:
        parsed = parse_log_name(name)
        if parsed is None or parsed.machine_id != machine_id:
            continue
        try:
            yield _read(objects, name, parsed, keys)
        except AsrfsError as error:
            if error.retryable:
                raise
            yield Unreadable(parsed, objects.where(name), str(error))


def log_names(objects: Objects, machine_id: str, after_lsn: int = 0) -> list[str]:
    """Names of a machine's log objects that hold anything beyond `after_lsn`."""
    found = []
    for name in objects.list(log_prefix(machine_id)):
        parsed = parse_log_name(name)
        if parsed is not None and parsed.last_lsn > after_lsn:
            found.append(name)
    return sorted(found)


def chain_of(surveyed: Iterable[Surveyed], last: ObjectRow | None) -> list[Entry]:
    """Those that make up the history after `last`."""
    by_digest = {each.entry.row.digest: each.entry for each in surveyed}
    found = [Found(each.entry.row, each.previous_digest) for each in surveyed]
    chain = best_chain(found, last.last_lsn if last else 0, last.digest if last else NO_DIGEST)
    return [by_digest[link.digest] for link in chain]


def _read(objects: Objects, name: str, parsed: LogName, keys: MachineKeys) -> Surveyed:
    where = objects.where(name)
    head = objects.read_range(name, 0, _HEAD_BYTES)
    header = decode_object_header(head, where)
    said = (header.machine_id.hex(), header.epoch, header.first_lsn, header.last_lsn)
    if said != (parsed.machine_id, parsed.epoch, parsed.first_lsn, parsed.last_lsn):
        raise IntegrityError(f"{where}: holds LSN {header.first_lsn}..{header.last_lsn} of {said[0]}, not what it says")
    if header.frames_offset > len(head):
        head = objects.read_range(name, 0, header.frames_offset)
    index = decode_index(header, head, _session_keys(keys, header.machine_id, header.epoch, header.session_salt), where)
    digest = objects.read_range(name, header.object_length - DIGEST_BYTES, DIGEST_BYTES + 1)
    if len(digest) != DIGEST_BYTES:
        raise IntegrityError(f"{where}: log object of LSN {header.first_lsn}..{header.last_lsn} has the wrong length")
    return Surveyed(entry_of(header, index, digest, parsed.nonce, where), header.previous_digest)


def _session_keys(keys: MachineKeys, machine_id: bytes, epoch: int, salt: bytes) -> ObjectKeys:
    return derive_keys(keys.index_key, keys.payload_key, machine_id, epoch, salt)
