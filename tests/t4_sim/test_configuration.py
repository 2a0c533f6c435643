"""From the store's catalog to a file at the host: real sessions and keeper; wire, time and disk in memory."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from asrfs.model.configuration import HostConfiguration
from asrfs.protocol.messages import Configure, Heartbeat, Hello
from asrfs.replication.alarms import Alarms
from asrfs.replication.configuration_keeper import SAVE_RETRY_S, ConfigurationKeeper, load_configuration
from asrfs.storage.interface import write_atomically
from replica_store.ingest.configurations import LOOK_EVERY_S
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_host import HostEnd, HostHistory
from tests.fakes.virtual_time import pass_time

FILE = "configuration.json"


def takes(history: HostHistory) -> Hello:
    return msgspec.structs.replace(history.hello(), takes_configuration=True)


def put_policy(world: StoreWorld, history: HostHistory, name: str, keys: dict[str, str]) -> None:
    """As the store's commands do, from another process."""
    catalog = world.vault.catalog
    with catalog.transaction():
        text = msgspec.json.encode(keys).decode()
        catalog.change("INSERT OR REPLACE INTO policies VALUES (?, ?)", (name, text))
        catalog.change("INSERT OR REPLACE INTO assignments VALUES ('machine', ?, ?)", (history.machine_id, name))
        catalog.raise_configuration_generation()


async def hear_configuration(host: HostEnd) -> HostConfiguration:
    event = await host.hear_except(Heartbeat)
    assert isinstance(event, Configure), event
    return event.configuration


@asynccontextmanager
async def told(scratch: Path) -> AsyncIterator[tuple[StoreWorld, HostHistory, HostEnd]]:
    """A host that was welcomed and has heard what the store wants at first."""
    async with make_world(scratch) as world:
        world.nursery.start_soon(world.listener.configurations.run)
        history = world.enrol()
        host = world.connect(history)
        await host.greet(takes(history))
        assert await hear_configuration(host) == HostConfiguration()
        yield world, history, host


async def test_a_host_is_told_after_its_welcome_and_within_a_second_of_each_change(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with told(scratch) as (world, history, host):
        for number in range(1, 4):
            await pass_time(3.3)
            put_policy(world, history, "gold", {"crash_interval": f"{number}s"})
            with trio.fail_after(2 * LOOK_EVERY_S):
                configuration = await hear_configuration(host)
            assert configuration == HostConfiguration(
                generation=number, policy="gold", keys={"crash_interval": f"{number}s"}
            )
        again = world.connect(history)
        await again.greet(takes(history))
        assert await hear_configuration(again) == configuration, "all of it in each session"


async def test_what_does_not_concern_a_host_is_not_said(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with told(scratch) as (world, history, host):
        other = world.enrol("web2", 2)
        put_policy(world, other, "gold", {"crash_interval": "1s"})
        await pass_time(3)
        put_policy(world, history, "silver", {})
        assert await hear_configuration(host) == HostConfiguration(generation=2, policy="silver")


async def test_a_host_of_before_is_told_nothing(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with make_world(scratch) as world:
        world.nursery.start_soon(world.listener.configurations.run)
        history = world.enrol()
        host, _ = await world.begin(history)
        put_policy(world, history, "gold", {"crash_interval": "1s"})
        for _ in range(3):
            assert isinstance(await host.hear(), Heartbeat)
            await host.say(Heartbeat())


async def test_a_host_goes_on_with_what_it_has_when_the_catalog_cannot_say(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with told(scratch) as (world, history, host):
        catalog = world.vault.catalog
        put_policy(world, history, "gold", {})
        await hear_configuration(host)
        with catalog.transaction():
            catalog.change("UPDATE policies SET keys = 'junk'")
            catalog.raise_configuration_generation()
        history.disk(0)
        await pass_time(5)
        built = history.build(1, 1, host.salt)
        await host.ship(built)
        event = await host.hear_except(Heartbeat)
        assert not isinstance(event, Configure), "received, and acknowledged, as if nothing were wrong"
        put_policy(world, history, "gold", {"retention": "3d"})
        assert (await hear_configuration(host)).keys == {"retention": "3d"}


# ---- the host -----------------------------------------------------------------------------------------------------


class InlineKeeper(ConfigurationKeeper):
    """Works in the task: virtual time would run on while a thread works."""

    async def in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        await trio.lowlevel.checkpoint()
        function(*arguments)


class Host:
    """A keeper on a disk in memory, and what it told who follows it."""

    def __init__(self, storage: CrashStorage, nursery: trio.Nursery) -> None:
        self.alarms = Alarms()
        self.keeper = InlineKeeper(storage, FILE, self.alarms, trio.CapacityLimiter(1))
        self.heard: list[HostConfiguration] = []
        self.keeper.follow(self.heard.append)
        nursery.start_soon(self.keeper.run)

    def alarm(self) -> str:
        return " ".join(alarm.text for alarm in self.alarms.now())


@asynccontextmanager
async def keeping(storage: CrashStorage) -> AsyncIterator[Host]:
    async with trio.open_nursery() as nursery:
        yield Host(storage, nursery)
        nursery.cancel_scope.cancel()


GOLD = HostConfiguration(generation=5, policy="gold", keys={"crash_interval": "10s"})


@pytest.mark.parametrize("fate", list(Fate))
async def test_what_was_told_holds_after_a_restart_and_a_power_loss(
    fate: Fate, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    storage = CrashStorage()
    async with keeping(storage) as first:
        first.keeper.offer(GOLD)
        await pass_time(1)
        assert first.heard == [HostConfiguration(), GOLD]
    async with keeping(storage.crash(fate, rng)) as second:
        assert second.heard == [GOLD], "the store is not there, and its word goes on"
        assert second.alarm() == ""


async def test_what_makes_no_sense_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with keeping(CrashStorage()) as host:
        host.keeper.offer(GOLD)
        await pass_time(1)
        host.keeper.offer(HostConfiguration(generation=6, policy="../../etc"))
        await pass_time(1)
        assert host.keeper.current == GOLD
        assert "passed over" in host.alarm()
        host.keeper.offer(msgspec.structs.replace(GOLD, generation=7))
        await pass_time(1)
        assert host.alarm() == ""
        assert [each.generation for each in host.heard] == [0, 5, 7]


async def test_it_is_followed_though_it_cannot_be_saved_and_saved_when_it_can(
    autojump_clock: trio.testing.MockClock,
) -> None:
    storage = CrashStorage()
    storage.inject(Fault(1, errno.ENOSPC))
    async with keeping(storage) as host:
        host.keeper.offer(GOLD)
        await pass_time(1)
        storage.assert_fired()
        assert host.keeper.current == GOLD
        assert "cannot be saved" in host.alarm()
        await pass_time(SAVE_RETRY_S)
        assert load_configuration(storage, FILE) == GOLD
        assert host.alarm() == ""


async def test_a_damaged_file_means_defaults_and_an_alarm(autojump_clock: trio.testing.MockClock) -> None:
    storage = CrashStorage()
    write_atomically(storage, FILE, b'{"generation": "x"}')
    async with keeping(storage) as host:
        assert host.heard == [HostConfiguration()]
        assert FILE in host.alarm()
        host.keeper.offer(GOLD)
        await pass_time(1)
        assert load_configuration(storage, FILE) == GOLD
        assert host.alarm() == ""
