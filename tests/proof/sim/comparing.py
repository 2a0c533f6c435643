"""Comparing in the simulation: the real comparer on both sides, and an oracle that knows what must come out.

What is looked at at one LSN must differ exactly where the model does. What is looked at at two moments must differ in
every chunk that no record between them touches and that is another one at the store, and in no such chunk that is not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio

from asrfs.format import kept_leaves as format_kept
from asrfs.format.record import Kind
from asrfs.model import digest_tree
from asrfs.model.digest_tree import Region
from asrfs.model.machine import DiskConfig
from asrfs.protocol.messages import Compare, Compared
from asrfs.replication import comparer, filler
from asrfs.replication.comparer import Comparer
from asrfs.replication.image_digests import digest_image
from replica_store.points import digests
from replica_store.points import kept_leaves as points_kept
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import ModelRecord, put_record

if TYPE_CHECKING:
    from tests.proof.sim.host import Host

CHUNK = 4096
NODE_CHUNKS = 4


@contextmanager
def small_chunks() -> Iterator[None]:
    """Leaves of a block and nodes of a few, for disks of a dozen."""
    values = {"LEAF_BYTES": CHUNK, "NODE_LEAVES": NODE_CHUNKS, "NODE_BYTES": CHUNK * NODE_CHUNKS, "CHUNK_BYTES": CHUNK}
    values_of: dict[Any, tuple[str, ...]] = {
        digest_tree: ("LEAF_BYTES", "NODE_LEAVES", "NODE_BYTES"),
        digests: ("LEAF_BYTES", "NODE_LEAVES"),
        points_kept: ("LEAF_BYTES",),
        format_kept: ("NODE_BYTES",),
        comparer: ("NODE_LEAVES",),
        filler: ("CHUNK_BYTES",),
    }
    patches = [mock.patch.object(room, name, values[name]) for room, names in values_of.items() for name in names]
    patches.append(mock.patch.object(digest_tree, "ZERO_LEAF", digest_tree.digest_of(bytes(CHUNK))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


class ImageDigester:
    """Digests images in a thread. `seen`: of each disk, between which LSNs it was when it was digested last.

    `bounds`: what every image has, and what none has more than.
    """

    def __init__(
        self, storage: CrashStorage, threads: trio.CapacityLimiter, bounds: Callable[[], tuple[int, int]]
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._bounds = bounds
        self.seen: dict[int, tuple[int, int]] = {}

    async def pace(self) -> None:
        await trio.lowlevel.checkpoint()

    async def digest(self, disk: DiskConfig, region: Region) -> bytes:
        file = self._storage.open(f"images/{disk.slot}")
        least, _ = self._bounds()
        try:
            found = await trio.to_thread.run_sync(digest_image, file, region, limiter=self._threads)
        finally:
            file.close()
        self.seen[disk.slot] = least, self._bounds()[1]
        return found.leaves


class WatchedComparer(Comparer):
    """Each answer is held against the model."""

    def __init__(self, host: Host, outlet: Any, digester: ImageDigester, *others: Any) -> None:
        super().__init__(outlet, digester, *others)
        self._host = host
        self._seen = digester.seen
        self._told: dict[int, tuple[int, int]] = {}

    async def _ask(self, request: Compare) -> Compared:
        answer = await super()._ask(request)
        self._told[request.slot] = answer.lsn, self._host.store.setbacks
        return answer

    async def _differing(
        self, disk: DiskConfig, region: Region, leaves: bytes, lsn: int, by_kept: bool = False
    ) -> list[int]:
        seen = (lsn, lsn) if lsn else self._seen[disk.slot]
        chunks = await super()._differing(disk, region, leaves, lsn, by_kept)
        told, setbacks = self._told[disk.slot]
        with self._host.watch.checking():
            assert lsn in (0, told), f"I9: compared at LSN {lsn} here and at LSN {told} there"
        if setbacks == self._host.store.setbacks and not self._host.store.in_doubt:
            with self._host.watch.checking():
                self._check(disk, region, seen, told, chunks)
        return chunks

    def _check(self, disk: DiskConfig, region: Region, seen: tuple[int, int], told: int, chunks: Sequence[int]) -> None:
        host, slot = self._host, disk.slot
        first, last = seen
        ours, theirs = host.model.disks_at(first)[slot], self._replica(told, slot)
        moved = array("Q")
        for record in host.model.records[first:last]:
            if record.slot == slot and record.length:
                moved.extend(range(record.offset // CHUNK, (record.offset + record.length - 1) // CHUNK + 1))
        for chunk in set(range(region.first_leaf, region.first_leaf + region.leaves)) - set(moved):
            extent = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            is_different, where = ours[extent] != theirs[extent], f"chunk {chunk} of {host.name}'s disk {slot}"
            at = f"between LSN {first} and {last} here, at LSN {told} there"
            assert is_different or chunk not in chunks, f"I9: {where} is equal {at}, and was found different"
            assert not is_different or chunk in chunks, f"I9: {where} is different {at}, and was found equal"

    def _replica(self, lsn: int, slot: int) -> bytearray:
        """The disk as a store has it that began with zeros and never got what was given up: a gap object says of disks,
        and of nothing else, while a folded stretch of zeros has records without payload."""
        host = self._host
        disks = [bytearray(len(content)) for content in host.model.initial]
        vault = host.store.vault
        given_up = [
            range(row.first_lsn, row.last_lsn + 1)
            for row in vault.objects_of(host.machine_id.hex(), lsn)
            if row.is_stretch and not (vault.object_index(row)[1].kind != Kind.DISK).any()
        ]
        records: Sequence[ModelRecord] = host.model.records[:lsn]
        for number, record in enumerate(records, 1):
            if not any(number in gap for gap in given_up):
                put_record(disks, record)
        return disks[slot]
