"""The journal between threads: guests on overlapping blocks, an applier that never waits, and a loss of power amid all.

The model is the journal's own order: `ToldJournal` keeps each record as it is appended, under the journal's lock. A
read is right if each of its blocks is what it was at some LSN between the read's begin and its end. A record of a
write must be what the guest asked for, laid over what was there.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from asrfs.format.record import CARRIES_EXTENT_BYTES, READS_AS_ZEROS, RECORD_HEADER_BYTES, Kind, WriteFrame, frame_write
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, WriteTogether, rebuild_maps
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.spares import trim
from asrfs.journal.writer import Journal
from asrfs.model.positions import Positions
from asrfs.storage.interface import Bytes
from tests.fakes.crash_storage import CrashFile, CrashStorage, Fate
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
SIZE = 64 * BLOCK + 512
SEGMENT_BYTES = 40 * BLOCK
STEPS = 1500
GUESTS = 3
MEANWHILE_S_MAX = 0.02
"""So long a datasync waits for somebody to append; nobody may be left who does."""
SWITCH_S = 20e-6

READ_BESIDE_APPEND = "read beside an append"
APPEND_IN_SYNC = "append inside a sync"
POWER_IN_SYNC = "power lost inside a sync"
POWER_TOOK = "power loss that took records"
FREED = "segment freed under readers"
TOGETHER = "writes journaled together"
EVENTS = (READ_BESIDE_APPEND, APPEND_IN_SYNC, POWER_IN_SYNC, POWER_TOOK, FREED, TOGETHER)


@dataclass(frozen=True)
class Version:
    lsn: int
    content: bytes


@dataclass
class RaceModel:
    """What each block was from which LSN on. Changed under the journal's lock only."""

    blocks: list[list[Version]] = field(
        default_factory=lambda: [[Version(0, bytes(min(BLOCK, SIZE - at)))] for at in range(0, SIZE, BLOCK)]
    )
    lsn: int = 0
    asked: threading.local = field(default_factory=threading.local)
    """`extent` and `content` of the request that this thread makes, and `done`: the blocks it has journaled for it."""

    def now(self, offset: int, length: int) -> bytearray:
        """Whole blocks, as they are with every record."""
        numbers = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return bytearray(b"".join(self.blocks[number][-1].content for number in numbers))

    def tell(self, kind: int, offset: int, length: int, payload: bytes) -> None:
        """A record is about to be written."""
        self.lsn += 1
        start, content = self.asked.start, self.asked.content
        wanted = self.now(offset, length)
        if content is not None:
            low, high = max(start, offset), min(start + len(content), offset + length)
            wanted[low - offset : high - offset] = content[low - start : high - start]
        found = bytes(length) if kind in READS_AS_ZEROS else payload
        assert found == wanted, f"record {self.lsn} of kind {kind} at {offset} is not what was asked for"
        for at in range(0, length, BLOCK):
            number = (offset + at) // BLOCK
            self.blocks[number].append(Version(self.lsn, found[at : at + BLOCK]))
            self.asked.done.add(number)

    def cut(self, lsn: int) -> None:
        """Nothing behind this LSN was found."""
        for versions in self.blocks:
            while versions[-1].lsn > lsn:
                versions.pop()
        self.lsn = lsn

    def check_read(self, offset: int, found: bytes, since: int, until: int) -> None:
        """Each block, or share of one, is what it was at some LSN from `since` to `until`."""
        end = offset + len(found)
        for number in range(offset // BLOCK, -(-end // BLOCK)):
            low, high = max(offset, number * BLOCK), min(end, (number + 1) * BLOCK)
            piece = found[low - offset : high - offset]
            for version in reversed(list(self.blocks[number])):
                share = version.content[low - number * BLOCK : high - number * BLOCK]
                if version.lsn <= until and share == piece:
                    break
                assert version.lsn > since, f"I9: block {number} was read as it was at no LSN from {since} to {until}"


class ToldJournal(Journal):
    """Tells the model of a record before its first byte is written. `appended` is set by each."""

    model: RaceModel
    appended: threading.Event

    def append_locked(self, kind: int, slot: int, offset: int, length: int, payload: Bytes = b"") -> int:
        self.model.tell(kind, offset, length, bytes(payload))
        position = super().append_locked(kind, slot, offset, length, payload)
        self.appended.set()
        return position

    def append_framed_locked(self, writes: Sequence[tuple[int, int, WriteFrame]]) -> int | None:
        before = self.model.lsn
        for _, offset, framed in writes:
            content = bytes(framed.payload)
            self.model.asked.start, self.model.asked.content = offset, content
            self.model.tell(Kind.WRITE, offset, len(content), content)
        position = super().append_framed_locked(writes)
        if position is None:
            self.model.cut(before)
        else:
            self.appended.set()
        return position


@dataclass(frozen=True)
class Loss:
    """What a loss of power leaves, and what had been promised by then."""

    storage: CrashStorage
    positions: Positions
    durable_lsn: int
    appended_lsn: int


class Life:
    """One start of the machine, with its threads. `run` ends it; `loss` says how."""

    def __init__(self, storage: CrashStorage, positions: Positions, model: RaceModel, rng: random.Random) -> None:
        self.model = model
        self.positions = positions
        self.events: Counter[str] = Counter()
        self.loss: Loss | None = None
        self._rng = rng
        self._storage = storage
        recovered = recover(storage, positions, MACHINE_ID, segment_bytes=SEGMENT_BYTES, by_indexes=True)
        assert recovered.last_lsn <= model.lsn, "I9: more was found than was appended"
        self.found_lsn = recovered.last_lsn
        model.cut(recovered.last_lsn)
        self.journal = ToldJournal(storage, MACHINE_ID, recovered, StepClock(), segment_bytes=SEGMENT_BYTES)
        self.journal.model = model
        self.journal.appended = threading.Event()
        block_map = BlockMap()
        rebuild_maps(recovered, {0: block_map}, storage)
        self.keeper = MapKeeper(self.journal, storage, {0: block_map}, recovered, layers_kept=1)
        self.disk = JournaledDisk(0, SIZE, storage.open("image"), self.journal, block_map)
        self._errors: list[BaseException] = []
        self._guests_left = GUESTS
        self._ended = threading.Event()
        self._rounds = threading.Semaphore(0)
        self._syncs_until_loss = 0

    def check(self) -> None:
        """Everything reads as the model is."""
        found = bytes(self.disk.read(0, SIZE))
        self.model.check_read(0, found, self.model.lsn, self.model.lsn)

    def run(self, steps: int, fate: Fate | None) -> None:
        """All guests do their steps; with a fate, power is lost inside some sync, and they come to an end."""
        if fate is not None:
            self._syncs_until_loss = self._rng.randint(1, max(2, steps // 10))
        self._storage.within_datasync = lambda name, is_durable: self._within(fate)
        agent = threading.Thread(target=self._guarded, args=(self._apply_for_ever,))
        seeds = [self._rng.getrandbits(64) for _ in range(GUESTS)]
        guests = [
            threading.Thread(target=self._guarded, args=(lambda s=seed: self._be_guest(random.Random(s), steps),))
            for seed in seeds
        ]
        for thread in (agent, *guests):
            thread.start()
        for thread in guests:
            thread.join()
        if fate is not None and self.loss is None:
            self._guarded(self._lose_in_last_sync)
        self._ended.set()
        agent.join()
        self._storage.within_datasync = None
        if self._errors:
            raise self._errors[0]
        self.check()
        self.journal.close()
        self.keeper.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
            self._ended.set()

    # ---- inside a sync ----

    def _lose_in_last_sync(self) -> None:
        """There were fewer syncs than drawn. The thread that syncs may be counting one."""
        while self.loss is None:
            self._syncs_until_loss = 0
            self._ask(0, bytes(BLOCK), lambda: self.disk.write(0, bytes(BLOCK)))
            self.journal.sync()

    def _within(self, fate: Fate | None) -> None:
        """Somebody appends while the journal syncs, if anybody is left. Of images and spares nothing is wanted."""
        if threading.current_thread().name != "journal-sync":
            return
        self.journal.appended.clear()
        if self._guests_left and self.journal.appended.wait(MEANWHILE_S_MAX):
            self.events[APPEND_IN_SYNC] += 1
        self._syncs_until_loss -= 1
        if fate is not None and self.loss is None and self._syncs_until_loss <= 0:
            self._lose(fate)
            self.events[POWER_IN_SYNC] += 1
            self._ended.set()

    def _lose(self, fate: Fate) -> None:
        """The lock keeps file and positions of one moment: images are synced before the one, segments freed after."""
        with self._storage.lock:
            journal = self.journal
            after = self._storage.crash(fate, self._rng)
            self.loss = Loss(after, self.positions, journal.durable_lsn, journal.appended_lsn)

    # ---- guests ----

    def _be_guest(self, rng: random.Random, steps: int) -> None:
        try:
            for number in range(steps):
                if self._ended.is_set():
                    return
                self._step(rng)
                if number % 100 == 99:  # a fast guest does not leave the agent behind
                    while not self._rounds.acquire(timeout=0.1):
                        if self._ended.is_set():
                            return
        finally:
            self._guests_left -= 1

    def _step(self, rng: random.Random) -> None:
        length = rng.choice((1, 1, 2, 8)) * BLOCK
        offset = rng.randrange((SIZE - length) // BLOCK + 1) * BLOCK
        if rng.random() < 0.2:
            length = rng.randint(1, 3 * BLOCK)
            offset = rng.randint(0, SIZE - length)
        what = rng.random()
        if what < 0.15:
            self._ask_together(rng)
        elif what < 0.4:
            content = (rng.randbytes(64) * (length // 64 + 1))[:length]
            self._ask(offset, content, lambda: self.disk.write(offset, content))
        elif what < 0.5:
            clear = self.disk.discard if rng.random() < 0.5 else self.disk.zero
            self._ask(offset, bytes(length), lambda: clear(offset, length))
        elif what < 0.52:
            self._ask(offset, None, lambda: self.disk.fill(offset, length))
        elif what < 0.55:
            asked = self.journal.appended_lsn
            self.journal.sync()
            assert self.journal.durable_lsn >= asked, "I2: a sync was answered and does not cover what came before"
        else:
            since = self.journal.appended_lsn
            found = bytes(self.disk.read(offset, length))
            until = self.journal.appended_lsn
            assert len(found) == length
            self.model.check_read(offset, found, since, until)
            self.events[READ_BESIDE_APPEND] += since < until

    def _ask(self, offset: int, content: bytes | None, request: Callable[[], object]) -> None:
        """`content` None: what is there is to be journaled again."""
        asked = self.model.asked
        asked.start, asked.content, asked.done = offset, content, set()
        request()
        if content is not None:
            blocks = set(range(offset // BLOCK, -(-(offset + len(content)) // BLOCK)))
            assert asked.done == blocks, f"of blocks {sorted(blocks)}, {sorted(asked.done)} were journaled"

    def _ask_together(self, rng: random.Random) -> None:
        """A turn of whole blocks; if it cannot be journaled together, one by one."""
        turn: list[tuple[JournaledDisk, int, memoryview]] = []
        for _ in range(rng.randint(2, 5)):
            content = (rng.randbytes(63) + b"e") * (BLOCK // 64)
            framed = frame_write(memoryview(bytearray(RECORD_HEADER_BYTES) + content))
            turn.append((self.disk, rng.randrange(SIZE // BLOCK) * BLOCK, framed))
        self.model.asked.done = set()
        if WriteTogether(self.journal)(turn):
            self.events[TOGETHER] += 1
            return
        for _, offset, framed in turn:
            content = bytes(framed.payload)
            self._ask(offset, content, partial(self.disk.write, offset, content))

    # ---- the agent ----

    def _apply_for_ever(self) -> None:
        """Applies what is durable, drops and frees it, as fast as it can."""
        reader = JournalReader(self._storage, MACHINE_ID)
        image = self._storage.open("image", write=True)
        while not self._ended.is_set():
            self.journal.sync()
            self._apply(reader, image)
            self._rounds.release(GUESTS)

    def _apply(self, reader: JournalReader, image: CrashFile) -> None:
        until = self.journal.durable_lsn
        cursor = self.positions.applied
        while cursor.lsn < until:
            batch = reader.read(cursor, until, 64 * BLOCK)
            for header, payload in batch.records:
                if header.kind in CARRIES_EXTENT_BYTES:
                    image.write_at([payload], header.offset)
                else:
                    assert header.kind in (Kind.ZERO, Kind.DISCARD)
                    image.punch(header.offset, header.length)
            cursor = batch.cursor
        image.datasync()
        self.positions = Positions(applied=cursor, acknowledged=cursor)
        self.journal.drop_through(cursor.segment - 1, [self.disk.map])
        freed = trim(
            self._storage,
            MACHINE_ID,
            cursor.lsn,
            spares_max=2,
            through_segment=cursor.segment - 1,
            segment_bytes=SEGMENT_BYTES,
        )
        self.events[FREED] += len(freed)


@contextmanager
def quick_switches() -> Iterator[None]:
    """The interpreter changes threads within a request, not after some hundred of them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@quick_switches()
def race(rng: random.Random, steps: int = STEPS, lives: int = 3) -> Counter[str]:
    """Reads stay right while segments are applied, dropped and used again, and what was promised survives each loss
    of power. Returns what happened: `EVENTS`."""
    storage = CrashStorage()
    image = storage.create("image")
    image.truncate(SIZE)
    image.datasync()
    storage.sync_directory("")
    model, positions, promised, appended = RaceModel(), Positions(), 0, 0
    events: Counter[str] = Counter()
    for number in range(lives):
        life = Life(storage, positions, model, rng)
        assert life.found_lsn >= promised, f"I2: LSN {promised} was promised, LSN {life.found_lsn} was found"
        events[POWER_TOOK] += life.found_lsn < appended
        life.check()
        life.run(steps, rng.choice([Fate.LOST, Fate.TORN, Fate.SUBSET]) if number < lives - 1 else None)
        events += life.events
        if life.loss is not None:
            storage, positions = life.loss.storage, life.loss.positions
            promised, appended = life.loss.durable_lsn, life.loss.appended_lsn
    return events
