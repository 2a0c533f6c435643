"""Keeps the block maps of a machine small and a restart short: sealed segments get an index, old layers become tables.

    segment sealed and durable → its index is written → its layers become tables in that file → tables are merged

All of it is done behind the back of whoever writes, in a thread of its own, and held under the lock of the journal only
while a finished table takes the place of what it was made from. None of it is needed: where a file cannot be made or
read, the layers stay as they are, and the next start reads the segment instead.

The interpreter is shared with whoever writes, who must ask for it back after each system call: so the thread rests
after each few milliseconds of work, for longer than it worked, unless segments come faster than that.

The newest `LAYERS_KEPT` sealed segments keep their layers, which are the fastest to look at; so while the agent keeps
up, there are no tables. Indexes are never synced: a start checks what it finds of them.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby

from asrfs.format.segment_index import DiskColumns, SealedSegment, encode_segment_index
from asrfs.journal.block_map import BlockMap, Layer
from asrfs.journal.map_table import MERGED_AT_ONCE, MapTable, TableShape, merge, shape_of
from asrfs.journal.recovery import Recovered
from asrfs.journal.segments import index_name, remove_index
from asrfs.journal.writer import Journal
from asrfs.storage.interface import Storage

LAYERS_KEPT = 2
REST = 9
"""Seconds of rest for a second of work."""
HURRIED_REST = 1
DUE_MANY = 4
"""When so many segments wait, rest is short: their layers take memory."""

log = logging.getLogger(__name__)


class _Closing(Exception):
    """The rest is left: the next start does it."""


class MapKeeper:
    """For the maps, by slot, of the disks of a journal; more may be added while it works. `close` it after the journal.

    `storage`: the journal's. `ahead` False does everything within the journal's sync.
    """

    def __init__(
        self,
        journal: Journal,
        storage: Storage,
        maps: Mapping[int, BlockMap],
        recovered: Recovered,
        *,
        ahead: bool = True,
        layers_kept: int = LAYERS_KEPT,
    ) -> None:
        self._storage = storage
        self._lock = journal.lock
        self._maps = maps
        self._layers_kept = layers_kept
        # Segments that have an index and still their layers, oldest first, with the shapes of their tables.
        self._indexed: deque[tuple[int, dict[int, TableShape]]] = deque()
        self._change = threading.Condition()
        self._closing = threading.Event()
        self._worked_since = time.monotonic()
        self._due = deque(s for s in recovered.segments if s.number in recovered.whole and s.last_lsn >= s.first_lsn)
        self._thread: threading.Thread | None = None
        if ahead:
            self._thread = threading.Thread(target=self._run, name="journal-maps", daemon=True)
            self._thread.start()
        else:
            self._work()
        journal.when_sealed = self._take

    def close(self) -> None:
        """Finish the step in hand, leave the rest."""
        with self._change:
            self._closing.set()
            self._change.notify()
        if self._thread is not None:
            self._thread.join()

    def _take(self, sealed: Sequence[SealedSegment]) -> None:
        with self._change:
            self._due.extend(sealed)
            self._change.notify()
        if self._thread is None:
            self._work()

    def _run(self) -> None:
        with suppress(_Closing):
            while not self._closing.is_set():
                self._work()
                with self._change:
                    while not self._due and not self._closing.is_set():
                        self._change.wait()
                self._worked_since = time.monotonic()

    def _work(self) -> None:
        """All there is to do. Raises _Closing."""
        try:
            self._index_due()
            self._make_tables()
            self._merge()
        except OSError as error:
            log.info("block maps stay as they are: %s", error)

    def _rest(self) -> None:
        """After a step. Raises _Closing."""
        if self._thread is None:
            return
        rest = HURRIED_REST if len(self._due) > DUE_MANY else REST
        if self._closing.wait(rest * (time.monotonic() - self._worked_since)):
            raise _Closing
        self._worked_since = time.monotonic()

    # ---- steps ----

    def _index_due(self) -> None:
        """Index what was sealed. Raises _Closing, OSError."""
        while True:
            with self._change:
                if not self._due:
                    return
                segment = self._due.popleft()
            self._index(segment)
            self._rest()

    def _index(self, segment: SealedSegment) -> None:
        """Write the index of a segment, from its layers, which do not change any more. Raises OSError."""
        number = segment.number
        maps = list(self._maps.items())
        with self._lock:
            if any(block_map.has_dropped(number) for _, block_map in maps):
                return
            layers = {slot: block_map.layer(number) for slot, block_map in maps}
        disks = [_columns(slot, layer) for slot, layer in layers.items() if layer is not None]
        content, disks = encode_segment_index(segment, disks)
        remove_index(self._storage, number)
        file = self._storage.create(index_name(number))
        try:
            file.write_at((content,), 0)
        except OSError:
            remove_index(self._storage, number)
            raise
        finally:
            file.close()
        self._indexed.append((number, {disk.slot: shape_of(number, disk) for disk in disks}))

    def _make_tables(self) -> None:
        """Put tables in the place of all layers but the newest. Raises OSError."""
        while len(self._indexed) > self._layers_kept:
            number, shapes = self._indexed.popleft()
            for slot, shape in shapes.items():
                with suppress(FileNotFoundError):  # freed meanwhile
                    self._put(slot, MapTable(self._storage.open(index_name(number)), shape, number, number))

    def _merge(self) -> None:
        """Merge tables while there are enough of a size. Raises OSError."""
        for slot, block_map in list(self._maps.items()):
            while tables := self._pin_some(block_map):
                try:
                    merged = merge(self._storage, tables, self._between_steps)
                finally:
                    with self._lock:
                        for table in tables:
                            table.unpin()
                self._put(slot, merged)

    def _between_steps(self) -> None:
        """Of a merge, which may take a minute: a segment that has no index then must be read by the next start."""
        self._rest()
        self._index_due()

    def _pin_some(self, block_map: BlockMap) -> list[MapTable]:
        """Tables to merge, oldest first: neighbours of one level."""
        with self._lock:
            for tables in block_map.tables():
                for _, level in groupby(tables, lambda table: table.level):
                    same = list(level)[:MERGED_AT_ONCE]
                    if len(same) == MERGED_AT_ONCE:
                        for table in same:
                            table.pin()
                        return same
        return []

    def _put(self, slot: int, table: MapTable) -> None:
        with self._lock:
            block_map = self._maps.get(slot)
            replaced = None if block_map is None else block_map.put_table(table)
        if replaced is None:
            table.close()


def _columns(slot: int, layer: Layer) -> DiskColumns:
    blocks = sorted(layer.blocks)
    positions = array("Q", map(layer.blocks.__getitem__, blocks))
    return DiskColumns(slot, array("Q", blocks), positions, layer.zeros.starts, layer.zeros.ends)
