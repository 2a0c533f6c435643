"""A journaled disk beside a bytearray: rules of a state machine that compares every byte after every step."""

from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asrfs.errors import BadInputError
from asrfs.format.record import RECORD_HEADER_BYTES
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.journal_world import JournalWorld

BLOCK = 4096
SIZES = (15 * BLOCK + 512, 10 * BLOCK)
# Room for the longest request here, widened to whole blocks.
SEGMENT_BYTES = SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES + 5 * BLOCK + 512
SLOTS = st.integers(0, 1)
WHERE = st.floats(0, 1, exclude_max=True)
POWER_TOOK = "power loss that took a disk's records"
KILLED_UNSYNCED = "killed with records that were not synced"
REFUSED = "request past the end refused"
TOGETHER = "writes of a turn journaled together"
EVENTS = (POWER_TOOK, KILLED_UNSYNCED, REFUSED, TOGETHER)
LENGTHS = st.one_of(st.sampled_from([1, 512, BLOCK, 2 * BLOCK]), st.integers(1, 4 * BLOCK))


class DiskAgainstBytes(RuleBasedStateMachine):
    """`disks` is what must be read. `events` counts what happened in all histories of this process."""

    events: ClassVar[Counter[str]] = Counter()

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = JournalWorld(CrashStorage(), sizes=SIZES, seed=seed, segment_bytes=SEGMENT_BYTES)
        self.disks = [bytearray(content) for content in self.world.model.initial]

    def _extent(self, slot: int, where: float, length: int, aligned: bool) -> tuple[int, int]:
        size = SIZES[slot]
        length = min(length, size)
        offset = int(where * (size - length + 1))
        if aligned:
            offset -= offset % BLOCK
            length = min(-(-length // BLOCK) * BLOCK, size - offset)
        return offset, length

    @rule(
        slot=SLOTS, where=WHERE, length=LENGTHS, aligned=st.booleans(), fill=st.sampled_from(["random", "zero", "edge"])
    )
    def write(self, slot: int, where: float, length: int, aligned: bool, fill: str) -> None:
        offset, length = self._extent(slot, where, length, aligned)
        content = bytearray(length) if fill != "random" else bytearray(self.rng.randbytes(length))
        if fill == "edge":
            content[length // 2] = 1
        self.world.disks[slot].write(offset, memoryview(content))
        self.disks[slot][offset : offset + length] = content
        content[:] = b"\xee" * length  # the buffer is used again after the call

    @rule(places=st.lists(st.tuples(SLOTS, WHERE), min_size=2, max_size=4), zeros=st.booleans())
    def write_together(self, places: list[tuple[int, float]], zeros: bool) -> None:
        writes: list[tuple[int, int, bytes]] = []
        for slot, where in places:
            offset, length = self._extent(slot, where, BLOCK, True)
            content = bytes(length) if zeros and not writes else self.rng.randbytes(length)
            writes.append((slot, offset, content))
            self.disks[slot][offset : offset + length] = content
        self.events[TOGETHER] += self.world.write_together(writes)

    @rule(slot=SLOTS, where=WHERE, length=LENGTHS, aligned=st.booleans(), discard=st.booleans())
    def clear(self, slot: int, where: float, length: int, aligned: bool, discard: bool) -> None:
        offset, length = self._extent(slot, where, length, aligned)
        disk = self.world.disks[slot]
        (disk.discard if discard else disk.zero)(offset, length)
        self.disks[slot][offset : offset + length] = bytes(length)

    @rule(slot=SLOTS)
    def clear_all(self, slot: int) -> None:
        self.world.disks[slot].discard(0, SIZES[slot])
        self.disks[slot][:] = bytes(SIZES[slot])

    @rule(slot=SLOTS, where=WHERE, length=LENGTHS)
    def fill(self, slot: int, where: float, length: int) -> None:
        before = self.world.journal.appended_lsn
        lsn = self.world.disks[slot].fill(*self._extent(slot, where, length, False))
        assert lsn == self.world.journal.appended_lsn == before + 1

    @rule(slot=SLOTS, where=WHERE, length=LENGTHS)
    def read(self, slot: int, where: float, length: int) -> None:
        offset, length = self._extent(slot, where, length, False)
        found = bytes(self.world.disks[slot].read(offset, length))
        assert found == self.disks[slot][offset : offset + length]

    @rule(slot=SLOTS, over=st.integers(1, 3 * BLOCK), length=LENGTHS)
    def past_the_end(self, slot: int, over: int, length: int) -> None:
        disk = self.world.disks[slot]
        appended = self.world.journal.appended_lsn
        offset = SIZES[slot] + over - length
        assume(offset >= 0)
        for refused in (
            lambda: disk.write(offset, bytes(length)),
            lambda: disk.zero(offset, length),
            lambda: disk.discard(offset, length),
            lambda: disk.fill(offset, length),
            lambda: disk.read(offset, length),
            lambda: disk.write(-BLOCK, bytes(BLOCK)),
        ):
            with pytest.raises(BadInputError):
                refused()
        assert self.world.journal.appended_lsn == appended
        self.events[REFUSED] += 1

    @rule()
    def sync(self) -> None:
        self.world.sync()

    @rule(free=st.booleans(), spares_max=st.integers(0, 2))
    def apply(self, free: bool, spares_max: int) -> None:
        self.world.apply(free=free, spares_max=spares_max)

    @rule()
    def prepare_spare(self) -> None:
        self.world.prepare_spare()

    @rule()
    def restart(self) -> None:
        self.events[KILLED_UNSYNCED] += self.world.journal.durable_lsn < self.world.journal.appended_lsn
        self.world = self.world.restart()

    @rule(fate=st.sampled_from(list(Fate)), seed=st.integers(0, 1 << 16))
    def lose_power(self, fate: Fate, seed: int) -> None:
        self.world.close()
        appended = self.world.journal.appended_lsn
        storage = self.world.storage.crash(fate, random.Random(seed))
        self.world = JournalWorld(storage, self.world.model, segment_bytes=SEGMENT_BYTES)
        self.disks = self.world.model.disks_at(len(self.world.model.records))
        self.events[POWER_TOOK] += self.world.recovered.last_lsn < appended

    @invariant()
    def every_byte(self) -> None:
        if hasattr(self, "world"):
            for slot in range(2):
                assert self.world.content(slot) == self.disks[slot]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
