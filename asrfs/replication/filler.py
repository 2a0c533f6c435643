"""Reads what the store lacks into the history: FILL and ZERO records of the chunks in the dirty map.

    for each disk in the map:  run of chunks ─▶ FILL record ─▶ … ─▶ all durable ─▶ taken from the map, saved ─▶ …
        nothing marked any more ─▶ gap False in machine.json ─▶ closing DISK record ─▶ MARKER ─▶ acknowledged
        ─▶ the disk leaves the map, saved

The disk server reads and appends each run as one step, so a write meanwhile is ordered before or after it and the
newest bytes win. A chunk leaves the map only when its record is durable and was not given up since; a kill anywhere
repeats some runs, which changes nothing. The disk's place in the map stays until the closing record is at the store, so
it also says that it is not whole yet. Of an adopted image what has content is marked first: holes are not read, the
store takes what it never heard of for zeros.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import trio

from asrfs.model.dirty_map import TO_COMPARE, Reason
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.pace import Pace
from asrfs.replication.progress import Progress
from asrfs.replication.quota import SetGaps

RUN_BYTES_MAX = 1 << 20
RUNS_PER_SAVE, BYTES_PER_SAVE = 1024, 64 << 20
"""A batch is waited for until it is durable, which takes a moment: so it is large, of many short runs, too."""
RATE_WINDOW_S = 30.0

FindDifferent = Callable[[Sequence[DiskConfig]], Awaitable[Mapping[int, Sequence[int]]]]
"""Compares disks with the store: by slot, the chunks that differ."""


class ImageMap(Protocol):
    """What of an image is looked at."""

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]: ...

    def close(self) -> None: ...


OpenImage = Callable[[DiskConfig], ImageMap]
T = TypeVar("T")


@dataclass(slots=True)
class Filler:
    """`machine` reads `machine.json`, `set_gaps` sets `gap` of disks in it, `open_image` opens; these block.

    `make_point` makes a recovery point that says this of itself: its LSN. Above `lag_bytes_max` nothing is filled.
    `compare` says which chunks of disks may differ from the replica, by slot, and misses none that does; by then it has
    saved what the store has acknowledged. `hurry_durable`: that what is appended is waited for; `hurry_applied` is told
    of an LSN that is. `filled_bytes`: by this process.
    """

    server: DiskServer
    progress: Progress
    dirty: DirtyMapFile
    threads: trio.CapacityLimiter
    machine: Callable[[], MachineConfig]
    set_gaps: SetGaps
    open_image: OpenImage
    make_point: Callable[[str], Awaitable[int]]
    lag_bytes_max: Callable[[], int]
    compare: FindDifferent
    hurry_durable: Callable[[], None]
    hurry_applied: Callable[[int], None] = lambda lsn: None
    filled_bytes: int = 0
    pace: Pace = field(default_factory=lambda: Pace(RATE_WINDOW_S))

    async def prepare(self) -> MachineConfig:
        """Have the map say what is to be filled, and the history that it is missing: the machine as it is then.

        Disks that were removed leave the map; adopted images that are new are looked at.
        """
        machine = await self._in_thread(self.machine)
        live = {disk.slot: disk for disk in machine.live_disks()}
        map = self.dirty.map
        for disk in live.values():
            if (disk.gap and disk.slot not in map) or Reason.UNREAD in map.reasons(disk.slot):
                await self._mark_content(disk)
        async with self.dirty.turn:
            gone = [slot for slot in map.slots() if slot not in live]
            for slot in gone:
                map.forget(slot)
            if gone:
                await self._in_thread(self.dirty.save)
            closed = [slot for slot in map.slots() if not live[slot].gap and not self.is_whole(slot)]
            if closed:
                machine = await self._in_thread(self.set_gaps, closed, True)
                await self.server.reread_disks()
        return machine

    def is_whole(self, slot: int) -> bool:
        """Whether nothing of a disk in the map is marked, and it is known that nothing need be."""
        return not self.dirty.map.dirty_chunks(slot) and not self.dirty.map.reasons(slot) & TO_COMPARE

    async def mark_different(self, chunks: Mapping[int, Sequence[int]]) -> None:
        """Chunks, by slot, that comparing has found to differ. Raises OSError."""
        async with self.dirty.turn:
            for slot, numbers in chunks.items():
                self._mark(slot, numbers)
            await self._in_thread(self.dirty.save)

    def _mark(self, slot: int, chunks: Sequence[int]) -> None:
        if len(chunks):
            self.dirty.map.enter(slot, Reason.DIFFERS)
            offsets = np.array(chunks, np.int64) * CHUNK_BYTES
            self.dirty.map.mark_all(slot, offsets, np.full(len(offsets), CHUNK_BYTES))

    async def find_out(self, disks: Sequence[DiskConfig]) -> None:
        """Mark what differs of disks of which anything may.

        What was given up is in the images before they are read, as no record will bring it, and the store knows of it.
        From then on the map is true of the store as it was when comparing began, and not of one that goes back. Not
        of one that came further meanwhile: of that no start knows before it is saved. Nothing is marked where another
        epoch has begun meanwhile, or the store went back. Raises what comparing fails with, and OSError.
        """
        dirty, epoch, through_lsn = self.dirty, self.progress.epoch, self.dirty.given_up.through.lsn
        self.hurry_applied(through_lsn)
        await self.progress.wait_until(lambda: self.progress.applied.lsn >= through_lsn)
        acknowledged_lsn = self.progress.acknowledged.lsn
        found = await self.compare(disks)
        async with dirty.turn:
            if self.progress.epoch != epoch or self.progress.acknowledged.lsn < acknowledged_lsn:
                return
            for disk in disks:
                self._mark(disk.slot, found.get(disk.slot, ()))
                if disk.slot in dirty.map:
                    dirty.map.settle(disk.slot, TO_COMPARE)
            await self._in_thread(dirty.save, dirty.given_up.known_from(acknowledged_lsn))
        self.progress.wake()

    async def fill(self, disk: DiskConfig, may_go_on: Callable[[], bool]) -> None:
        """Send what is marked of a disk; it may return before that is all."""
        async with self.dirty.turn:
            self.dirty.map.cut(disk.slot, disk.size_bytes)
        while may_go_on():
            batch = await self._in_thread(self._take, disk)
            if not batch or not await self._fill_batch(disk, batch, may_go_on):
                return

    async def close(self, slots: list[int], note: str) -> bool:
        """End the gaps of disks that are whole, with a recovery point; returns when the store has it.

        False: something was given up meanwhile, and nothing is closed.
        """
        map = self.dirty.map
        async with self.dirty.turn:
            if not all(slot in map and self.is_whole(slot) for slot in slots):
                return False
            await self._in_thread(self.set_gaps, slots, False)
            await self.server.reread_disks()
            closing_lsn = (await self.server.positions()).appended_lsn
        lsn = closing_lsn if self._has_others(slots) else await self.make_point(note)
        self.hurry_durable()
        await self.progress.wait_until(
            lambda: self.progress.acknowledged.lsn >= lsn or self.dirty.given_up.through.lsn >= closing_lsn
        )
        async with self.dirty.turn:
            given_up = self.dirty.given_up
            if given_up.through.lsn >= closing_lsn:
                return False
            is_whole = not self._has_others(slots)
            for slot in slots:
                map.forget(slot)
            await self._in_thread(self.dirty.save, given_up.closed(closing_lsn) if is_whole else given_up)
        return True

    def _has_others(self, slots: list[int]) -> bool:
        return any(slot not in slots for slot in self.dirty.map.slots())

    async def _mark_content(self, disk: DiskConfig) -> None:
        """All that an adopted image has content in."""
        extents = await self._in_thread(self._content_of, disk)
        async with self.dirty.turn:
            map = self.dirty.map
            map.enter(disk.slot, Reason.INITIAL)
            for offset, length in extents:
                map.mark(disk.slot, offset, length)
            map.settle(disk.slot, Reason.UNREAD)
            await self._in_thread(self.dirty.save)

    def _content_of(self, disk: DiskConfig) -> list[tuple[int, int]]:
        image = self.open_image(disk)
        try:
            return list(image.data_extents())
        finally:
            image.close()

    def _take(self, disk: DiskConfig) -> list[tuple[int, int]]:
        """The first runs that are marked."""
        taken: list[tuple[int, int]] = []
        room = BYTES_PER_SAVE
        for offset, length in islice(self.dirty.map.runs(disk.slot, RUN_BYTES_MAX), RUNS_PER_SAVE):
            taken.append((offset, min(length, disk.size_bytes - offset)))
            room -= length
            if room <= 0:
                break
        return taken

    async def _fill_batch(self, disk: DiskConfig, batch: list[tuple[int, int]], may_go_on: Callable[[], bool]) -> bool:
        """Whether all of them were filled; what was is taken from the map."""
        progress = self.progress
        filled: list[tuple[int, int, int]] = []

        def may_be_next(length: int) -> bool:
            """What is appended and not durable yet waits, too."""
            waiting = progress.lag_bytes + sum(each[2] for each in filled if each[0] > progress.durable.lsn)
            return not may_go_on() or not waiting or waiting + length <= self.lag_bytes_max()

        for offset, length in batch:
            await progress.wait_until(partial(may_be_next, length))
            if not may_go_on():
                break
            filled.append((await self.server.fill(disk.slot, offset, length), offset, length))
            self.filled_bytes += length
        if filled:
            self.hurry_durable()
            await progress.wait_until(lambda: progress.durable.lsn >= filled[-1][0])
            await self._take_from_map(disk, filled)
        return len(filled) == len(batch)

    async def _take_from_map(self, disk: DiskConfig, filled: list[tuple[int, int, int]]) -> None:
        """`(lsn, offset, length)` of records that are durable. Those that were given up meanwhile are marked again, and
        stay so."""
        async with self.dirty.turn:
            through_lsn = self.dirty.given_up.through.lsn
            for lsn, offset, length in filled:
                if lsn > through_lsn and disk.slot in self.dirty.map:
                    self.dirty.map.clear(disk.slot, offset, length)
                    self.pace.note(length, trio.current_time())
            await self._in_thread(self.dirty.save)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)
