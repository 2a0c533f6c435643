"""Kept leaves: what a store makes of a file that was changed. Nothing of it is believed, or all of it, as it was."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crc32c import crc32c

from asrfs.format import kept_leaves as layout
from asrfs.model.digest_tree import LEAF_BYTES, regions_of
from asrfs.model.machine import DiskRecord
from replica_store.points.kept_leaves import Kept, keep_leaves, load_leaves
from tests.fakes.memory_history import MemoryHistory
from tests.proof.fuzzing.mutations import Strike, mutate_bytes, mutate_fields
from tests.proof.fuzzing.target import Target, Trial

_BITS = (128, 32, 16, 16, 256, 128, 64, 256, 64, 64)


def _history() -> tuple[MemoryHistory, DiskRecord]:
    history = MemoryHistory()
    history.disk(0, "root", 20 * LEAF_BYTES + 512)
    for _ in range(4):
        history.write(0, 0, bytes(4096))
        history.seal()
    return history, history.disks_at(history.id, history.lsn)[0]


def _change_field(rng: random.Random, content: bytes, strike: Strike) -> bytes:
    """Of the header, with its checksum made right again."""
    strike("field")
    changed = bytearray(content)
    fields = layout._HEADER.unpack_from(changed, layout._PREFIX.size)
    numbers = [at for at, each in enumerate(fields) if isinstance(each, int)]
    mutated = list(fields)
    for at, value in zip(
        numbers, mutate_fields(rng, [fields[at] for at in numbers], [_BITS[at] for at in numbers]), strict=True
    ):
        mutated[at] = value
    struct.pack_into(layout._HEADER.format, changed, layout._PREFIX.size, *mutated)
    return _seal(bytes(changed))


def _seal(content: bytes) -> bytes:
    body = content[layout._PREFIX.size : layout.LEAVES_HEADER_BYTES]
    return layout._PREFIX.pack(layout.LEAVES_MAGIC, crc32c(body)) + content[layout._PREFIX.size :]


@contextmanager
def _opened(_scratch: Path) -> Iterator[Trial]:
    history, disk = _history()
    (region,) = regions_of(disk.size_bytes)
    rng = random.Random(6)
    made = [Kept(lsn, rng.randbytes(32 * region.leaves)) for lsn in (3, history.lsn)]
    files = []
    for each in made:
        keep_leaves(history, history.id, disk, region, each)
        assert load_leaves(history, history.id, disk, region) == each
        files += history.leaves.files.values()
    ((key, _),) = history.leaves.files.items()

    def trial(rng: random.Random, strike: Strike) -> None:
        good, other = rng.sample(files, 2)
        chance = rng.random()
        if chance < 0.4:
            content = mutate_bytes(rng, good, other, strike)
        elif chance < 0.7:
            content = _seal(mutate_bytes(rng, good, other, strike).ljust(layout._PREFIX.size, b"\0"))
        else:
            content = _change_field(rng, good, strike)
        history.leaves.files[key] = content
        found = load_leaves(history, history.id, disk, region)
        assert found is None or (content in files and found in made), "kept leaves that were changed are believed"

    yield trial


TARGETS = (Target("kept leaves", 4, _opened),)
