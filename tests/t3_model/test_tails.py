"""The store dies after every operation while a superseded host's tail comes: what was acknowledged of it is there, the
rest comes again, and neither it nor the history ever shows a byte of the other.

Each look is continued with each fate of what was not synced, on the catalog as it was, on one of before the tail, and
on one made from the objects alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from asrfs.errors import NotFoundError
from replica_store.points.builder import resolve
from replica_store.vault.scrub import scrub
from replica_store.vault.tails import tail_of
from tests.fakes.crash_storage import Fate
from tests.fakes.tail_world import (
    TAIL,
    check_state,
    hello_of,
    other_side,
    ship_history,
    supersede,
    take_tail,
    write_history,
)
from tests.fakes.vault_world import MACHINE_ID, StoreLook, VaultWorld

RECORDS = 40


def superseded(scratch: Path, rng: random.Random, *, records: int = RECORDS) -> tuple[VaultWorld, int]:
    """A store at the middle of the history of a host that was superseded, and what it has."""
    world = VaultWorld.new(scratch / "vault", seed=rng.getrandbits(30))
    write_history(world.history, rng, records)
    received = world.history.last_lsn // 2
    ship_history(world, received, rng)
    supersede(world)
    return world, received


@pytest.mark.timeout(240)
def test_i3_i7_the_store_dies_after_every_operation_while_a_tail_comes(scratch: Path, rng: random.Random) -> None:
    world, received = superseded(scratch, rng, records=16)
    hello = hello_of(world, received)
    catalog = world.catalogs[-1]
    looks = world.look_at_everything()
    take_tail(world, hello, rng)
    world.look_away()
    check_both(world, received, rng)
    whole = 0
    for look in looks:
        for fate in (Fate.KEPT, Fate.LOST, Fate.SUBSET):
            for start in (look.catalogs[-1], catalog, None):
                whole += _check_next_start(world, look, fate, start, received, rng)
    assert len(looks) > 30 and whole > 0
    world.vault.close()


def _check_next_start(
    world: VaultWorld, look: StoreLook, fate: Fate, catalog: bytes | None, received: int, rng: random.Random
) -> bool:
    """Whether it was whole by then."""
    after = world.next_start(look.storage.crash(fate, rng), catalog)
    tail = tail_of(after.vault.catalog, MACHINE_ID, 1)
    if tail is None or not tail.is_whole:
        with pytest.raises(NotFoundError):
            resolve(after.vault, "web1", TAIL)
    assert after.vault.machine("web1").epoch == 2, "I6"
    take_tail(after, hello_of(after, received), rng)
    check_both(after, received, rng)
    rebuilt, damages = after.rebuilt(after.storage)
    assert damages == [] and rebuilt.tables() == after.tables()
    rebuilt.vault.close()
    after.vault.close()
    return tail is not None and tail.is_whole


def check_both(world: VaultWorld, received: int, rng: random.Random) -> None:
    """The tail is the host's disks as it wrote them last; the history ends where it did, and all is sound."""
    last = world.history.last_lsn
    check_state(world, TAIL, world.history, last)
    check_state(world, "latest", world.history, received)
    assert world.vault.received_lsn(MACHINE_ID) == received
    world.acknowledged = received
    world.check(rng)
    scrubbed = scrub(world.vault, world.vault.machines())
    assert (scrubbed.damages, scrubbed.uncatalogued) == ([], [])


def test_i6_i7_the_other_side_goes_on_and_neither_shows_in_the_other(scratch: Path, rng: random.Random) -> None:
    world, received = superseded(scratch, rng)
    hello = hello_of(world, received)
    other = other_side(world, rng, 20)
    ship_history(world, received + 5, rng, other)
    take_tail(world, hello, rng)
    ship_history(world, other.last_lsn, rng, other)
    for after in (world, world.rebuilt(world.storage)[0]):
        check_state(after, TAIL, world.history, world.history.last_lsn)
        check_state(after, "latest", other, other.last_lsn)
        for lsn in range(received - 3, other.last_lsn + 1):
            check_state(after, f"lsn:{lsn}", other, lsn)
        for point in after.vault.points(MACHINE_ID):
            check_state(after, point.id, other, point.lsn)
        (tail,) = after.vault.tail_points(MACHINE_ID)
        assert (tail.lsn, tail.epoch, tail.name, tail.protected) == (world.history.last_lsn, 1, TAIL, True)
        check_state(after, tail.id, world.history, tail.lsn)
        after.vault.close()


def test_i7_a_tail_begins_where_the_host_last_heard_of_the_store(scratch: Path, rng: random.Random) -> None:
    """The last acknowledgements were lost: what the store has by then is in both. A host of which the store has
    nothing that it could go on from goes on from the newest that there is."""
    world, received = superseded(scratch, rng)
    heard = next(row.last_lsn for row in world.vault.objects_of(MACHINE_ID, received) if row.last_lsn >= received // 2)
    take_tail(world, hello_of(world, heard), rng)
    tail = tail_of(world.vault.catalog, MACHINE_ID, 1)
    assert tail is not None and tail.branch_lsn == heard < received
    check_both(world, received, rng)
    world.vault.close()


def test_i7_a_tail_of_a_host_that_heard_of_nothing_the_store_has(scratch: Path, rng: random.Random) -> None:
    world, received = superseded(scratch, rng)
    hello = hello_of(world, received)
    strange = type(hello)(**{name: getattr(hello, name) for name in hello.__struct_fields__} | {"last_digest": "junk"})
    take_tail(world, strange, rng)
    tail = tail_of(world.vault.catalog, MACHINE_ID, 1)
    assert tail is not None and tail.branch_lsn == received
    check_both(world, received, rng)
    world.vault.close()


def test_i5_a_tail_in_a_gap_is_kept_and_no_point(scratch: Path, rng: random.Random) -> None:
    world = VaultWorld.new(scratch / "vault", seed=1)
    history = world.history
    history.disk(0, size_bytes=1 << 20, gap=True)
    history.write()
    ship_history(world, history.last_lsn, rng)
    supersede(world)
    history.write()
    kept = take_tail(world, hello_of(world, 2), rng)
    assert (kept.lsn, kept.is_point) == (3, False)
    assert world.vault.tail_points(MACHINE_ID) == []
    with pytest.raises(NotFoundError):
        resolve(world.vault, "web1", TAIL)
    assert tail_of(world.vault.catalog, MACHINE_ID, 1) is not None
    world.vault.close()


def test_i7_damage_in_a_tail_is_found_and_is_none_of_the_history(scratch: Path, rng: random.Random) -> None:
    world, received = superseded(scratch, rng)
    take_tail(world, hello_of(world, received), rng)
    (name, *_) = sorted(name for name in world.vault.objects.list("machines/") if "/tail/0" in name)
    world.vault.objects.delete(name)
    (damage,) = scrub(world.vault, world.vault.machines()).damages
    assert damage.tail == 1 and damage.points == (TAIL,) and damage.first_lsn == received + 1
    rebuilt, damages = world.rebuilt(world.storage)
    assert rebuilt.vault.tail_points(MACHINE_ID) == [] and rebuilt.vault.received_lsn(MACHINE_ID) == received
    assert damages, "a rebuild says that something of a tail is missing"
    rebuilt.vault.close()
    world.vault.close()


def test_i7_the_tail_of_a_clone_leaves_the_history_where_both_were_the_same(scratch: Path, rng: random.Random) -> None:
    """Both wrote on in one epoch, then the other one went on in a new one."""
    world = VaultWorld.new(scratch / "vault", seed=1)
    write_history(world.history, rng, 10)
    common = world.history.last_lsn
    ship_history(world, common, rng)
    clone = other_side(world, rng, 10)
    write_history(world.history, rng, 10)
    ship_history(world, world.history.last_lsn, rng)
    supersede(world)
    taken = world.history
    world.history = clone
    take_tail(world, hello_of(world, common), rng)
    tail = tail_of(world.vault.catalog, MACHINE_ID, 1)
    assert tail is not None and tail.branch_lsn == common
    for after in (world, world.rebuilt(world.storage)[0]):
        check_state(after, TAIL, clone, clone.last_lsn)
        check_state(after, "latest", taken, taken.last_lsn)
        check_state(after, f"lsn:{common + 3}", taken, common + 3)
        after.vault.close()
