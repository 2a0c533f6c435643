"""What every byte of one machine must be at every LSN, and what has been promised: the oracle of the simulation.

The model is the list of records as the journal was given them; disks at an LSN are the initial content and the records
up to it, put together here with slices and nothing of the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from asrfs.format.record import CARRIES_EXTENT_BYTES, READS_AS_ZEROS, Kind
from asrfs.model.machine import decode_disk
from tests.fakes.journal_world import ModelRecord, put_record

BLOCK = 4096
SECTOR = 512


class Stretch(NamedTuple):
    """The store has no state between its LSNs, but at the last: none there either if it was given up."""

    first_lsn: int
    last_lsn: int
    is_given_up: bool


@dataclass
class MachineModel:
    """`durable_lsn`: the largest that anything has ever called durable. `acknowledged_lsn`: that the store has."""

    initial: tuple[bytes, ...]
    records: list[ModelRecord] = field(default_factory=list)
    durable_lsn: int = 0
    acknowledged_lsn: int = 0
    segments: dict[int, int] = field(default_factory=dict)
    """Number of a segment to the LSN its first record has."""
    refused: ModelRecord | None = None
    """A write that failed last. Nobody was promised it, but all of its bytes may have come to lie where they belong."""
    disks: list[bytearray] = field(init=False)
    """Now, with every record."""
    _seen: list[list[list[bytes]]] = field(init=False)
    _seen_lsn: int = 0
    _drawn_lsn: int = 0

    def __post_init__(self) -> None:
        self.disks = [bytearray(content) for content in self.initial]
        self._seen = [[[content[at : at + BLOCK]] for at in range(0, len(content), BLOCK)] for content in self.initial]

    @property
    def lsn(self) -> int:
        return len(self.records)

    # ---- what happens ----

    def tell(self, record: ModelRecord) -> None:
        """A record is about to be written: from now on a crash may find it."""
        self.records.append(record)
        self.refused = None

    def take_back(self) -> None:
        """The write of the record told last failed."""
        self.refused = self.records.pop()

    def draw(self) -> None:
        """Put records told since the last time onto the disks."""
        for record in self.records[self._drawn_lsn :]:
            put_record(self.disks, record)
        self._drawn_lsn = len(self.records)

    def note_durable(self, lsn: int) -> None:
        self.durable_lsn = max(self.durable_lsn, lsn)

    def recovered(self, lsn: int) -> None:
        """A start found this prefix (I2, I3): all that was durable is there, and nothing that never was."""
        assert lsn >= self.durable_lsn, f"I2: LSN {self.durable_lsn} was durable, LSN {lsn} was found"
        assert lsn >= self.acknowledged_lsn, f"I1: the store has LSN {self.acknowledged_lsn}, the host {lsn}"
        if lsn == len(self.records) + 1 and self.refused is not None:
            self.records.append(self.refused)
        self.refused = None
        assert lsn <= len(self.records), f"I9: LSN {lsn} was found, {len(self.records)} were appended"
        if lsn < len(self.records):
            del self.records[lsn:]
            self.disks = self.disks_at(lsn)
            self._drawn_lsn = lsn
        else:
            self.draw()
        self.note_durable(lsn)

    # ---- what must hold ----

    def disks_at(self, lsn: int) -> list[bytearray]:
        """Every disk at an LSN, byte for byte."""
        disks = [bytearray(content) for content in self.initial]
        for record in self.records[:lsn]:
            put_record(disks, record)
        return disks

    def check_image(self, slot: int, image: bytes | bytearray, where: str) -> None:
        """I1: each sector of the image is what it was at some LSN that is durable."""
        self._see()
        view = memoryview(image)
        for number, versions in enumerate(self._seen[slot]):
            block = view[number * BLOCK : (number + 1) * BLOCK]
            if block == versions[-1] or block in versions:
                continue
            for at in range(0, len(block), SECTOR):
                sector = block[at : at + SECTOR]
                assert any(sector == version[at : at + SECTOR] for version in versions), (
                    f"I1: sector {number * BLOCK // SECTOR + at // SECTOR} of image {slot} of {where} holds bytes of "
                    f"no LSN up to {self.durable_lsn}"
                )

    def _see(self) -> None:
        """Take up what every block was at each durable LSN."""
        for record in self.records[self._seen_lsn : self.durable_lsn]:
            zeros = record.kind in READS_AS_ZEROS
            if not zeros and record.kind not in CARRIES_EXTENT_BYTES:
                continue
            content = bytes(record.length) if zeros else record.content
            for at in range(0, record.length, BLOCK):
                self._seen[record.slot][(record.offset + at) // BLOCK].append(content[at : at + BLOCK])
        self._seen_lsn = self.durable_lsn

    def last_lsn_of(self, segment: int) -> int | None:
        """The last record that a segment holds; None while records may still be added behind it."""
        later = [first for number, first in self.segments.items() if number > segment]
        return min(later) - 1 if later else None

    def listed(self, received: int, stretches: Sequence[Stretch]) -> list[int]:
        """LSNs of the points a store that has so much may show: those outside every gap (I5)."""
        return [lsn for lsn, kind, gaps in self._walk(received, stretches) if kind == Kind.MARKER and not gaps]

    def whole_lsns(self, received: int, stretches: Sequence[Stretch]) -> list[int]:
        """LSNs at which the disks can be had, whether there is a point or not."""
        return [lsn for lsn, _, gaps in self._walk(received, stretches) if not gaps]

    def _walk(self, received: int, stretches: Sequence[Stretch]) -> Iterator[tuple[int, int, frozenset[int]]]:
        """LSN, kind and disks with a gap. Every disk has one from the end of what was given up, whether the DISK
        records that say so lie before that or behind: a host that lost its map gives up what is gone, and no more."""
        gaps: frozenset[int] = frozenset()
        missing = {lsn for each in stretches for lsn in range(each.first_lsn, each.last_lsn)}
        given_up_to = {each.last_lsn for each in stretches if each.is_given_up}
        for lsn, record in enumerate(self.records[:received], 1):
            if record.kind == Kind.DISK:
                disk = decode_disk(record.content)
                gaps = gaps | {disk.slot} if disk.gap else gaps - {disk.slot}
            if lsn in given_up_to:
                gaps = frozenset(range(len(self.initial)))
            if lsn not in missing:
                yield lsn, record.kind, gaps
