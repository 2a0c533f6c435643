"""Map checkpoints as runs: which of them describe a disk of this history, reading them, and writing them.

A checkpoint is believed when the history has, where the checkpoint ends, the very log object that it names by digest,
and every seal in it holds. As the digests of a history chain, nothing before that place can differ: not after a change
of epoch, a catalog set back, a rebuild, or in a copy of the vault that went its own way. What is not believed is passed
over in silence: all it could say is in the objects, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from asrfs.errors import AsrfsError
from asrfs.format.log_object import SALT_BYTES
from asrfs.format.map_checkpoint import (
    MAP_VERSION,
    PART_EXTENTS,
    MapExtents,
    MapHeader,
    SealedMap,
    decode_map_header,
    encode_map,
    part_count_of,
)
from replica_store.points.extent_map import SECTOR_SHIFT, ExtentMap, join_refs, split_refs
from replica_store.points.history import History
from replica_store.points.run import Run
from replica_store.vault.map_files import MapName

_HEAD_BYTES = 4096
_THREADS = 4


def load_runs(history: History, machine_id: str, slot: int, lsn: int) -> list[Run]:
    """The runs of a disk from record 1 on that checkpoints hold, up to the last that ends at or before `lsn`."""
    runs: list[Run] = []
    names = [name for name in history.maps.names(machine_id) if name.slot == slot and name.lsn <= lsn]
    while (run := _first_sound(history, machine_id, following(names, runs[-1].lsn if runs else 0))) is not None:
        runs.append(run)
    return runs


def following(names: Iterable[MapName], lsn: int) -> list[MapName]:
    """Those that go on from `lsn`, the longest first."""
    return sorted((name for name in names if name.after_lsn == lsn < name.lsn), key=lambda name: -name.lsn)


def _first_sound(history: History, machine_id: str, names: Iterable[MapName]) -> Run | None:
    return next(filter(None, (load_run(history, machine_id, name) for name in names)), None)


def is_of_history(history: History, machine_id: str, lsn: int, digest: bytes) -> bool:
    """Whether the log object of this history that ends at `lsn` has a digest that begins so."""
    row = history.object_with(machine_id, lsn)
    return row is not None and row.last_lsn == lsn and row.digest.startswith(digest)


def open_map(history: History, machine_id: str, name: MapName) -> SealedMap | None:
    """The checkpoint, with its seals still closed; None if it is not one of this history."""
    where = str(name)
    with suppress(OSError, AsrfsError):
        head = history.maps.read_range(machine_id, name, 0, _HEAD_BYTES)
        header = decode_map_header(head, where)
        said = (header.machine_id.hex(), header.slot, header.after_lsn, header.lsn)
        if said != (machine_id, name.slot, name.after_lsn, name.lsn):
            return None
        if not is_of_history(history, machine_id, header.lsn, header.digest):
            return None
        if header.parts_offset > len(head):
            head = history.maps.read_range(machine_id, name, 0, header.parts_offset)
        return SealedMap(header, head, history.map_key(machine_id, header.salt), where)
    return None


def load_run(history: History, machine_id: str, name: MapName) -> Run | None:
    """The run that a checkpoint holds; None if it is not one of this history, or damaged."""
    sealed = open_map(history, machine_id, name)
    if sealed is None:
        return None
    header = sealed.header
    with suppress(OSError, AsrfsError):
        objects = sealed.objects(history.maps.read_range(machine_id, name, *sealed.extent(0)))
        start, end = np.empty(header.extent_count, np.int64), np.empty(header.extent_count, np.int64)
        ref = np.empty(header.extent_count, np.uint64)
        shift = np.uint64(SECTOR_SHIFT)

        def read(part: int) -> None:
            content = history.maps.read_range(machine_id, name, *sealed.extent(part))
            extents = sealed.extents(part, content)
            place = slice((part - 1) * PART_EXTENTS, (part - 1) * PART_EXTENTS + len(extents.start))
            start[place] = extents.start << shift
            end[place] = (extents.start + extents.length) << shift
            ref[place] = join_refs(extents.object, extents.position)

        _for_each(read, range(1, header.part_count))
        return Run(header.after_lsn, header.lsn, ExtentMap(start, end, ref), objects, header.digest)
    return None


def _for_each(call: Callable[[int], None], numbers: range) -> None:
    """Call with each number, from several threads where there are many. Raises what a call raises."""
    if len(numbers) <= _THREADS:
        for number in numbers:
            call(number)
        return
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(call, numbers))


def keep_run(history: History, machine_id: str, slot: int, run: Run) -> MapName:
    """Write a run of whole objects as a checkpoint. Under the lock. Raises OSError."""
    assert run.digest is not None
    count = len(run.extents)
    salt = os.urandom(SALT_BYTES)
    header = MapHeader(
        machine_id=bytes.fromhex(machine_id),
        version=MAP_VERSION,
        slot=slot,
        reserved=0,
        salt=salt,
        after_lsn=run.after_lsn,
        lsn=run.lsn,
        digest=run.digest,
        extent_count=count,
        object_count=len(run.objects.first_lsn),
        part_count=part_count_of(count),
    )
    pieces = encode_map(header, run.objects, _parts_of(run.extents), history.map_key(machine_id, salt))
    name = MapName.of(slot, run.after_lsn, run.lsn, run.digest)
    history.maps.put(machine_id, name, pieces)
    return name


def _parts_of(extents: ExtentMap) -> Iterator[MapExtents]:
    shift = np.uint64(SECTOR_SHIFT)
    for at in range(0, len(extents), PART_EXTENTS):
        part = slice(at, at + PART_EXTENTS)
        start, end = extents.start[part].astype(np.uint64) >> shift, extents.end[part].astype(np.uint64) >> shift
        yield MapExtents(start, end - start, *split_refs(extents.ref[part]))
