"""What happens in a history, drawn from its seed: what guests do, what breaks, and how all of it is mended at the end.

Each history is given a few kinds of trouble only, another choice each time: what two of them do together shows better
when the others are quiet.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from asrfs.errors import AsrfsError
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.storage.interface import read_whole, write_atomically
from tests.fakes.crash_storage import CHANGING, CrashStorage, Fate, Fault
from tests.proof.sim.disk_server import DiskServerLife
from tests.proof.sim.host import Host
from tests.proof.sim.machine_model import BLOCK
from tests.proof.sim.processes import Process

if TYPE_CHECKING:
    from tests.proof.sim.world import World

STEPS = (12, 36)
TROUBLES = (2, 6)
PAUSES_S = (0.0, 0.0, 0.02, 0.1, 0.3, 0.6, 1.2)
LONG_PAUSE_S = 20.0
"""Longer than either side waits for a silent peer."""

FAULTS = (
    "disk server killed",
    "agent killed",
    "agent stopped",
    "host killed",
    "host lost power",
    "store killed",
    "store lost power",
    "wire cut",
    "wire half-open",
    "wire stalled",
    "wire delayed",
    "connection doubled",
    "network away",
    "clock jumped",
    "host's EIO",
    "web1's journal full",
    "db1's journal full",
    "store's EIO",
    "store full",
    "catalog set back",
    "vault set back",
    "store lost what was freed",
    "rejoined disk compared",
    "write of a fenced host refused",
    "positions not saved",
    "maps held",
    "epoch raised",
    "answer of a verb lost",
    "shipping paused",
    "records given up",
    "backlog folded",
    "dirty map lost",
    "disks compared",
    "difference found",
    "segment freed",
)
"""Every one of them strikes in any run of more than a few hundred histories. The last is no trouble, but must occur."""


class Steps:
    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._faults: list[tuple[str, Fault]] = []
        self._points = 0
        self._is_fenced = False
        self._backed_up: Host | None = None
        self._backup_lsn = 0

    def draw(self) -> Iterator[tuple[str, Callable[[], None], float]]:
        """Name, what it does, seconds until the next."""
        rng = self._rng
        troubles: list[Callable[[], None]] = rng.sample(
            [
                self.kill_disk_server, self.kill_agent, self.stop_agent, self.kill_host, self.host_power,
                self.kill_store, self.store_power, self.cut_wire, self.cut_wire_soon, self.half_open, self.stall_wire,
                self.delay, self.double, self.network_away, self.jump, self.host_eio, self.host_full, self.store_eio,
                self.store_full, self.set_catalog_back, self.set_vault_back, self.raise_epoch, self.lose_answers,
                self.pause_shipping, self.lose_map,
            ],
            rng.randint(*TROUBLES),
        )  # fmt: skip
        guest = [self.write, self.write, self.write, self.burst, self.unaligned, self.clear, self.sync, self.point]
        guest += [self.compare] if rng.random() < 0.3 else []
        share = rng.choice((0.2, 0.4, 0.6))
        pauses = rng.choices(PAUSES_S, k=4)
        for _ in range(rng.randint(*STEPS)):
            step = rng.choice(troubles if rng.random() < share else guest)
            if self._backed_up is not None and rng.random() < 0.3:
                step = self.set_vault_back
            yield step.__name__, step, rng.choice(pauses)
            if rng.random() < 0.1 and self._world.network.is_silent:
                yield "wait", self._nothing, LONG_PAUSE_S

    def _nothing(self) -> None:
        pass

    # ---- guests ----

    def _host(self) -> Host:
        return self._rng.choice(self._world.hosts)

    def _content(self, length: int) -> bytes:
        if self._rng.random() < 0.1:
            return bytes(length)
        return self._rng.randbytes(length) if self._rng.random() < 0.7 else self._rng.randbytes(1) * length

    def _write_blocks(self, host: Host, count_max: int) -> None:
        slot = self._rng.choice((0, 0, 1))
        blocks = len(host.model.initial[slot]) // BLOCK
        count = self._rng.randint(1, count_max)
        offset, content = self._rng.randint(0, blocks - count) * BLOCK, self._content(count * BLOCK)

        def write(server: DiskServerLife) -> None:
            server.announce()
            server.disks[slot].write(offset, content)
            read = server.disks[slot].read(offset, len(content))
            assert read == content, f"I9: {host.name} does not read what it has written"

        host.change(write)

    def write(self) -> None:
        self._write_blocks(self._host(), 1)

    def burst(self) -> None:
        host = self._host()
        for _ in range(self._rng.randint(2, 6)):
            self._write_blocks(host, 3)
        if self._rng.random() < 0.5:
            host.ask(DiskServerLife.sync)

    def unaligned(self) -> None:
        host = self._host()
        size = len(host.model.initial[0])
        length = self._rng.randint(1, 2 * BLOCK)
        offset, content = self._rng.randint(0, size - length), self._content(length)

        def write(server: DiskServerLife) -> None:
            server.announce()
            server.disks[0].write(offset, content)

        host.change(write)

    def clear(self) -> None:
        host = self._host()
        slot = self._rng.choice((0, 1))
        size = len(host.model.initial[slot])
        length = self._rng.randint(1, 3 * BLOCK)
        offset, is_discard = self._rng.randint(0, size - length), self._rng.random() < 0.5

        def clear(server: DiskServerLife) -> None:
            server.announce()
            disk = server.disks[slot]
            (disk.discard if is_discard else disk.zero)(offset, length)

        host.change(clear)

    def sync(self) -> None:
        host = self._host()
        appended = host.model.lsn
        if host.ask(DiskServerLife.sync) is not None:
            assert host.model.durable_lsn >= appended, "I2: a sync was answered and does not cover what came before"

    def point(self) -> None:
        self._point(self._host())

    def _point(self, host: Host) -> bool:
        """Whether it was made."""
        self._points += 1
        payload = encode_marker(MarkerRecord(id=f"{self._points:032x}", name=f"point-{self._points}"))
        place = host.ask(lambda server: server.marker(payload))
        if place is not None and host.agent is not None:
            host.agent.shipper.hurry(place[0])
            host.agent.ticker.poke()
        return place is not None

    def write_last(self, host: Host) -> bool:
        """So that there is something new to ship to the end, and a point. Whether it was taken."""
        self._write_blocks(host, 1)
        return self._point(host)

    # ---- deaths ----

    def _at_some_operation(self, process: Process, fault: str, action: Callable[[], None]) -> None:
        """Now, between what its tasks do, or right after one of its next operations."""

        def strike() -> None:
            if not process.is_dead:
                self._world.watch.fired(fault)
                self._world.watch.note(fault, process.name)
                action()

        if self._rng.random() < 0.5:
            strike()
        else:
            process.light_fuse(self._rng.choice((1, 2, 3, 5, 8, 13, 21, 34)), strike)

    def kill_disk_server(self) -> None:
        host = self._host()
        self._at_some_operation(host.server_process, "disk server killed", host.kill_disk_server)

    def kill_agent(self) -> None:
        host = self._host()
        self._at_some_operation(host.agent_process, "agent killed", host.kill_agent)

    def stop_agent(self) -> None:
        host = self._host()
        if host.agent is not None and not host.agent_process.is_dead:
            self._world.watch.fired("agent stopped")
            host.agent_process.stop()

    def kill_host(self) -> None:
        host = self._host()
        process = self._rng.choice((host.server_process, host.agent_process))
        self._at_some_operation(process, "host killed", host.kill)

    def host_power(self) -> None:
        host, fate = self._host(), self._rng.choice(list(Fate))
        process = self._rng.choice((host.server_process, host.agent_process))
        self._at_some_operation(process, "host lost power", lambda: host.lose_power(fate, self._rng))

    def kill_store(self) -> None:
        self._at_some_operation(self._world.store.process, "store killed", self._world.store.kill)

    def store_power(self) -> None:
        store, fate = self._world.store, self._rng.choice(list(Fate))
        self._at_some_operation(store.process, "store lost power", lambda: store.lose_power(fate, self._rng))

    # ---- the network ----

    def cut_wire(self) -> None:
        if (wire := self._world.network.live(self._host())) is not None:
            if self._rng.random() < 0.3:
                wire.cut(lose=self._rng.random() < 0.5)
            else:
                wire.cut_after(self._rng.choice((wire.upward, wire.downward)), self._rng.randrange(1, 20_000))

    def cut_wire_soon(self) -> None:
        self._world.network.cuts_soon = self._rng.choice((0.0, 0.5, 0.9))

    def half_open(self) -> None:
        if (wire := self._world.network.live(self._host())) is not None:
            for lane in self._rng.sample((wire.upward, wire.downward), self._rng.randint(1, 2)):
                wire.silence(lane)

    def stall_wire(self) -> None:
        if (wire := self._world.network.live(self._host())) is not None:
            lane = self._rng.choice((wire.upward, wire.downward))
            if lane.is_stalled:
                wire.release(lane)
            else:
                wire.stall(lane)

    def delay(self) -> None:
        self._world.network.latency_s = self._rng.choice((0.0, 0.01, 0.2, 3.0))
        self._world.network.capacity = self._rng.choice((1 << 10, 8 << 10, 64 << 10))

    def double(self) -> None:
        self._world.network.doubles = self._rng.choice((0.5, 1.0))
        if (wire := self._world.network.live(self._host())) is not None:
            wire.cut()

    def network_away(self) -> None:
        network = self._world.network
        if network.refuses or network.swallows:
            network.refuses = network.swallows = False
            return
        network.refuses = self._rng.random() < 0.5
        network.swallows = not network.refuses
        if (wire := network.live(self._host())) is not None:
            wire.cut()

    # ---- storage and clocks ----

    def jump(self) -> None:
        self._host().clock.jump(self._rng.choice((-86_400.0, -3600.0, -1.0, 3600.0, 86_400.0)))

    def _inject(self, fault: str, storage: CrashStorage) -> None:
        struck = Fault(self._rng.randrange(30), errno.EIO, kinds=CHANGING, partial=self._rng.choice((0.0, 0.5)))
        self._faults.append((fault, storage.inject(struck)))

    def host_eio(self) -> None:
        """A journal that failed stays so until its disk server starts again."""
        host = self._host()
        if host.server is not None and host.server.journal.failed is not None:
            host.kill_disk_server()
        else:
            self._inject("host's EIO", host.storage)

    def host_full(self) -> None:
        host = self._host()
        if host.is_short_of_space:
            host.storage.capacity = None
            host.is_short_of_space = False
        else:
            host.storage.capacity = host.storage.used_bytes() + self._rng.choice((0, 2000, 40_000))
            host.is_short_of_space = True

    def store_eio(self) -> None:
        self._inject("store's EIO", self._world.store.storage)

    def store_full(self) -> None:
        store = self._world.store
        if store.is_short_of_space:
            store.storage.capacity = None
            store.is_short_of_space = False
        else:
            store.storage.capacity = store.storage.used_bytes() + self._rng.choice((0, 3000))
            store.is_short_of_space = True

    def set_catalog_back(self) -> None:
        store = self._world.store
        if store.has_copy and store.is_up:
            store.set_catalog_back()
        elif not self._is_fenced and not store.in_doubt:
            store.copy_catalog()

    def set_vault_back(self) -> None:
        """A backup of the vault is made, and takes its place later. One host may be slow to free meanwhile, and not
        able to save what it hears then."""
        store, rng = self._world.store, self._rng
        if self._backed_up is None:
            if store.is_up and not self._is_fenced and not store.in_doubt:
                store.copy_vault()
                self._backed_up = self._host()
                self._backup_lsn = self._backed_up.received_lsn()
                self._backed_up.holds_maps = rng.random() < 0.7
                for _ in range(rng.randrange(12)):
                    self._write_blocks(self._backed_up, 2)
        elif store.has_vault_copy:
            if store.is_up and (self._has_more_than_backup(self._backed_up) or rng.random() < 0.2):
                store.set_vault_back()
                self._backed_up.cannot_save = rng.random() < 0.7
        else:
            if self._backed_up.cannot_save and rng.random() < 0.5:  # with what it could not save
                self._world.watch.fired("agent killed")
                self._backed_up.kill_agent()
            self._backed_up.holds_maps = self._backed_up.cannot_save = False
            self._backed_up = None

    def _has_more_than_backup(self, host: Host) -> bool:
        """Whether the host could free a segment that the backup has not."""
        later = [first for first in host.model.segments.values() if first > self._backup_lsn + 1]
        return bool(later) and host.received_lsn() >= min(later)

    def lose_map(self) -> None:
        """Of what a host knows of its replica's gaps; its agent finds out when it starts."""
        host = self._host()
        if host.storage.exists("dirty.map"):
            host.kill_agent()
            content = bytearray(read_whole(host.storage, "dirty.map"))
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
            with suppress(OSError):  # a fault that was meant for somebody else
                host.storage.unlink("dirty.map")
                self._world.watch.fired("dirty map lost")
                if self._rng.random() < 0.5:
                    write_atomically(host.storage, "dirty.map", content)

    # ---- people ----

    def compare(self) -> None:
        host = self._host()
        if host.agent is not None and not host.agent_process.is_dead:
            host.agent.verify()

    def raise_epoch(self) -> None:
        """As the commit of a failover does; at most one of the hosts is left behind."""
        if self._is_fenced or self._world.store.in_doubt:
            return
        host = self._host()
        if host.storage.exists("rejoin.json"):
            return  # it would be given a higher one yet
        try:
            self._world.store.raise_epoch(host.machine_id.hex())
        except AsrfsError:
            return  # the store has no room, or its disk fails: nobody was told
        self._is_fenced = True
        self._world.invariants.freeze(host)
        self._world.watch.fired("epoch raised")

    def lose_answers(self) -> None:
        self._host().loses_answers = self._rng.choice((0.0, 0.2, 0.5))

    def pause_shipping(self) -> None:
        host = self._host()
        if host.agent is not None and not host.agent_process.is_dead:
            shipper = host.agent.shipper
            if shipper.paused:
                shipper.resume()
            else:
                self._world.watch.fired("shipping paused")
                shipper.pause()

    # ---- the end ----

    def heal(self) -> None:
        """Nothing breaks any more, and what is broken is mended as people would."""
        world = self._world
        world.network.heal()
        for storage in (world.store.storage, *(host.storage for host in world.hosts)):
            storage.capacity = None
        for _, fault in self._faults:
            fault.at = -1
        world.store.is_short_of_space = False
        world.store.process.put_out_fuse()
        for host in world.hosts:
            host.is_short_of_space = False
            host.loses_answers = 0.0
            host.holds_maps = host.cannot_save = False
            host.server_process.put_out_fuse()
            host.agent_process.put_out_fuse()
            if host.server is not None and host.server.journal.failed is not None:
                host.kill_disk_server()
            if host.agent is not None and host.agent.shipper.paused:
                host.agent.shipper.resume()

    def count(self) -> None:
        """Say which injected errors struck."""
        for name, fault in self._faults:
            self._world.watch.fired(name, fault.fired)
