"""The store loses power, or is killed, after every operation on its objects: every acknowledged LSN is still there.

One run of ingest is looked at after each operation; each look is continued with each fate of what was not synced and
with the catalog as it was, set back, or gone. Every listed point must then be the model's bytes, and the history goes
on to its end. Planted bugs show that the harness would notice.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from asrfs.errors import AsrfsError
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from replica_store.ingest import ingester as ingester_room
from replica_store.ingest.ingester import Ingester, Taken
from replica_store.points import builder, kept_maps
from replica_store.points.history import History
from replica_store.points.run import Run
from replica_store.vault import listing as listing_room
from replica_store.vault import vault as vault_room
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.schema import REBUILDABLE
from tests.fakes.crash_storage import CHANGING, CrashStorage, Fate, Fault
from tests.fakes.rebuild_world import (
    RebuildLook,
    check_rebuilt,
    check_restrictions,
    new_rebuild_world,
    put_catalog,
    rebuild,
)
from tests.fakes.store_power_loss import check_next_start, lose_power_everywhere, new_world
from tests.fakes.vault_world import MACHINE_ID, StoreLook, VaultWorld, listed

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.timeout(240)
def test_i3_i5_i9_the_store_loses_power_after_every_operation(scratch: Path, rng: random.Random) -> None:
    assert lose_power_everywhere(scratch, rng) >= 250


def test_i3_a_catalog_made_again_is_the_one_that_was_lost(scratch: Path, rng: random.Random) -> None:
    world = new_rebuild_world(scratch, rng)
    tables = {name: world.vault.catalog.table(name) for name in REBUILDABLE}
    world.vault.close()
    after = world.next_start(world.storage.crash(Fate.LOST, rng), None)
    check_restrictions(after.vault.catalog)
    assert {name: after.vault.catalog.table(name) for name in REBUILDABLE} == tables
    after.vault.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_i3_every_operation_fails(error: int, scratch: Path, rng: random.Random) -> None:
    """What fails is not acknowledged; the next session of the same store goes on, and so does one after a crash."""
    for at in range(0, 60, 2):
        world = new_world(scratch, rng)
        fault = world.storage.inject(Fault(at, error, kinds=CHANGING, partial=rng.random() * 0.99))
        errors = world.ingest(rng)
        if not fault.fired:
            break
        assert [each.retryable for each in errors] == [True]
        look = StoreLook("fault", str(at), world.storage.killed(), world.acknowledged, tuple(world.catalogs))
        assert world.ingest(rng) == [], "the same process goes on"
        world.check(rng)
        for fate in (Fate.LOST, Fate.SUBSET):
            check_next_start(world, look, look.storage.crash(fate, rng), look.catalogs[-1], rng)
        world.vault.close()
        shutil.rmtree(world.root)
    assert at >= 30, "the fault struck many times"


@pytest.mark.parametrize("is_rebuilt", [False, True], ids=["adopted", "rebuilt"])
def test_i5_no_point_is_listed_behind_a_missing_record(is_rebuilt: bool, scratch: Path, rng: random.Random) -> None:
    """Objects behind a hole are there and whole, and none of their points counts."""
    world = new_world(scratch, rng)
    assert world.ingest(rng) == []
    rows = world.vault.objects_of(MACHINE_ID, world.history.last_lsn)
    hole = rows[len(rows) // 2]
    behind = [lsn for lsn in listed(world.history, world.history.last_lsn) if lsn >= hole.first_lsn]
    assert behind
    world.vault.objects.delete(hole.name)
    before = [catalog for catalog in world.catalogs if received_by(world, catalog) < hole.first_lsn][-1]
    if is_rebuilt:
        after, damages = world.rebuilt(world.storage)
        assert len(damages) == 1
        assert f"LSN {hole.first_lsn}..{hole.last_lsn} is missing" in damages[0]
    else:
        after = world.next_start(world.storage, before)
        after.begin()
    assert after.vault.received_lsn(MACHINE_ID) == hole.first_lsn - 1
    points = [point.lsn for point in after.vault.points(MACHINE_ID)]
    assert points == listed(world.history, hole.first_lsn - 1)
    after.check(rng)
    after.vault.close()
    world.vault.close()


def received_by(world: VaultWorld, catalog: bytes) -> int:
    after = world.next_start(world.storage, catalog)
    received = after.vault.received_lsn(MACHINE_ID)
    after.vault.close()
    return received


def test_i6_what_a_superseded_side_left_without_a_row_is_never_taken_in(scratch: Path, rng: random.Random) -> None:
    """It died between object and row; by the next start the machine has another epoch."""
    world = new_world(scratch, rng)
    looks = world.look_at_everything()
    assert world.ingest(rng) == []
    world.look_away()
    world.vault.close()
    linked = [look for look in looks if look.kind == "sync_directory" and look.name.endswith("/log")]
    for look in rng.sample(linked, 5):
        after = world.next_start(look.storage.killed(), look.catalogs[-1])
        received = after.vault.received_lsn(MACHINE_ID)
        with after.vault.catalog.transaction():
            after.vault.catalog.put_machine(replace(after.vault.machine("web1"), epoch=2))
        _, position, _ = after.begin()
        assert (position.epoch, position.lsn) == (2, received)
        after.vault.close()


def test_i3_power_loss_while_the_catalog_is_made_again(scratch: Path, rng: random.Random) -> None:
    """At each step there is the old catalog with its log, or the new one without it, or none."""
    world = new_rebuild_world(scratch, rng)
    looks: list[RebuildLook] = []
    rebuild(world, put_catalog(world.catalogs[-1]), world.storage.killed(), looks)
    assert {"create", "unlink", "rename", "sync_directory"} <= {look.kind for look in looks}
    for look in looks:
        for fate in Fate:
            check_rebuilt(world, look, look.files.crash(fate, rng), look.objects.crash(fate, rng))
    world.vault.close()


# ---- planted bugs: the harness must notice ----


def acknowledges_before_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is stored when the next one comes."""
    real = Ingester.take
    waiting: list[list[ObjectReceived]] = []

    def take(self: Ingester, batch: list[ObjectReceived]) -> Taken:
        if waiting:
            real(self, waiting.pop())
        waiting.append(batch)
        said = [Acknowledge(lsn=each.begin.last_lsn, digest=each.content[-32:].hex()) for each in batch]
        return Taken(said, None)

    monkeypatch.setattr(Ingester, "take", take)


def does_not_sync_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CrashStorage, "honours_datasync", property(lambda self: False, lambda self, value: None), raising=False
    )


def does_not_sync_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CrashStorage, "honours_directory_sync", property(lambda self: False, lambda self, value: None), raising=False
    )


def does_not_settle_what_it_adopts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectoryObjects, "settle", lambda self, prefix: None)


def adopts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingester_room, "adopt", lambda vault, machine: [])


def lists_points_inside_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (vault_room, listing_room):
        monkeypatch.setattr(room, "gap_at", lambda gaps, lsn: None)


def believes_checkpoints_of_any_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that a catalog which was set back has never come to."""
    sound = builder.load_runs

    def load(history: History, machine_id: str, slot: int, lsn: int) -> list[Run]:
        with mock.patch.object(kept_maps, "is_of_history", return_value=True):
            return sound(history, machine_id, slot, lsn)

    monkeypatch.setattr(builder, "load_runs", load)


PLANTS: dict[Plant, str] = {
    believes_checkpoints_of_any_history: "I9|does not have the log object",
    acknowledges_before_it_stores: "I3",
    does_not_sync_the_object: "checksum|magic|short|bytes|log object|I3",
    does_not_sync_the_name: "no such object|missing|I3",
    does_not_settle_what_it_adopts: "no such object|missing|I3",
    adopts_nothing: "I3|exists|assert",
    lists_points_inside_a_gap: "I5",
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_i3_i5_negative_control(
    plant: Plant, scratch: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, AsrfsError), match=PLANTS[plant]):
        lose_power_everywhere(scratch, rng)
