"""A store, a machine whose host was superseded in the middle of its history, and the side that goes on."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec

from asrfs.format.log_object import NO_DIGEST, SALT_BYTES
from asrfs.protocol.messages import Hello, KeptTail
from asrfs.protocol.session import ObjectReceived
from replica_store.ingest.tails import TailIngester
from replica_store.points.builder import open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.epochs import raise_epoch
from tests.fakes.scripted_host import BLOCK, HostHistory
from tests.fakes.vault_world import BLOCKS, MACHINE_ID, VaultWorld, state_at

TAIL = "tail-of-epoch-1"


def write_history(history: HostHistory, rng: random.Random, count: int) -> None:
    """Records of two disks and a point now and then."""
    if not history.records:
        for slot in (0, 1):
            history.disk(slot, size_bytes=BLOCKS * BLOCK)
    for _ in range(count):
        history.write(rng.randint(1, 3), slot=rng.randrange(2), offset=rng.randrange(BLOCKS - 3) * BLOCK)
        if rng.random() < 0.2:
            history.marker(f"point-{history.last_lsn}")


def ship_history(world: VaultWorld, until_lsn: int, rng: random.Random, history: HostHistory | None = None) -> None:
    """To the main history, up to an LSN."""
    history = history or world.history
    ingester, position, salt = world.begin(rng)
    lsn, digest = position.lsn, position.digest
    while lsn < until_lsn:
        built = history.build(lsn + 1, min(until_lsn, lsn + rng.randint(1, 4)), salt, digest)
        taken = ingester.take([ObjectReceived(built.begin, built.content)])
        assert taken.error is None
        world.note(taken.acknowledged)
        lsn, digest = built.begin.last_lsn, built.digest


def supersede(world: VaultWorld) -> None:
    raise_epoch(world.vault, MACHINE_ID)


def hello_of(world: VaultWorld, acknowledged_lsn: int, history: HostHistory | None = None) -> Hello:
    """What the superseded host greets with, which holds so much for acknowledged."""
    history = history or world.history
    row = world.vault.object_with(MACHINE_ID, acknowledged_lsn)
    hello = history.hello(acknowledged_lsn, row.digest.hex() if row is not None else "")
    return msgspec.structs.replace(hello, tail_lsn=history.last_lsn)


def take_tail(world: VaultWorld, hello: Hello, rng: random.Random) -> KeptTail:
    """All of it, from where the store wants it, in batches; what the host is told."""
    ingester = TailIngester(world.vault, world.vault.machine("web1"), hello, lambda: f"{rng.getrandbits(32):08x}")
    salt = rng.randbytes(SALT_BYTES)
    position = ingester.begin(salt)
    lsn, digest = position.lsn, position.digest or NO_DIGEST
    kept = ingester.finish_if_whole()
    while kept is None:
        built = world.history.build(lsn + 1, min(world.history.last_lsn, lsn + rng.randint(1, 4)), salt, digest)
        taken = ingester.take([ObjectReceived(built.begin, built.content)])
        if taken.error is not None:
            raise taken.error
        lsn, digest = built.begin.last_lsn, built.digest
        kept = ingester.finish_if_whole()
    return kept


def other_side(world: VaultWorld, rng: random.Random, count: int) -> HostHistory:
    """The history of the side that goes on from what the store has, with so many records of its own."""
    received = world.vault.received_lsn(MACHINE_ID)
    history = replace(
        world.history,
        epoch=world.vault.machine("web1").epoch,
        records=world.history.records[:received],
        seed=world.history.seed + 1,
    )
    write_history(history, rng, count)
    return history


def check_state(world: VaultWorld, selector: str, history: HostHistory, lsn: int) -> None:
    """I9: what the selector means is, byte for byte, the model's state."""
    cut = resolve(world.vault, "web1", selector)
    assert cut.lsn == lsn
    state = state_at(history, lsn)
    opened = open_disks(world.vault, cut, [f"disk{slot}" for slot in sorted(state)], FrameCache(world.vault))
    for slot, content in state.items():
        assert opened[f"disk{slot}"].read(0, len(content)) == content, f"I9: disk {slot} of {selector}"
