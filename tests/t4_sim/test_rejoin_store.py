"""A host that rejoins, as the store sees it: a new epoch, durable everywhere before it is told, behind what is here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio.testing

from asrfs.errors import IntegrityError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.protocol.messages import Acknowledge, Refused, Welcome
from replica_store.vault import epochs
from replica_store.vault.enrolment import newest_description
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.rebuild import rebuild
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import Vault
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_host import HostHistory


def fill(history: HostHistory, writes: int) -> None:
    history.disk()
    for _ in range(writes):
        history.write()
    history.marker("tail")


async def rejoin(world: StoreWorld, history: HostHistory, **changes: object) -> Welcome:
    host = world.connect(history)
    answer = await host.greet(msgspec.structs.replace(history.hello(), rejoin=True, **changes))
    assert isinstance(answer, Welcome)
    history.epoch = answer.epoch
    fresh = history.build_gap(answer.acknowledged_lsn + 1, history.last_lsn, answer.session_salt, digest_of(answer))
    await host.ship(fresh)
    heard = await host.hear_except()
    assert isinstance(heard, Acknowledge), heard
    return answer


def digest_of(answer: Welcome) -> bytes:
    return bytes.fromhex(answer.last_digest) or NO_DIGEST


async def test_i5_i6_and_i7_a_host_that_rejoins(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What was here stays, what comes is of a new epoch, whatever host and store had; the other side is fenced."""
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 6)
        await world.ship_all(history)
        tail = world.vault.points(history.machine_id)[-1]
        rows = world.vault.objects_of(history.machine_id, 1 << 62)
        other = history.hello(history.last_lsn, rows[-1].digest.hex())
        for _ in range(5):
            history.write()
        history.disk(gap=True)
        answer = await rejoin(world, history, appended_lsn=3, last_digest="ab" * 32, acknowledged_lsn=2)
        assert (answer.epoch, answer.acknowledged_lsn) == (2, tail.lsn)
        assert [disk.slot for disk in answer.disks] == [0]
        assert world.vault.points(history.machine_id) == [tail], "I5, I7: what was there, and nothing inside the gap"
        after = world.vault.objects_of(history.machine_id, 1 << 62)
        assert after[: len(rows)] == rows and after[-1].epoch == 2
        refused = await world.connect(history).greet(other)
        assert isinstance(refused, Refused) and refused.code == "fenced"
        history.write()
        again = await rejoin(world, history)
        assert again.epoch == 3, "asking again after a lost answer is harmless"


async def test_a_hello_that_comes_late_does_not_supersede_the_host_that_said_it(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The network has kept it, over a connection that was given up; the host has rejoined over another one since."""
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        await world.ship_all(history)
        late = msgspec.structs.replace(history.hello(), rejoin=True, order="a" * 32)
        history.write()
        history.disk(gap=True)
        answer = await rejoin(world, history, order="a" * 32)
        ghost = await world.connect(history).greet(late)
        assert isinstance(ghost, Welcome) and ghost.epoch == answer.epoch == world.vault.machine("web1").epoch
        _, again = await world.begin(history)
        assert again.epoch == answer.epoch, "the host goes on"
        other = msgspec.structs.replace(late, order="b" * 32)
        granted = await world.connect(history).greet(other)
        assert isinstance(granted, Welcome) and granted.epoch == 3
        refused = await world.connect(history).greet(late)
        assert isinstance(refused, Refused) and refused.code == "fenced", "somebody else has rejoined since"


async def test_i6_a_rebuild_knows_the_epoch_although_nothing_of_it_has_come(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        await world.ship_all(history)
        root = world.vault.root
        assert raise_epoch(world.vault, history.machine_id) == 2
        assert raise_epoch(world.vault, history.machine_id, above=6) == 7
        before = {name: world.vault.catalog.table(name) for name in REBUILDABLE}
    rebuild(root)
    with Vault.open(root, writable=False) as vault:
        assert vault.machine("web1").epoch == 7
        assert {name: vault.catalog.table(name) for name in REBUILDABLE} == before


async def test_i6_a_catalog_that_is_set_back_learns_the_epoch_from_its_objects(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        await world.ship_all(history)
        catalog = Path(world.vault.catalog.path)
        older = copied(world.vault)
        other = history.hello()
        history.write()
        history.disk(gap=True)
        await rejoin(world, history)
        world.vault.close()
        set_back(catalog, older)
        world.vault = Vault.open(world.vault.root, writable=True)
        world.restart()
        answer = await world.connect(history).greet(other)
        assert isinstance(answer, Refused) and answer.code == "fenced"
        assert world.received(history) == history.last_lsn, "I3"
        assert world.vault.machine("web1").epoch == 2


async def test_an_epoch_that_could_not_be_written_down_is_told_to_nobody(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        fill(history, 3)
        await world.ship_all(history)
        real = epochs.put_description

        def full(*_: object) -> None:
            raise TemporaryError("no space")

        monkeypatch.setattr(epochs, "put_description", full)
        with pytest.raises(TemporaryError):
            raise_epoch(world.vault, history.machine_id)
        assert world.vault.machine("web1").epoch == 1
        monkeypatch.setattr(epochs, "put_description", real)
        monkeypatch.setattr(world.vault.catalog, "put_machine", broken)
        with pytest.raises(IntegrityError):
            raise_epoch(world.vault, history.machine_id)
        assert world.vault.machine("web1").epoch == 1
        monkeypatch.undo()
        assert raise_epoch(world.vault, history.machine_id) == 3, "the description that is left was of 2"
        described = newest_description(world.vault, history.machine_id)
        assert described is not None and described.epoch == 3


def copied(vault: Vault) -> bytes:
    vault.catalog.fold()
    return Path(vault.catalog.path).read_bytes()


def set_back(catalog: Path, older: bytes) -> None:
    for beside in ("-wal", "-shm"):
        Path(f"{catalog}{beside}").unlink(missing_ok=True)
    catalog.write_bytes(older)


def broken(*_: object) -> None:
    raise IntegrityError("dead before the commit")
