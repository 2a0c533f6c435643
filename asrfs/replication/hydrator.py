"""Copies what a disk's image lacks from its base, in the order of the disk, until the base is not needed any more.

    base ─▶ memory ─▶ │ still holes? ─▶ hydration.json ─▶ disk server told ─▶ image, datasync │ ─▶ disk server told ─▶ …
                      └─ no span of the applier meanwhile ───────────────────────────────────┘
    nothing missing ─▶ image datasync ─▶ base gone from machine.json ─▶ disk server told ─▶ zeros may be holes again

Only holes are written, so what the applier wrote stays; what reads as zeros stays a hole. A base that is away and a
filesystem that is full are waited for, with an alarm. Whoever dies anywhere leaves a turn in doubt, which the next
agent takes back; see `hydration_file`.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import trio

from asrfs.disk.base_file import BaseFile
from asrfs.disk.overlay import Extent, holes_of, joined
from asrfs.errors import AsrfsError, NoSpaceError, TemporaryError
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.quantities import format_size
from asrfs.replication.alarms import Alarms
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.exact_images import ExactImages
from asrfs.replication.hydration_file import HydrationFile
from asrfs.replication.progress import Progress
from asrfs.storage.interface import File

ALARM = "hydration"
TURN_BYTES = 16 << 20
TURN_EXTENTS_MAX = 2048
PIECE_BYTES = 1 << 20
REST_BYTES = 1 << 30
"""After so many bytes of nothing but zeros it is written down how far this is."""
RETRY_S = 1.0
SPACE_INTERVAL_S = 2.0

State = Literal["waiting", "running", "paused", "space", "base"]
T = TypeVar("T")


class Rules(NamedTuple):
    """Whether it goes on, bytes a second at the most (0 for no limit), bytes that are left free for others."""

    on: bool
    limit: int
    reserve_bytes: int


class BasedImages(Protocol):
    """What the hydrator needs of the images. Calls block and raise OSError."""

    @property
    def hydration(self) -> HydrationFile: ...

    def settle(self) -> None: ...

    def raw(self, slot: int) -> File | None: ...

    def drop(self, slot: int) -> None: ...

    def know_content(self, slot: int, content: list[Extent]) -> None: ...

    def may_punch(self, slot: int) -> None: ...


class Batch(NamedTuple):
    """`(offset, bytes)` of the base that are not zeros, whole blocks; nothing is missing before `end` but these."""

    pieces: list[tuple[int, memoryview]]
    end: int


@dataclass(slots=True)
class Job:
    """A disk with a base. `content`: where the base may have any, in whole blocks; `before`: its bytes before each."""

    disk: DiskConfig
    base: BaseFile
    map: File
    """The image, to look at its holes."""
    content: list[Extent] | None = None
    before: list[int] = field(default_factory=list)
    at: int = 0
    written_down: int = 0
    state: State = "waiting"

    def survey(self) -> None:
        """Raises OSError."""
        size_bytes = self.disk.size_bytes
        whole = (
            (offset - offset % BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size_bytes))
            for offset, end in self.base.content()
        )
        content = joined(whole)
        self.before = list(accumulate((end - offset for offset, end in content), initial=0))
        self.content = content

    def bytes_done(self) -> int:
        if self.content is None:
            return 0
        i = bisect_right(self.content, self.at, key=itemgetter(0))
        return self.before[i] - (max(0, self.content[i - 1][1] - self.at) if i else 0)

    def bytes_total(self) -> int:
        return self.disk.size_bytes if self.content is None else self.before[-1]

    def absent(self) -> Iterator[Extent]:
        """What is not in the image from `at` on. Blocks."""
        assert self.content is not None
        first = max(0, bisect_right(self.content, self.at, key=itemgetter(0)) - 1)
        for i in range(first, len(self.content)):
            offset, end = self.content[i]
            if end > self.at:
                yield from holes_of(self.map, max(offset, self.at), end)

    def read(self, bytes_max: int) -> Batch:
        """The next bytes that may be missing, a few more than `bytes_max`. Blocks; raises OSError."""
        pieces: list[tuple[int, memoryview]] = []
        taken = 0
        for offset, end in self.absent():
            for at in range(offset, end, PIECE_BYTES):
                piece = memoryview(bytearray(min(PIECE_BYTES, end - at)))
                self.base.read_into(piece, at)
                pieces += [(at + start, piece[start:until]) for start, until in runs_with_content(piece)]
                taken += len(piece)
                if taken >= bytes_max or len(pieces) >= TURN_EXTENTS_MAX:
                    return Batch(pieces, at + len(piece))
        return Batch(pieces, self.disk.size_bytes)


def runs_with_content(piece: memoryview) -> list[Extent]:
    """Where a piece has blocks that are not zeros: `(start, end)` in it, adjacent blocks together."""
    whole = len(piece) - len(piece) % BLOCK_BYTES
    blocks = np.frombuffer(piece[:whole], np.uint8).reshape(-1, BLOCK_BYTES).any(axis=1)
    has_content = np.append(blocks, any(piece[whole:]) if whole < len(piece) else False)
    edges = np.flatnonzero(np.diff(has_content.astype(np.int8), prepend=0, append=0)) * BLOCK_BYTES
    return [(start, min(end, len(piece))) for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]


@dataclass(slots=True)
class Hydrator:
    """`machine` reads `machine.json`, `drop_base` takes the base of a slot out of it, `open_map` opens an image to look
    at; these block, `open_base` does not. `is_recovered`: the machine began at a recovery point. `free_bytes`: of the
    images' filesystem.
    """

    server: DiskServer
    progress: Progress
    exact: ExactImages
    images: BasedImages
    alarms: Alarms
    threads: trio.CapacityLimiter
    machine: Callable[[], MachineConfig]
    drop_base: Callable[[int], object]
    open_map: Callable[[DiskConfig], File]
    open_base: Callable[[DiskConfig], BaseFile]
    rules: Callable[[], Rules]
    free_bytes: Callable[[], int]
    is_recovered: bool
    jobs: dict[int, Job] = field(default_factory=dict)
    _reading: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    _not_before: float = 0.0

    async def run(self) -> None:
        """Until no disk has a base."""
        if not self.is_recovered:
            return
        await self._persistently(self.server.reread_disks)
        machine = await self._in_thread(self.machine)
        for disk in machine.disks:
            if disk.base is None:
                self.images.may_punch(disk.slot)
            else:
                opened = await self._in_thread(self.open_map, disk)
                self.jobs[disk.slot] = Job(disk, self.open_base(disk), opened)
        for job in list(self.jobs.values()):
            await self._tended(job, self._survey)
        for job in list(self.jobs.values()):
            job.at = job.written_down = self.images.hydration.through(job.disk.id)
            await self._tended(job, self._hydrate)
            del self.jobs[job.disk.slot]

    def standing(self) -> dict[int, dict[str, Any]]:
        """For status, by slot."""
        return {
            slot: {"bytes_total": job.bytes_total(), "bytes_done": job.bytes_done(), "state": job.state}
            for slot, job in list(self.jobs.items())
        }

    # ---- a disk -------------------------------------------------------------------------------------------------

    async def _tended(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        """`work`, tried again as often as it fails."""
        while True:
            try:
                await work(job)
            except TemporaryError as error:
                if isinstance(error, NoSpaceError):
                    self._say_full(job)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._say_full(job)
                else:
                    job.state = "base"
                    self.alarms.set(ALARM, "critical", f"disk {job.disk.name} cannot be hydrated: {error.strerror}")
            except AsrfsError as error:
                self.alarms.set(ALARM, "critical", f"disk {job.disk.name} cannot be hydrated: {error}")
            else:
                self.alarms.clear(ALARM)
                return
            await trio.sleep(RETRY_S)

    async def _survey(self, job: Job) -> None:
        await trio.to_thread.run_sync(job.survey, limiter=self._reading, abandon_on_cancel=True)
        assert job.content is not None
        self.images.know_content(job.disk.slot, job.content)

    async def _hydrate(self, job: Job) -> None:
        await self._settle(job)
        while job.at < job.disk.size_bytes:
            await self._may_go_on(job)
            job.state = "running"
            started, appended_lsn = trio.current_time(), self.progress.appended_lsn
            limit = self.rules().limit
            bytes_max = min(TURN_BYTES, limit) if limit else TURN_BYTES
            batch = await trio.to_thread.run_sync(job.read, bytes_max, limiter=self._reading, abandon_on_cancel=True)
            if batch.pieces:
                await self._bring(job, batch)
            job.at = batch.end
            if not batch.pieces and job.at - job.written_down >= REST_BYTES:
                await self._settle(job)
            self.alarms.clear(ALARM)
            now = trio.current_time()
            brought = sum(len(piece) for _, piece in batch.pieces)
            self._not_before = max(
                started + brought / limit if limit else now,
                now + (now - started if self.progress.appended_lsn > appended_lsn else 0.0),  # who writes goes first
            )
        await self._end(job)

    async def _bring(self, job: Job, batch: Batch) -> None:
        """A turn."""
        slot = job.disk.slot
        async with self.exact.hydrating():
            pieces = await self._in_thread(self._begin, job, batch)
            turn = self.images.hydration.pending
            if turn is not None:
                await self.server.hydrating(slot, turn.extents, turn.applied_lsn)
                await self._in_thread(self._write, slot, pieces)
        if turn is not None:
            await self._persistently(lambda: self.server.hydrating(slot, (), turn.applied_lsn))
            job.written_down = turn.through

    def _begin(self, job: Job, batch: Batch) -> list[tuple[int, memoryview]]:
        """What of a batch is still missing; from now on that is in doubt. In a thread; no span meanwhile."""
        self.images.settle()
        image = self.images.raw(job.disk.slot)
        assert image is not None, "a disk is not removed before it has everything"
        pieces = [
            (begin, piece[begin - at : end - at])
            for at, piece in batch.pieces
            for begin, end in holes_of(image, at, at + len(piece))
        ]
        extents = joined((at, at + len(piece)) for at, piece in pieces)
        if extents:
            self.images.hydration.begin(job.disk.id, job.at, extents)
        return pieces

    def _write(self, slot: int, pieces: list[tuple[int, memoryview]]) -> None:
        image = self.images.raw(slot)
        assert image is not None
        try:
            for at, piece in pieces:
                image.write_at([piece], at)
            image.datasync()
        except OSError:
            self.images.drop(slot)
            raise
        self.images.hydration.over()

    async def _settle(self, job: Job) -> None:
        """Nothing is in doubt, here, on the disk and in the disk server; and it is written down how far this is."""

        def settle() -> None:
            self.images.settle()
            self.images.hydration.rest(job.disk.id, job.at)

        async with self.exact.hydrating():
            await self._in_thread(settle)
        job.written_down = job.at
        await self._persistently(lambda: self.server.hydrating(job.disk.slot, (), self.progress.applied.lsn))

    async def _end(self, job: Job) -> None:
        """The image has everything: the base is given up."""
        slot = job.disk.slot

        def make_durable() -> None:
            self.images.settle()
            image = self.images.raw(slot)
            assert image is not None
            image.datasync()

        async with self.exact.hydrating():
            await self._in_thread(make_durable)
        await self._in_thread(self.drop_base, slot)
        await self._persistently(self.server.reread_disks)
        self.images.may_punch(slot)
        job.base.close()
        job.map.close()

    # ---- waiting ------------------------------------------------------------------------------------------------

    async def _may_go_on(self, job: Job) -> None:
        if not self.rules().on:
            job.state = "paused"
            await self._settle(job)
            await self.progress.wait_until(lambda: self.rules().on)
        while await self._in_thread(self.free_bytes) < self.rules().reserve_bytes + TURN_BYTES:
            if job.state != "space":
                self._say_full(job)
                await self._settle(job)
            await trio.sleep(SPACE_INTERVAL_S)
        await trio.sleep_until(self._not_before)

    def _say_full(self, job: Job) -> None:
        job.state = "space"
        left = format_size(job.bytes_total() - job.bytes_done())
        self.alarms.set(
            ALARM,
            "warning",
            f"hydration of disk {job.disk.name} waits for space, which is left to writes: up to {left} are to be "
            "copied; make room on the filesystem of the state directory",
        )

    async def _persistently(self, call: Callable[[], Awaitable[object]]) -> None:
        """Until the disk server has answered."""
        while True:
            try:
                await call()
                return
            except TemporaryError:
                await trio.sleep(RETRY_S)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)
