"""The very end of a segment of the real size: the byte behind it is where the next number's positions begin."""

from __future__ import annotations

import pytest

from asrfs.format.record import RECORD_HEADER_BYTES, Kind, RecordHeader
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT, SEGMENT_BYTES
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, rebuild_maps
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.recovery import Recovered, recover
from asrfs.journal.segments import index_name, list_indexes
from asrfs.journal.writer import Journal
from asrfs.model.positions import Positions
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, StepClock

BLOCK = 4096
MIB = 1 << 20
SIZE = 128 * MIB


class Host:
    """A start over what is in `storage`; the image is empty, so whatever is not in the maps reads as an error."""

    def __init__(self, storage: CrashStorage) -> None:
        recovered = recover(storage, Positions(), MACHINE_ID, by_indexes=True)
        block_map = BlockMap()
        rebuild_maps(recovered, {0: block_map}, storage)
        self.storage = storage
        self.journal = Journal(storage, MACHINE_ID, recovered, StepClock(), prepare_ahead=False)
        MapKeeper(self.journal, storage, {0: block_map}, recovered, ahead=False, layers_kept=0)
        if not storage.exists("image"):
            storage.create("image")
        self.disk = JournaledDisk(0, SIZE, storage.open("image"), self.journal, block_map)

    def killed(self) -> CrashStorage:
        self.journal.close()
        return self.storage.killed()

    def room(self) -> int:
        return SEGMENT_BYTES - self.journal.offset

    def fill(self) -> None:
        """Until there is room for one record without payload, to the byte."""
        while self.room() > 2 * MIB:
            self.disk.write(MIB, b"x" * MIB)
        rest = (self.room() - 2 * RECORD_HEADER_BYTES) // BLOCK * BLOCK
        self.disk.write(MIB, b"y" * min(rest, MIB))
        if rest > MIB:
            self.disk.write(MIB, b"y" * (rest - MIB - BLOCK))
        while self.room() > RECORD_HEADER_BYTES:
            self.disk.discard(64 * MIB, BLOCK)
        assert self.room() == RECORD_HEADER_BYTES


@pytest.mark.parametrize("filled_before", [0, 1])
@pytest.mark.parametrize("lost", ["nothing", "the indexes", "the index of the segment"])
def test_i9_what_is_discarded_there_stays_so(filled_before: int, lost: str) -> None:
    host = Host(CrashStorage())
    host.disk.write(0, b"o" * BLOCK)
    while host.journal.segment <= filled_before:
        host.disk.write(MIB, b"x" * MIB)
    host.fill()
    number = host.journal.segment
    host.disk.discard(0, BLOCK)
    assert host.disk.read(0, BLOCK) == bytes(BLOCK)
    host.journal.sync()
    host = Host(host.killed())  # nothing followed
    assert host.disk.read(0, BLOCK) == bytes(BLOCK)
    host.disk.write(2 * MIB, b"z" * BLOCK)
    host.journal.sync()
    while host.journal.segment <= number + 3:
        host.disk.write(MIB, b"x" * MIB)
    host.journal.sync()
    storage = host.killed()
    for each in list_indexes(storage):
        if lost == "the indexes" or (lost == "the index of the segment" and each == number):
            storage.unlink(index_name(each))
    for _ in range(2):
        host = Host(storage)
        assert host.disk.read(0, BLOCK) == bytes(BLOCK)
        assert host.disk.read(2 * MIB, BLOCK) == b"z" * BLOCK
        storage = host.killed()
    host.journal.close()


def test_a_record_that_ends_with_its_segment_is_recovered_as_one_of_it() -> None:
    """As an earlier writer may have left it."""
    found = Recovered(Positions())
    at = SEGMENT_BYTES - RECORD_HEADER_BYTES
    found.add([RecordHeader(1, 1, 0, 0, BLOCK, 0, 0, Kind.DISCARD, 0)], 7 << POSITION_SHIFT | at)
    (record,) = found.records()
    assert record.position >> POSITION_SHIFT == 7
    assert found.offset_of(1) == at & POSITION_MASK
