"""PURE: a run: what a stretch of a history made of one disk. Runs that follow one another are layers of the disk.

A disk at an LSN is its runs from record 1 to there. They are kept apart, because laying a small one over a large one
costs as much as the large one has extents; few enough are kept for reading through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asrfs.format.log_object import DIGEST_BYTES
from asrfs.format.map_checkpoint import MapObjects
from replica_store.points.extent_map import ExtentMap, merge, renumbered
from replica_store.points.layers import Layer

OBJECT_WEIGHT = 512
"""Records that cost as much to read as what opening the index of one more log object costs."""
RUNS_MAX = 24
SMALL_EXTENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """Records `after_lsn + 1` to `lsn` of one disk. `extents` refer to `objects`, counted from 0; zeros among them
    cover what is older, except in the first run, which needs none.

    `digest`: of the log object that ends at `lsn`; None when the run does not consist of whole objects: what begins or
    ends within one is of no use to anybody else.
    """

    after_lsn: int
    lsn: int
    extents: ExtentMap
    objects: MapObjects
    digest: bytes | None

    @property
    def layer(self) -> Layer:
        return Layer(self.extents, len(self.objects.first_lsn))

    @property
    def weight(self) -> int:
        """What reading it from the objects costs, in records."""
        return weight_of(self.after_lsn, self.lsn, len(self.objects.first_lsn))

    @property
    def nbytes(self) -> int:
        """About how much memory this holds."""
        return self.extents.nbytes + sum(column.nbytes for column in self.objects)


def weight_of(after_lsn: int, lsn: int, objects: int) -> int:
    """What reading a stretch of a history costs, in records."""
    return lsn - after_lsn + OBJECT_WEIGHT * objects


def merge_runs(older: Run, newer: Run) -> Run:
    """Both as one. `newer` begins where `older` ends."""
    assert older.lsn == newer.after_lsn
    by = len(older.objects.first_lsn)
    moved = ExtentMap(newer.extents.start, newer.extents.end, renumbered(newer.extents.ref, by))
    extents = merge(older.extents, moved, keep_zeros=older.after_lsn > 0)
    objects = join_objects([older.objects, newer.objects])
    return Run(older.after_lsn, newer.lsn, extents, objects, newer.digest if older.digest is not None else None)


def join_objects(parts: Sequence[MapObjects]) -> MapObjects:
    """All of them, counted through."""
    return MapObjects(
        np.concatenate([np.empty(0, np.int64), *(part.first_lsn for part in parts)]),
        np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *(part.digest for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.frame_bytes for part in parts)]),
    )


def stack(runs: Sequence[Run], newer: Run) -> list[Run]:
    """The runs with one more on top, fewer of them where that is cheap or there are too many."""
    stacked = [*runs, newer]
    while len(stacked) > 1 and len(stacked[-1].extents) < SMALL_EXTENTS:
        if len(stacked[-2].extents) >= max(SMALL_EXTENTS, 2 * len(stacked[-1].extents)):
            break
        stacked[-2:] = [merge_runs(*stacked[-2:])]
    while len(stacked) > RUNS_MAX:
        at = min(range(len(stacked) - 1), key=lambda i: len(stacked[i].extents) + len(stacked[i + 1].extents))
        stacked[at : at + 2] = [merge_runs(stacked[at], stacked[at + 1])]
    return stacked
