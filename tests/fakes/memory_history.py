"""A received history in memory, behind the interface that reading the past needs, and a model beside it.

Records become real sealed log objects, so opening them is the real code. The model is the bytes of every disk after
every record: what an image recovered at that LSN must be (I9).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest import mock

import msgspec
import numpy as np

from asrfs.errors import NotFoundError
from asrfs.format import log_object, object_encoder
from asrfs.format.kept_leaves import derive_leaves_key
from asrfs.format.log_object import FrameTable, ObjectHeader
from asrfs.format.map_checkpoint import derive_map_key
from asrfs.format.object_index import Index, decode_index
from asrfs.format.record import Kind
from asrfs.model.extents import BLOCK_BYTES, widen_to_blocks
from asrfs.model.machine import NO_SLOT, DiskRecord, decode_disk, encode_disk
from asrfs.model.marker import Consistency, MarkerRecord, encode_marker
from tests.fakes.folding import Dirty, folded, up_to_markers
from tests.fakes.memory_leaves import MemoryLeaves
from tests.fakes.memory_maps import MemoryMaps

INDEX_KEY = bytes(range(32))
PAYLOAD_KEY = bytes(range(32, 64))
BEGIN_NS = 1_700_000_000_123_456_789


@dataclass(frozen=True)
class MemoryMachine:
    id: str
    name: str
    epoch: int = 1


@dataclass(frozen=True)
class MemoryObject:
    name: str
    epoch: int
    first_lsn: int
    last_lsn: int
    first_time_ns: int
    last_time_ns: int
    digest: bytes
    is_stretch: bool = False


@dataclass(frozen=True)
class MemoryPoint:
    id: str
    lsn: int
    epoch: int
    time_ns: int
    consistency: Consistency
    group: str | None
    name: str | None
    protected: bool = False


@dataclass(frozen=True)
class _Record:
    time_ns: int
    kind: Kind
    slot: int
    offset: int
    length: int
    payload: bytes


@dataclass(repr=False)
class MemoryHistory:
    """One machine. Records wait until `seal` makes a log object of them; only then are they received."""

    name: str = "web1"
    id: str = "0123456789abcdef0123456789abcdef"
    frame_bytes: int = log_object.FRAME_RAW_BYTES
    epoch: int = 1
    time_ns: int = BEGIN_NS
    lsn: int = 0
    frames_read: int = 0
    indexes_read: int = 0
    hidden_after: int | None = None
    """A store that has not yet received what comes after this LSN."""
    maps: MemoryMaps = field(default_factory=MemoryMaps)
    leaves: MemoryLeaves = field(default_factory=MemoryLeaves)
    model: dict[int, bytearray] = field(default_factory=dict)
    _records: list[_Record] = field(default_factory=list)
    _replayed: tuple[int, dict[int, bytearray]] = field(default_factory=lambda: (0, {}))
    _pending: list[_Record] = field(default_factory=list)
    _rows: list[MemoryObject] = field(default_factory=list)
    _objects: dict[str, bytes] = field(default_factory=dict)
    _disks: list[tuple[int, DiskRecord]] = field(default_factory=list)
    _points: list[MemoryPoint] = field(default_factory=list)
    _dirty: Dirty = field(default_factory=Dirty)
    _digest: bytes = log_object.NO_DIGEST

    # ---- writing ---------------------------------------------------------------------------------------------------

    def disk(self, slot: int, name: str, size_bytes: int, *, removed: bool = False, gap: bool = False) -> int:
        record = DiskRecord(slot=slot, id=f"{slot:032x}", name=name, size_bytes=size_bytes, removed=removed, gap=gap)
        self._disks.append((self.lsn + 1, record))
        return self._append(Kind.DISK, slot, 0, 0, encode_disk(record))

    def write(self, slot: int, offset: int, payload: bytes, kind: Kind = Kind.WRITE) -> int:
        """Whole blocks, as the host makes them."""
        assert (offset, len(payload)) == widen_to_blocks(offset, len(payload), len(self.model[slot]))
        return self._append(kind, slot, offset, len(payload), payload)

    def zero(self, slot: int, offset: int, length: int, kind: Kind = Kind.ZERO) -> int:
        return self._append(kind, slot, offset, length, b"")

    def marker(
        self, name: str | None = None, consistency: Consistency = "crash", group: str | None = None
    ) -> MemoryPoint:
        point_id = f"{self.lsn + 1:032x}"
        return self.mark(MarkerRecord(id=point_id, consistency=consistency, group=group, name=name))

    def mark(self, said: MarkerRecord) -> MemoryPoint:
        lsn = self._append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(said))
        point = MemoryPoint(said.id, lsn, self.epoch, self.time_ns, said.consistency, said.group, said.name)
        self._points.append(point)
        return point

    def begin_epoch(self, time_ns: int) -> None:
        """A new epoch, from a host whose clock shows `time_ns`."""
        self.seal()
        self.epoch += 1
        self.time_ns = time_ns

    def seal(self) -> None:
        """Cut a log object of what waits."""
        if self._pending:
            first, self._pending, records = self.lsn - len(self._pending) + 1, [], self._pending
            self._put(records, first, None)

    def seal_folded(self) -> None:
        """Cut stretches of what waits, one up to each marker, without what is overwritten in them."""
        first, self._pending, records = self.lsn - len(self._pending) + 1, [], self._pending
        for first_lsn, part in up_to_markers(first, records):
            kept = folded(first_lsn, part)
            self._put([record for _, record in kept], first_lsn, [lsn for lsn, _ in kept])

    def give_up(self) -> None:
        """What waits is never sent: a gap object stands for it, of which `heal` sends the content."""
        if not self._pending:
            return
        first, self._pending, records = self.lsn - len(self._pending) + 1, [], self._pending
        before = {disk.slot: disk.size_bytes for disk in self.disks_at(self.id, first - 1) if not disk.removed}
        present = [msgspec.structs.replace(disk, gap=True) for disk in self.disks_at(self.id, self.lsn)]
        self._dirty.give_up(records, before)
        self._points = [point for point in self._points if point.lsn < first]
        self._disks = [row for row in self._disks if row[0] < first] + [(self.lsn, disk) for disk in present]
        notes = [_Record(self.time_ns, Kind.DISK, disk.slot, 0, 0, encode_disk(disk)) for disk in present]
        self._put(notes, first, [self.lsn] * len(notes))

    def heal(self) -> None:
        """Send what was given up as FILL records, and close the gap of every disk."""
        for disk in self.disks_at(self.id, self.lsn):
            if disk.gap and not disk.removed:
                for offset, length in self._dirty.take(disk.slot, disk.size_bytes):
                    self.write(disk.slot, offset, bytes(self.model[disk.slot][offset : offset + length]), Kind.FILL)
                self.disk(disk.slot, disk.name, disk.size_bytes)

    def has_gap(self, slot: int) -> bool:
        return any(disk.gap for disk in self.disks_at(self.id, self.lsn) if disk.slot == slot)

    def _put(self, records: Sequence[_Record], first: int, lsns: Sequence[int] | None) -> None:
        last = lsns[-1] if lsns is not None else first + len(records) - 1
        with mock.patch.object(object_encoder, "FRAME_RAW_BYTES", self.frame_bytes):
            self._digest, content = object_encoder.ObjectEncoder().encode(
                machine_id=bytes.fromhex(self.id),
                epoch=self.epoch,
                session_salt=bytes(32),
                previous_digest=self._digest,
                index=_index_of(first, records, lsns),
                payloads=[record.payload for record in records if record.kind in (Kind.WRITE, Kind.FILL)],
                keys=self._keys(self.epoch),
            )
        times = records[0].time_ns, records[-1].time_ns
        row = MemoryObject(f"{first:016x}", self.epoch, first, last, *times, self._digest, lsns is not None)
        self._rows.append(row)
        self._objects[row.name] = bytes(content)

    def stored(self, row: MemoryObject) -> bytes:
        """The whole log object as it is kept."""
        return self._objects[row.name]

    def damage(self, row: MemoryObject, at: int) -> None:
        """Flip a bit in a stored object."""
        stored = bytearray(self._objects[row.name])
        stored[at] ^= 1
        self._objects[row.name] = bytes(stored)

    def state_at(self, lsn: int) -> dict[int, bytes]:
        """The model: content of every live disk by slot. Remembers where it stood, so it is one thread's at a time."""
        at, state = self._replayed
        if lsn < at:
            at, state = 0, {}
        for record in self._records[at:lsn]:
            _apply(state, record)
        self._replayed = lsn, state
        return {slot: bytes(content) for slot, content in sorted(state.items())}

    def time_at(self, lsn: int) -> int:
        return self._records[lsn - 1].time_ns

    # ---- reading, as of a vault ------------------------------------------------------------------------------------

    def machine(self, name: str) -> MemoryMachine:
        if name != self.name:
            raise NotFoundError(f"no machine {name!r}")
        return MemoryMachine(self.id, self.name)

    def machines(self) -> list[MemoryMachine]:
        return [MemoryMachine(self.id, self.name)]

    def objects_of(self, machine_id: str, up_to_lsn: int, after_lsn: int = 0) -> Sequence[MemoryObject]:
        last = min(up_to_lsn, self.received_lsn(machine_id))
        return [row for row in self._rows if row.first_lsn <= last and row.last_lsn > after_lsn]

    def object_with(self, machine_id: str, lsn: int) -> MemoryObject | None:
        rows = self.objects_of(machine_id, lsn, lsn - 1)
        return rows[0] if rows else None

    def object_index(self, row: MemoryObject) -> tuple[ObjectHeader, Index]:
        self.indexes_read += 1
        header, index, _ = self.object_head(row)
        return header, index

    def map_key(self, machine_id: str, salt: bytes) -> bytes:
        return derive_map_key(INDEX_KEY, bytes.fromhex(machine_id), salt)

    def leaves_key(self, machine_id: str, salt: bytes) -> bytes:
        return derive_leaves_key(PAYLOAD_KEY, bytes.fromhex(machine_id), salt)

    def object_head(self, row: MemoryObject) -> tuple[ObjectHeader, Index, FrameTable]:
        stored = self._objects[row.name]
        header = log_object.decode_object_header(stored, row.name)
        index = decode_index(header, stored, self._keys(row.epoch), row.name)
        return header, index, FrameTable(header, stored, row.name)

    def read_frame(self, row: MemoryObject, header: ObjectHeader, table: FrameTable, i: int) -> bytes:
        self.frames_read += 1
        at, length = table.extent(i)
        return table.open_frame(i, self._objects[row.name][at : at + length], self._keys(row.epoch).payload)

    def disks_at(self, machine_id: str, lsn: int) -> list[DiskRecord]:
        newest = {record.slot: record for at, record in self._disks if at <= lsn}
        return [newest[slot] for slot in sorted(newest)]

    def points(self, machine_id: str) -> list[MemoryPoint]:
        received = self.received_lsn(machine_id)
        return [point for point in self._points if point.lsn <= received and not self.gap_at(machine_id, point.lsn)]

    def tail(self, machine_id: str, label: str) -> None:
        return None

    def tail_points(self, machine_id: str) -> list[MemoryPoint]:
        return []

    def received_lsn(self, machine_id: str) -> int:
        sealed = self._rows[-1].last_lsn if self._rows else 0
        return sealed if self.hidden_after is None else min(sealed, self.hidden_after)

    def gap_at(self, machine_id: str, lsn: int) -> str | None:
        disks = [disk for disk in self.disks_at(machine_id, lsn) if disk.gap and not disk.removed]
        return f"first copy of disk {disks[0].name}" if disks else None

    def nearest(self, lsn: int) -> list[int]:
        """The LSNs around one that have a state, or that one."""
        row = self.object_with(self.id, lsn)
        assert row is not None
        if lsn == row.last_lsn or not row.is_stretch:
            return [lsn]
        return [each for each in (row.first_lsn - 1, row.last_lsn) if each]

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _append(self, kind: Kind, slot: int, offset: int, length: int, payload: bytes) -> int:
        self.lsn += 1
        self.time_ns += 1000
        self._pending.append(_Record(self.time_ns, kind, slot, offset, length, payload))
        _apply(self.model, self._pending[-1])
        self._records.append(self._pending[-1])
        return self.lsn

    def _keys(self, epoch: int) -> log_object.ObjectKeys:
        return log_object.derive_keys(INDEX_KEY, PAYLOAD_KEY, bytes.fromhex(self.id), epoch, bytes(32))


def random_history(seed: int, *, records: int, disks: dict[str, int], frame_bytes: int = 8192) -> MemoryHistory:
    """Random extents written (some blocks with zeros), zeroed and discarded; a marker now and then."""
    rng = random.Random(seed)
    history = MemoryHistory(frame_bytes=frame_bytes)
    for slot, (name, size_bytes) in enumerate(disks.items()):
        history.disk(slot, name, size_bytes)
    sizes = list(disks.values())
    for _ in range(records):
        slot = rng.randrange(len(sizes))
        offset, length = random_extent(rng, sizes[slot])
        chance = rng.random()
        if chance < 0.75:
            content = [rng.randbytes(BLOCK_BYTES) if rng.random() < 0.8 else bytes(BLOCK_BYTES) for _ in range(8)]
            history.write(slot, offset, b"".join(content)[:length])
        elif chance < 0.95:
            history.zero(slot, offset, length, rng.choice((Kind.ZERO, Kind.DISCARD)))
        else:
            history.marker(name=f"m{rng.randrange(5)}")
        if rng.random() < 0.1:
            history.seal()
    history.seal()
    return history


def random_extent(rng: random.Random, size_bytes: int) -> tuple[int, int]:
    """Whole blocks somewhere on a disk."""
    blocks = -(-size_bytes // BLOCK_BYTES)
    first = rng.randrange(blocks)
    count = rng.randint(1, min(8, blocks - first))
    return widen_to_blocks(first * BLOCK_BYTES, min(count * BLOCK_BYTES, size_bytes - first * BLOCK_BYTES), size_bytes)


def _apply(state: dict[int, bytearray], record: _Record) -> None:
    """What a record does to the disks: the model in one place."""
    if record.kind == Kind.DISK:
        disk = decode_disk(record.payload)
        content = state.pop(disk.slot, bytearray())
        if not disk.removed:
            state[disk.slot] = content[: disk.size_bytes].ljust(disk.size_bytes, b"\0")
    elif record.kind != Kind.MARKER:
        end = record.offset + record.length
        state[record.slot][record.offset : end] = record.payload or bytes(record.length)


def _index_of(first_lsn: int, records: Sequence[_Record], lsns: Sequence[int] | None = None) -> Index:
    """`lsns`: of a stretch."""
    is_note = [record.kind in (Kind.MARKER, Kind.DISK) for record in records]
    positions, places = [], {True: 0, False: 0}
    for note, record in zip(is_note, records, strict=True):
        positions.append(places[note] if record.payload else 0)
        places[note] += len(record.payload)
    return Index(
        first_lsn=first_lsn,
        time_ns=np.array([record.time_ns for record in records], np.uint64),
        offset=np.array([record.offset for record in records], np.uint64),
        length=np.array([record.length for record in records], np.uint64),
        payload_position=np.array(positions, np.uint64),
        note_length=np.array([len(r.payload) if n else 0 for n, r in zip(is_note, records, strict=True)], np.uint32),
        kind=np.array([record.kind for record in records], np.uint16),
        slot=np.array([record.slot for record in records], np.uint16),
        notes=b"".join(record.payload for note, record in zip(is_note, records, strict=True) if note),
        stretch_lsn=None if lsns is None else np.array(lsns, np.uint64),
    )
