"""The journal between the threads of disk server and agent: a disk, a model of it, and an applier that never waits."""

from __future__ import annotations

import random
import threading

from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, drop_applied, rebuild_maps
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.spares import trim
from asrfs.journal.writer import Journal
from asrfs.model.positions import Positions
from tests.fakes.crash_storage import CrashFile, CrashStorage, Fate
from tests.fakes.journal_world import MACHINE_ID, ModelRecord, StepClock, put_record

BLOCK = 4096
SIZE = 256 * BLOCK
SEGMENT_BYTES = 40 * BLOCK
STEPS = 1500


class Agent:
    """Applies what is durable, drops and frees it, in a thread, as fast as it can. `stop` raises what went wrong."""

    def __init__(self, storage: CrashStorage, journal: Journal, disk: JournaledDisk, positions: Positions) -> None:
        self.positions = positions
        self.error: BaseException | None = None
        self._storage, self._journal, self._disk = storage, journal, disk
        self._stop = threading.Event()
        self._rounds = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> Positions:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.positions

    def wait_for_rounds(self, count: int) -> None:
        """So many more rounds of it have ended: it is not left behind by a fast writer."""
        for _ in range(count):
            assert self._rounds.acquire(timeout=60), f"the agent ended: {self.error!r}"

    def _run(self) -> None:
        reader = JournalReader(self._storage, MACHINE_ID)
        image = self._storage.open("image", write=True)
        try:
            while not self._stop.is_set():
                self._journal.sync()
                self._apply(reader, image)
                self._rounds.release()
        except BaseException as error:
            self.error = error

    def _apply(self, reader: JournalReader, image: CrashFile) -> None:
        until = self._journal.durable_lsn
        cursor = self.positions.applied
        while cursor.lsn < until:
            batch = reader.read(cursor, until, 64 * BLOCK)
            for header, payload in batch.records:
                if header.payload_length:
                    image.write_at([payload], header.offset)
                else:
                    image.punch(header.offset, header.length)
            cursor = batch.cursor
        image.datasync()
        self.positions = Positions(applied=cursor, acknowledged=cursor)
        drop_applied(self._journal, [self._disk], cursor.segment - 1)
        trim(
            self._storage,
            MACHINE_ID,
            cursor.lsn,
            spares_max=2,
            through_segment=cursor.segment - 1,
            segment_bytes=SEGMENT_BYTES,
        )


def race(rng: random.Random, steps: int = STEPS, lives: int = 3) -> None:
    """Reads stay right while segments are applied, dropped and used again, and after each loss of power."""
    storage = CrashStorage()
    storage.create("image").truncate(SIZE)
    expected = [bytearray(SIZE)]
    positions = Positions()
    for _ in range(lives):
        recovered = recover(storage, positions, MACHINE_ID, segment_bytes=SEGMENT_BYTES)
        journal = Journal(storage, MACHINE_ID, recovered, StepClock(), segment_bytes=SEGMENT_BYTES)
        block_map = BlockMap()
        rebuild_maps(recovered, {0: block_map})
        disk = JournaledDisk(0, SIZE, storage.open("image"), journal, block_map)
        agent = Agent(storage, journal, disk, positions)
        for number in range(steps):
            step(disk, expected, rng)
            if number % 100 == 99:
                agent.wait_for_rounds(1)
        positions = agent.stop()
        assert b"".join(bytes(piece) for piece in disk.read(0, SIZE)) == expected[0]
        assert positions.applied.segment > steps // 300
        journal.sync()
        journal.close()
        storage = storage.crash(rng.choice([Fate.LOST, Fate.TORN]), rng)


def step(disk: JournaledDisk, expected: list[bytearray], rng: random.Random) -> None:
    length = rng.choice([1, 1, 2, 8]) * BLOCK
    offset = rng.randrange((SIZE - length) // BLOCK + 1) * BLOCK
    what = rng.random()
    if what < 0.5:
        content = rng.randbytes(64) * (length // 64)
        disk.write(offset, content)
        put_record(expected, ModelRecord(1, 0, offset, length, content))
    elif what < 0.55:
        disk.discard(offset, length)
        put_record(expected, ModelRecord(3, 0, offset, length, b""))
    elif what < 0.57:
        disk.fill(offset, length)
    else:
        found = b"".join(bytes(piece) for piece in disk.read(offset, length))
        assert found == expected[0][offset : offset + length]
