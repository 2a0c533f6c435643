"""Host and store as a pair over connections that break: nothing is left out, taken twice, or acknowledged too early."""

from __future__ import annotations

import random
from pathlib import Path

from asrfs.protocol.session import ObjectReceived
from tests.fakes.broken_exchange import EVENTS, exchange_over_broken_connections
from tests.fakes.vault_world import VaultWorld, make_history


def test_i3_a_history_over_connections_that_break(scratch: Path, rng: random.Random) -> None:
    events = sum(
        (exchange_over_broken_connections(_world(scratch / f"vault-{i}", rng), rng) for i in range(40)),
        start=exchange_over_broken_connections(_world(scratch / "vault", rng), rng),
    )
    assert all(events[each] for each in EVENTS), events


def test_an_object_twice_in_one_batch_is_acknowledged_twice(scratch: Path, rng: random.Random) -> None:
    """As when it comes again in the next batch."""
    world = _world(scratch / "vault", rng)
    ingester, _, salt = world.begin(rng)
    first = world.history.build(1, 3, salt)
    second = world.history.build(4, 5, salt, first.digest)
    batch = [ObjectReceived(each.begin, each.content) for each in (first, second, first, second)]
    taken = ingester.take(batch)
    assert (taken.error, [each.lsn for each in taken.acknowledged]) == (None, [3, 5, 3, 5])
    assert [row.last_lsn for row in world.vault.objects_of(world.history.machine_id, 99)] == [3, 5]
    world.vault.close()


def _world(root: Path, rng: random.Random) -> VaultWorld:
    world = VaultWorld.new(root, rng.getrandbits(30))
    make_history(world.history, rng)
    return world
