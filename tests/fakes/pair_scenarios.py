"""What a host and its store go through together while somebody watches: scenarios on a `ReplicatedWorld`."""

from __future__ import annotations

from collections.abc import Callable

from tests.fakes.replicated_world import ReplicatedWorld

PairScenario = Callable[[ReplicatedWorld], None]


def ship_and_acknowledge(pair: ReplicatedWorld) -> None:
    for i in range(3):
        for _ in range(3):
            pair.write()
        pair.host.sync()
        pair.ship()
        if i != 1:
            pair.save()
    pair.marker()
    pair.ship(1)


def trim_behind_the_acknowledgement(pair: ReplicatedWorld) -> None:
    for i in range(4):
        for _ in range(4):
            pair.write()
        pair.host.sync()
        pair.apply()
        if i % 2 == 0:
            pair.trim()
        pair.ship(2)
        pair.save()
        pair.trim()


def trim_while_nothing_is_acknowledged(pair: ReplicatedWorld) -> None:
    for i in range(3):
        for _ in range(4):
            pair.write()
        pair.host.sync()
        pair.apply()
        pair.trim()
        if i == 0:
            pair.ship(1)
            pair.trim()
    pair.save()
    pair.trim()


def points_are_shipped(pair: ReplicatedWorld) -> None:
    for _ in range(3):
        pair.write()
        pair.marker()
        pair.write()
        pair.ship()
        pair.save()


def discards_are_applied_and_shipped(pair: ReplicatedWorld) -> None:
    disk = pair.host.disks[0]
    for i in range(2):
        pair.write(2)
        disk.discard(pair.rng.randrange(6) * 4096, 3 * 4096)
        disk.zero(pair.rng.randrange(20_000), 5_000)
        pair.marker()
        pair.apply()
        pair.ship()
        if i:
            disk.discard(0, disk.size_bytes)
            pair.marker()
            pair.ship()


def answers_are_lost(pair: ReplicatedWorld) -> None:
    for _ in range(3):
        for _ in range(2):
            pair.write()
        pair.marker()
        pair.ship(loses_answer=True)
        pair.ship(1)
    pair.save()


def the_host_starts_twice(pair: ReplicatedWorld) -> None:
    pair.write()
    pair.marker()
    pair.ship()
    pair.restart_host()
    pair.restart_host()
    pair.write()
    pair.marker()
    pair.apply()
    pair.ship()
    pair.save()
    pair.trim()


def the_store_starts_twice(pair: ReplicatedWorld) -> None:
    pair.write()
    pair.marker()
    pair.ship()
    pair.restart_store()
    pair.restart_store()
    pair.write()
    pair.marker()
    pair.ship()


def the_catalog_is_made_again(pair: ReplicatedWorld) -> None:
    for _ in range(2):
        pair.write()
        pair.marker()
        pair.ship()
        pair.restart_store(keeps_catalog=False)
    pair.write()
    pair.marker()
    pair.ship()


def given_up_and_healed(pair: ReplicatedWorld) -> None:
    for i in range(2):
        for _ in range(4):
            pair.write()
        pair.marker()
        if i == 0:
            pair.ship(1)
        pair.apply()
        pair.give_up()
        pair.trim()
        pair.write()
        pair.host.sync()
        pair.heal()
        pair.save()
        pair.trim()


def given_up_again_while_it_heals(pair: ReplicatedWorld) -> None:
    pair.write(3)
    pair.marker()
    pair.ship()
    pair.write(3)
    pair.give_up()
    pair.heal(1)
    pair.write()
    pair.apply()
    pair.give_up()
    pair.trim()
    pair.ship(1, loses_answer=True)
    pair.restart_host()
    pair.heal()
    pair.trim()
    pair.write()
    pair.marker()
    pair.ship()


def given_up_although_its_gap_was_closing(pair: ReplicatedWorld) -> None:
    """The record that closes the first gap is not at the store when more is given up."""
    pair.write(2)
    pair.give_up()
    pair.ship()
    pair.heal(0)
    pair.heal_unheard()
    pair.write(2)
    pair.apply()
    pair.give_up()
    pair.trim()
    pair.ship()
    pair.heal()


def everything_at_once(pair: ReplicatedWorld) -> None:
    for _ in range(22):
        step = pair.rng.randrange(18)
        if step < 6:
            pair.write(pair.rng.randint(1, 2))
        elif step < 8:
            pair.marker()
        elif step < 10:
            pair.ship(pair.rng.randint(1, 3), loses_answer=pair.rng.random() < 0.2)
        elif step < 12:
            pair.apply()
        elif step == 12:
            pair.save()
        elif step == 13:
            pair.trim()
        elif step == 14:
            pair.restart_host()
        elif step == 15:
            pair.give_up()
        elif step == 16:
            pair.heal(pair.rng.choice((0, 1, None)))
        else:
            pair.restart_store(keeps_catalog=pair.rng.random() < 0.7)


PAIR_SCENARIOS: tuple[PairScenario, ...] = (
    ship_and_acknowledge,
    trim_behind_the_acknowledgement,
    trim_while_nothing_is_acknowledged,
    points_are_shipped,
    discards_are_applied_and_shipped,
    answers_are_lost,
    the_host_starts_twice,
    the_store_starts_twice,
    the_catalog_is_made_again,
    given_up_and_healed,
    given_up_again_while_it_heals,
    given_up_although_its_gap_was_closing,
    everything_at_once,
)
