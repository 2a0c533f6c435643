"""Power is lost after every storage operation of every scenario: what is found is a prefix that keeps promises.

One run of a scenario is looked at after each of its operations; each look is continued with each fate of what was not
synced, recovered, and compared with the model byte for byte. Recovery itself loses power too, and storage fails in
every operation. Planted bugs show that the harness would notice.
"""

from __future__ import annotations

import errno
import random

import pytest

from asrfs.journal import recovery as recovery_room
from asrfs.journal.writer import Journal
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.host_scenarios import (
    BLOCK,
    SCENARIOS,
    Scenario,
    anything,
    applied_in_parts,
    block_of,
    killed_again_and_again,
    many_segments_one_sync,
    segments_used_again,
    write_and_sync_each,
    zeros_and_discards,
)
from tests.fakes.journal_world import JournalWorld, Look
from tests.fakes.power_loss import check_next_start, lose_power_everywhere, next_starts, watch


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
        world.disks[0].write(i * BLOCK, block_of(rng))
        world.sync()
    fault = world.storage.inject(Fault(0, kinds=frozenset(("datasync",))))
    for i in range(8):
        world.disks[i % 2].write(i * BLOCK, block_of(rng))
    with pytest.raises(OSError, match="sync failed"):
        world.sync()
    assert fault.fired == 1
    with pytest.raises(OSError, match="sync failed"):
        world.disks[0].write(0, block_of(rng))
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
    # Or a segment whose index was believed is too short to be read.
    with pytest.raises((AssertionError, OSError), match=r"I2|durable|I9|segment: ends at"):
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
