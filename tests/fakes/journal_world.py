"""A machine's disks on a `CrashStorage`, with a model beside them: what every byte must be at every LSN.

The model is the list of records as they were appended; the disks at LSN n are the initial content plus records 1..n,
computed here with slices and nothing of the code under test. `apply` is the smallest thing that may move records into
images: durable ones only, image synced, position persisted, maps dropped, segments freed, in this order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import msgspec

from asrfs.format.record import (
    CARRIES_EXTENT_BYTES,
    READS_AS_ZEROS,
    RECORD_HEADER_BYTES,
    Kind,
    RecordHeader,
    WriteFrame,
    frame_write,
    payload_crc,
)
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, WriteTogether, rebuild_maps
from asrfs.journal.epochs import EpochJournal
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.spares import prepare_spare, trim
from asrfs.model.machine import NO_SLOT
from asrfs.model.positions import Cursor, Positions
from asrfs.storage.interface import Bytes, read_whole, write_atomically
from tests.fakes.crash_storage import CrashStorage

MACHINE_ID = b"machine-of-tests"
RECORDS_A_SEGMENT = 4
LAYERS_KEPT = 1
"""Sealed segments whose layers stay: so few that tables and their merging come up in most histories."""
SEGMENT_BYTES = SEGMENT_HEADER_BYTES + RECORDS_A_SEGMENT * (RECORD_HEADER_BYTES + 4096) + 512
SECTOR_BYTES = 512
BLOCK_BYTES = 4096


class StepClock:
    """Each look is a millisecond later, and now and then the clock is set back."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000_000_000_000
        self.looks = 0

    def time_ns(self) -> int:
        self.looks += 1
        self.now_ns += -50_000_000 if self.looks % 17 == 0 else 1_000_000
        return self.now_ns

    def monotonic(self) -> float:
        return self.looks / 1000


@dataclass(frozen=True, eq=False)
class ModelRecord:
    """A record as the model keeps it, equal to nothing but itself. `content` is empty for those that read as zeros."""

    kind: int
    slot: int
    offset: int
    length: int
    content: bytes


@dataclass
class Model:
    """What was appended, and what someone was promised: a finished sync, or records given to a reader."""

    initial: tuple[bytes, ...]
    records: list[ModelRecord] = field(default_factory=list)
    promised_lsn: int = 0
    refused: tuple[ModelRecord, ...] = ()
    """Writes that failed last. Nobody was promised one, but all of its bytes may have come to lie where they belong."""
    _known: tuple[tuple[ModelRecord, ...], tuple[bytes, ...]] = ((), ())
    """The disks after these records, which were asked for last."""

    def copy(self) -> Model:
        return Model(self.initial, list(self.records), self.promised_lsn, self.refused, self._known)

    def disks_at(self, lsn: int) -> list[bytearray]:
        """The disks at an LSN, byte for byte (I9)."""
        return [bytearray(content) for content in self._disks_at(lsn)]

    def _disks_at(self, lsn: int) -> tuple[bytes, ...]:
        records = tuple(self.records[:lsn])
        known, content = self._known
        if known == records and content:
            return content
        if not content or known != records[: len(known)]:
            known, content = (), self.initial
        disks = [bytearray(each) for each in content]
        for record in records[len(known) :]:
            put_record(disks, record)
        self._known = records, tuple(map(bytes, disks))
        return self._known[1]

    def assert_image_never_ahead(self, images: Sequence[bytes], lsn: int) -> None:
        """I1: each sector of an image is what it was at some LSN up to `lsn`."""
        newest = self._disks_at(lsn)
        for slot, image in enumerate(images):
            oldest = self.initial[slot]
            for at in range(0, len(image), BLOCK_BYTES):
                block = image[at : at + BLOCK_BYTES]
                if block != newest[slot][at : at + BLOCK_BYTES] and block != oldest[at : at + BLOCK_BYTES]:
                    self._assert_block_never_ahead(slot, at, block, lsn)

    def _assert_block_never_ahead(self, slot: int, at: int, block: bytes, lsn: int) -> None:
        """The same for the sectors of one block, with every state they were in."""
        states = [bytearray(self.initial[slot])]
        for record in self.records[:lsn]:
            if record.slot == slot and record.offset < at + len(block) and at < record.offset + record.length:
                disks = [bytearray()] * slot + [bytearray(states[-1])]
                put_record(disks, record)
                states.append(disks[slot])
        for sector in range(0, len(block), SECTOR_BYTES):
            place = slice(at + sector, at + sector + SECTOR_BYTES)
            assert block[sector : sector + SECTOR_BYTES] in [state[place] for state in states], (
                f"I1: sector {place.start // SECTOR_BYTES} of image {slot} holds bytes of no LSN up to {lsn}"
            )


class _TellingJournal(EpochJournal):
    """Tells the model of a record before the first byte of it is written: from then on a crash may find it."""

    model: Model

    def append_locked(self, kind: int, slot: int, offset: int, length: int, payload: Bytes = b"") -> int:
        records = self.model.records
        records.append(ModelRecord(kind, slot, offset, length, bytes(payload)))
        try:
            position = super().append_locked(kind, slot, offset, length, payload)
        except OSError:
            self.model.refused += (records.pop(),)
            raise
        self.model.refused = ()
        return position

    def append_framed_locked(self, writes: Sequence[tuple[int, int, WriteFrame]]) -> int | None:
        records, before = self.model.records, len(self.model.records)
        for slot, offset, framed in writes:
            content = bytes(framed.payload)
            records.append(ModelRecord(Kind.WRITE, slot, offset, len(content), content))
        position = super().append_framed_locked(writes)
        if position is None:
            self.model.refused += tuple(records[before:])
            del records[before:]
        else:
            self.model.refused = ()
        return position

    def _take_back(self) -> None:
        super()._take_back()
        self.model.refused = ()  # before a byte of the next record is written, and durably


@dataclass(frozen=True)
class Look:
    """A storage as it was after one of its operations, and what had been appended and promised by then."""

    kind: str
    name: str
    storage: CrashStorage
    model: Model


def put_record(disks: list[bytearray], record: ModelRecord) -> None:
    """One record onto the model's disks."""
    end = record.offset + record.length
    if record.kind in READS_AS_ZEROS:
        disks[record.slot][record.offset : end] = bytes(record.length)
    elif record.kind in CARRIES_EXTENT_BYTES:
        disks[record.slot][record.offset : end] = record.content


def load_positions(storage: CrashStorage) -> Positions:
    """What the applier saved last."""
    if not storage.exists("positions.json"):
        return Positions()
    return msgspec.json.decode(read_whole(storage, "positions.json"), type=Positions)


def _is_that(record: ModelRecord, found: RecordHeader) -> bool:
    """Whether the journal's record is this one: several that were refused may be of one extent."""
    is_there = (record.kind, record.slot, record.offset, record.length) == (
        found.kind,
        found.slot,
        found.offset,
        found.length,
    )
    return is_there and (not found.payload_length or payload_crc(record.content) == found.payload_crc)


class JournalWorld:
    """See the module. `model` None begins a new machine with random images, else this is its next start. `lives`: this
    one and those it came from by `restart`, also when one of them failed to start."""

    def __init__(
        self,
        storage: CrashStorage,
        model: Model | None = None,
        *,
        sizes: Sequence[int] = (61_952, 40_960),
        seed: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        steals: bool = False,
        looks: list[Look] | None = None,
        lives: list[JournalWorld] | None = None,
    ) -> None:
        self.storage = storage
        self._is_closed = False
        self.lives = [] if lives is None else lives
        self.lives.append(self)
        self.looks = looks
        self.segment_bytes = segment_bytes
        self.steals = steals
        if model is not None:
            self.model = model
        self.journal_storage = storage.below("journal")
        storage.replaces_nothing_in.add("journal")
        self.image_storage = storage.below("images")
        self.clock = StepClock()
        if model is None:
            model = Model(self._make_images(sizes, random.Random(seed)))
        self.model = model
        if looks is not None:
            storage.after_operation = self._look
        storage.sync_directory("")  # as `StateDirectory.settle` does
        self.positions = load_positions(storage)
        self.recovered: Recovered = recover(
            self.journal_storage, self.positions, MACHINE_ID, segment_bytes=segment_bytes, by_indexes=True
        )
        self._check_end(self.recovered.last_lsn)
        self.model.promised_lsn = self.recovered.last_lsn  # what recovery found counts as durable
        self.journal = _TellingJournal(
            self.journal_storage,
            MACHINE_ID,
            self.recovered,
            self.clock,
            segment_bytes=segment_bytes,
            prepare_ahead=False,  # its thread would make the order of operations another one in each run
        )
        self.journal.model = self.model
        self.maps = maps = {slot: BlockMap() for slot in range(len(model.initial))}
        rebuild_maps(self.recovered, maps, self.journal_storage)
        self.keeper = MapKeeper(
            self.journal, self.journal_storage, maps, self.recovered, ahead=False, layers_kept=LAYERS_KEPT
        )
        self.images = [self.image_storage.open(str(slot), write=True) for slot in maps]
        self.disks = [
            JournaledDisk(slot, len(content), self.images[slot], self.journal, maps[slot])
            for slot, content in enumerate(model.initial)
        ]

    def _look(self, kind: str, name: str) -> None:
        assert self.looks is not None
        self.looks.append(Look(kind, name, self.storage.killed(), self.model.copy()))

    def _make_images(self, sizes: Sequence[int], rng: random.Random) -> tuple[bytes, ...]:
        initial = tuple(rng.randbytes(size) for size in sizes)
        for slot, content in enumerate(initial):
            file = self.image_storage.create(str(slot))
            file.write_at([content], 0)
            file.datasync()
            file.close()
        self.image_storage.sync_directory("")
        return initial

    def _check_end(self, lsn: int) -> None:
        """Recovery found a prefix that holds what was promised (I2, host part of I3). The rest never was."""
        assert lsn >= self.model.promised_lsn, f"I2: LSN {self.model.promised_lsn} was promised, {lsn} was found"
        more = lsn - len(self.model.records)
        if more > 0 and self.model.refused:
            for found in self._read_all(lsn)[-more:]:
                self.model.records += [one for one in self.model.refused if _is_that(one, found)][:1]
        self.model.refused = ()
        assert lsn <= len(self.model.records), f"I9: LSN {lsn} was found, {len(self.model.records)} were appended"
        del self.model.records[lsn:]

    def _read_all(self, lsn: int) -> list[RecordHeader]:
        """Records behind the applied position: an earlier start that failed may have left an index of all of them."""
        headers: list[RecordHeader] = []
        cursor = self.positions.applied
        with closing(JournalReader(self.journal_storage, MACHINE_ID)) as reader:
            while cursor.lsn < lsn:
                batch = reader.read(cursor, lsn, 1 << 20)
                headers += [header for header, _ in batch.records]
                cursor = batch.cursor
        return headers

    # ---- what happens to a machine ----

    def begin_epoch(self, epoch: int, after_lsn: int) -> None:
        """LSNs that are jumped over are records of nothing to the model, which a crash may find from now on."""
        self.sync()
        jumped = after_lsn - len(self.model.records)
        self.model.records += [ModelRecord(0, NO_SLOT, 0, 0, b"") for _ in range(jumped)]
        self.journal.begin_epoch(epoch, after_lsn)
        self.model.promised_lsn = len(self.model.records)

    def write_together(self, writes: Sequence[tuple[int, int, bytes]]) -> bool:
        """`(slot, offset, content)` as a turn of requests: together, or if that cannot be, one by one. Which it was."""
        room = WriteTogether.room
        framed = [frame_write(memoryview(bytearray(b"\xee" * room + content))) for _, _, content in writes]
        turn = [(self.disks[slot], offset, each) for (slot, offset, _), each in zip(writes, framed, strict=True)]
        if WriteTogether(self.journal)(turn):
            return True
        for disk, offset, each in turn:
            disk.write(offset, each.payload)
        return False

    def sync(self) -> None:
        appended = self.journal.appended_lsn
        self.journal.sync()
        assert self.journal.durable_lsn >= appended
        self.model.promised_lsn = max(self.model.promised_lsn, appended)

    def sync_while(self, before: Callable[[], None], behind: Callable[[], None]) -> None:
        """A sync. Something happens inside the first of its datasyncs of a segment, and behind it, before the journal
        knows that it is done."""
        waiting = [before, behind]

        def within(name: str, is_durable: bool) -> None:
            if waiting and name.startswith("journal/") and is_durable is (len(waiting) == 1):
                waiting.pop(0)()

        self.storage.within_datasync = within
        try:
            self.sync()
        finally:
            self.storage.within_datasync = None
        assert not waiting, "nothing was synced"

    def apply(self, *, free: bool = True, spares_max: int = 2) -> None:
        """Move durable records into the images, then drop and free what is whole behind that."""
        until = self.journal.appended_lsn if self.steals else self.journal.durable_lsn
        reader = JournalReader(self.journal_storage, MACHINE_ID)
        cursor = self.positions.applied
        while cursor.lsn < until:
            batch = reader.read(cursor, until, 3 * 4096)
            assert [header.lsn for header, _ in batch.records] == list(range(cursor.lsn + 1, batch.cursor.lsn + 1))
            for header, payload in batch.records:
                told = self.model.records[header.lsn - 1]
                assert (header.kind, header.slot, header.offset, header.length) == (
                    told.kind,
                    told.slot,
                    told.offset,
                    told.length,
                )
                assert payload == told.content
                self._put(told)
            cursor = batch.cursor
        reader.close()
        if not self.steals:
            self.model.promised_lsn = max(self.model.promised_lsn, cursor.lsn)
        for image in self.images:
            image.datasync()
        self._persist(cursor)
        if free:
            # Wholly applied: every segment before the cursor's.
            self.journal.drop_through(cursor.segment - 1, [disk.map for disk in self.disks])
            trim(
                self.journal_storage,
                MACHINE_ID,
                cursor.lsn,
                through_segment=cursor.segment - 1,
                spares_max=spares_max,
                segment_bytes=self.segment_bytes,
            )

    def _put(self, record: ModelRecord) -> None:
        if record.kind in READS_AS_ZEROS:
            self.images[record.slot].punch(record.offset, record.length)
        elif record.kind in CARRIES_EXTENT_BYTES:
            self.images[record.slot].write_at([record.content], record.offset)

    def _persist(self, cursor: Cursor) -> None:
        positions = Positions(applied=cursor, acknowledged=cursor)
        write_atomically(self.storage, "positions.json", msgspec.json.encode(positions))
        self.positions = positions

    def prepare_spare(self) -> None:
        prepare_spare(self.journal_storage, segment_bytes=self.segment_bytes)

    def marker(self) -> None:
        self.journal.append(Kind.MARKER, 0xFFFF, 0, 0, b"a point")
        self.sync()

    def restart(self) -> JournalWorld:
        """SIGKILL and the next start. The model of what was not promised is cut to what the start found."""
        self.close()
        storage = self.storage.killed()
        storage.keep_failing(self.storage)
        return JournalWorld(
            storage,
            self.model.copy(),
            segment_bytes=self.segment_bytes,
            steals=self.steals,
            looks=self.looks,
            lives=self.lives,
        )

    def close(self) -> None:
        """Also one that failed to start. A second time it does nothing: the descriptors may be another's by then."""
        if self._is_closed:
            return
        self._is_closed = True
        if hasattr(self, "journal"):
            self.journal.close()
        for block_map in getattr(self, "maps", {}).values():
            block_map.close()
        for image in getattr(self, "images", ()):
            image.close()

    # ---- what must hold ----

    def content(self, slot: int) -> bytes:
        """The whole disk through its read path."""
        disk = self.disks[slot]
        return bytes(disk.read(0, disk.size_bytes))

    def check(self) -> None:
        """I9 for what is there now, and I1 for the images below."""
        lsn = len(self.model.records)
        assert self.journal.appended_lsn == lsn
        expected = self.model.disks_at(lsn)
        for slot in range(len(self.disks)):
            assert self.content(slot) == expected[slot], f"I9: disk {slot} is not the model at LSN {lsn}"
        images = [image.read_at(image.size(), 0) for image in self.images]
        self.model.assert_image_never_ahead(images, lsn)
