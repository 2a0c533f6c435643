"""The store loses power, or is killed, after every operation on its objects and after every transaction.

One run of ingest is looked at after each of them; each look is continued with each fate of what was not synced and
with the catalog as it was, set back, or gone. Every listed point must then be the model's bytes, and the history goes
on to its end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from asrfs.errors import AsrfsError
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.vault_world import StoreLook, VaultWorld, make_history

START_ALONE_SHARE = 0.8
"""So often only the start itself is looked at, not the ingest that follows."""


def new_world(scratch: Path, rng: random.Random) -> VaultWorld:
    world = VaultWorld.new(scratch / "vault", rng.randrange(1 << 30))
    make_history(world.history, rng)
    return world


def next_starts(look: StoreLook, rng: random.Random) -> Iterator[tuple[str, CrashStorage, bytes | None]]:
    """What the next start can find, with the catalog that belongs to it, an older one, or none."""
    for what, storage in (("killed", look.storage.killed()), *((f.value, look.storage.crash(f, rng)) for f in Fate)):
        number = rng.choice((len(look.catalogs) - 1, len(look.catalogs) - 1, rng.randrange(len(look.catalogs)), -1))
        yield f"{what}, catalog {number}", storage, look.catalogs[number] if number >= 0 else None


def check_next_start(
    world: VaultWorld,
    look: StoreLook,
    storage: CrashStorage,
    catalog: bytes | None,
    rng: random.Random,
    again: list[StoreLook] | None = None,
) -> None:
    """`again`: looks at all that the next start does, which is then also done twice. While a catalog is being made
    again there is none yet."""

    def look_at_start(kind: str, name: str) -> None:
        assert again is not None
        catalogs = () if catalog is None else (catalog,)
        again.append(StoreLook(kind, name, storage.killed(), look.acknowledged, catalogs))

    if again is not None:
        storage.after_operation = look_at_start
        look_at_start("start", "")
    after = world.next_start(storage, catalog)
    try:
        after.acknowledged = look.acknowledged
        if again is not None:
            after.look_at_everything(again)
        after.begin(rng)
        if again is not None:
            check_starts_twice(after, catalog, rng)
        after.check(rng)
        if not storage.is_settled():
            after.check(rng, storage.crash(Fate.LOST, rng))  # what the host was welcomed with is durable by then
        if rng.random() < START_ALONE_SHARE:
            after.look_away()
        assert after.ingest(rng) == []
        after.look_away()
        assert after.acknowledged == world.history.last_lsn
        after.check(rng, storage.crash(Fate.LOST, rng), points_max=1)
    finally:
        after.look_away()
        after.vault.close()


def check_starts_twice(after: VaultWorld, catalog: bytes | None, rng: random.Random) -> None:
    """Right after a first session began: the next start, after a kill or a power loss, finds and leaves the same."""
    found = after.storage.contents(), after.tables()
    for storage in (after.storage.killed(), after.storage.crash(Fate.LOST, rng)):
        second = after.next_start(storage, catalog and after.catalogs[-1])
        second.begin(rng)
        assert (storage.contents(), second.tables()) == found, "the store recovers twice to two states"
        second.vault.close()


def lose_power_everywhere(scratch: Path, rng: random.Random, step: int = 1) -> int:
    """Every `step`-th operation × every fate. Returns how many crashes there were."""
    world = new_world(scratch, rng)
    crashes = 0
    try:
        looks = world.look_at_everything()
        assert world.ingest(rng) == []
        world.look_away()
        world.check(rng)
        assert {"write", "datasync", "link", "sync_directory"} <= {look.kind for look in looks}
        for number, look in enumerate(looks[rng.randrange(step) :: step]):
            for what, storage, catalog in next_starts(look, rng):
                crashes += 1
                try:
                    check_next_start(world, look, storage, catalog, rng)
                except (AssertionError, AsrfsError) as error:
                    raise AssertionError(
                        f"crash after operation {number} ({look.kind} {look.name}), {what}: {error}"
                    ) from error
    finally:
        world.vault.close()
    return crashes
