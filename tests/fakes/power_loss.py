"""Power is lost after every storage operation of a scenario, and what is found is compared with the model.

One run of a scenario is looked at after each of its operations; each look is continued with each fate of what was not
synced, recovered, and compared byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

from asrfs.errors import IntegrityError
from asrfs.journal.recovery import Recovered, recover
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.host_scenarios import BLOCK, Scenario
from tests.fakes.journal_world import MACHINE_ID, SEGMENT_BYTES, JournalWorld, Look, Model, load_positions


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


EVERY_SUBSET_MAX = 4
"""Of so many unsynced changes of names every subset is tried; of more, what the fates happen to choose."""
Seen = set[tuple[object, ...]]
"""States that were found before with the same promises: what holds for one holds for the other."""


def distinct_starts(
    storage: CrashStorage, rng: random.Random, seen: Seen, promised: tuple[object, ...]
) -> Iterator[tuple[str, CrashStorage]]:
    """As `next_starts`, without those that find what was found before."""
    yield "killed", storage.killed()
    if storage.is_settled():
        return
    for fate in Fate:
        yield from _distinct(fate.value, storage.crash(fate, rng), seen, promised)
    names = storage.unsynced_names()
    for kept in product((False, True), repeat=names) if 0 < names <= EVERY_SUBSET_MAX else ():
        fate = rng.choice(list(Fate))
        said = ", ".join("kept" if each else "lost" for each in kept)
        yield from _distinct(f"{fate.value} (names: {said})", storage.crash(fate, rng, kept), seen, promised)


def _distinct(
    way: str, after: CrashStorage, seen: Seen, promised: tuple[object, ...]
) -> Iterator[tuple[str, CrashStorage]]:
    state = (promised, *sorted(after.contents().items()))
    if state not in seen:
        seen.add(state)
        yield way, after


def check_recovers_twice(storage: CrashStorage) -> None:
    """Recovery run again, after a kill or a power loss, finds and leaves what it found and left the first time."""
    once = storage.killed()
    once.sync_directory("")  # as every start does first
    first = found_by_recovery(once)
    again = once.killed()
    assert found_by_recovery(again) == first, "recovering twice finds something else"
    assert again.contents() == once.contents(), "recovering twice leaves something else"
    relied = relied_on(once)
    again = once.crash(Fate.LOST, random.Random(0))
    assert found_by_recovery(again) == first, "recovering after a power loss finds something else"
    for name, content in relied_on(again).items():
        assert content == relied.pop(name, None), f"recovering after a power loss leaves something else in {name}"
    assert not relied, f"recovering after a power loss leaves no {sorted(relied)}"


def relied_on(storage: CrashStorage) -> dict[str, bytes]:
    """What must be durable once recovery is done: segments, positions, and of images what no record lies over.

    The rest of an image is applied again, and what lies in a spare means nothing: neither need be durable."""
    found = {
        name: content
        for name, content in storage.contents().items()
        if name.endswith(".segment") or name == "positions.json" or name.startswith("images/")
    }
    for record in recovered(storage.killed()).records():
        if record.length:
            name = f"images/{record.slot}"
            image = bytearray(found[name])
            image[record.offset : record.offset + record.length] = bytes(record.length)
            found[name] = bytes(image)
    return found


def found_by_recovery(storage: CrashStorage) -> tuple[object, ...]:
    """All that recovery says of a machine's journal, except in words what it cut, and the next number: a segment that
    never held a record may have been removed, and its number is free again."""
    found = recovered(storage)
    head = (found.last_lsn, found.last_time_ns, found.epoch)
    return (*head, tuple(found.segments), tuple(found.records()))


def recovered(storage: CrashStorage) -> Recovered:
    return recover(storage.below("journal"), load_positions(storage), MACHINE_ID, segment_bytes=SEGMENT_BYTES)


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
