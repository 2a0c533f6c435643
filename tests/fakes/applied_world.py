"""A machine on a `JournalWorld` whose images are kept by the real applier and whose positions by the real file."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from asrfs.journal.reader import JournalReader
from asrfs.model.positions import Positions
from asrfs.replication.applier import Applier, Image
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import File, Storage, write_atomically
from tests.fakes.journal_world import MACHINE_ID, JournalWorld

BLOCK = 4096


class StoredImages:
    """Images in a storage, opened when they are first asked for."""

    def __init__(self, storage: Storage, sizes: Sequence[int]) -> None:
        self._storage = storage
        self._sizes = sizes
        self._open: dict[int, File] = {}

    def image(self, slot: int) -> Image | None:
        if slot not in self._open:
            self._open[slot] = self._storage.open(str(slot), write=True)
        return Image(self._open[slot], self._sizes[slot])

    def drop(self, slot: int) -> None:
        self._open.pop(slot).close()

    def settle(self) -> None:
        """Nothing is hydrated."""


class AppliedWorld:
    """See the module. How many rounds share a datasync, and how large each is, is drawn."""

    def __init__(self, world: JournalWorld, rng: random.Random) -> None:
        self.world = world
        self.images = StoredImages(world.image_storage, [len(content) for content in world.model.initial])
        self.positions = PositionsFile(world.positions, self._save)
        self.applier = Applier(
            JournalReader(world.journal_storage, MACHINE_ID),
            self.positions,
            self.images,
            round_bytes_max=rng.choice((1, BLOCK, 5 * BLOCK, 1 << 20)),
            rounds_max=rng.randint(1, 4),
        )

    def apply_once(self, *, steal: bool = False) -> None:
        journal = self.world.journal
        self.applier.apply_span(journal.appended_lsn if steal else journal.durable_lsn)
        if not steal:
            self.world.model.promised_lsn = max(self.world.model.promised_lsn, self.positions.saved.applied.lsn)

    def apply_all(self) -> None:
        while self.positions.saved.applied.lsn < self.world.journal.durable_lsn:
            self.apply_once()

    def image(self, slot: int) -> bytes:
        file = self.world.image_storage.open(str(slot))
        try:
            return file.read_at(file.size(), 0)
        finally:
            file.close()

    def finish(self) -> None:
        """Make all durable, apply all, and compare the images with the model."""
        self.world.sync()
        self.apply_all()
        self.check_images()

    def check_images(self) -> None:
        """I9 for images into which everything was applied."""
        expected = self.world.model.disks_at(len(self.world.model.records))
        for slot in range(len(expected)):
            assert self.image(slot) == expected[slot], f"I9: image {slot} is not the model"

    def _save(self, positions: Positions) -> None:
        write_atomically(self.world.storage, "positions.json", msgspec.json.encode(positions))
        self.world.positions = positions
