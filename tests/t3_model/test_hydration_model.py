"""Disks over bases against the model: any history of writes, turns of hydration and starts, with power lost between any
two operations on files (I9).

A hole after a crash is the base again, and then the journal's records: what a turn was bringing is taken back, what was
applied stays. At the end no base is needed and the images alone are the model.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence

import pytest

from asrfs.disk.interface import waiting
from asrfs.replication import hydrator
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.hydrated_world import Agent, HydratedWorld, load_machine, next_start
from tests.fakes.journal_world import Look

BLOCK = 4096
SIZES = (61_952, 40_960)


@pytest.fixture(autouse=True)
def _small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrator, "TURN_BYTES", 3 * BLOCK)
    monkeypatch.setattr(hydrator, "PIECE_BYTES", 2 * BLOCK)


def change_something(world: HydratedWorld, rng: random.Random) -> None:
    """One random change of one disk, shares of blocks too, or a sync."""
    disk = rng.choice(world.disks)
    offset = rng.randrange(disk.size_bytes)
    length = min(rng.choice((1, 512, BLOCK, rng.randint(1, 3 * BLOCK))), disk.size_bytes - offset)
    if rng.random() < 0.5:
        offset -= offset % BLOCK
        length = min(-(-length // BLOCK) * BLOCK, disk.size_bytes - offset)
    kind = rng.random()
    if kind < 0.6:
        content = rng.randbytes(length) if kind < 0.5 else bytes(length)
        waiting(lambda: disk.write(offset, content))
    elif kind < 0.7:
        waiting(lambda: disk.zero(offset, length))
    elif kind < 0.85:
        waiting(lambda: disk.discard(offset, length))
    elif kind < 0.9:
        waiting(lambda: disk.fill(offset, length))
    else:
        world.sync()


def new_world(rng: random.Random, looks: list[Look] | None = None) -> HydratedWorld:
    return HydratedWorld(CrashStorage(), sizes=SIZES, seed=rng.randrange(1 << 30), looks=looks)


def meanwhile(world: HydratedWorld, agent: Callable[[], Agent], rng: random.Random) -> Callable[[], None]:
    """What guests and the applier do between two turns."""

    def do() -> None:
        for _ in range(rng.randint(0, 2)):
            change_something(world, rng)
        if rng.random() < 0.4:
            world.sync()
            agent().apply_once()
        world.check()

    return do


def live(world: HydratedWorld, rng: random.Random) -> Agent:
    agents: list[Agent] = []
    agents.append(Agent(world, meanwhile(world, lambda: agents[0], rng)))
    return agents[0]


def finish(world: HydratedWorld, agent: Agent) -> None:
    """All is applied, no base is needed any more, and the images alone are the model."""
    agent.finish_applying()
    assert all(disk.base is None for disk in load_machine(world.storage).disks)
    for base in world.bases:
        base.away = True
    world.check()
    expected = world.model.disks_at(len(world.model.records))
    for slot, image in enumerate(world.images):
        assert image.read_at(image.size(), 0) == expected[slot], f"I9: image {slot} is not the model"


@pytest.mark.parametrize("number", range(25))
def test_i9_hydrated_disk_is_the_model(number: int, rng: random.Random) -> None:
    world = new_world(rng)
    for _ in range(rng.randint(0, 20)):
        change_something(world, rng)
    world.check()
    agent = live(world, rng)
    agent.hydrate()
    assert agent.notes["turns"]
    assert agent.notes["bases dropped"] == len(SIZES)
    finish(world, agent)
    world.close()


def run_history(rng: random.Random, looks: list[Look]) -> HydratedWorld:
    world = new_world(rng, looks)
    for _ in range(4):
        change_something(world, rng)
    agent = live(world, rng)
    agent.hydrate()
    agent.finish_applying()
    world.close()
    return world


def continue_after(look: Look, storage: CrashStorage, was: HydratedWorld, rng: random.Random) -> None:
    """The next disk server serves before there is an agent; the next agent takes back, applies, and hydrates."""
    for base in was.bases:
        base.away = False
    world = next_start(look, storage, was.bases)
    world.check()
    agent = live(world, rng)
    if rng.random() < 0.5:
        agent.apply_once()
        world.check()
    agent.hydrate()
    finish(world, agent)
    world.close()


@pytest.mark.parametrize("fate", list(Fate))
@pytest.mark.parametrize("number", range(4))
def test_i9_power_lost_between_any_two_operations(number: int, fate: Fate, rng: random.Random) -> None:
    looks: list[Look] = []
    was = run_history(rng, looks)
    kinds = {(look.kind, look.name) for look in looks}
    assert {("rename", "hydration.json"), ("write", "images/0"), ("datasync", "images/0")} <= kinds
    for look in looks:
        continue_after(look, look.storage.crash(fate, rng), was, rng)


@pytest.mark.parametrize("number", range(2))
def test_i9_killed_between_any_two_operations(number: int, rng: random.Random) -> None:
    looks: list[Look] = []
    was = run_history(rng, looks)
    for look in looks:
        continue_after(look, look.storage.killed(), was, rng)


@pytest.mark.parametrize("kinds", ["write", "datasync"])
@pytest.mark.parametrize("number", range(6))
def test_i9_failed_turn_is_taken_back_and_tried_again(
    kinds: str, number: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is refused half way, a datasync that fails: of the image, which is all a turn writes."""
    monkeypatch.setattr(hydrator, "RETRY_S", 0.0)
    world = new_world(rng)
    agent = live(world, rng)
    faults: list[Fault] = []
    hydrating = agent.hydrating

    async def with_fault(slot: int, extents: Sequence[tuple[int, int]], applied_lsn: int) -> None:
        await hydrating(slot, extents, applied_lsn)
        if extents and len(faults) < 3 and (not faults or rng.random() < 0.5):
            error = rng.choice((errno.ENOSPC, errno.EIO))
            at = rng.randrange(len(extents)) if kinds == "write" else 0
            faults.append(world.storage.inject(Fault(at=at, error=error, kinds=frozenset((kinds,)), partial=0.5)))

    monkeypatch.setattr(agent, "hydrating", with_fault)
    agent.hydrate()
    assert faults
    world.storage.assert_fired()
    finish(world, agent)
    world.close()


def test_i9_no_hole_is_made_while_a_disk_server_reads_the_base(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between `machine.json` without the base and the disk server's answer, what is discarded is written out."""
    world = new_world(rng)
    agent = live(world, rng)
    reread, discarded = agent.reread_disks, 0

    async def discard_first() -> None:
        nonlocal discarded
        for slot in world.based:
            if load_machine(world.storage).disks[slot].base is None:
                discarded += 1
                world.disks[slot].discard(0, 8 * BLOCK)
                for _ in range(12):  # so that its segment leaves the maps
                    world.disks[slot].write(9 * BLOCK, rng.randbytes(BLOCK))
                world.sync()
                agent.apply_once()
                world.check()
        await reread()

    monkeypatch.setattr(agent, "reread_disks", discard_first)
    agent.hydrate()
    assert discarded == len(SIZES)
    finish(world, agent)
    world.close()
