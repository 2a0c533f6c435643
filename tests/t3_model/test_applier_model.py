"""The applier against a model: any history, cut into any rounds, with power lost between any two operations.

A run is looked at after each of its storage operations; each look is continued with each fate of what was not synced:
the machine starts again, its disks are compared with the model byte for byte, the images must hold nothing that was
not durable (I1), and applying the rest must make the images equal to the model (I9). A planted thief shows that the
harness would notice.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from asrfs.journal.reader import JournalReader
from asrfs.replication.applier import Applier
from tests.fakes.applied_world import AppliedWorld
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.journal_world import MACHINE_ID, JournalWorld, Look

BLOCK = 4096
SIZES = (61_952, 40_960)


def change_something(world: JournalWorld, rng: random.Random) -> None:
    """One random change of one disk, or a marker, or a sync."""
    disk = rng.choice(world.disks)
    kind = rng.random()
    offset = rng.randrange(disk.size_bytes // BLOCK) * BLOCK
    length = min(rng.randint(1, 3) * BLOCK, disk.size_bytes - offset)
    if kind < 0.6:
        disk.write(offset, rng.randbytes(length))
    elif kind < 0.7:
        disk.zero(offset, length)
    elif kind < 0.8:
        disk.discard(offset, length)
    elif kind < 0.85:
        disk.discard(0, disk.size_bytes)
    elif kind < 0.9:
        world.marker()
    else:
        world.sync()


def new_world(rng: random.Random, looks: list[Look] | None = None) -> JournalWorld:
    return JournalWorld(CrashStorage(), sizes=SIZES, seed=rng.randrange(1 << 30), looks=looks)


@pytest.mark.parametrize("number", range(60))
def test_i9_any_split_of_a_history_gives_the_model(number: int, rng: random.Random) -> None:
    world = new_world(rng)
    applied = AppliedWorld(world, rng)
    for _ in range(rng.randint(5, 60)):
        change_something(world, rng)
        if rng.random() < 0.2:
            applied.apply_once()
            images = [applied.image(slot) for slot in range(len(SIZES))]
            world.model.assert_image_never_ahead(images, world.journal.durable_lsn)
    applied.finish()
    world.close()


def run_history(rng: random.Random, looks: list[Look], *, steal: bool = False) -> None:
    world = new_world(rng, looks)
    applied = AppliedWorld(world, rng)
    for step in range(14):
        change_something(world, rng)
        if step % 4 == 3:
            if not steal:
                world.sync()
            applied.apply_once(steal=steal)
    world.close()


def continue_after_power_loss(look: Look, fate: Fate, rng: random.Random) -> None:
    world = JournalWorld(look.storage.crash(fate, rng), look.model.copy(), sizes=SIZES)
    world.check()
    AppliedWorld(world, rng).finish()
    world.close()


@pytest.mark.parametrize("fate", list(Fate))
@pytest.mark.parametrize("number", range(3))
def test_i1_i9_power_lost_between_any_two_operations(number: int, fate: Fate, rng: random.Random) -> None:
    looks: list[Look] = []
    run_history(rng, looks)
    assert {"write", "datasync", "rename"} <= {look.kind for look in looks}
    for look in looks:
        continue_after_power_loss(look, fate, rng)


def test_i1_a_thief_would_be_noticed(rng: random.Random) -> None:
    """Applying records that are not durable yet must turn this harness red."""

    def is_red(look: Look) -> bool:
        try:
            continue_after_power_loss(look, Fate.LOST, rng)
        except Exception:
            return True
        return False

    def looks() -> list[Look]:
        found: list[Look] = []
        run_history(rng, found, steal=True)
        return found

    assert any(is_red(look) for _ in range(8) for look in looks()), "one history in fifty has nothing to steal"


def _fail_sync(storage: CrashStorage) -> Fault:
    return storage.inject(Fault(at=0, kinds=frozenset(("datasync",))))


def _fail_write(storage: CrashStorage) -> Fault:
    return storage.inject(Fault(at=1, error=errno.ENOSPC, kinds=frozenset(("write",)), partial=0.5))


@pytest.mark.parametrize("fail", [_fail_sync, _fail_write])
def test_i4_a_failed_round_moves_no_position(fail: Callable[[CrashStorage], Fault], rng: random.Random) -> None:
    """What could not be written or synced is not applied; after the next start it is applied again from the journal."""
    world = new_world(rng)
    applied = AppliedWorld(world, rng)
    for block in (1, 3, 5):
        world.disks[0].write(block * BLOCK, rng.randbytes(BLOCK))
        world.disks[1].write(block * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    applied.applier = Applier(JournalReader(world.journal_storage, MACHINE_ID), applied.positions, applied.images)
    fault = fail(world.storage)
    with pytest.raises(OSError):
        applied.apply_once()
    assert fault.fired == 1
    assert applied.positions.saved.applied.lsn == 0
    world.close()
    for fate in Fate:
        after = JournalWorld(world.storage.crash(fate, rng), world.model.copy(), sizes=SIZES)
        after.check()
        AppliedWorld(after, rng).finish()
        after.close()


@pytest.mark.parametrize("at", range(12))
def test_i1_i9_after_a_failed_sync_everything_since_the_last_good_one_is_written_again(
    at: int, rng: random.Random
) -> None:
    """A failed datasync is final for the bytes before it; the applier goes on only by writing them anew."""
    world = new_world(rng)
    applied = AppliedWorld(world, rng)
    applied.applier = Applier(
        JournalReader(world.journal_storage, MACHINE_ID),
        applied.positions,
        applied.images,
        round_bytes_max=BLOCK,
        rounds_max=2,
    )
    for i in range(8):
        world.disks[i % 2].write(i * BLOCK, rng.randbytes(BLOCK))
    world.sync()
    fault = world.storage.inject(Fault(at=at, kinds=frozenset(("datasync",))))
    failures = 0
    while applied.positions.saved.applied.lsn < world.journal.durable_lsn:
        try:
            applied.apply_once()
        except OSError:
            failures += 1
    assert failures == fault.fired
    assert at >= 10 or fault.fired == 1, "two images and the positions are synced in each of four spans"
    expected = world.model.disks_at(8)
    lost = world.storage.crash(Fate.LOST, rng)
    for slot in range(len(SIZES)):
        assert lost.open(f"images/{slot}").read_at(SIZES[slot], 0) == expected[slot], "I9: applied, but not durable"
    world.close()


def test_i9_an_image_never_goes_back_while_positions_may_be_saved(rng: random.Random) -> None:
    """Only the save failed. Whoever saves next, whenever, saves what is true of the images at that instant."""
    world = new_world(rng)
    applied = AppliedWorld(world, rng)
    applied.applier = Applier(
        JournalReader(world.journal_storage, MACHINE_ID), applied.positions, applied.images, round_bytes_max=1
    )
    for _ in range(4):
        world.disks[0].write(0, rng.randbytes(BLOCK))
    world.sync()
    fault = world.storage.inject(Fault(at=0, error=errno.ENOSPC, kinds=frozenset(("rename",))))
    with pytest.raises(OSError):
        applied.apply_once()
    assert fault.fired == 1

    def another_task_saves_and_all_are_killed(kind: str, name: str) -> None:
        if not name.startswith("images/"):
            return
        world.storage.after_operation = None
        applied.positions.save()
        after = JournalWorld(world.storage.killed(), world.model.copy(), sizes=SIZES)
        after.check()
        after.close()
        world.storage.after_operation = another_task_saves_and_all_are_killed

    world.storage.after_operation = another_task_saves_and_all_are_killed
    applied.apply_once()
    world.storage.after_operation = None
    assert applied.positions.saved.applied.lsn == 4
    world.close()
