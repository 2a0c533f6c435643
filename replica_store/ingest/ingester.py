"""One machine's writer: from a received log object to an LSN that may be acknowledged. Blocks; runs in a thread.

    checks ─▶ object: written, fsynced, linked, directory fsynced ─▶ catalog: one durable transaction ─▶ acknowledge

The order is I3. Several objects that came together share the transaction, never the checks. When the process dies
in between, objects without a row are left; the next first session takes them in (`vault/adoption.py`) before
anything else is stored, and so does the session after one whose last step is in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asrfs.errors import AsrfsError, FencedError, RefusedError
from asrfs.format.log_object import (
    DIGEST_BYTES,
    NO_DIGEST,
    Bytes,
    ObjectHeader,
    ObjectKeys,
    check_digest,
    decode_object_header,
)
from asrfs.format.object_index import decode_index
from asrfs.model.machine import DiskRecord
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from replica_store.ingest.seeding import complete
from replica_store.vault.adoption import adopt
from replica_store.vault.contents import check_extents, entry_of
from replica_store.vault.protection import check_not_committed
from replica_store.vault.rows import Entry, MachineRow
from replica_store.vault.vault import Vault

Checked = tuple[Entry, Bytes]
"""A log object that may be stored, and all of its bytes."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a machine's history is durable here. `time_ns`: of its last record."""

    epoch: int
    lsn: int
    digest: bytes
    time_ns: int

    @property
    def digest_hex(self) -> str:
        """As the protocol says it: empty before the first object."""
        return "" if self.digest == NO_DIGEST else self.digest.hex()


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch: what may be acknowledged, and what stopped it, if anything did."""

    acknowledged: list[Acknowledge]
    error: AsrfsError | None


class Ingester:
    """Used by one session at a time. `make_nonce` gives the part of an object's name that makes it unique, `now_ns` the
    store's clock, by which it is noted when points came; without it that is not noted."""

    def __init__(
        self, vault: Vault, machine_id: str, make_nonce: Callable[[], str], now_ns: Callable[[], int] | None = None
    ) -> None:
        self._vault = vault
        self._machine_id = machine_id
        self._make_nonce = make_nonce
        self._now_ns = now_ns
        self._salt = b""
        self._settled = False
        self.granted: dict[str, int] = {}
        """Epochs by the orders that this process gave them for."""
        self._position = Position(0, 0, NO_DIGEST, 0)
        self._disks: list[DiskRecord] = []

    @property
    def position(self) -> Position:
        return self._position

    @property
    def live_disks(self) -> tuple[DiskRecord, ...]:
        """Those that the history has at the position, by slot."""
        newest = {record.slot: record for record in self._disks}
        return tuple(newest[slot] for slot in sorted(newest) if not newest[slot].removed)

    def begin_session(self, machine: MachineRow, session_salt: bytes) -> Position:
        """Where the history stands; from now on only objects sealed with this salt are taken."""
        if not self._settled:
            adopt(self._vault, machine)
            machine = self._vault.catalog.machine_by_id(machine.id) or machine
            self._settled = True
        self._salt = session_salt
        last = self._vault.catalog.last_object(machine.id)
        self._disks = [row.record for row in self._vault.catalog.disk_rows(machine.id)]
        if last is None:
            self._position = Position(machine.epoch, 0, NO_DIGEST, 0)
        else:
            self._position = Position(machine.epoch, last.last_lsn, last.digest, last.last_time_ns)
        return self._position

    def take(self, batch: Sequence[ObjectReceived]) -> Taken:
        """Store these, in order, up to the first that cannot be. After an error the session is over."""
        acknowledged: list[Acknowledge] = []
        entries: list[Entry] = []
        error: AsrfsError | None = None
        position = self._position
        for received in batch:
            try:
                checked = self._check(received, position)
                if checked is None:
                    acknowledged.append(self._again(received, position, entries))
                    continue
                entry, content = checked
                self._vault.objects.put(entry.row.name, [content])
            except AsrfsError as failure:
                error = failure
                self._settled = self._settled and not failure.retryable  # it may have been put all the same
                break
            entries.append(entry)
            position = Position(position.epoch, entry.row.last_lsn, entry.row.digest, entry.row.last_time_ns)
            acknowledged.append(Acknowledge(lsn=entry.row.last_lsn, digest=entry.row.digest.hex()))
        if entries:
            try:
                self._catalogue(entries)
            except FencedError as failure:
                self._remove(entries)
                return Taken([], failure)
            except AsrfsError as failure:
                self._settled = False
                return Taken([], failure)
            self._position = position
        return Taken(acknowledged, error)

    def _catalogue(self, entries: Sequence[Entry]) -> None:
        with self._vault.catalog.transaction():
            machine = self._vault.catalog.machine_by_id(self._machine_id)
            if machine is None or machine.epoch != self._position.epoch:
                raise FencedError("the machine was given a new epoch meanwhile: this side can add nothing any more")
            check_not_committed(self._vault.catalog, machine)
            self._vault.catalog.append(entries)
            if self._now_ns is not None:
                points = [point for entry in entries for point in entry.points]
                self._vault.catalog.note_appeared(points, self._now_ns())

    def _remove(self, entries: Sequence[Entry]) -> None:
        """What a superseded side has stored must not look like a history to a rebuild (I6)."""
        for entry in entries:
            self._vault.objects.delete(entry.row.name)

    def _check(self, received: ObjectReceived, position: Position) -> Checked | None:
        """All that must hold before anything is stored, and what is stored. None: it is here already."""
        where = f"log object from machine {self._machine_id}"
        content = received.content
        header = decode_object_header(content, where)
        _check_epoch(header, bytes.fromhex(self._machine_id), position.epoch, where)
        if header.session_salt != self._salt:
            raise ProtocolError(f"{where}: LSN {header.first_lsn} was sealed for another session")
        if header.last_lsn <= position.lsn:
            return None
        if header.first_lsn != position.lsn + 1:
            raise ProtocolError(f"{where}: LSN {header.first_lsn} came where {position.lsn + 1} was due")
        if header.previous_digest != position.digest:
            raise ProtocolError(f"{where}: LSN {header.first_lsn} continues another history than the one that is here")
        if (header.first_lsn, header.last_lsn) != (received.begin.first_lsn, received.begin.last_lsn):
            raise ProtocolError(f"{where}: LSN {header.first_lsn}..{header.last_lsn} was announced as something else")
        keys = self._vault.session_keys(self._machine_id, header.epoch, header.session_salt)
        if received.begin.omitted:
            content = self._complete(received, header, keys, where)
        digest = check_digest(content, where)
        index = decode_index(header, content, keys, where)
        entry = entry_of(header, index, digest, self._make_nonce(), where)
        disks = [*self._disks, *(disk.record for disk in entry.disks)]
        check_extents(index, disks, where)
        self._disks = disks
        return entry, content

    def _complete(self, received: ObjectReceived, header: ObjectHeader, keys: ObjectKeys, where: str) -> memoryview:
        """With what the host left out because a seed has it."""
        index = decode_index(header, received.content, keys, where)
        announced = [disk.record for disk in entry_of(header, index, NO_DIGEST, "", where).disks]
        disks = [*self._disks, *announced]
        return complete(self._vault, self._machine_id, received, header, index, disks, where)

    def _again(self, received: ObjectReceived, position: Position, entries: Sequence[Entry]) -> Acknowledge:
        """An object that lies wholly below the acknowledged LSN: acknowledged once more if it is the same. `entries`:
        of the same batch, which have no row yet."""
        begin, digest = received.begin, received.content[-DIGEST_BYTES:]
        row = next((each.row for each in entries if each.row.first_lsn == begin.first_lsn), None)
        if row is None:
            row = self._vault.catalog.object_with(self._machine_id, begin.first_lsn)
        if row is None or (row.first_lsn, row.last_lsn, row.digest) != (begin.first_lsn, begin.last_lsn, digest):
            raise ProtocolError(
                f"log object of LSN {begin.first_lsn}..{begin.last_lsn} came again with other content: "
                f"LSN {position.lsn} is acknowledged"
            )
        return Acknowledge(lsn=row.last_lsn, digest=digest.hex())


def _check_epoch(header: ObjectHeader, machine_id: bytes, epoch: int, where: str) -> None:
    """Whose it is, and whether that side may still write (I6)."""
    if header.machine_id != machine_id:
        raise ProtocolError(f"{where}: is of machine {header.machine_id.hex()}")
    if header.epoch < epoch:
        raise FencedError(f"{where}: is of epoch {header.epoch}, and the machine is at epoch {epoch}")
    if header.epoch > epoch:
        raise RefusedError(f"{where}: is of epoch {header.epoch}, which this store has not given out")
