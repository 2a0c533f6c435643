"""What lies between hosts and store: wires that are made when a host connects, and what is done to them."""

from __future__ import annotations

import random

import trio

from asrfs.transport.stream import CONNECT_S, LinkError
from asrfs.transport.tls import MachineIdentity
from tests.fakes.wire import Wire, WireEnd
from tests.proof.sim.determinism import certificate_of
from tests.proof.sim.host import Host
from tests.proof.sim.store import Store
from tests.proof.sim.watch import Watch

GHOST_DELAYS_S = (0.0, 0.01, 0.3, 2.0)


class Network:
    """`latency_s` is the largest delay of a piece; `doubles` how often a connection attempt comes twice."""

    def __init__(self, store: Store, rng: random.Random, watch: Watch) -> None:
        self._store = store
        self._rng = rng
        self._watch = watch
        self.latency_s = 0.0
        self.capacity = 64 << 10
        self.doubles = 0.0
        self.refuses = False
        self.swallows = False
        self.cuts_soon = 0.0
        self._wires: list[Wire] = []

    async def connect(self, host: Host, identity: MachineIdentity) -> WireEnd:
        """As `asrfs.transport.stream.connect`."""
        await trio.sleep(self._latency())  # sleep: virtual, the way there and back
        if self.swallows:
            self._watch.fired("network away")
            await trio.sleep(CONNECT_S)  # sleep: virtual, nobody answers
            raise LinkError("no answer")
        if self.refuses:
            self._watch.fired("network away")
        if self.refuses or not self._store.is_up:
            raise LinkError("connection refused")
        wire = self._make()
        certificate = certificate_of(identity)
        if self._rng.random() < self.doubles:
            ghost = self._make(self._rng.choice(GHOST_DELAYS_S))
            wire.echo_to(ghost)
            self._store.accept(ghost, certificate)
        if self._rng.random() < self.cuts_soon:
            wire.cut_after(self._rng.choice((wire.upward, wire.downward)), self._rng.randrange(1, 4000))
        self._store.accept(wire, certificate)
        host.wires = [end for end in host.wires if not end.is_closed]
        host.wires.append(wire.host)
        return wire.host

    def live(self, host: Host) -> Wire | None:
        """The wire that a host uses now."""
        alive = [end.wire for end in host.wires if end.wire.is_alive]
        return alive[-1] if alive else None

    @property
    def is_silent(self) -> bool:
        """Whether somebody waits for a peer that will say nothing."""
        return any(
            not (end.is_closed or wire.is_cut) and (end.inward.is_silent or end.inward.is_stalled)
            for wire in self._wires
            for end in (wire.host, wire.store)
        )

    def heal(self) -> None:
        """From now on the network does what networks should."""
        self.refuses = self.swallows = False
        self.doubles = self.cuts_soon = self.latency_s = 0.0
        for wire in self._wires:
            wire.upward.bytes_until_cut = wire.downward.bytes_until_cut = float("inf")
            wire.release(wire.upward)
            wire.release(wire.downward)

    def count(self) -> None:
        """Say which faults struck; called once, at the end."""
        for wire in self._wires:
            lanes = (wire.upward, wire.downward)
            self._watch.fired("wire cut", wire.cuts)
            self._watch.fired("connection doubled", wire.echoed)
            self._watch.fired("wire half-open", sum(lane.swallowed > 0 for lane in lanes))
            self._watch.fired("wire stalled", sum(lane.held_back > 0 for lane in lanes))
            self._watch.fired("wire delayed", sum(lane.late > 0 for lane in lanes))

    def _latency(self) -> float:
        return self._rng.uniform(0.0, self.latency_s) if self.latency_s else 0.0

    def _make(self, extra_s: float = 0.0) -> Wire:
        wire = Wire(latency=lambda: self._latency() + extra_s, capacity=self.capacity, chop=self._rng)
        self._wires.append(wire)
        return wire
