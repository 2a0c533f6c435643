"""Frees journal segments nobody needs (I4) and keeps spares ahead of the writer. Blocks.

Two threads may be in here at once: one that trims and one that makes spares.

A segment is freed when all of it is applied and acknowledged by the *saved* positions, or given up by the *saved* dirty
map, and only after the disk server has dropped its map: the caller asks for that first and passes on what it answered.
Where the store has gone back and that is not saved yet, the lower position in memory counts.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import pairwise
from typing import NamedTuple

from asrfs.format.segment import SEGMENT_BYTES
from asrfs.journal.segments import list_journal, segment_name
from asrfs.journal.spares import prepare_spare, trim
from asrfs.model.dirty_map import GivenUp
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.interface import Storage

SPARES_MIN = 2
SPARES_MAX = 8
RATE_WINDOW_S = 10.0
"""Freed segments are kept as spares for what was used in so long a time."""
RECYCLE_S = 2.0
"""About the time from a segment's end until it is freed. Only for this long new spares have to be made: making one
costs as much writing as filling it, and under steady writing segments come back as fast as they are used."""


CHANGING = 3
"""So many of the newest segments may still be cut: the open one by the next start; another lies ready behind it."""


class Limit(NamedTuple):
    """Segments up to `segment` that hold nothing behind `lsn` may go."""

    lsn: int
    segment: int


def freeable(positions: PositionsFile, given_up: GivenUp, dropped: Limit) -> Limit:
    """What may be freed: applied, and acknowledged or given up (I4), and `dropped` from the disk server's maps.

    The segment a cursor points into stays, so that a restart finds it. `dropped` is asked for by itself: the saved
    position may have moved on since the disk server was told, and it would read what was freed.
    """
    saved = positions.saved
    acknowledged = [given_up.needed_behind(each.acknowledged) for each in (saved, positions.current)]
    cursors = (saved.applied, *acknowledged)
    return Limit(
        min(dropped.lsn, *(cursor.lsn for cursor in cursors)),
        min(dropped.segment, *(cursor.segment - 1 for cursor in cursors)),
    )


class Trimmer:
    """For the journal at the root of `storage`. Times are monotonic seconds."""

    def __init__(self, storage: Storage, machine_id: bytes, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._storage = storage
        self._machine_id = machine_id
        self._segment_bytes = segment_bytes
        self._look_lock = threading.Lock()
        self._settled: dict[int, int] = {}
        self._cut: dict[int, int] = {}
        self._seen: deque[tuple[float, int]] = deque()
        self._seen_lock = threading.Lock()

    def trim(self, limit: Limit, now_s: float) -> list[int]:
        """Free what `limit` allows; returns the numbers of the segments."""
        return trim(
            self._storage,
            self._machine_id,
            limit.lsn,
            spares_max=self.spares_wanted(now_s, RATE_WINDOW_S),
            through_segment=limit.segment,
        )

    def prepare(self, now_s: float) -> bool:
        """Make one spare if fewer than wanted are there; whether it did. Raises OSError."""
        listing = list_journal(self._storage)
        newest = listing.segments[-1] if listing.segments else 0
        with self._seen_lock:
            self._seen.append((now_s, newest))
            while now_s - self._seen[0][0] > RATE_WINDOW_S:
                self._seen.popleft()
        if len(listing.spare_names()) >= self.spares_wanted(now_s, RECYCLE_S):
            return False
        prepare_spare(self._storage)
        return True

    def spares_wanted(self, now_s: float, window_s: float) -> int:
        """As many as segments were begun in the last `window_s` (at most RATE_WINDOW_S), within bounds."""
        with self._seen_lock:
            recent = [number for at, number in self._seen if now_s - at <= window_s]
        consumed = recent[-1] - recent[0] if recent else 0
        return min(SPARES_MAX, max(SPARES_MIN, consumed))

    def look(self) -> int:
        """See how long the segments are; the number of the oldest one kept, 0 when there is none. Raises OSError."""
        with self._look_lock:
            segments = list_journal(self._storage).segments
            short = {each: self._settled[each] if each in self._settled else self._short_by(each) for each in segments}
            # Whoever was seen while it could still be cut is looked at again, however many came since.
            self._settled = {number: short[number] for number in segments[:-CHANGING]}
            unused = {one: (following - one - 1) * self._segment_bytes for one, following in pairwise(segments)}
            self._cut = {number: by + unused.get(number, 0) for number, by in short.items()}
            return segments[0] if segments else 0

    def cut_bytes(self, first_segment: int) -> int:
        """By how much all segments from this one on are shorter than places in the journal count them, numbers that
        no segment has included, as they were when `look` was called last."""
        return sum(cut for number, cut in self._cut.items() if cut and number >= first_segment)

    def _short_by(self, number: int) -> int:
        try:
            file = self._storage.open(segment_name(number))
        except FileNotFoundError:
            return 0
        try:
            return max(0, self._segment_bytes - file.size())
        finally:
            file.close()
