"""One history: two hosts, a network and a store, made, driven and compared, all of it a function of one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import trio

from asrfs.format.segment import POSITION_SHIFT
from asrfs.model import dirty_map
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.replication import filler, shipping_session, stretch_reader
from asrfs.replication.object_builder import MachineKeys
from asrfs.replication.source import ShippingSettings
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.tails import TailIngester
from replica_store.vault.keys import MachineKeys as StoredKeys
from replica_store.vault.schema import REBUILDABLE
from tests.proof.sim.comparing import small_chunks
from tests.proof.sim.determinism import LeapingClock, LogEntry, deterministic
from tests.proof.sim.host import Host, JumpingClock
from tests.proof.sim.invariants import Invariants
from tests.proof.sim.machine_model import BLOCK
from tests.proof.sim.network import Network
from tests.proof.sim.steps import Steps
from tests.proof.sim.store import MASTER_KEY, Store, template_catalog
from tests.proof.sim.watch import Watch

RECORDS_A_SEGMENT = 6
SEGMENT_BYTES = 8192 + RECORDS_A_SEGMENT * (64 + BLOCK) + 512
DISK_BYTES = (12 * BLOCK + 1536, 5 * BLOCK)
DRAIN_S_MAX = 120.0
_NAMES = ("web1", "db1")


def _identity(number: int) -> MachineIdentity:
    return MachineIdentity(f"{number + 1:032x}", _NAMES[number], f"{number + 17:x}")


def _keys(number: int) -> StoredKeys:
    return StoredKeys(bytes([number + 1]) * 32, bytes([number + 101]) * 32)


@lru_cache
def _catalog() -> bytes:
    identities = [_identity(number) for number in range(len(_NAMES))]
    return template_catalog([(each.machine_id, each.name, each.serial, _keys(i)) for i, each in enumerate(identities)])


def prepare(root: Path) -> None:
    """What a store needs on a real disk."""
    (root / "keys").mkdir(parents=True, exist_ok=True)
    (root / "keys" / "master.key").write_bytes(MASTER_KEY)


class World:
    """Made and used inside the event loop, in `deterministic`."""

    def __init__(self, rng: random.Random, root: Path, watch: Watch, log: list[LogEntry]) -> None:
        self.rng = rng
        self._log = log
        self.watch = watch
        self.store = Store(root, _catalog(), JumpingClock(watch), rng, watch)
        self.network = Network(self.store, rng, watch)
        self.hosts = [self._make_host(number) for number in range(len(_NAMES))]
        self.invariants = Invariants(self.store, self.hosts)

    def _make_host(self, number: int) -> Host:
        rng, identity = self.rng, _identity(number)
        adopted = rng.random() < 0.3
        initial = [bytes(size) for size in DISK_BYTES]
        if adopted:
            initial[1] = rng.randbytes(2 * BLOCK) + bytes(BLOCK) + rng.randbytes(BLOCK) + bytes(BLOCK)
        disks = tuple(
            DiskConfig(
                slot=slot,
                id=f"{number * 16 + slot + 1:032x}",
                name=f"disk{slot}",
                size_bytes=size,
                gap=adopted and slot == 1,
            )
            for slot, size in enumerate(DISK_BYTES)
        )
        keys = _keys(number)
        settings = ShippingSettings(
            object_size=rng.choice((2, 4, 8)) * BLOCK,
            object_age=rng.choice((0.5, 2.0, 4.0, 8.0)),
            compression=rng.random() < 0.5,
        )
        host: Host

        async def connect() -> Any:
            return await self.network.connect(host, identity)

        host = Host(
            identity.name,
            MachineConfig(id=identity.machine_id, name=identity.name, disks=disks),
            MachineKeys(bytes.fromhex(identity.machine_id), keys.index_key, keys.payload_key),
            tuple(initial),
            self.store,
            connect,
            random.Random(rng.getrandbits(64)),
            self.watch,
            segment_bytes=SEGMENT_BYTES,
            settings=settings,
            quota_bytes=rng.choice((1 << 40, 4 << POSITION_SHIFT, 7 << POSITION_SHIFT)),  # as places count segments
        )
        return host

    # ---- the history ----

    async def run(self) -> None:
        steps = Steps(self, self.rng)
        async with trio.open_nursery() as nursery:
            for task in (self.store.run, *(host.run for host in self.hosts)):
                nursery.start_soon(task)
            for name, step, pause_s in steps.draw():
                self.watch.note("step", name)
                step()
                await trio.sleep(pause_s)  # sleep: virtual, what happens between two steps
                self._check()
            await self._drain(steps)
            self._check()
            self._check_drained()
            self.invariants.check_bytes(self.rng)
            self.network.count()
            steps.count()
            nursery.cancel_scope.cancel()

    def _check(self) -> None:
        if self.watch.violations:
            raise self.watch.violations[0]
        for entry in self._log:
            # What would end one connection only, and should not happen to any, is swallowed and logged.
            assert entry["level"] not in ("error", "exception", "critical"), f"the product's own fault: {entry}"
        self._log.clear()
        self.invariants.check()

    async def _drain(self, steps: Steps) -> None:
        """Everything works again: whatever was written reaches images and store."""
        with trio.move_on_after(DRAIN_S_MAX) as scope:
            steps.heal()
            for host in self.hosts:
                await host.until_up()
                is_taken = steps.write_last(host) or host.is_fenced
                assert is_taken, f"I8: {host.name} takes no writes although nothing is wrong any more"
            for host in self.hosts:
                await self._wait_until_drained(host)
        if scope.cancelled_caught:
            self._check()
            raise AssertionError("not drained: " + "; ".join(self._describe(host) for host in self.hosts))

    async def _wait_until_drained(self, host: Host) -> None:
        while True:
            agent = host.agent
            if agent is not None and host.server is not None:
                agent.shipper.retry_now()
                agent.resyncer.retry_now()
                lsn = host.model.lsn
                is_fenced = self.invariants.seen[host.name].frozen_at is not None
                is_known = host.machine_id.hex() not in self.store.in_doubt
                is_over = is_fenced
                is_shipped = is_over or (
                    is_known and host.knows_store and agent.positions.saved.acknowledged.lsn >= lsn
                )
                is_filled = is_over or not agent.dirty.map.slots()
                if is_shipped and is_filled and agent.progress.applied.lsn >= lsn:
                    return
            await trio.sleep(1)  # sleep: virtual
            self._check()

    def _describe(self, host: Host) -> str:
        agent, model = host.agent, host.model
        said = "no agent" if agent is None else f"{agent.positions.current}, {agent.alarms.now()}"
        return f"{host.name}: LSN {model.lsn}, {model.durable_lsn} durable, {said}"

    def _check_drained(self) -> None:
        """I1 to its end: the images are the disks. I6: who was superseded added nothing."""
        for host in self.hosts:
            host.check_disks()
            for slot, content in enumerate(host.model.disks):
                assert host.image(slot) == content, f"I9: image {slot} of {host.name} after everything was applied"

    def note_everything(self) -> None:
        """Every byte there is into the digest."""
        for name, storage in (("store", self.store.storage), *((host.name, host.storage) for host in self.hosts)):
            for file, content in sorted(storage.contents().items()):
                self.watch.note_bytes(f"{name}/{file}", content)
        for table in (*REBUILDABLE, "links"):
            self.watch.note_bytes(table, repr(self.store.vault.catalog.select(f"SELECT * FROM {table}")).encode())


class _Turns:
    """I6: whoever stores for a machine, or begins to, is alone with it; so is whoever takes a tail, which is no part of
    the machine's history."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._busy: set[tuple[str, bool]] = set()

    def on_work(self, function: Callable[..., Any], begins: bool) -> None:
        owner = getattr(function, "__self__", None)
        machine_id = getattr(owner, "_machine_id", None) or getattr(
            getattr(owner, "_identity", None), "machine_id", None
        )
        if getattr(function, "__name__", "") not in ("take", "_begin") or not isinstance(machine_id, str):
            return
        written = (machine_id, isinstance(owner, TailIngester))
        with self._watch.checking():
            if begins:
                assert written not in self._busy, f"I6: two sessions write for machine {machine_id}"
                self._busy.add(written)
            else:
                self._busy.discard(written)


def play(rng: random.Random, root: Path, watch: Watch) -> None:
    """Play one history. Raises AssertionError for what did not hold, and whatever left the product."""
    slow = rng.choice((0.0, 0.05, 0.3))
    turns = _Turns(watch)

    with (
        deterministic(rng, segment_bytes=SEGMENT_BYTES, slow=slow, on_work=turns.on_work) as log,
        mock.patch.object(dirty_map, "CHUNK_SHIFT", 12),  # disks have a dozen blocks, segments a few
        small_chunks(),
        mock.patch.object(filler, "RUN_BYTES_MAX", 4 * BLOCK),
        mock.patch.object(shipping_session, "FOLD_BACKLOG_BYTES", 6 * BLOCK),
        mock.patch.object(stretch_reader, "BYTES_LEAST", 0),
        mock.patch.object(stretch_reader, "FOLDED_BYTES_MAX", 12 * BLOCK),
    ):

        async def main() -> None:
            world = World(rng, root, watch, log)
            await world.run()
            if watch.is_recording:
                world.note_everything()

        try:
            trio.run(main, clock=LeapingClock())
        except BaseExceptionGroup as group:
            raise _first_of(group) from group


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, out of its groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
