"""The applier's bookkeeping: newest bytes win, neighbours are written together, removed disks are passed over."""

from __future__ import annotations

import random

import numpy as np
import pytest

from asrfs.errors import IntegrityError
from asrfs.format.record import READS_AS_ZEROS, Kind, RecordHeader, encode_record_header, payload_crc
from asrfs.journal.columns import scan_columns
from asrfs.journal.reader import JournalReader
from asrfs.model.positions import Positions
from asrfs.replication.applier import Applier, Image
from asrfs.replication.applier_round import BUFFERS_MAX, DiskRound
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import File
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld

BLOCK = 4096


def note(round: DiskRound, kind: Kind, offset: int, content: bytes | int) -> None:
    length = content if isinstance(content, int) else len(content)
    payload = b"" if isinstance(content, int) else content
    header = RecordHeader(1, 0, 0, offset, length, len(payload), payload_crc(payload), kind, 0)
    found = scan_columns(memoryview(encode_record_header(header, 0) + payload), 0, 0, 1)
    assert len(found.columns) == 1
    round.note(found.columns, np.ones(1, np.bool_))


def written(round: DiskRound) -> list[tuple[int, bytes]]:
    return [(offset, b"".join(buffers)) for offset, buffers in round.writes()]


def test_the_newest_bytes_of_a_block_win() -> None:
    round = DiskRound()
    note(round, Kind.WRITE, 0, b"a" * 2 * BLOCK)
    note(round, Kind.FILL, BLOCK, b"b" * BLOCK)
    note(round, Kind.WRITE, 0, b"c" * BLOCK)
    assert written(round) == [(0, b"c" * BLOCK + b"b" * BLOCK)]
    assert round.end == 2 * BLOCK


def test_neighbours_are_written_together_in_block_order() -> None:
    round = DiskRound()
    for block in (7, 2, 1, 9, 8):
        note(round, Kind.WRITE, block * BLOCK, bytes([block]) * BLOCK)
    assert [(offset // BLOCK, len(content) // BLOCK) for offset, content in written(round)] == [(1, 2), (7, 3)]


def test_one_write_has_at_most_so_many_buffers() -> None:
    round = DiskRound()
    for block in range(BUFFERS_MAX + 5):
        note(round, Kind.WRITE, block * BLOCK, b"x" * BLOCK)
    assert [len(buffers) for _, buffers in round.writes()] == [BUFFERS_MAX, 5]


def test_the_last_block_of_a_disk_may_be_short() -> None:
    round = DiskRound()
    note(round, Kind.WRITE, BLOCK, b"x" * (BLOCK + 512))
    assert written(round) == [(BLOCK, b"x" * (BLOCK + 512))]


@pytest.mark.parametrize("zeros", [2 * BLOCK, 1 << 40])
def test_zeros_hide_older_bytes_and_not_newer_ones(zeros: int) -> None:
    round = DiskRound()
    note(round, Kind.WRITE, 0, b"a" * BLOCK)
    note(round, Kind.WRITE, zeros, b"b" * BLOCK)
    note(round, Kind.DISCARD, 0, zeros)
    assert written(round) == [(zeros, b"b" * BLOCK)]
    note(round, Kind.WRITE, 0, b"c" * BLOCK)
    assert written(round)[0] == (0, b"c" * BLOCK)
    assert list(round.punches()) == [(0, zeros)]


def test_zeros_are_merged() -> None:
    round = DiskRound()
    for offset, length in ((8, 4), (0, 4), (4, 4), (20, 2), (9, 1)):
        note(round, Kind.ZERO, offset * BLOCK, length * BLOCK)
    assert list(round.punches()) == [(0, 12 * BLOCK), (20 * BLOCK, 2 * BLOCK)]


def test_a_round_leaves_what_its_records_leave_one_by_one(rng: random.Random) -> None:
    """Against an image that takes each record as it comes: any extents, any order, several slabs (I9)."""
    blocks = 40
    size = blocks * BLOCK - 512 * 3
    for _ in range(150):
        image, expected = bytearray(rng.randbytes(size)), bytearray()
        expected[:] = image
        round = DiskRound()
        for _ in range(rng.randint(1, 12)):
            raw = b""
            count = rng.randint(1, 6)
            for lsn in range(1, count + 1):
                first = rng.randrange(blocks)
                length = min((first + rng.randint(1, 9)) * BLOCK, size) - first * BLOCK
                kind = rng.choice((Kind.WRITE, Kind.WRITE, Kind.FILL, Kind.ZERO, Kind.DISCARD))
                zeros = kind in READS_AS_ZEROS
                payload = b"" if zeros else rng.randbytes(length)
                crc = payload_crc(payload)
                raw += encode_record_header(
                    RecordHeader(lsn, 0, 0, first * BLOCK, length, len(payload), crc, kind, rng.choice((0, 0, 1))), 0
                )
                raw += payload
            columns = scan_columns(memoryview(raw), 0, 0, 1).columns
            assert len(columns) == count
            for i in range(count):
                header = columns.header(i)
                if header.slot == 0:
                    content = bytes(columns.payload(i)) or bytes(header.length)
                    expected[header.offset : header.offset + header.length] = content
            round.note(columns, columns.headers["slot"] == 0)
        for offset, length in round.punches():
            image[offset : offset + length] = bytes(length)
        seen = -1
        for offset, content in written(round):
            assert offset > seen, "in block order, and what is adjacent is one write"
            image[offset : offset + len(content)] = content
            seen = offset + len(content)
        assert len(image) == size and image == expected
        assert round.end <= size


class SomeImages:
    """The images of a world; those in `removed` are gone. `dropped`: slots closed because they were uncertain."""

    def __init__(self, world: JournalWorld, removed: tuple[int, ...] = (), size_bytes: int | None = None) -> None:
        self._world = world
        self._removed = removed
        self._size_bytes = size_bytes
        self.dropped: list[int] = []

    def image(self, slot: int) -> Image | None:
        if slot in self._removed:
            return None
        file: File = self._world.images[slot]
        return Image(file, self._size_bytes or file.size())

    def settle(self) -> None:
        """Nothing is hydrated."""

    def drop(self, slot: int) -> None:
        self.dropped.append(slot)


def applier_of(world: JournalWorld, images: SomeImages, saved: list[Positions], markers: list[int]) -> Applier:
    return Applier(
        JournalReader(world.journal_storage, MACHINE_ID),
        PositionsFile(Positions(), saved.append),
        images,
        lambda header, payload: markers.append(header.lsn),
    )


def test_i1_only_durable_records_reach_an_image(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage())
    before = [image.read_at(image.size(), 0) for image in world.images]
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    world.disks[0].write(BLOCK, rng.randbytes(BLOCK))
    world.disks[1].write(0, rng.randbytes(BLOCK))
    saved: list[Positions] = []
    cursor = applier_of(world, SomeImages(world), saved, []).apply_span(world.journal.durable_lsn)
    assert cursor.lsn == 1
    after = [image.read_at(image.size(), 0) for image in world.images]
    assert after[0] == world.model.records[0].content + before[0][BLOCK:]
    assert after[1] == before[1]
    assert [positions.applied.lsn for positions in saved] == [1]
    world.close()


def test_removed_disks_are_passed_over_and_markers_are_seen(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage())
    before = world.images[1].read_at(world.images[1].size(), 0)
    world.disks[1].write(0, rng.randbytes(BLOCK))
    world.marker()
    world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    markers: list[int] = []
    assert applier_of(world, SomeImages(world, removed=(1,)), [], markers).apply_span(3).lsn == 3
    assert world.images[1].read_at(world.images[1].size(), 0) == before
    assert world.images[0].read_at(BLOCK, 0) == world.model.records[2].content
    assert markers == [2]
    world.close()


def test_a_record_that_does_not_fit_its_disk_is_refused(rng: random.Random) -> None:
    world = JournalWorld(CrashStorage())
    world.disks[0].write(4 * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    saved: list[Positions] = []
    images = SomeImages(world, size_bytes=4 * BLOCK)
    with pytest.raises(IntegrityError, match="slot 0"):
        applier_of(world, images, saved, []).apply_span(1)
    assert not saved
    world.close()
