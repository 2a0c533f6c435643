"""A superseded host offers its tail: host and store together, while links break and somebody dies (I7).

Real rejoiner, shipper, journal, sessions and vault; wire, time and disks in memory.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import trio
import trio.testing

from asrfs.model.dirty_map import GivenUp
from asrfs.model.positions import Positions
from asrfs.model.rejoining import FencedTail, Handed
from asrfs.model.tails import tail_epoch, tail_name
from asrfs.replication.positions_file import PositionsFile
from replica_store.points.builder import open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.tails import tails
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.healing_host import HealingHost
from tests.fakes.journal_world import JournalWorld, Look
from tests.fakes.scripted_host import BLOCK
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_comparing import SIZES
from tests.t4_sim.test_handover_pair import ID, PairHost, pair
from tests.t4_sim.test_rejoin import make_rejoiner

TAIL = "tail-of-epoch-1"
POSITIONS = PositionsFile(Positions(), lambda positions: None)


def test_a_tail_is_named_by_its_epoch() -> None:
    assert [tail_epoch(tail_name(epoch)) for epoch in (0, 1, 17, (1 << 32) - 1)] == [0, 1, 17, (1 << 32) - 1]
    assert [tail_epoch(name) for name in ("tail-of-epoch-", "tail-of-epoch-01", "tail-of-epoch-1x", "one")] == [
        None
    ] * 4


async def superseded(host: PairHost, count: int) -> int:
    """Cut off, it writes so much more; another side goes on. What the store has."""
    await host._drain()
    host.shipper.pause()
    await pass_time(1)
    received = host.store.vault.received_lsn(ID)
    host.write(count)
    raise_epoch(host.store.vault, ID)
    return received


async def settled(host: PairHost) -> FencedTail:
    with trio.fail_after(2000):
        while (fence := host.rejoiner.fence) is None or fence.tail is None:
            await pass_time(0.5)
    assert host.is_fenced
    return fence.tail


def alarm(host: PairHost) -> str:
    (found,) = [each for each in host.alarms.now() if each.id == "fenced"]
    return found.text


def check_tail(host: PairHost, received: int) -> None:
    """The tail is all that the host's guests ever wrote, and the history is what it was."""
    world, vault = host.world, host.store.vault
    assert vault.received_lsn(ID) == received, "I6"
    for selector in (TAIL, "latest"):
        cut = resolve(vault, "web1", selector)
        disks = open_disks(vault, cut, [f"d{slot}" for slot in range(len(SIZES))], FrameCache(vault))
        for slot, size in enumerate(SIZES):
            there, ours = disks[f"d{slot}"].read(0, size), world.model.disks_at(cut.lsn)[slot]
            assert bytes(there) == bytes(ours), f"I9: disk {slot} of {selector}"
    assert resolve(vault, "web1", TAIL).lsn == world.journal.durable_lsn == world.journal.appended_lsn
    assert resolve(vault, "web1", "latest").lsn == received


async def test_i7_the_tail_of_a_superseded_host_comes_while_the_connection_breaks(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host, trio.open_nursery() as nursery:
        received = await superseded(host, 400)
        freed = host.positions_file.current.acknowledged
        host.source.settings = host.source.settings._replace(object_size=4 * BLOCK, bandwidth_limit=400_000)
        nursery.start_soon(host.break_links)
        wires = len(host.wires)
        host.shipper.resume()
        tail = await settled(host)
        assert tail.outcome == "kept" and TAIL in tail.text and tail.text in alarm(host)
        assert len(host.wires) > wires + 2, "connections broke"
        refused = host.refused
        await pass_time(10)
        assert host.refused > refused, "I6"
        check_tail(host, received)
        assert host.positions_file.current.acknowledged == freed, "I4: nothing of the history was acknowledged by it"
        tries = len(host.wires)
        await pass_time(1000)
        assert len(host.wires) == tries, "it has nothing more to say"
        nursery.cancel_scope.cancel()


async def test_i7_the_last_answer_is_lost_and_a_host_that_forgot_asks_again(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        received = await superseded(host, 30)
        host.shipper.resume()
        first = await settled(host)
        fence = host.rejoiner.fence
        assert fence is not None
        host.rejoiner.fence = msgspec.structs.replace(fence, tail=None)
        host.shipper.retry_now()
        assert await settled(host) == first
        check_tail(host, received)
        assert len(tails(host.store.vault.catalog, ID)) == 1


async def test_i7_a_store_that_restarts_in_the_middle_goes_on(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        received = await superseded(host, 200)
        host.source.settings = host.source.settings._replace(object_size=4 * BLOCK, bandwidth_limit=200_000)
        host.shipper.resume()
        with trio.fail_after(2000):
            while not tails(host.store.vault.catalog, ID):
                await pass_time(0.1)
        assert not tails(host.store.vault.catalog, ID)[0].is_whole
        await host.cut()
        host.store.restart()
        await settled(host)
        check_tail(host, received)


async def test_nothing_is_offered_where_the_store_has_all_of_it(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        await host._drain()
        await host.rejoiner.hand_over("f" * 32, "a planned failover")
        await host.rejoiner.handed("f" * 32, Handed(lsn=1, chunks_compared=1))
        assert await host.rejoiner.superseded("it was committed")
        tail = await settled(host)
        assert tail.outcome == "none" and not tails(host.store.vault.catalog, ID)


async def test_i7_what_was_given_up_is_said_to_be_at_the_host_alone(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    async with pair(scratch, rng) as host:
        await superseded(host, 30)
        everything = msgspec.structs.replace(host.positions_file.current.acknowledged, lsn=1 << 40)
        host.source.given_up = lambda: GivenUp(0, everything)
        await host.rejoiner.superseded("another side goes on")
        host.shipper.resume()
        tail = await settled(host)
        assert tail.outcome == "lost" and "cannot be offered" in tail.text and "images/" in tail.text
        assert tail.text in alarm(host) and not tails(host.store.vault.catalog, ID)


async def test_i7_a_clone_of_which_the_store_has_another_tail_says_so(
    autojump_clock: trio.testing.MockClock, scratch: Path, rng: random.Random
) -> None:
    """Two hosts of one epoch were superseded; one tail of each epoch is kept, and none is overwritten."""
    async with pair(scratch, rng) as host:
        received = await superseded(host, 30)
        host.shipper.resume()
        await settled(host)
        (kept,) = tails(host.store.vault.catalog, ID)
        with host.store.vault.catalog.transaction():
            host.store.vault.catalog.change("UPDATE tail_objects SET last_time_ns = last_time_ns + 1")
        fence = host.rejoiner.fence
        assert fence is not None
        host.rejoiner.fence = msgspec.structs.replace(fence, tail=None)
        host.shipper.retry_now()
        tail = await settled(host)
        assert tail.outcome == "lost" and "is not the record" in tail.text
        assert tails(host.store.vault.catalog, ID) == [kept] and host.store.vault.received_lsn(ID) == received


def test_i7_a_host_that_dies_when_its_tail_is_settled_stays_fenced(rng: random.Random) -> None:
    """Killed or without power at each step of writing that down, it offers the tail again, or knows."""
    world = JournalWorld(CrashStorage(), seed=rng.getrandbits(30))
    looks: list[Look] = []

    async def settle() -> None:
        healing = HealingHost(world, POSITIONS)
        rejoiner = make_rejoiner(world, POSITIONS, healing)
        await rejoiner.superseded("another side goes on")
        world.looks = looks
        world.storage.after_operation = world._look
        await rejoiner.tail_settled(FencedTail(outcome="kept", text="kept"))
        world.storage.after_operation = None
        healing.close()

    trio.run(settle)
    assert len(looks) > 2
    offers = set()
    for look in looks:
        for storage in (look.storage.killed(), look.storage.crash(rng.choice(list(Fate)), rng)):
            after = JournalWorld(storage, look.model.copy())
            healing = HealingHost(after, POSITIONS)
            rejoiner = make_rejoiner(after, POSITIONS, healing)
            assert rejoiner.fence is not None and rejoiner.fence.why == "another side goes on", "I6"
            offers.add(rejoiner.offers_tail)
            healing.close()
            after.close()
    assert offers == {True, False}
    world.close()
