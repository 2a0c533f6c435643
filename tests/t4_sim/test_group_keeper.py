"""Who coordinates a group while hosts connect, go away and come back, by the clock of `serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from asrfs.storage.system_clock import SystemClock
from replica_store.daemon.group_keeper import AWAY_S_MAX, LOOK_EVERY_S, GroupKeeper
from replica_store.vault.group_changes import create_group
from replica_store.vault.groups import read_groups
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault

A, B = "a" * 32, "b" * 32


class TrioClock(SystemClock):
    """The monotonic time is that of the event loop."""

    def monotonic(self) -> float:
        return trio.current_time()


class World:
    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.connected: set[str] = set()

    @property
    def coordinator(self) -> str:
        (group,) = read_groups(self.vault.catalog).groups
        return group.coordinator


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """It does not wait for threads, so there are none."""

    async def here(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", here)
    return autojump_clock


async def pass_time(seconds: float) -> None:
    await trio.sleep(seconds)  # sleep: virtual


@asynccontextmanager
async def serving(scratch: Path) -> AsyncIterator[World]:
    """Group `shop` of two, coordinated by A; nobody has connected yet."""
    with Vault.create(str(scratch / "vault"), "site-b", SystemClock()) as vault:
        with vault.catalog.transaction():
            for name, machine_id in (("web", A), ("db", B)):
                vault.catalog.put_machine(MachineRow(machine_id, name, 1, "5e", False, 5, 1, b"sealed"))
        create_group(vault, "shop", ["web", "db"])
        world = World(vault)
        keeper = GroupKeeper(vault, lambda: world.connected, TrioClock(), trio.CapacityLimiter(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            yield world
            nursery.cancel_scope.cancel()


async def test_who_connects_a_moment_later_than_the_others_after_a_start_keeps_its_place(
    scratch: Path, clock: trio.testing.MockClock
) -> None:
    async with serving(scratch) as world:
        world.connected = {B}
        await pass_time(AWAY_S_MAX - LOOK_EVERY_S / 2)
        assert world.coordinator == A
        world.connected = {A, B}
        await pass_time(5 * AWAY_S_MAX)
        assert world.coordinator == A


async def test_who_stays_away_is_replaced_and_comes_back_as_a_member(
    scratch: Path, clock: trio.testing.MockClock
) -> None:
    async with serving(scratch) as world:
        world.connected = {B}
        await pass_time(AWAY_S_MAX + 2 * LOOK_EVERY_S)
        assert world.coordinator == B
        world.connected = {A, B}
        await pass_time(5 * AWAY_S_MAX)
        assert world.coordinator == B
        world.connected = set()
        await pass_time(5 * AWAY_S_MAX)
        assert world.coordinator == B, "there is nobody else"
