"""Stretches and gap objects that a host ships to a real store: taken, catalogued, read back, made again, scrubbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio.testing

from asrfs.errors import NotFoundError, RefusedError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.format.record import Kind
from asrfs.protocol.messages import Acknowledge, Heartbeat, Refused
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.rebuild import rebuild
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.scrub import scrub
from tests.fakes.listening_store import StoreWorld, make_world
from tests.fakes.scripted_host import BLOCK, BuiltObject, HostEnd, HostHistory

SIZE = 16 * BLOCK


async def ship(host: HostEnd, built: BuiltObject) -> bytes:
    await host.ship(built)
    event = await host.hear_except(Heartbeat)
    assert event == Acknowledge(lsn=built.begin.last_lsn, digest=built.digest.hex())
    return built.digest


def content_at(world: StoreWorld, selector: str) -> bytes:
    cut = resolve(world.vault, "web1", selector)
    names = [disk.name for disk in disks_of(world.vault, cut)]
    opened = open_disks(world.vault, cut, names, FrameCache(world.vault))
    return b"".join(opened[name].read(0, SIZE) for name in names)


def damage_file(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def tables(world: StoreWorld) -> dict[str, list[tuple[object, ...]]]:
    return {name: world.vault.catalog.table(name) for name in REBUILDABLE}


def write(history: HostHistory, model: bytearray, block: int, rng: random.Random) -> None:
    content = rng.randbytes(BLOCK)
    history.append(Kind.WRITE, 0, block * BLOCK, BLOCK, content)
    model[block * BLOCK : (block + 1) * BLOCK] = content


async def make_stretches(world: StoreWorld, rng: random.Random) -> tuple[HostHistory, dict[int, bytes]]:
    """LSN 1 to 3 record for record, 4 to 14 as one up to a point, 15 to 18 given up, then healed up to a point; and
    what the disk holds where there is a state."""
    history, model, states = world.enrol(), bytearray(SIZE), {}
    host, welcome = await world.begin(history)
    history.disk(0, size_bytes=SIZE)
    for block in (0, 1):
        write(history, model, block, rng)
    states[3] = bytes(model)
    digest = await ship(host, history.build(1, 3, welcome.session_salt, NO_DIGEST))
    for block in (2, 3, 2, 0, 2, 3, 2, 5, 2, 6):
        write(history, model, block, rng)
    states[history.marker("folded")] = bytes(model)
    digest = await ship(host, history.build(4, 14, welcome.session_salt, digest, is_folded=True))
    for block in (7, 0):
        write(history, model, block, rng)
    history.marker("lost")
    write(history, model, 9, rng)
    digest = await ship(host, history.build_gap(15, 18, welcome.session_salt, digest))
    for block in (0, 7, 9):
        history.append(Kind.FILL, 0, block * BLOCK, BLOCK, bytes(model[block * BLOCK : (block + 1) * BLOCK]))
    history.disk(0, size_bytes=SIZE)
    states[history.marker("healed")] = bytes(model)
    await ship(host, history.build(19, history.last_lsn, welcome.session_salt, digest))
    return history, states


async def test_i5_i9_a_store_reads_stretches_back_and_shows_nothing_inside(
    scratch: Path, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        history, states = await make_stretches(world, rng)
        before = tables(world)
        for is_rebuilt in (False, True):
            assert [point.name for point in world.vault.points(history.machine_id)] == ["folded", "healed"]
            assert [row.is_stretch for row in world.vault.objects_of(history.machine_id, history.last_lsn)] == [
                *(False, True, True, False)
            ]
            for lsn, content in states.items():
                assert content_at(world, f"lsn:{lsn}") == content
            assert content_at(world, "folded") == states[14]
            assert content_at(world, "latest") == states[history.last_lsn]
            for lsn in (*range(4, 14), 15, 16, 17):
                with pytest.raises(NotFoundError, match="one stretch"):
                    resolve(world.vault, "web1", f"lsn:{lsn}")
            for lsn in range(18, 22):
                with pytest.raises(RefusedError, match="gap"):
                    resolve(world.vault, "web1", f"lsn:{lsn}")
            scrubbed = scrub(world.vault, world.vault.machines())
            assert (scrubbed.damages, scrubbed.objects) == ([], 4)
            if not is_rebuilt:
                world.vault.close()
                report = rebuild(world.path)
                assert (report.damages, report.left_out, report.points) == ([], 0, 2)
                world.restart()
                assert tables(world) == before


async def test_a_stretch_is_shorter_than_its_records(
    scratch: Path, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        history, _ = await make_stretches(world, rng)
        row = world.vault.objects_of(history.machine_id, 14)[1]
        header, index = world.vault.object_index(row)
        assert (header.first_lsn, header.last_lsn, header.record_count) == (4, 14, 6)
        assert header.payload_raw_length == 5 * BLOCK
        assert index.lsn.tolist() == [7, 9, 11, 12, 13, 14]


async def test_damage_in_a_stretch_is_said_by_the_lsns_it_has(
    scratch: Path, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        history, _ = await make_stretches(world, rng)
        row = world.vault.objects_of(history.machine_id, 14)[1]
        _, _, table = world.vault.object_head(row)
        damage_file(Path(world.vault.where(row)), table.extent(0)[0] + 5)
        (damage,) = scrub(world.vault, world.vault.machines()).damages
        assert (damage.first_lsn, damage.last_lsn) == (7, 13)


async def test_i3_a_gap_object_without_a_catalog_row_is_adopted(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        history = world.enrol()
        history.disk(0, size_bytes=SIZE)
        point = history.marker("before")
        host, welcome = await world.begin(history)
        digest = await ship(host, history.build(1, 2, welcome.session_salt))
        for block in range(4):
            write(history, bytearray(SIZE), block, rng)
        gap = history.build_gap(3, 6, welcome.session_salt, digest)
        dead = TemporaryError("dead")
        monkeypatch.setattr(world.vault.catalog, "append", lambda entries: (_ for _ in ()).throw(dead))
        await host.ship(gap)
        assert isinstance(await host.hear_except(Heartbeat), Refused)
        world.restart()
        _, welcome = await world.begin(history)
        assert (welcome.acknowledged_lsn, welcome.last_digest) == (6, gap.digest.hex())
        assert welcome.acknowledged_time_ns == history.records[5].time_ns
        assert world.vault.objects_of(history.machine_id, 6)[1].is_stretch
        assert [each.lsn for each in world.vault.points(history.machine_id)] == [point]
        with pytest.raises(RefusedError, match="gap"):
            resolve(world.vault, "web1", "latest")


async def test_a_catalog_that_calls_a_stretch_something_else_is_damage(
    scratch: Path, autojump_clock: trio.testing.MockClock, rng: random.Random
) -> None:
    async with make_world(scratch) as world:
        await make_stretches(world, rng)
        with world.vault.catalog.transaction():
            world.vault.catalog.change("UPDATE objects SET is_stretch = 0 WHERE first_lsn = 4")
        damages = scrub(world.vault, world.vault.machines()).damages
        assert [(damage.first_lsn, damage.last_lsn) for damage in damages] == [(4, 14)]
