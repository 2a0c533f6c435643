"""A vault that holds a very long history of one sparse disk, as if its host had shipped it: for reading from, only.

The writes lie at random places of the disk, so that no two make one extent. Their bytes repeat: what they are does not
matter to finding them, and so the history needs no space. Objects are as large as a host makes them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asrfs.format.log_object import NO_DIGEST, SALT_BYTES, ObjectKeys, decode_object_header, derive_keys
from asrfs.format.object_encoder import ObjectEncoder
from asrfs.format.object_index import Index
from asrfs.format.record import Kind
from asrfs.model.machine import DiskRecord, encode_disk
from asrfs.storage.system_clock import SystemClock
from replica_store.vault.contents import entry_of
from replica_store.vault.keys import MachineKeys
from replica_store.vault.rows import MachineRow, log_object_name
from replica_store.vault.vault import Vault

MACHINE, DISK = "web1", "bench"
BLOCK = 4096
OBJECT_RECORDS = 1023
"""With its headers an object of so many 4 KiB writes is just below the 4 MiB that a host makes."""
_SEED = 20261121
_MARK = 0xA5


@dataclass(frozen=True)
class LongHistory:
    """`written[n]`: where the write with LSN n lies, for each n that was asked for."""

    vault: Path
    written: dict[int, int]


def make(root: Path, records: int, size_bytes: int, asked: tuple[int, ...]) -> LongHistory:
    """A vault with `records` writes over a disk of `size_bytes`; its DISK record is LSN 1."""
    rng = np.random.default_rng(_SEED)
    machine_id = os.urandom(16)
    machine_keys = MachineKeys(os.urandom(32), os.urandom(32))
    salt = os.urandom(SALT_BYTES)
    keys = derive_keys(machine_keys.index_key, machine_keys.payload_key, machine_id, 1, salt)
    clock = SystemClock()
    payload = bytes([_MARK]) * (OBJECT_RECORDS * BLOCK)
    written: dict[int, int] = {}
    with Vault.create(str(root), "site-b", clock) as vault:
        sealed = vault.sealer.seal_keys(machine_id.hex(), machine_keys)
        with vault.catalog.transaction():
            vault.catalog.put_machine(MachineRow(machine_id.hex(), MACHINE, 1, "1", False, 0, 1, sealed))
            writer = _Writer(vault, machine_id, salt, keys, clock.time_ns())
            writer.put(_first(size_bytes, writer.time_ns), b"")
            while writer.lsn < records + 1:
                count = min(OBJECT_RECORDS, records + 1 - writer.lsn)
                offsets = rng.integers(0, size_bytes // BLOCK, count, dtype=np.uint64) * np.uint64(BLOCK)
                for lsn in asked:
                    if writer.lsn < lsn <= writer.lsn + count:
                        written[lsn] = int(offsets[lsn - writer.lsn - 1])
                writer.put(_writes(writer.lsn + 1, offsets, writer.time_ns), payload[: count * BLOCK])
    return LongHistory(root, written)


class _Writer:
    """Appends log objects. `lsn`: the last that was put."""

    def __init__(self, vault: Vault, machine_id: bytes, salt: bytes, keys: ObjectKeys, time_ns: int) -> None:
        self.lsn = 0
        self.time_ns = time_ns
        self._vault = vault
        self._machine_id = machine_id
        self._salt = salt
        self._keys = keys
        self._digest = NO_DIGEST

    def put(self, index: Index, payload: bytes) -> None:
        self._digest, content = ObjectEncoder().encode(
            machine_id=self._machine_id,
            epoch=1,
            session_salt=self._salt,
            previous_digest=self._digest,
            index=index,
            payloads=[payload] if payload else [],
            keys=self._keys,
        )
        header = decode_object_header(content, "a log object")
        nonce = f"{header.first_lsn & 0xFFFFFFFF:08x}"
        name = log_object_name(self._machine_id.hex(), 1, header.first_lsn, header.last_lsn, nonce)
        path = Path(self._vault.root, "objects", name)  # not by `objects.put`, which makes each one durable by itself
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
        self._vault.catalog.append([entry_of(header, index, self._digest, nonce, name)])
        self.lsn = header.last_lsn
        self.time_ns = header.last_time_ns + 1


def _first(size_bytes: int, time_ns: int) -> Index:
    note = encode_disk(DiskRecord(slot=0, id="0" * 32, name=DISK, size_bytes=size_bytes))
    return Index(
        first_lsn=1,
        time_ns=np.array([time_ns], np.uint64),
        offset=np.zeros(1, np.uint64),
        length=np.zeros(1, np.uint64),
        payload_position=np.zeros(1, np.uint64),
        note_length=np.array([len(note)], np.uint32),
        kind=np.array([Kind.DISK], np.uint16),
        slot=np.zeros(1, np.uint16),
        notes=note,
    )


def _writes(first_lsn: int, offsets: np.ndarray[tuple[int], np.dtype[np.uint64]], time_ns: int) -> Index:
    count = len(offsets)
    numbers = np.arange(count, dtype=np.uint64)
    return Index(
        first_lsn=first_lsn,
        time_ns=np.uint64(time_ns) + numbers,
        offset=offsets,
        length=np.full(count, BLOCK, np.uint64),
        payload_position=numbers * np.uint64(BLOCK),
        note_length=np.zeros(count, np.uint32),
        kind=np.full(count, Kind.WRITE, np.uint16),
        slot=np.zeros(count, np.uint16),
        notes=b"",
    )
