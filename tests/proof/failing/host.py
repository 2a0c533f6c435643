"""A host alone while its disk fails, and while the calls below its real storage come short."""

from __future__ import annotations

import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.host_scenarios import BLOCK, Scenario
from tests.fakes.journal_world import JournalWorld, Model
from tests.fakes.power_loss import check_next_start
from tests.fakes.real_storage import RealStorage
from tests.fakes.short_system import InterruptedLibrary, Shortage, ShortSystem, below_storage
from tests.proof.failing.kinds import (
    FATES,
    FOR_EVER,
    HOST_STEP,
    IN_START,
    INTERRUPTED,
    NEVER,
    NO_ROOM,
    SYSTEM_CALLS,
    Failure,
    check_refusal,
    failing,
    note,
)
from tests.proof.level import Notes

# ---- a disk that fails ----


def fail_host(scenario: Scenario, failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    seed = rng.random()
    world = JournalWorld(CrashStorage())
    probe = world.storage.inject(failure.at(NEVER, False, rng))
    scenario(world, random.Random(seed)).close()
    for number in range(rng.randrange(HOST_STEP), probe.seen, HOST_STEP):
        with failing(number, failure, mode):
            world, fault = JournalWorld(CrashStorage()), failure.at(number, mode == FOR_EVER, rng)
            world.storage.inject(fault)
            last = _play_host(scenario, seed, world, fault, rng)
            fate = rng.choice((None, rng.choice(FATES)))
            storage = last.storage.killed() if fate is None else last.storage.crash(fate, rng)
            last, has_failed = _start_while_failing(storage, last.model, failure.at(rng.randrange(12), False, rng))
            world = JournalWorld(last.storage.killed(), last.model.copy())
            world.check()
            world.close()
            check_next_start(world.storage.crash(rng.choice(FATES), rng), world.model)
        note(notes, failure, mode)
        if has_failed:
            notes.fired(IN_START)


def _play_host(
    scenario: Scenario, seed: float, world: JournalWorld, fault: Fault | Shortage, rng: random.Random
) -> JournalWorld:
    """A scenario until the failure ends it; the life it ended in, closed."""
    try:
        scenario(world, random.Random(seed))
    except OSError as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"
    last = world.lives[-1]
    if not (fault.for_ever and fault.error) and hasattr(last, "disks"):
        _go_on(last, rng)
    for life in world.lives:
        life.close()
    return last


def _go_on(world: JournalWorld, rng: random.Random) -> None:
    """After a failure that is over: I9, and either all goes on or nothing is ever acknowledged again."""
    if world.journal.failed is None:
        world.check()
        world.disks[0].write(0, rng.randbytes(2 * BLOCK))
        world.sync()
        world.check()
        return
    durable = world.journal.durable_lsn
    for call in (partial(world.disks[0].write, 0, rng.randbytes(BLOCK)), world.journal.sync):
        with pytest.raises(OSError, match=re.escape(world.journal.failed)):
            call()
    assert world.journal.durable_lsn == durable
    world.check()


def _start_while_failing(storage: CrashStorage, model: Model, fault: Fault) -> tuple[JournalWorld, bool]:
    """The next start on a disk that still fails: it says so, or it starts and holds what was promised."""
    storage.inject(fault)
    lives: list[JournalWorld] = []
    try:
        JournalWorld(storage, model.copy(), lives=lives).check()
    except OSError as error:
        check_refusal(fault, error)
    lives[-1].close()
    return lives[-1], fault.fired > 0


# ---- the system below the host's storage ----


def fail_system(
    scenario: Scenario, failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes
) -> None:
    """`DirectoryStorage` itself: of a call that came short it asks for the rest, an interrupted one it makes again."""
    seed = rng.random()
    told = failure.error if failure is NO_ROOM else 0
    probe = Shortage(NEVER, error=told)
    _play_system(scenario, failure, probe, seed, scratch / "probe", rng)
    step = max(1, probe.seen // SYSTEM_CALLS)
    for number in range(rng.randrange(step), probe.seen, step):
        shortage = Shortage(number, mode == FOR_EVER, rng.random(), told)
        with failing(number, failure, mode):
            _play_system(scenario, failure, shortage, seed, scratch / str(number), rng)
        if shortage.error:
            notes.count()
        notes.fired(f"{failure.name} {mode}")


def _play_system(
    scenario: Scenario, failure: Failure, shortage: Shortage, seed: float, root: Path, rng: random.Random
) -> None:
    storage, system = RealStorage(str(root)), ShortSystem(Shortage(NEVER), syncs=False)
    library = InterruptedLibrary(shortage if failure is INTERRUPTED else Shortage(NEVER))
    with below_storage(system, library):
        world = JournalWorld(storage.as_double)
        if failure is not INTERRUPTED:
            system.shortage = shortage
        if shortage.at == NEVER:
            _then_apply(scenario, world, random.Random(seed)).close()
            return
        last = _play_host(partial(_then_apply, scenario), seed, world, shortage, rng)
        if shortage.error:
            system.shortage = Shortage(NEVER)  # there is room again
        for _ in range(2):
            world = JournalWorld(storage.as_double, last.model.copy())
            world.check()
            world.close()
    shutil.rmtree(root)


def _then_apply(scenario: Scenario, world: JournalWorld, rng: random.Random) -> JournalWorld:
    world = scenario(world, rng)
    world.sync()
    world.apply()
    return world
