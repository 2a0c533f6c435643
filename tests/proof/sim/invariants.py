"""What must hold of hosts and store: after each step what is cheap to see, at the end every byte.

I1 to I3 and I9 of a host's own disk are checked where they can break: when an image is written, when a segment is
freed, when a disk server starts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from asrfs.format.log_object import check_digest
from asrfs.format.record import Kind
from replica_store.points.builder import Cut, disks_of, open_disks
from replica_store.points.point_disk import FrameCache
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.rows import ObjectRow, log_prefix, parse_log_name
from replica_store.vault.vault import Vault
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.proof.sim.host import Host
from tests.proof.sim.machine_model import Stretch
from tests.proof.sim.store import Store

EARLIER_LSNS = 2
"""Compared beside the last one, for one of the hosts."""


@dataclass
class Seen:
    """What the last look at a machine's history at the store found."""

    received: int = 0
    digest: bytes = b""
    time_ns: int = 0
    changes: tuple[int, int] = (0, -1)
    frozen_at: int | None = None
    """Nothing may be added beyond this: the epoch was raised."""


class Invariants:
    def __init__(self, store: Store, hosts: list[Host]) -> None:
        self._store = store
        self._hosts = hosts
        self.seen = {host.name: Seen() for host in hosts}
        self._setbacks = 0

    def freeze(self, host: Host) -> None:
        """The host's side was superseded: from now on it adds nothing (I6)."""
        self.seen[host.name].frozen_at = self._received(host)

    def check(self) -> None:
        """After each step."""
        if self._setbacks != self._store.setbacks:
            self._setbacks = self._store.setbacks
            self._forget_store()
        for host in self._hosts:
            self._check_host(host)
            self._check_store(host)

    def _forget_store(self) -> None:
        """A backup took the vault's place: what was acknowledged since it was made is not there any more."""
        for host in self._hosts:
            self.seen[host.name] = Seen(frozen_at=self.seen[host.name].frozen_at)
            host.model.acknowledged_lsn = self._received(host)

    def _received(self, host: Host) -> int:
        return self._store.vault.received_lsn(host.machine_id.hex())

    def _check_host(self, host: Host) -> None:
        model = host.model
        if host.server is not None and not host.server_process.is_dead:
            journal = host.server.journal
            model.note_durable(journal.durable_lsn)
            assert journal.appended_lsn == model.lsn, "the model has every record"
        assert model.durable_lsn <= model.lsn
        if host.agent is not None and not host.agent_process.is_dead:
            positions = host.agent.positions.current
            assert positions.applied.lsn <= model.durable_lsn, "I1: applied what is not durable"
            assert positions.acknowledged.lsn <= model.durable_lsn, "acknowledged what is not durable here"
            if host.knows_store:
                model.acknowledged_lsn = max(model.acknowledged_lsn, positions.acknowledged.lsn)

    def _check_store(self, host: Host) -> None:
        machine_id, model, seen = host.machine_id.hex(), host.model, self.seen[host.name]
        if machine_id in self._store.in_doubt:
            if not self._store.is_settled(machine_id):
                return
            self._store.in_doubt.discard(machine_id)
        changes = self._store.changes
        if changes == seen.changes and model.acknowledged_lsn <= seen.received <= model.durable_lsn:
            return
        seen.changes = changes
        received = self._received(host)
        assert received <= model.durable_lsn, (
            f"I1: the store has LSN {received} of {host.name}, where LSN {model.durable_lsn} is durable"
        )
        assert received >= model.acknowledged_lsn, (
            f"I3: LSN {model.acknowledged_lsn} of {host.name} was acknowledged, LSN {received} is here"
        )
        assert received >= seen.received, f"I3: the store had LSN {seen.received} of {host.name}, now {received}"
        assert seen.frozen_at is None or received <= seen.frozen_at, (
            f"I6: a superseded side added LSN {received} behind LSN {seen.frozen_at}"
        )
        if received > seen.received:
            model.acknowledged_lsn = received
            self._check_new_objects(host, seen)
            listed = [point.lsn for point in self._store.vault.points(machine_id)]
            assert listed == model.listed(received, self._stretches(host)), (
                f"I5: {host.name} has points at {listed}, LSN {received} is here"
            )

    def _stretches(self, host: Host) -> list[Stretch]:
        rows = self._store.vault.objects_of(host.machine_id.hex(), 1 << 62)
        return [Stretch(row.first_lsn, row.last_lsn, self._is_given_up(host, row)) for row in rows if row.is_stretch]

    def _is_given_up(self, host: Host, row: ObjectRow) -> bool:
        """Whether it has nothing but what each of its disks is at its end. A folded one may be a DISK record alone."""
        _, index = self._store.vault.object_index(row)
        is_of_all = len(index.kind) == len(host.model.initial)
        return is_of_all and bool(np.all((index.kind == Kind.DISK) & (index.lsn == index.last_lsn)))

    def _check_new_objects(self, host: Host, seen: Seen) -> None:
        """No gap, no LSN twice, times never go back, each object durable and there."""
        vault, storage = self._store.vault, self._store.storage
        rows = vault.objects_of(host.machine_id.hex(), 1 << 62)
        for row in rows:
            if row.last_lsn <= seen.received:
                continue
            assert row.first_lsn == seen.received + 1, f"I3: LSN {row.first_lsn} follows LSN {seen.received}"
            assert row.last_lsn >= row.first_lsn
            assert row.first_time_ns >= seen.time_ns, "times never go back within an epoch"
            assert vault.objects.size(row.name) == row.length, f"I3: {row.name} is not what the catalog says"
            assert not storage.unsynced_bytes(row.name), f"I3: {row.name} can still be lost"
            if row.is_stretch and not self._is_given_up(host, row):
                host.watch.fired("backlog folded")
                inside = host.model.records[row.first_lsn - 1 : row.last_lsn - 1]
                assert all(record.kind != Kind.MARKER for record in inside), "I5: a point vanished in a stretch"
            seen.received, seen.digest, seen.time_ns = row.last_lsn, row.digest, row.last_time_ns

    # ---- at the end ----

    def check_bytes(self, rng: random.Random) -> None:
        """I9: each disk at the last LSN, and those of one host at another one, are the model, byte for byte; what they
        consist of is there after a power loss at this moment."""
        chosen = rng.choice(self._hosts)
        for host in self._hosts:
            self._check_machine(host, rng, EARLIER_LSNS if host is chosen else 0)
        lost = self._store.storage.crash(Fate.LOST, rng)
        for host in self._hosts:
            self._check_objects(host, lost)

    def _check_machine(self, host: Host, rng: random.Random, earlier: int) -> None:
        machine_id, vault = host.machine_id.hex(), self._store.vault
        received = vault.received_lsn(machine_id)
        whole = host.model.whole_lsns(received, self._stretches(host))
        if not whole:
            return
        reader: Any = _Reader(vault)
        frames = FrameCache(reader)
        for lsn in {whole[-1], *rng.sample(whole, min(len(whole), earlier))}:
            assert vault.gap_at(machine_id, lsn) is None, f"I5: LSN {lsn} of {host.name} lies in no gap"
            row = vault.catalog.machine_by_id(machine_id)
            assert row is not None
            cut = Cut(row, lsn, 0, 1, None)
            disks = disks_of(reader, cut)
            opened = open_disks(reader, cut, [disk.name for disk in disks], frames)
            expected = host.model.disks_at(lsn)
            for disk in disks:
                content = opened[disk.name].read(0, disk.size_bytes)
                assert content == expected[disk.slot], f"I9: {host.name}'s disk {disk.name} at LSN {lsn}"

    def _check_objects(self, host: Host, storage: CrashStorage) -> None:
        """What the catalog names is there and whole, and nothing else is: no LSN was stored twice."""
        objects = DirectoryObjects(storage, "objects")
        machine_id = host.machine_id.hex()
        rows = self._store.vault.objects_of(machine_id, 1 << 62)
        known, found = {row.name for row in rows}, set(objects.list(log_prefix(machine_id)))
        assert known <= found, f"I3: log objects of {host.name} are gone: {known - found}"
        strays = [name for name in found - known if not self._is_superseded(host, name)]
        assert not strays, f"I3: log objects of {host.name} hold LSNs that others hold: {strays}"
        for row in rows:
            assert check_digest(objects.read(row.name), row.name) == row.digest

    def _is_superseded(self, host: Host, name: str) -> bool:
        """Whether it may be left by a store that died before it took it away again: it is of an older epoch."""
        machine, parsed = self._store.vault.catalog.machine_by_id(host.machine_id.hex()), parse_log_name(name)
        return machine is not None and parsed is not None and parsed.epoch < machine.epoch


class _Reader:
    """A vault that opens each object's head once: objects never change."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self.object_head = lru_cache(None)(vault.object_head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vault, name)
