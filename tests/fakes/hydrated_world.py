"""A machine on a `JournalWorld` whose disks have bases: the real overlay, applier and hydrator on a storage that loses
power, with the model of every byte beside them.

What a disk server knows beside its journal (`BasedImage`, what is in doubt) and what the agent does are put together
here as the daemons do it; a step of the hydrator is a turn of its own task. `notes` count what happened.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import trio

from asrfs.disk.base_file import BaseFile
from asrfs.disk.interface import waiting
from asrfs.disk.overlay import BasedImage, KeptImage
from asrfs.journal.reader import JournalReader
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.positions import Positions
from asrfs.replication.alarms import Alarms
from asrfs.replication.applier import Applier, Image
from asrfs.replication.exact_images import ExactImages
from asrfs.replication.hydration_file import HydrationFile, load_turn
from asrfs.replication.hydrator import Hydrator, Rules
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.storage.directory import OpenFile
from asrfs.storage.interface import File, read_whole, write_atomically
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, Look, Model

BLOCK = 4096
MACHINE_FILE = "machine.json"
HYDRATION_FILE = "hydration.json"


class MemoryBase:
    """A base in memory, with holes where it has whole blocks of zeros; `away` while it cannot be read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.away = False
        self.reads: list[tuple[int, int]] = []

    def open(self, _path: str) -> OpenFile:
        if self.away:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return cast(OpenFile, self)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        if self.away:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        piece = self.content[offset : offset + len(buffer)]
        self.reads.append((offset, len(piece)))
        buffer[: len(piece)] = piece
        return len(piece)

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        if self.away:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        for at in range(start - start % BLOCK, len(self.content), BLOCK):
            block = self.content[at : at + BLOCK]
            if any(block):
                yield at, len(block)

    def size(self) -> int:
        return len(self.content)

    def will_need(self, offset: int, length: int) -> None: ...

    def close(self) -> None: ...


class HydratedWorld(JournalWorld):
    """`journal_world.JournalWorld` whose images begin empty over `bases`."""

    def __init__(
        self, storage: CrashStorage, model: Model | None = None, *, bases: Sequence[MemoryBase] = (), **rest: Any
    ) -> None:
        self._bases = list(bases)
        super().__init__(storage, model, **rest)
        self.bases = self._bases or [MemoryBase(content) for content in self.model.initial]
        machine = load_machine(storage)
        turn = load_turn(storage, HYDRATION_FILE)
        applied_lsn = self.positions.applied.lsn
        self.based: dict[int, BasedImage] = {}
        self.doubt_lsn = turn.applied_lsn
        for disk, config in zip(self.disks, machine.disks, strict=True):
            if config.base is not None:
                base = self.base_of(config)
                doubtful = turn.doubtful(config.id, applied_lsn)
                disk.image = self.based[disk.slot] = BasedImage(self.images[disk.slot], base, doubtful)

    def _make_images(self, sizes: Sequence[int], rng: random.Random) -> tuple[bytes, ...]:
        initial = []
        for slot, size in enumerate(sizes):
            content = bytearray(rng.randbytes(size))
            for _ in range(rng.randint(0, 4)):
                at = rng.randrange(size // BLOCK) * BLOCK
                length = min(rng.randint(1, 4) * BLOCK, size - at)
                content[at : at + length] = bytes(length)
            initial.append(bytes(content))
            file = self.image_storage.create(str(slot))
            file.truncate(size)
            file.datasync()
            file.close()
        self.image_storage.sync_directory("")
        disks = tuple(
            DiskConfig(slot=slot, id=f"{slot:032x}", name=f"d{slot}", size_bytes=size, base=f"/{slot}")
            for slot, size in enumerate(sizes)
        )
        save_machine(self.storage, MachineConfig(id="a" * 32, name="db1", disks=disks))
        return tuple(initial)

    def base_of(self, disk: DiskConfig) -> BaseFile:
        def ask(file: OpenFile, start: int) -> Iterator[tuple[int, int]]:
            return file.data_extents(start)

        return BaseFile(f"/{disk.slot}", disk.size_bytes, self.bases[disk.slot].open, ask)

    def content(self, slot: int) -> bytes:
        return waiting(lambda: super(HydratedWorld, self).content(slot))

    def check(self) -> None:
        """Every byte through the read path."""
        lsn = len(self.model.records)
        assert self.journal.appended_lsn == lsn
        expected = self.model.disks_at(lsn)
        for slot in range(len(self.disks)):
            assert self.content(slot) == expected[slot], f"I9: disk {slot} is not the model at LSN {lsn}"

    # ---- a disk server's verbs ----------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Verb `disks`."""
        for config in load_machine(self.storage).disks:
            if config.base is None and config.slot in self.based:
                self.disks[config.slot].image = self.images[config.slot]
                self.based.pop(config.slot).close()

    def doubt(self, slot: int, extents: Sequence[tuple[int, int]], applied_lsn: int) -> None:
        """Verb `hydrating`."""
        if slot in self.based:
            self.based[slot].doubt(extents)
            self.doubt_lsn = applied_lsn

    def drop_maps(self, lsn: int, segment: int) -> None:
        """Verb `applied`."""
        if lsn > self.doubt_lsn:
            for based in self.based.values():
                based.doubt(())
        self.journal.drop_through(segment, [disk.map for disk in self.disks])


class WorldImages:
    """As `StateImages`, on the world's storage."""

    def __init__(self, world: HydratedWorld, positions: PositionsFile, *, beside_server: bool = True) -> None:
        self.world = world
        self._open: dict[int, File] = {}
        self._content: dict[int, list[tuple[int, int]]] = {}
        self._kept = {disk.slot for disk in world.disks} if beside_server else set()
        self.hydration = HydrationFile(world.storage, HYDRATION_FILE, lambda: positions.saved.applied.lsn)

    def image(self, slot: int) -> Image | None:
        file = self.raw(slot)
        size_bytes = len(self.world.model.initial[slot])
        if load_machine(self.world.storage).disks[slot].base is not None:
            return Image(KeptImage(file, self._content.get(slot)), size_bytes)
        return Image(KeptImage(file, None) if slot in self._kept else file, size_bytes)

    def drop(self, slot: int) -> None:
        if slot in self._open:
            self._open.pop(slot).close()

    def settle(self) -> None:
        def opened(disk_id: str) -> File | None:
            disks = load_machine(self.world.storage).disks
            (slot,) = (disk.slot for disk in disks if disk.id == disk_id)
            self.drop(slot)
            return self.raw(slot) if disks[slot].base is not None else None

        try:
            self.hydration.take_back(opened)
        except OSError:
            for slot in list(self._open):
                self.drop(slot)
            raise

    def raw(self, slot: int) -> File:
        if slot not in self._open:
            self._open[slot] = self.world.image_storage.open(str(slot), write=True)
        return self._open[slot]

    def know_content(self, slot: int, content: list[tuple[int, int]]) -> None:
        self._content[slot] = content

    def may_punch(self, slot: int) -> None:
        self._kept.discard(slot)
        self._content.pop(slot, None)


class _ImagesApplied(ExactImages):
    """The applier gets its turn before the hydrator does."""

    def __init__(self, positions: PositionsFile, progress: Progress, meanwhile: Callable[[], None]) -> None:
        super().__init__(positions, progress)
        self._meanwhile = meanwhile

    @asynccontextmanager
    async def hydrating(self) -> AsyncIterator[None]:
        self._meanwhile()
        async with super().hydrating():
            yield


class Agent:
    """One life of an agent on a world. `meanwhile` is called whenever the hydrator is between two turns."""

    def __init__(self, world: HydratedWorld, meanwhile: Callable[[], None]) -> None:
        self.world = world
        self.notes: Counter[str] = Counter()
        self._meanwhile = meanwhile
        self.positions = PositionsFile(world.positions, self._save)
        self.images = WorldImages(world, self.positions)
        self.applier = Applier(JournalReader(world.journal_storage, MACHINE_ID), self.positions, self.images)

    def apply_once(self) -> None:
        world = self.world
        self.applier.apply_span(world.journal.durable_lsn)
        saved = self.positions.saved.applied
        world.model.promised_lsn = max(world.model.promised_lsn, saved.lsn)
        world.drop_maps(saved.lsn, saved.segment - 1)

    def finish_applying(self) -> None:
        self.world.sync()
        while self.positions.saved.applied.lsn < self.world.journal.durable_lsn:
            self.apply_once()

    def hydrate(self) -> None:
        """To the end, or until something raises."""
        trio.run(self._run)

    async def _run(self) -> None:
        progress = Progress(self.positions.current)
        with trio.fail_after(20):
            await Hydrator(
                server=cast(Any, self),
                progress=progress,
                exact=_ImagesApplied(self.positions, progress, self._meanwhile),
                images=cast(Any, self.images),
                alarms=Alarms(),
                threads=trio.CapacityLimiter(1),
                machine=lambda: load_machine(self.world.storage),
                drop_base=self._drop_base,
                open_map=lambda disk: cast(File, self.world.image_storage.open(str(disk.slot))),
                open_base=self.world.base_of,
                rules=lambda: Rules(True, 0, 0),
                free_bytes=lambda: 1 << 40,
                is_recovered=True,
            ).run()

    # ---- the hydrator's disk server -----------------------------------------------------------------------------

    async def reread_disks(self) -> None:
        self._meanwhile()
        self.world.take_over()
        self._meanwhile()

    async def hydrating(self, slot: int, extents: Sequence[tuple[int, int]], applied_lsn: int) -> None:
        self.world.doubt(slot, extents, applied_lsn)
        self.notes["turns" if extents else "turns over"] += 1
        if extents:
            self.world.check()
        else:
            self._meanwhile()

    def _drop_base(self, slot: int) -> None:
        machine = load_machine(self.world.storage)
        disks = tuple(msgspec.structs.replace(disk, base=None) if disk.slot == slot else disk for disk in machine.disks)
        save_machine(self.world.storage, msgspec.structs.replace(machine, disks=disks))
        self.notes["bases dropped"] += 1

    def _save(self, positions: Positions) -> None:
        write_atomically(self.world.storage, "positions.json", msgspec.json.encode(positions))
        self.world.positions = positions


def load_machine(storage: CrashStorage) -> MachineConfig:
    return msgspec.json.decode(read_whole(storage, MACHINE_FILE), type=MachineConfig)


def save_machine(storage: CrashStorage, machine: MachineConfig) -> None:
    write_atomically(storage, MACHINE_FILE, msgspec.json.encode(machine))


def next_start(look: Look, storage: CrashStorage, bases: Sequence[MemoryBase]) -> HydratedWorld:
    return HydratedWorld(storage, look.model.copy(), bases=bases)
