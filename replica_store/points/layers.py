"""PURE: a disk that is described by several maps, each laid over those before it.

Making one map of them all would cost as much as the largest has extents, although nobody may ever read most of it.
So what is asked for is put together when it is asked for: a place of the disk from what each layer has there, the
whole disk in groups, in the order in which its bytes are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from asrfs.model.quantities import SECTOR_BYTES
from replica_store.points.extent_map import (
    ExtentMap,
    clip,
    empty_map,
    first_ref,
    merge,
    objects_of,
    renumbered,
    subtract,
    without_zeros,
)

GROUP_EXTENTS_FIRST, GROUP_EXTENTS_MAX = 1 << 14, 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """A map whose references count the `objects` log objects it has of its own from 0."""

    extents: ExtentMap
    objects: int


class Layers:
    """A disk of `size_bytes`; the oldest layer first. In what is given out, objects are counted through all layers."""

    def __init__(self, layers: Sequence[Layer], size_bytes: int) -> None:
        self._maps = [layer.extents for layer in layers]
        self._bases = [0, *accumulate(layer.objects for layer in layers)]
        self._size_bytes = size_bytes

    @property
    def nbytes(self) -> int:
        """Memory of all columns."""
        return sum(whole.nbytes for whole in self._maps)

    @property
    def bytes_max(self) -> int:
        """Not less than what all extents given out by `groups` have together."""
        return sum(whole.mapped_bytes for whole in map(self._on_disk, self._maps))

    def between(self, offset: int, end: int) -> ExtentMap:
        """What the disk consists of in `[offset, end)`, multiples of 512, cut there; what no extent covers reads as
        zeros."""
        assert not (offset | end) % SECTOR_BYTES
        end = min(end, self._size_bytes)
        found = empty_map()
        for base, whole in zip(self._bases, self._maps, strict=False):
            part = clip(whole, offset, end)
            if len(part):
                found = merge(found, _numbered(part, base), keep_zeros=True)
        return without_zeros(found)

    def groups(self) -> Iterator[ExtentMap]:
        """All extents of the disk that are not zeros. No log object is in two groups, and older ones come first.

        The first groups are small, so that there is something to begin with.
        """
        extents_max = GROUP_EXTENTS_FIRST
        for number, whole in enumerate(map(self._on_disk, self._maps)):
            shown = without_zeros(whole)
            if not len(shown):
                continue
            behind = np.cumsum(np.bincount(objects_of(shown.ref)))  # extents in objects up to each
            first, done = 0, 0
            while done < len(shown):
                last = max(first, int(np.searchsorted(behind, done + extents_max, side="right")) - 1)
                chosen = np.flatnonzero((shown.ref >= first_ref(first)) & (shown.ref < first_ref(last + 1)))
                group = ExtentMap(shown.start[chosen], shown.end[chosen], shown.ref[chosen])
                for newer in self._maps[number + 1 :]:
                    group = subtract(group, newer)
                if len(group):
                    yield _numbered(group, self._bases[number])
                first, done = last + 1, int(behind[last])
                extents_max = min(4 * extents_max, GROUP_EXTENTS_MAX)

    def _on_disk(self, whole: ExtentMap) -> ExtentMap:
        return clip(whole, 0, self._size_bytes)


def _numbered(part: ExtentMap, base: int) -> ExtentMap:
    return ExtentMap(part.start, part.end, renumbered(part.ref, base))
