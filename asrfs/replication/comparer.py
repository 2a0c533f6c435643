"""Compares the images of disks with what the store has received of them, by digests; changes nothing.

    region ─▶ digests here (a process) ─▶ nodes ─▶ store ─▶ which nodes differ, their leaves ─▶ chunks that differ

The store may answer by digests it has kept where its caller allows it; proofs (`settle`, and a `compare` that says
nothing else) are of what both sides have stored, all of it read. A difference found by kept digests is shown by such a
proof, too, before anything is sent (`is_real`).

Both sides go on meanwhile. **Equal at any two moments is equal for good**: each byte of the image is its value after
some record, each of the store's after some other; the records between them are, or will be, in both histories and
carry the bytes themselves. So where the values agree, they agree after all records, and writes under way cost nothing.

What differs may be only a record on its way. Filling that again is harmless, and costs traffic: who fills lets come
what there is (`catch_up`); who must know looks again (`settle`), at one LSN on both sides:

    sync ─▶ applied that far ─▶ applier held at LSN n, digests here, applier goes on ─▶ acknowledged ≥ n ─▶ store: at n

A connection that is lost is waited for, and a region asked about again: what was compared stays compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from asrfs.errors import AsrfsError, IntegrityError, NotFoundError, TemporaryError
from asrfs.model.digest_tree import (
    NODE_LEAVES,
    TREE_DIGEST_BYTES,
    Region,
    different,
    leaf_count,
    node_digests,
    numbers_of,
    regions_of,
    regions_with,
)
from asrfs.model.machine import DiskConfig
from asrfs.protocol.messages import Compare, Compared
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.exact_images import ExactImages
from asrfs.replication.outlet import Outlet
from asrfs.replication.progress import Progress

AHEAD = 16
"""Regions digested here that wait for the store: both sides work at once, and this one while that one begins."""
PATIENCE_S = 600.0
"""For so long a lost connection is waited for."""
RETRY_S, RETRY_S_MAX = 0.5, 30.0
ROUNDS_MAX = 8

Step = Callable[[int, int], None]
"""Told how many bytes of how many are compared."""


class Digester(Protocol):
    """Digests images of this host."""

    async def pace(self) -> None:
        """Wait until it is time to read more."""

    async def digest(self, disk: DiskConfig, region: Region) -> bytes:
        """Of all leaves of the region, as they are in the image now. Raises TemporaryError."""


@dataclass(slots=True)
class Comparison:
    """`different`: by slot the numbers of the chunks that differ, ascending, 8 bytes each; slots without any are not
    there."""

    chunks_compared: int = 0
    different: dict[int, array[int]] = field(default_factory=dict)
    bytes_sent: int = 0

    @property
    def chunks_different(self) -> int:
        return sum(map(len, self.different.values()))


@dataclass(slots=True)
class Comparer:
    """One comparison at a time. `hurry_applied`, `hurry_shipped`: told of LSNs that are waited for."""

    outlet: Outlet
    digester: Digester
    server: DiskServer
    progress: Progress
    images: ExactImages
    hurry_applied: Callable[[int], None]
    hurry_shipped: Callable[[int], None]

    async def catch_up(self) -> None:
        """Wait until the store has all that was written by now, else that differs, and is sent once more as what fills
        the difference. A store that takes longer is not waited for; one that is away raises TemporaryError."""
        lsn = (await self.server.sync()).durable.lsn
        with trio.move_on_after(PATIENCE_S) as scope:
            await self._have_shipped(lsn)
        if scope.cancelled_caught and not self.outlet.is_open:
            raise TemporaryError("there is no connection to the store")

    async def compare(
        self, disks: Sequence[DiskConfig], step: Step = lambda done, total: None, *, by_kept: bool = False
    ) -> Comparison:
        """What may differ: of chunks not in it both sides are the same, or will be when all records have come.

        `by_kept`: of what its history has not written since an earlier comparison the store need not look at what it
        stores, so damage there since then is not found. Raises TemporaryError, RefusedError, and what else the store
        answers.
        """
        wanted = [(disk, region) for disk in disks for region in regions_of(disk.size_bytes)]
        result = Comparison(chunks_compared=sum(leaf_count(disk.size_bytes) for disk in disks))
        sent_before = self.outlet.bytes_sent
        total = sum(region.end - region.offset for _, region in wanted)
        done = 0
        slots = trio.Semaphore(AHEAD)
        failures: list[AsrfsError] = []
        found: dict[tuple[int, int], array[int]] = {}

        async def ask(disk: DiskConfig, region: Region, leaves: bytes) -> None:
            nonlocal done
            try:
                chunks = await self._differing(disk, region, leaves, 0, by_kept)
            except AsrfsError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
                return
            slots.release()
            if chunks:
                found[disk.slot, region.first] = array("Q", chunks)
            done += region.end - region.offset
            step(done, total)

        async with trio.open_nursery() as nursery:
            try:
                for disk, region in wanted:
                    await slots.acquire()
                    await self.digester.pace()
                    nursery.start_soon(ask, disk, region, await self.digester.digest(disk, region))
            except AsrfsError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        for (slot, _), chunks in sorted(found.items()):  # answers come in any order
            result.different.setdefault(slot, array("Q")).extend(chunks)
        result.bytes_sent = self.outlet.bytes_sent - sent_before
        return result

    async def settle(
        self, disks: Iterable[DiskConfig], found: Comparison, step: Step = lambda done, total: None
    ) -> Comparison:
        """What of `found` really differs, both sides looked at after the same record. Raises as `compare`."""
        settled = Comparison(found.chunks_compared)
        sent_before = self.outlet.bytes_sent
        regions = _regions_of(disks, found)
        lsn = (await self.server.sync()).durable.lsn if regions else 0
        for number, (disk, region) in enumerate(regions):
            if differing := await self._look_again(disk, region, lsn):
                settled.different.setdefault(disk.slot, array("Q")).extend(differing)
            step(number + 1, len(regions))
        settled.bytes_sent = found.bytes_sent + self.outlet.bytes_sent - sent_before
        return settled

    async def is_real(self, disks: Iterable[DiskConfig], found: Comparison) -> bool:
        """Whether any of `found` really differs: for who sends all of it then, since what was on its way may be sent
        twice. Looks no further than the first, and there at one node before it looks at more. Raises as `compare`."""
        regions = _regions_of(disks, found)
        if regions:
            disk, region = regions[0]
            regions.insert(0, (disk, region._replace(nodes=1)))
        lsn = (await self.server.sync()).durable.lsn if regions else 0
        for disk, region in regions:
            if await self._look_again(disk, region, lsn):
                return True
        return False

    async def _look_again(self, disk: DiskConfig, region: Region, lsn: int) -> Sequence[int]:
        """Chunks of the region that differ between the image and the store's state at one LSN, at least `lsn`."""
        for _ in range(ROUNDS_MAX):
            await self.digester.pace()
            self.hurry_applied(lsn)
            async with self.images.held(lsn) as exact:
                leaves = await self.digester.digest(disk, region)
            await self._have_shipped(exact)
            try:
                return await self._differing(disk, region, leaves, exact)
            except NotFoundError:
                await trio.sleep(RETRY_S)  # the store has no state at this LSN, only at others
        raise TemporaryError(f"the store has no state of disk {disk.name} that could be compared: try again later")

    async def _have_shipped(self, lsn: int) -> None:
        self.hurry_shipped(lsn)
        await self.progress.wait_until(lambda: self.progress.acknowledged.lsn >= lsn)

    async def _differing(
        self, disk: DiskConfig, region: Region, leaves: bytes, lsn: int, by_kept: bool = False
    ) -> list[int]:
        """Numbers of the chunks of a region that differ from the store's, at `lsn` or, for 0, at its newest."""
        request = Compare(
            number=0,
            slot=disk.slot,
            disk_id=disk.id,
            size_bytes=region.size_bytes,
            first=region.first,
            digests=node_digests(leaves),
            lsn=lsn,
            by_kept=by_kept,
        )
        answer = await self._ask(request)
        if lsn and answer.lsn != lsn:
            raise IntegrityError(f"the store compared LSN {answer.lsn} where LSN {lsn} was asked for")
        return chunks_in(answer, region, leaves)

    async def _ask(self, request: Compare) -> Compared:
        """Asked again while the connection comes and goes."""
        deadline, delay = trio.current_time() + PATIENCE_S, RETRY_S
        while True:
            try:
                return await self.outlet.ask(request)
            except (TemporaryError, NotFoundError) as error:  # or it has not heard of the disk yet
                if trio.current_time() >= deadline or (request.lsn and isinstance(error, NotFoundError)):
                    raise
            await trio.sleep(delay)
            delay = min(2 * delay, RETRY_S_MAX)
            with trio.move_on_at(deadline):
                await self.outlet.wait_open()


def _regions_of(disks: Iterable[DiskConfig], found: Comparison) -> list[tuple[DiskConfig, Region]]:
    return [
        (disk, region) for disk in disks for region in regions_with(found.different.get(disk.slot, ()), disk.size_bytes)
    ]


def chunks_in(answer: Compared, region: Region, leaves: bytes) -> list[int]:
    """Numbers, on the disk, of the chunks that differ, from the store's answer and our digests of the region's leaves.

    Raises IntegrityError for an answer that fits no such region.
    """
    nodes = numbers_of(answer.differs)
    if nodes and nodes[-1] >= region.nodes:
        raise IntegrityError(f"the store compared node {nodes[-1]} of a region that has {region.nodes}")
    ours = [leaf for node in nodes for leaf in _leaves_of(region, node)]
    if len(answer.leaves) != len(ours) * TREE_DIGEST_BYTES:
        raise IntegrityError(f"the store gave {len(answer.leaves)} bytes of digests for {len(ours)} chunks")
    kept = b"".join(leaves[leaf * TREE_DIGEST_BYTES : (leaf + 1) * TREE_DIGEST_BYTES] for leaf in ours)
    return [region.first_leaf + ours[place] for place in different(kept, answer.leaves)]


def _leaves_of(region: Region, node: int) -> range:
    """Numbers of a node's leaves, counted in the region."""
    return range(node * NODE_LEAVES, node * NODE_LEAVES + region.leaves_in(node))
