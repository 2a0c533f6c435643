"""A store while its disk or its catalog fails: with a host, at ingest alone, and at a rebuild."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

from asrfs.errors import AsrfsError
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.failing_catalog import CatalogFault, fail
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.pair_scenarios import PairScenario
from tests.fakes.rebuild_world import RebuildLook, check_rebuilt, new_rebuild_world, put_catalog, rebuild
from tests.fakes.replicated_world import PairLook, ReplicatedWorld
from tests.fakes.store_power_loss import check_next_start as check_store_start
from tests.fakes.store_power_loss import new_world
from tests.fakes.vault_world import StoreLook, VaultWorld
from tests.proof.failing.kinds import (
    CATALOG,
    DISK,
    FATES,
    FOR_EVER,
    IN_START,
    INGEST_STEP,
    NEVER,
    PAIR_STEP,
    SMALL_STEP,
    AnyFault,
    Failure,
    check_refusal,
    failing,
    note,
)
from tests.proof.level import Notes

# ---- with a host ----


def fail_pair(
    scenario: PairScenario, failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes
) -> None:
    seed = rng.random()
    store = VaultWorld.new(scratch / "vault", 1)
    found, catalog = store.storage.killed(), store.catalogs[-1]
    for is_host in (True, False):
        pair = ReplicatedWorld.new(store.next_start(found.killed(), catalog), random.Random(seed))
        probe = _disk_of(pair, is_host).inject(failure.at(NEVER, False, rng))
        scenario(pair)
        pair.close()
        for number in range(rng.randrange(PAIR_STEP), probe.seen, PAIR_STEP):
            with failing(number, failure, f"{mode} {'of the host' if is_host else 'of the store'}"):
                pair = ReplicatedWorld.new(store.next_start(found.killed(), catalog), random.Random(seed))
                fault = _disk_of(pair, is_host).inject(failure.at(number, mode == FOR_EVER, rng))
                _play_pair(scenario, pair, fault)
                look = pair.look("host" if is_host else "store", "fault", str(number))
                pair.close()
                _check_pair(store, look, rng)
            note(notes, failure, mode)
    store.vault.close()


def _disk_of(pair: ReplicatedWorld, is_host: bool) -> CrashStorage:
    return pair.host.storage if is_host else pair.store.storage


def _play_pair(scenario: PairScenario, pair: ReplicatedWorld, fault: Fault) -> None:
    try:
        scenario(pair)
    except (OSError, AsrfsError) as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"
    pair.session = None
    if not fault.for_ever and pair.is_alive and pair.host.journal.failed is None:
        pair.go_on()


def _check_pair(store: VaultWorld, look: PairLook, rng: random.Random) -> None:
    """Both lose power, start again and go on."""
    fates = rng.choice(FATES), rng.choice(FATES)
    after = store.next_start(look.store.crash(fates[1], rng), look.catalogs[-1])
    pair = ReplicatedWorld.next_start(look, look.host.crash(fates[0], rng), after, rng)
    try:
        pair.check_found()
        pair.go_on()
    finally:
        pair.close()


# ---- alone ----


def fail_ingest(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    seed = rng.random()
    store = new_world(scratch, rng)
    found, catalog = store.storage.killed(), store.catalogs[-1]
    world = store.next_start(found.killed(), catalog)
    probe = _break_store(world, failure, NEVER, False, rng)
    assert _ingest(world, random.Random(seed)) == []
    world.vault.close()
    for number in range(rng.randrange(INGEST_STEP), probe.seen, INGEST_STEP):
        with failing(number, failure, mode):
            world = store.next_start(found.killed(), catalog)
            fault = _break_store(world, failure, number, mode == FOR_EVER, rng)
            for error in _ingest(world, random.Random(seed)):
                check_refusal(fault, error)
            assert fault.fired, "the fault never fired"
            look, left = _store_look(world), _catalog_left(world, fault, rng)
            if not fault.for_ever:
                assert _ingest(world, rng) == [], "the same process goes on"
                world.check(rng)
            world.vault.close()
            look, left = _start_store_while_failing(store, look, left, failure, rng, notes)
            check_store_start(store, look, look.storage.crash(rng.choice(FATES), rng), left, rng)
        note(notes, failure, mode)
    store.vault.close()


def _break_store(
    world: VaultWorld, failure: Failure, number: int, for_ever: bool, rng: random.Random
) -> Fault | CatalogFault:
    if failure in CATALOG:
        return fail(cast(MemoryCatalog, world.vault.catalog), CatalogFault(number, failure.error, for_ever, rng))
    return world.storage.inject(failure.at(number, for_ever, rng))


def _ingest(world: VaultWorld, rng: random.Random) -> list[AsrfsError]:
    """Also what beginning the session raises."""
    try:
        return world.ingest(rng)
    except AsrfsError as error:
        return [error]


def _store_look(world: VaultWorld) -> StoreLook:
    return StoreLook("fault", "", world.storage.killed(), world.acknowledged, tuple(world.catalogs))


def _catalog_left(world: VaultWorld, fault: AnyFault, rng: random.Random) -> bytes:
    """What the next start finds, if a transaction is in doubt with it or without."""
    doubt = fault.in_doubt if isinstance(fault, CatalogFault) else None
    return rng.choice((world.catalogs[-1], doubt or world.catalogs[-1]))


def _start_store_while_failing(
    store: VaultWorld, look: StoreLook, catalog: bytes, failure: Failure, rng: random.Random, notes: Notes
) -> tuple[StoreLook, bytes]:
    """The next start on a disk that still fails, up to the end of its first session's beginning: what it left."""
    world = store.next_start(look.storage.crash(rng.choice(FATES), rng), catalog)
    world.acknowledged = look.acknowledged
    fault = _break_store(world, failure, rng.randrange(12), False, rng)
    try:
        world.begin(rng)
    except AsrfsError as error:
        check_refusal(fault, error)
        notes.fired(IN_START)
    world.vault.close()
    return _store_look(world), _catalog_left(world, fault, rng)


def fail_rebuild(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    world = new_rebuild_world(scratch, rng)
    for is_files in (True, False) if failure in DISK else (True,):

        def play(number: int, for_ever: bool, is_files: bool = is_files) -> tuple[RebuildLook, AnyFault]:
            files, objects = put_catalog(world.catalogs[-1]), world.storage.killed()
            fault: Fault | CatalogFault
            if failure in CATALOG:
                fault = CatalogFault(number, failure.error, for_ever, rng)
                statements: CatalogFault | None = fault
            else:
                fault, statements = failure.at(number, for_ever, rng), None
                (files if is_files else objects).inject(fault)
            try:
                rebuild(world, files, objects, None, statements)
            except (OSError, AsrfsError) as error:
                check_refusal(fault, error)
            return RebuildLook("fault", "", files, objects), fault

        _, probe = play(NEVER, False)
        for number in range(rng.randrange(SMALL_STEP), probe.seen, SMALL_STEP):
            with failing(number, failure, mode):
                look, fault = play(number, mode == FOR_EVER)
                assert fault.fired, "the fault never fired"
                fate = rng.choice((None, *FATES))
                files, objects = (
                    each.crash(fate, rng) if fate else each.killed() for each in (look.files, look.objects)
                )
                check_rebuilt(world, look, files, objects)
            note(notes, failure, mode)
    world.vault.close()
