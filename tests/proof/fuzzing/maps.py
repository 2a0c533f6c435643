"""The dirty map: what an agent that starts makes of a file that was changed.

Where its checksum was not made right again nothing of it is believed. Whatever is in the file, an agent starts (I8),
the file it then has is a whole one, and a file that was not believed is kept beside it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crc32c import crc32c

from asrfs.format import dirty_map as layout
from asrfs.format.dirty_map import decode_dirty_map, encode_dirty_map
from asrfs.model.dirty_map import DirtyMap, Gap, GivenUp, Reason
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig
from asrfs.model.positions import Cursor, Positions
from asrfs.replication.dirty_map_file import load_dirty_map
from asrfs.replication.lost_map import open_dirty_map, unknown_slots
from asrfs.storage.interface import read_whole
from tests.fakes.crash_storage import CrashStorage
from tests.proof.fuzzing.journal import storage_with
from tests.proof.fuzzing.mutations import Strike, mutate_bytes, mutate_fields
from tests.proof.fuzzing.target import Target, Trial, refused

_NAME = "dirty.map"
_PREFIX_BYTES = layout._PREFIX.size
_HEADER_BITS = (64, 64, 64, 64, 32, 32, 32, 32)
_DISK_BITS = (16, 16, 32, 64)
_MACHINE = MachineConfig(
    id=bytes(range(16)).hex(),
    name="web1",
    disks=tuple(
        DiskConfig(slot=slot, id=f"{slot:032x}", name=f"d{slot}", size_bytes=64 << 20, removed=slot == 1, gap=slot == 2)
        for slot in range(3)
    ),
)
_POSITIONS = Positions(applied=Cursor(lsn=99, segment=3, offset=9000, time_ns=9), acknowledged=Cursor(lsn=42))


def make_map(rng: random.Random) -> bytes:
    """A whole file: disks that are marked, adopted, given up, removed."""
    dirty = DirtyMap()
    for slot in (0, 2):
        dirty.enter(slot, Reason(rng.randrange(1, sum(Reason) + 1)))
        for _ in range(5):
            dirty.mark(slot, rng.randrange(900) * CHUNK_BYTES, rng.randint(1, 40 * CHUNK_BYTES))
    records = tuple(DiskRecord.of(disk) for disk in _MACHINE.disks)
    through = Cursor(lsn=99, segment=3, offset=8192, time_ns=77)
    return encode_dirty_map(dirty, GivenUp(42, through, records, (Gap(1, 5), Gap(42))))


def _seal(body: bytes) -> bytes:
    return layout._PREFIX.pack(layout.DIRTY_MAGIC, layout.DIRTY_VERSION, crc32c(body)) + body


def _change_field(rng: random.Random, content: bytes, strike: Strike) -> bytes:
    """Of the header or of a disk's head, with the checksum made right again."""
    strike("field")
    changed = bytearray(content)
    at, form, bits = _PREFIX_BYTES, layout._HEADER, _HEADER_BITS
    if rng.random() < 0.5:
        at, form, bits = at + form.size + rng.randrange(3) * layout._DISK.size, layout._DISK, _DISK_BITS
    fields = form.unpack_from(changed, at)
    struct.pack_into(form.format, changed, at, *mutate_fields(rng, fields, bits))
    return _seal(bytes(changed[_PREFIX_BYTES:]))


def _check_whole(dirty: DirtyMap, given_up: GivenUp) -> None:
    """What was believed can be used, and says the same when written again."""
    again, given_up_again = decode_dirty_map(encode_dirty_map(dirty, given_up), "again")
    assert given_up_again == given_up and again.slots() == dirty.slots(), "what was read is written as something else"
    for slot in dirty.slots():
        assert again.bitmap(slot) == dirty.bitmap(slot) and again.reasons(slot) == dirty.reasons(slot)
        runs = list(dirty.runs(slot, 1 << 20))
        assert sum(length for _, length in runs) == dirty.dirty_chunks(slot) * CHUNK_BYTES
        dirty.cut(slot, 64 << 20)
        assert dirty.dirty_chunks(slot) <= (64 << 20) // CHUNK_BYTES
    for gap in given_up.gaps:
        given_up.is_lost(gap.after_lsn + 1)


def _start(content: bytes, is_believed: bool) -> None:
    storage = storage_with({_NAME: content})
    dirty = open_dirty_map(storage, _NAME, CrashStorage(), _MACHINE, _POSITIONS)
    if not is_believed:
        assert unknown_slots(dirty.map) == [0, 2], "nothing is known of any disk that is left"
        assert read_whole(storage, f"{_NAME}.unreadable-1") == content, "what cannot be read is kept"
    again, given_up = load_dirty_map(storage, _NAME)
    assert (again.slots(), given_up) == (dirty.map.slots(), dirty.given_up)


def try_map(good: bytes, other: bytes, rng: random.Random, strike: Strike) -> None:
    chance = rng.random()
    if chance < 0.4:
        content = mutate_bytes(rng, good, other, strike)
        is_sealed = content in (good, other)
    elif chance < 0.7:
        content, is_sealed = _seal(mutate_bytes(rng, good[_PREFIX_BYTES:], other[_PREFIX_BYTES:], strike)), True
    else:
        content, is_sealed = _change_field(rng, good, strike), True
    found = refused(lambda: decode_dirty_map(content, "a file"))
    assert found is None or is_sealed, "a map whose checksum is wrong was believed"
    _start(content, found is not None)
    if found is not None:
        _check_whole(*found)


@contextmanager
def _opened(_scratch: Path) -> Iterator[Trial]:
    rng = random.Random(5)
    good, other = make_map(rng), make_map(rng)
    _check_whole(*decode_dirty_map(good, "good"))
    yield lambda rng, strike: try_map(good, other, rng, strike)


TARGETS = (Target("dirty map", 8, _opened),)
