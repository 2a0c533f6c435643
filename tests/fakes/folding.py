"""What a host may leave out of records that reach the store as one stretch: what later ones of them overwrite.

Plain and slow, one block after the other: the model of folding, not how it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from asrfs.format.record import CARRIES_EXTENT_BYTES, Kind
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import decode_disk


class Record(Protocol):
    """A record of some history that was made up."""

    @property
    def kind(self) -> Kind: ...
    @property
    def slot(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def payload(self) -> bytes: ...


R = TypeVar("R", bound=Record)


def up_to_markers(first_lsn: int, records: Sequence[R]) -> Iterator[tuple[int, list[R]]]:
    """Cut behind every marker, so that its state exists; each part with its first LSN."""
    part: list[R] = []
    for lsn, record in enumerate(records, first_lsn):
        part.append(record)
        if record.kind == Kind.MARKER or lsn == first_lsn + len(records) - 1:
            yield lsn - len(part) + 1, part
            part = []


def folded(first_lsn: int, records: Sequence[R]) -> list[tuple[int, R]]:
    """With their LSNs, the records that are left, some of them shorter: none begins or ends with a block that a later
    one has."""
    newer: set[tuple[int, int]] = set()
    kept: list[tuple[int, R]] = []
    for lsn, record in reversed(list(enumerate(records, first_lsn))):
        if record.kind in (Kind.MARKER, Kind.DISK):
            kept.append((lsn, record))
            continue
        blocks = [(record.slot, at) for at in range(record.offset, record.offset + record.length, BLOCK_BYTES)]
        shown = [at for slot, at in blocks if (slot, at) not in newer]
        newer.update(blocks)
        if shown:
            kept.append((lsn, _cut(record, shown[0], shown[-1] + BLOCK_BYTES)))
    return kept[::-1]


def _cut(record: R, start: int, end: int) -> R:
    end = min(end, record.offset + record.length)
    payload = record.payload[start - record.offset : end - record.offset]
    assert len(payload) == (end - start if record.kind in CARRIES_EXTENT_BYTES else 0)
    changed: Any = replace(record, offset=start, length=end - start, payload=payload)  # type: ignore[type-var]
    result: R = changed
    return result


class Dirty:
    """Blocks that a host gave up and has not sent again, by slot."""

    def __init__(self) -> None:
        self._blocks: dict[int, set[int]] = {}

    def mark(self, slot: int, start: int, end: int) -> None:
        self._blocks.setdefault(slot, set()).update(range(start, end, BLOCK_BYTES))

    def give_up(self, records: Sequence[Record], size_of: dict[int, int]) -> None:
        """Mark what these changed, also by making a disk shorter. `size_of`: of the disks before them, by slot."""
        sizes = dict(size_of)
        for record in records:
            if record.kind == Kind.DISK:
                disk = decode_disk(record.payload)
                edge = min(sizes.get(disk.slot, 0), disk.size_bytes) // BLOCK_BYTES * BLOCK_BYTES
                self.mark(disk.slot, edge, max(sizes.get(disk.slot, 0), disk.size_bytes))
                sizes[disk.slot] = disk.size_bytes
            elif record.kind != Kind.MARKER:
                self.mark(record.slot, record.offset, record.offset + record.length)

    def take(self, slot: int, size: int) -> list[tuple[int, int]]:
        """`(offset, length)` of runs of blocks that are dirty on a disk of this size, and are not any more."""
        runs: list[tuple[int, int]] = []
        for at in sorted(self._blocks.pop(slot, ())):
            length = min(BLOCK_BYTES, size - at)
            if length > 0 and runs and sum(runs[-1]) == at:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            elif length > 0:
                runs.append((at, length))
        return runs
