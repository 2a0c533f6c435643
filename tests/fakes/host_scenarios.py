"""What a machine's disks and journal go through while somebody watches: scenarios on a `JournalWorld`.

Each returns the world it ended in, which is another one after a restart.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

from tests.fakes.crash_storage import Fault
from tests.fakes.journal_world import JournalWorld

BLOCK = 4096
Scenario = Callable[[JournalWorld, random.Random], JournalWorld]


def block_of(rng: random.Random, count: int = 1) -> bytes:
    return rng.randbytes(count * BLOCK)


def write_and_sync_each(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(8):
        world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))
        if i % 2:
            world.sync()
    return world


def overwrite_without_sync(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for _ in range(14):
        world.disks[0].write(rng.randrange(3) * BLOCK, block_of(rng))
    return world


def unaligned_writes(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(7):
        length = rng.randrange(1, 9000)
        world.disks[i % 2].write(rng.randrange(40_960 - length), rng.randbytes(length))
        if i == 3:
            world.sync()
    return world


def zeros_and_discards(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(6):
        offset = rng.randrange(30_000)
        world.disks[0].zero(offset, rng.randrange(1, 9_000))
        world.disks[1].discard(rng.randrange(9) * BLOCK, BLOCK)
        world.disks[0].write(rng.randrange(15) * BLOCK, bytes(BLOCK) if i % 2 else block_of(rng))
        if i == 2:
            world.sync()
    world.disks[0].discard(0, world.disks[0].size_bytes)
    world.sync()
    return world


def the_short_last_block(world: JournalWorld, rng: random.Random) -> JournalWorld:
    disk = world.disks[0]
    last = disk.size_bytes - disk.size_bytes % BLOCK
    for _ in range(3):
        disk.write(last, rng.randbytes(disk.size_bytes - last))
        disk.write(disk.size_bytes - 512, rng.randbytes(512))
        world.sync()
        disk.zero(last - 100, 612)
    return world


def many_segments_one_sync(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(16):
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, block_of(rng))
    world.sync()
    world.disks[0].write(0, block_of(rng))
    return world


def blocks_that_end_in_zeros(world: JournalWorld, rng: random.Random) -> JournalWorld:
    """Of such a write the last sectors are as they were before: a part of it may be as good as all."""
    for i in range(24):
        world.disks[0].write(rng.randrange(15) * BLOCK, rng.randbytes(700).ljust(BLOCK, b"\0"))
        if i % 5 == 4:
            world.sync()
    return world


def spares_made_ahead(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(10):
        if i % 4 == 0:
            world.prepare_spare()
        world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))
        if i % 3 == 0:
            world.sync()
    return world


def segments_used_again(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(16):
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, block_of(rng))
        if i % 4 == 3:
            world.sync()
            world.apply()
    return world


def applied_in_parts(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(9):
        world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))
        if i % 2:
            world.sync()
            world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))
            world.apply(free=i % 3 == 0, spares_max=1)
    return world


def killed_again_and_again(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(5):
        for _ in range(i):
            world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))
        if i == 2:
            world.sync()
        world = world.restart()
    return world


def killed_between_applying(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(3):
        for _ in range(5):
            world.disks[1].write(rng.randrange(10) * BLOCK, block_of(rng))
        world.sync()
        world.apply(free=i != 1)
        world.disks[0].write(rng.randrange(10) * BLOCK, block_of(rng))
        world = world.restart()
    return world


def two_disks_markers_and_fills(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(4):
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, block_of(rng))
        world.disks[1].fill(rng.randrange(9) * BLOCK, 2 * BLOCK)
        world.marker()
        world.disks[0].write(rng.randrange(10) * BLOCK + 512, rng.randbytes(512))
    return world


def written_while_syncing(world: JournalWorld, rng: random.Random) -> JournalWorld:
    """Others write while a sync runs, into the segment that is synced and into the next; it answers for none of it."""

    def write(count: int) -> None:
        for _ in range(count):
            world.disks[0].write(rng.randrange(15) * BLOCK, block_of(rng))

    for i in range(4):
        write(1 + i)
        world.sync_while(lambda: write(rng.randrange(4)), lambda: write(rng.randrange(3)))
        if i == 1:
            world.apply()
        if i == 2:
            world.sync()
            write(1)
    return world


def several(rng: random.Random) -> list[tuple[int, int, bytes]]:
    """Writes of one turn, on both disks, some over one another."""
    return [(rng.randrange(2), rng.randrange(6) * BLOCK, block_of(rng)) for _ in range(rng.randint(2, 3))]


def written_together(world: JournalWorld, rng: random.Random) -> JournalWorld:
    """Turns of several writes; now and then one does not fit in the segment, and each begins by itself."""
    done = {True: 0, False: 0}
    for turn in range(9):
        done[world.write_together(several(rng))] += 1
        if turn % 3 == 2:
            world.sync()
    assert all(done.values()), done
    world.apply()
    world.write_together(several(rng))
    return world


def a_turn_refused(world: JournalWorld, rng: random.Random) -> JournalWorld:
    """A full disk refuses a turn, of which most lies there whole; each write then has its place again by itself."""
    for _ in range(2):
        world = world.restart()  # so that there is room in the segment for all of the turn
        world.sync()
        fault = world.storage.inject(Fault(0, errno.ENOSPC, kinds=frozenset(("write",)), partial=0.8))
        assert not world.write_together([(0, block * BLOCK, block_of(rng)) for block in range(3)])
        assert fault.fired
        world.sync()
        world.write_together(several(rng))
    return world


def anything(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for _ in range(40):
        step = rng.randrange(11)
        disk = world.disks[rng.randrange(2)]
        length = rng.randrange(1, 3 * BLOCK)
        offset = rng.randrange(disk.size_bytes - length)
        if step < 2:
            world.write_together(several(rng))
        elif step < 4:
            disk.write(rng.randrange(10) * BLOCK, block_of(rng))
        elif step == 4:
            disk.write(offset, rng.randbytes(length))
        elif step == 5:
            disk.zero(offset, length)
        elif step == 6:
            disk.discard(offset, length)
        elif step == 7:
            world.sync()
        elif step == 8:
            world.apply(free=rng.random() < 0.7, spares_max=rng.randrange(3))
        elif step == 9:
            disk.fill(offset, length)
        else:
            world = world.restart()
    return world


SCENARIOS: tuple[Scenario, ...] = (
    write_and_sync_each,
    blocks_that_end_in_zeros,
    overwrite_without_sync,
    unaligned_writes,
    zeros_and_discards,
    the_short_last_block,
    many_segments_one_sync,
    spares_made_ahead,
    segments_used_again,
    applied_in_parts,
    killed_again_and_again,
    killed_between_applying,
    two_disks_markers_and_fills,
    written_while_syncing,
    written_together,
    a_turn_refused,
    anything,
)
IN_MEMORY_ONLY = (written_while_syncing, a_turn_refused)
"""They look into their storage, or break it."""
