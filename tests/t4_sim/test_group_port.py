"""The port at which members of a group come in: only the one good certificate of a member gets anywhere, both ways."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

from asrfs.consistency.maker import PointMaker
from asrfs.consistency.points import Point, PointLog
from asrfs.daemon.agent_groups import AgentGroups
from asrfs.daemon.enrolment import Enrolment, save_enrolment
from asrfs.daemon.point_processes import PointProcesses
from asrfs.daemon.settings import Settings
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.configuration import GroupOrder, HostConfiguration, Member
from asrfs.replication.alarms import Alarms
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.tls import (
    Credential,
    client_context,
    make_authority,
    make_key_and_request,
    sign_request,
)
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.group_world import MemoryServer

GROUP_ID = "e" * 32
WAIT_S_MAX = 10.0


@dataclass
class Agent:
    """A machine with keys, its groups, and what it would be in an order."""

    state: StateDirectory
    member: Member
    groups: AgentGroups
    server: MemoryServer
    alarms: Alarms


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Vault:
    """Signs certificates and makes agents."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.authority = make_authority("site-b", SystemClock().time_ns())

    def agent(self, name: str, port: int, authority: Credential | None = None) -> Agent:
        state = StateDirectory.create(str(self.scratch / name), name)
        machine_id = state.load_machine().id
        serial = self.sign(state, authority)
        server = MemoryServer(lambda: 0.0)
        alarms = Alarms()

        async def note(_point: Point) -> None:
            await trio.lowlevel.checkpoint()

        async def settled(_lsn: int) -> None:
            await trio.lowlevel.checkpoint()

        maker = PointMaker(
            machine_name=name,
            quiescer=PointProcesses(state),
            mark=server.marker,
            note=note,
            epoch=lambda: 1,
            deadline_s=lambda: 1.0,
        )
        settings = msgspec.structs.replace(Settings(), group_port=port)
        groups = AgentGroups(
            state,
            machine_id=machine_id,
            server=server,
            maker=maker,
            alarms=alarms,
            settings=lambda: settings,
            settled=settled,
            threads=trio.CapacityLimiter(2),
            points=PointLog(CrashStorage(), "points.jsonl"),
        )
        member = Member(machine_id=machine_id, name=name, address="127.0.0.1", port=port, serial=serial)
        return Agent(state, member, groups, server, alarms)

    def sign(self, state: StateDirectory, authority: Credential | None = None) -> str:
        """A new certificate for a machine; its serial number."""
        machine = state.load_machine()
        key, request = make_key_and_request(machine.name, machine.id)
        signer = authority or self.authority
        certificate, identity = sign_request(signer, request, machine.name, machine.id, SystemClock().time_ns())
        enrolment = Enrolment(
            store_id="0" * 32,
            server_name="x",
            host="127.0.0.1",
            data_port=1,
            manage_port=1,
            payload_key="",
            index_key="",
        )
        save_enrolment(state, enrolment, key=key, certificate=certificate, authority=signer.certificate)
        return identity.serial


def order_of(*members: Member) -> HostConfiguration:
    order = GroupOrder(id=GROUP_ID, name="shop", coordinator=members[0].machine_id, members=members, generation=1)
    return HostConfiguration(generation=1, groups=(order,))


@asynccontextmanager
async def running(*agents: Agent) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(agent.groups.run)
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what other tasks and sockets do."""
    with trio.fail_after(WAIT_S_MAX):
        while True:
            if condition():
                return
            await trio.sleep(0.01)  # sleep: between two looks


async def complete(coordinator: Agent) -> None:
    await until(coordinator.groups.groups.coordinated)
    with trio.fail_after(WAIT_S_MAX):
        await coordinator.groups.groups.coordinated()[0].wait_until_complete()


async def reason_of(member: Agent, word: str) -> None:
    """Until the member says so of why it has no connection."""
    await until(lambda: any(word in standing["reason"] for standing in member.groups.groups.standing()))


async def test_members_meet_and_cut_a_point(scratch: Path) -> None:
    vault = Vault(scratch)
    a, b = vault.agent("a", free_port()), vault.agent("b", free_port())
    configuration = order_of(a.member, b.member)
    for agent in (a, b):
        agent.groups.follow(configuration)
    async with running(a, b):
        await complete(a)
        point = await a.groups.groups.create("shop", "crash", point_name=None, note=None, wait_s=None)
        assert (point.ready, point.members) == (2, 2)
        b.groups.follow(HostConfiguration())
        await until(lambda: len(a.groups.groups.coordinated()[0].connected) == 1)
        with pytest.raises(TemporaryError, match="b: it is not connected"):
            await a.groups.groups.create("shop", "crash", point_name=None, note=None, wait_s=None)


async def test_a_certificate_of_another_vault_gets_nowhere(scratch: Path) -> None:
    vault = Vault(scratch)
    a = vault.agent("a", free_port())
    b = vault.agent("b", free_port(), make_authority("other", SystemClock().time_ns()))
    for agent in (a, b):
        agent.groups.follow(order_of(a.member, b.member))
    async with running(a, b):
        await reason_of(b, "certificate")
        assert len(a.groups.groups.coordinated()[0].connected) == 1


async def test_a_machine_of_the_vault_that_is_no_member_gets_nowhere(scratch: Path) -> None:
    vault = Vault(scratch)
    a, b, c = (vault.agent(name, free_port()) for name in "abc")
    a.groups.follow(order_of(a.member, b.member))
    c.groups.follow(order_of(a.member, c.member))
    async with running(a, c):
        await reason_of(c, "closed")
        assert len(a.groups.groups.coordinated()[0].connected) == 1


async def test_a_certificate_that_was_replaced_gets_nowhere_either_way(scratch: Path) -> None:
    vault = Vault(scratch)
    a, b = vault.agent("a", free_port()), vault.agent("b", free_port())
    configuration = order_of(a.member, b.member)
    for agent in (a, b):
        agent.groups.follow(configuration)
    vault.sign(b.state)
    async with running(a, b):
        await reason_of(b, "closed")
        vault.sign(a.state)
        a.groups.changed()
        await reason_of(b, "not coordinator a")


async def test_a_port_that_is_taken_is_an_alarm_until_it_is_free(scratch: Path) -> None:
    vault = Vault(scratch)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen(1)
        a = vault.agent("a", taken.getsockname()[1])
        a.groups.follow(order_of(a.member))
        async with running(a):
            await until(a.alarms.now)
            (alarm,) = a.alarms.now()
            assert "group_port" in alarm.text
            a.groups.follow(HostConfiguration())
            await until(lambda: not a.alarms.now())


def test_a_machine_named_like_a_store_is_not_taken_for_one(scratch: Path, rng: random.Random) -> None:
    """Its certificate may serve, to members of groups; whoever looks for a store looks at the name that only a store's
    certificate has, never at the one that a person chose."""
    vault = Vault(scratch)
    name = f"{rng.getrandbits(128):032x}.store.asrfs"
    state = StateDirectory.create(str(scratch / "liar"), name)
    vault.sign(state)
    key, ca = f"{state.keys}/machine.key", f"{state.keys}/ca.crt"
    context = client_context(key, key, ca)
    assert not context.hostname_checks_common_name
    assert context.check_hostname
