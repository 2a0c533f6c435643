"""Power is lost after every storage operation of every scenario: what is found is a prefix that keeps promises.

One run of a scenario is looked at after each of its operations; each look is continued with each fate of what was not
synced, recovered, and compared with the model byte for byte. Recovery itself loses power too, and storage fails in
every operation. Planted bugs show that the harness would notice.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator

import pytest

from asrfs.errors import IntegrityError
from asrfs.journal import recovery as recovery_room
from asrfs.journal.writer import Journal
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.journal_world import JournalWorld, Look, Model

BLOCK = 4096
Scenario = Callable[[JournalWorld, random.Random], JournalWorld]


# ---- scenarios: each returns the world it ended in, which is another one after a restart ----


def _block(rng: random.Random, count: int = 1) -> bytes:
    return rng.randbytes(count * BLOCK)


def write_and_sync_each(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(8):
        world.disks[0].write(rng.randrange(15) * BLOCK, _block(rng))
        if i % 2:
            world.sync()
    return world


def overwrite_without_sync(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for _ in range(14):
        world.disks[0].write(rng.randrange(3) * BLOCK, _block(rng))
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
        world.disks[0].write(rng.randrange(15) * BLOCK, bytes(BLOCK) if i % 2 else _block(rng))
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
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, _block(rng))
    world.sync()
    world.disks[0].write(0, _block(rng))
    return world


def spares_made_ahead(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(10):
        if i % 4 == 0:
            world.prepare_spare()
        world.disks[0].write(rng.randrange(15) * BLOCK, _block(rng))
        if i % 3 == 0:
            world.sync()
    return world


def segments_used_again(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(16):
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, _block(rng))
        if i % 4 == 3:
            world.sync()
            world.apply()
    return world


def applied_in_parts(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(9):
        world.disks[0].write(rng.randrange(15) * BLOCK, _block(rng))
        if i % 2:
            world.sync()
            world.disks[0].write(rng.randrange(15) * BLOCK, _block(rng))
            world.apply(free=i % 3 == 0, spares_max=1)
    return world


def killed_again_and_again(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(5):
        for _ in range(i):
            world.disks[0].write(rng.randrange(15) * BLOCK, _block(rng))
        if i == 2:
            world.sync()
        world = world.restart()
    return world


def killed_between_applying(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(3):
        for _ in range(5):
            world.disks[1].write(rng.randrange(10) * BLOCK, _block(rng))
        world.sync()
        world.apply(free=i != 1)
        world.disks[0].write(rng.randrange(10) * BLOCK, _block(rng))
        world = world.restart()
    return world


def two_disks_markers_and_fills(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for i in range(4):
        world.disks[i % 2].write(rng.randrange(10) * BLOCK, _block(rng))
        world.disks[1].fill(rng.randrange(9) * BLOCK, 2 * BLOCK)
        world.marker()
        world.disks[0].write(rng.randrange(10) * BLOCK + 512, rng.randbytes(512))
    return world


def anything(world: JournalWorld, rng: random.Random) -> JournalWorld:
    for _ in range(40):
        step = rng.randrange(11)
        disk = world.disks[rng.randrange(2)]
        length = rng.randrange(1, 3 * BLOCK)
        offset = rng.randrange(disk.size_bytes - length)
        if step < 4:
            disk.write(rng.randrange(10) * BLOCK, _block(rng))
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
    anything,
)


# ---- the harness ----


def watch(scenario: Scenario, rng: random.Random, *, plant: str = "", steals: bool = False) -> list[Look]:
    """Run a scenario once; a look at it after each operation of its storage. `plant`: a promise the storage breaks."""
    looks: list[Look] = []
    world = JournalWorld(CrashStorage(), steals=steals, looks=looks)
    if plant:
        setattr(world.storage, plant, False)
    try:
        world = scenario(world, rng)
        world.storage.after_operation = None
        world.check()
    finally:
        world.close()
    return looks


def next_starts(look: Look, rng: random.Random) -> Iterator[tuple[str, CrashStorage]]:
    """What the next start can find: after a kill, and after a power loss with each fate of what was not synced."""
    yield "killed", look.storage.killed()
    for fate in Fate:
        yield fate.value, look.storage.crash(fate, rng)


def check_next_start(storage: CrashStorage, model: Model, looks: list[Look] | None = None) -> None:
    """Recovery finds a prefix that keeps promises, byte for byte, and the machine goes on from there."""
    world = JournalWorld(storage, model.copy(), looks=looks)
    try:
        world.check()
        world.disks[0].write(0, b"after the crash ".ljust(BLOCK, b"."))
        world.sync()
        world.check()
    finally:
        storage.after_operation = None
        world.close()


def lose_power_everywhere(scenario: Scenario, rng: random.Random, *, plant: str = "", steals: bool = False) -> int:
    """Every operation of a scenario × every fate. Returns how many crashes there were."""
    crashes = 0
    for number, look in enumerate(watch(scenario, rng, plant=plant, steals=steals)):
        for what, found in next_starts(look, rng):
            crashes += 1
            try:
                check_next_start(found, look.model)
            except (AssertionError, IntegrityError) as error:
                raise AssertionError(
                    f"crash after operation {number} ({look.kind} {look.name}), {what}: {error}"
                ) from error
    return crashes


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_i1_i2_i3_i9_power_loss_after_every_operation(scenario: Scenario, rng: random.Random) -> None:
    """I1: no image is ahead of the journal. I2: what a sync promised is there. I3, host part: what a reader was given
    as durable is there. I9: what is there is a prefix, byte for byte."""
    assert lose_power_everywhere(scenario, rng) >= 5 * 12


def test_i2_power_loss_during_recovery(rng: random.Random) -> None:
    crashes = 0
    for scenario in (many_segments_one_sync, segments_used_again, killed_again_and_again, anything):
        for look in rng.sample(watch(scenario, rng), 8):
            for _, found in next_starts(look, rng):
                again: list[Look] = []
                check_next_start(found, look.model, again)
                for second in again:
                    crashes += 1
                    check_next_start(second.storage.crash(rng.choice(list(Fate)), rng), second.model)
    assert crashes >= 600


@pytest.mark.parametrize("at", range(4))
def test_i2_after_a_failed_sync_the_next_start_writes_what_it_finds_again(at: int, rng: random.Random) -> None:
    """The kernel holds bytes for clean whose sync failed: visible to the next start, gone at the next power loss."""
    world = JournalWorld(CrashStorage())
    for i in range(at):
        world.disks[0].write(i * BLOCK, _block(rng))
        world.sync()
    fault = world.storage.inject(Fault(0, kinds=frozenset(("datasync",))))
    for i in range(8):
        world.disks[i % 2].write(i * BLOCK, _block(rng))
    with pytest.raises(OSError, match="sync failed"):
        world.sync()
    assert fault.fired == 1
    with pytest.raises(OSError, match="sync failed"):
        world.disks[0].write(0, _block(rng))
    world = world.restart()
    found = world.recovered.last_lsn
    assert found == at + 8, "a killed process loses nothing"
    assert world.journal.durable_lsn == found, "so it may be shipped and applied"
    world.model.promised_lsn = found
    world.close()
    for fate in Fate:
        check_next_start(world.storage.crash(fate, rng), world.model)


# ---- planted bugs: the harness must notice ----


def test_i2_negative_control_a_sync_that_does_nothing(rng: random.Random) -> None:
    with pytest.raises(AssertionError, match="I2"):
        lose_power_everywhere(write_and_sync_each, rng, plant="honours_datasync")


def test_i2_negative_control_names_that_are_not_synced(rng: random.Random) -> None:
    with pytest.raises(AssertionError, match=r"I2|durable"):
        lose_power_everywhere(many_segments_one_sync, rng, plant="honours_directory_sync")


def test_i2_negative_control_sealed_segments_are_not_synced(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Journal._commit

    def forgets_sealed(journal: Journal) -> OSError | None:
        journal._unsynced.clear()
        return real(journal)

    monkeypatch.setattr(Journal, "_commit", forgets_sealed)
    with pytest.raises(AssertionError, match=r"I2|durable"):
        lose_power_everywhere(many_segments_one_sync, rng)


def test_i2_negative_control_recovery_does_not_sync_what_it_found(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(recovery: recovery_room._Recovery) -> None:
        for number in recovery._torn:
            recovery._set_free(number)

    monkeypatch.setattr(recovery_room._Recovery, "_finish", finish)
    with pytest.raises(AssertionError, match=r"I2|durable|I1"):
        for _ in range(3):
            lose_power_everywhere(killed_again_and_again, rng)


def test_i2_negative_control_recovery_only_syncs_what_a_failed_sync_left(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_room._Recovery, "_write_again", lambda recovery, file, segment: None)
    with pytest.raises(AssertionError, match=r"I2|durable"):
        for at in range(4):
            test_i2_after_a_failed_sync_the_next_start_writes_what_it_finds_again(at, rng)


def test_i1_negative_control_an_applier_that_steals(rng: random.Random) -> None:
    with pytest.raises(AssertionError, match=r"I1|I2|I9|durable"):
        lose_power_everywhere(applied_in_parts, rng, steals=True)


# ---- storage fails in every operation ----


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("scenario", [many_segments_one_sync, segments_used_again, zeros_and_discards])
def test_i2_every_operation_fails(scenario: Scenario, error: int, for_ever: bool, rng: random.Random) -> None:
    seed = rng.random()
    storage = CrashStorage()
    world = JournalWorld(storage)
    before = storage.operations
    scenario(world, random.Random(seed)).close()
    operations = storage.operations - before
    assert operations >= 20
    refused: set[int | None] = set()
    for at in range(operations):
        storage = CrashStorage()
        world = JournalWorld(storage)
        storage.inject(Fault(at, error, for_ever=for_ever, partial=rng.random() * 0.99))
        try:
            scenario(world, random.Random(seed))
        except OSError as raised:
            refused.add(raised.errno)
        storage.assert_fired()
        world.close()
        for fate in (Fate.LOST, Fate.TORN):
            check_next_start(storage.crash(fate, rng), world.model)
    assert refused <= {error, errno.EIO}
    assert refused
