"""A host for the store: makes a history of real log objects, and says over the real protocol what the test wants.

`HostHistory` is the machine's side of the truth: records, and log objects of them sealed for a session. `HostEnd`
speaks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from asrfs.format.log_object import NO_DIGEST, ObjectKeys, derive_keys
from asrfs.format.object_encoder import ObjectEncoder
from asrfs.format.object_index import Index
from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.model.machine import NO_SLOT, DiskRecord, decode_disk, encode_disk
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.protocol.messages import PROTOCOL_VERSION, Hello, Message, ObjectBegin, Refused, Welcome
from asrfs.protocol.session import Event, Session
from asrfs.transport.stream import ByteStream, LinkError
from replica_store.vault.keys import MachineKeys
from tests.fakes.folding import folded

BLOCK = 4096
BEGIN_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class HostRecord:
    kind: Kind
    slot: int
    offset: int
    length: int
    payload: bytes
    time_ns: int


@dataclass(frozen=True)
class BuiltObject:
    begin: ObjectBegin
    pieces: list[bytes]
    digest: bytes

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)


@dataclass
class HostHistory:
    """Records of one machine from LSN 1 on; `seed` decides their bytes."""

    machine_id: str
    keys: MachineKeys
    name: str = "web1"
    epoch: int = 1
    seed: int = 1
    records: list[HostRecord] = field(default_factory=list)
    given_up: list[tuple[int, int]] = field(default_factory=list)
    """First and last LSN of records that are not there any more: a gap object stands for them."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    @property
    def last_lsn(self) -> int:
        return len(self.records)

    def append(self, kind: Kind, slot: int, offset: int, length: int, payload: bytes) -> int:
        """The record's LSN."""
        time_ns = BEGIN_NS + 1_000_000 * len(self.records)
        self.records.append(HostRecord(kind, slot, offset, length, payload, time_ns))
        return len(self.records)

    def disk(self, slot: int = 0, *, size_bytes: int = 1 << 20, gap: bool = False, removed: bool = False) -> int:
        record = DiskRecord(
            slot=slot, id=f"{slot:032x}", name=f"disk{slot}", size_bytes=size_bytes, removed=removed, gap=gap
        )
        return self.append(Kind.DISK, slot, 0, 0, encode_disk(record))

    def write(self, blocks: int = 1, *, slot: int = 0, offset: int | None = None) -> int:
        at = self._rng.randrange(200) * BLOCK if offset is None else offset
        return self.append(Kind.WRITE, slot, at, blocks * BLOCK, self._rng.randbytes(blocks * BLOCK))

    def marker(self, name: str | None = None) -> int:
        point = MarkerRecord(id=f"{self._rng.getrandbits(128):032x}", name=name)
        return self.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(point))

    def unfinished(self, name: str) -> MarkerRecord:
        """The marker of a point of which more is known later, see `last_word`."""
        point = MarkerRecord(
            id=f"{self._rng.getrandbits(128):032x}", consistency="filesystem", name=name, unfinished=True
        )
        self.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(point))
        return point

    def last_word(self, unfinished: MarkerRecord, lsn: int, **said: Any) -> int:
        """What completes the point that `unfinished` made at `lsn`."""
        word = msgspec.structs.replace(unfinished, unfinished=False, completes=lsn, **said)
        return self.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(word))

    def session_keys(self, salt: bytes) -> ObjectKeys:
        machine_id = bytes.fromhex(self.machine_id)
        return derive_keys(self.keys.index_key, self.keys.payload_key, machine_id, self.epoch, salt)

    def build(
        self,
        first_lsn: int,
        last_lsn: int,
        salt: bytes,
        previous_digest: bytes = NO_DIGEST,
        *,
        machine_id: str | None = None,
        epoch: int | None = None,
        is_folded: bool = False,
    ) -> BuiltObject:
        """The log object of these records, sealed for the session with this salt. `is_folded`: as a stretch."""
        records = self.records[first_lsn - 1 : last_lsn]
        lsns = None
        if is_folded:
            kept = folded(first_lsn, records)
            lsns, records = [lsn for lsn, _ in kept], [record for _, record in kept]
        return self._seal(_index(first_lsn, records, lsns), records, salt, previous_digest, machine_id, epoch)

    def build_gap(self, first_lsn: int, last_lsn: int, salt: bytes, previous_digest: bytes = NO_DIGEST) -> BuiltObject:
        """The log object that stands for records that were given up."""
        time_ns = self.records[last_lsn - 1].time_ns
        disks = [msgspec.structs.replace(disk, gap=True) for disk in self.disks_at(last_lsn).values()]
        records = [HostRecord(Kind.DISK, disk.slot, 0, 0, encode_disk(disk), time_ns) for disk in disks]
        return self._seal(_index(first_lsn, records, [last_lsn] * len(disks)), records, salt, previous_digest)

    def next_object(
        self, first_lsn: int, records_max: int, salt: bytes, previous_digest: bytes, rng: random.Random
    ) -> BuiltObject:
        """What goes on from there: the gap object where records were given up, now and then a stretch that ends behind
        the next marker, else some records."""
        for begin, end in self.given_up:
            if begin == first_lsn:
                return self.build_gap(begin, end, salt, previous_digest)
        is_folded = rng.random() < 0.2
        last = min(first_lsn + records_max * (1 + 3 * is_folded) - 1, self.last_lsn)
        last = min([last, *(begin - 1 for begin, _ in self.given_up if begin > first_lsn)])
        markers = [lsn for lsn in range(first_lsn, last) if self.records[lsn - 1].kind == Kind.MARKER]
        if is_folded and markers:
            last = markers[0]
        return self.build(first_lsn, last, salt, previous_digest, is_folded=is_folded)

    def disks_at(self, lsn: int) -> dict[int, DiskRecord]:
        """What the newest DISK record of each slot says."""
        noted = [decode_disk(record.payload) for record in self.records[:lsn] if record.kind == Kind.DISK]
        newest = {disk.slot: disk for disk in noted}
        return {slot: newest[slot] for slot in sorted(newest)}

    def give_up(self, first_lsn: int) -> None:
        """No record from there on will ever be sent."""
        self.given_up.append((first_lsn, self.last_lsn))

    def _seal(
        self,
        index: Index,
        records: list[HostRecord],
        salt: bytes,
        previous_digest: bytes,
        machine_id: str | None = None,
        epoch: int | None = None,
    ) -> BuiltObject:
        digest, content = ObjectEncoder().encode(
            machine_id=bytes.fromhex(machine_id or self.machine_id),
            epoch=self.epoch if epoch is None else epoch,
            session_salt=salt,
            previous_digest=previous_digest,
            index=index,
            payloads=[record.payload for record in records if record.kind in CARRIES_EXTENT_BYTES],
            keys=self.session_keys(salt),
        )
        begin = ObjectBegin(first_lsn=index.first_lsn, last_lsn=index.last_lsn, length=len(content))
        return BuiltObject(begin, [content], digest)

    def hello(self, acknowledged_lsn: int = 0, last_digest: str = "") -> Hello:
        return Hello(
            protocol=PROTOCOL_VERSION,
            machine_id=self.machine_id,
            machine_name=self.name,
            epoch=self.epoch,
            appended_lsn=self.last_lsn,
            durable_lsn=self.last_lsn,
            acknowledged_lsn=acknowledged_lsn,
            last_digest=last_digest,
        )


def _index(first_lsn: int, records: list[HostRecord], lsns: list[int] | None = None) -> Index:
    """`lsns`: of a stretch."""
    positions, at_payload, at_notes, notes = [], 0, 0, []
    for record in records:
        if record.kind in CARRIES_EXTENT_BYTES:
            positions.append(at_payload)
            at_payload += record.length
        else:
            positions.append(at_notes if record.payload else 0)
            at_notes += len(record.payload)
            notes.append(record.payload)
    carries = [record.kind in CARRIES_EXTENT_BYTES for record in records]
    return Index(
        first_lsn=first_lsn,
        time_ns=np.array([record.time_ns for record in records], np.uint64),
        offset=np.array([record.offset for record in records], np.uint64),
        length=np.array([record.length for record in records], np.uint64),
        payload_position=np.array(positions, np.uint64),
        note_length=np.array(
            [0 if has else len(record.payload) for has, record in zip(carries, records, strict=True)], np.uint32
        ),
        kind=np.array([record.kind for record in records], np.uint16),
        slot=np.array([record.slot for record in records], np.uint16),
        notes=b"".join(notes),
        stretch_lsn=None if lsns is None else np.array(lsns, np.uint64),
    )


class HostEnd:
    """The host's end of one connection."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.session = Session("host")
        self._events: list[Event] = []
        self.salt = b""

    async def greet(self, hello: Hello) -> Welcome | Refused:
        await self.say(hello)
        answer = await self.hear()
        if answer is None:
            raise LinkError("the store closed the connection")
        assert isinstance(answer, Welcome | Refused)
        if isinstance(answer, Welcome):
            self.salt = answer.session_salt
        return answer

    async def say(self, message: Message) -> None:
        await self.stream.send_all(self.session.send(message))

    async def ship(self, built: BuiltObject) -> None:
        for buffer in self.session.send_object(built.begin, built.pieces):
            await self.stream.send_all(buffer)

    async def hear(self) -> Event | None:
        """The store's next word; None when it has closed."""
        while not self._events:
            received = await self.stream.receive_some(65536)
            if not received:
                return None
            self._events += self.session.receive(received)
        return self._events.pop(0)

    async def hear_except(self, *ignored: type) -> Event | None:
        """The store's next word that is not of these kinds."""
        while isinstance(event := await self.hear(), ignored):
            pass
        return event
