"""What the benchmarks have in common: which peers there are, taking them into a run, one turn of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

from . import machine
from .foreign import NbdkitPeer, QemuMirrorPeer, QemuPeer, QemuQuorumPeer, S3backerPeer
from .measuring import MIB, Load, fill, processor_seconds, resident_peak
from .own_peers import AsrfsPeer, ShippingPeer
from .packages import version_of
from .peers import PassthroughPeer, Peer, RawPeer
from .results import Outcome, PeerFacts, Turn, Workload
from .workbench import TOLD_FAILURES, Workbench

PEERS: dict[str, type[Peer]] = {
    kind.key: kind
    for kind in (
        *(RawPeer, PassthroughPeer, QemuPeer, QemuMirrorPeer, QemuQuorumPeer, NbdkitPeer, S3backerPeer),
        *(AsrfsPeer, ShippingPeer),
    )
}
STORE = "store"
BULK = "MiB/s"
"""The unit of workloads in which bytes count, not operations."""
FIO = ("fio",)


class Run:
    """One run of one benchmark: the outcome that grows, and the peers that are being served, by key."""

    def __init__(self, bench: Workbench, name: str, command: str, settings: dict[str, Any]) -> None:
        self.bench = bench
        self.served: dict[str, tuple[Peer, str]] = {}
        self.outcome = Outcome(
            benchmark=name,
            when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            command=command,
            machine=machine.description(bench.root),
            settings={key: str(value) for key, value in settings.items()},
        )
        self._stacks: dict[str, ExitStack] = {}

    # ---- peers ------------------------------------------------------------------------------------------------

    @contextmanager
    def serving(self, peers: Iterable[str], size_bytes: int, *, filled: bool = True) -> Iterator[None]:
        """Serve those of the peers that are wanted and can be had, each written once, inside the block."""
        try:
            for key in peers:
                if self.bench.wants(key):
                    self._begin(PEERS[key](self.bench, size_bytes), filled)
            yield
        finally:
            for key in reversed(list(self._stacks)):
                self._stacks.pop(key).close()
            self.served.clear()

    def share_peers(self, other: Run) -> None:
        """Measure the peers that another run serves, as long as it does."""
        self.served, self._stacks = other.served, other._stacks
        for key, facts in other.outcome.peers.items():
            self.outcome.peers[key] = PeerFacts(facts.title, facts.version, facts.unavailable)

    def facts(self, key: str, title: str = "", version: str = "") -> PeerFacts:
        """What is known of a peer, which may be a plain program too."""
        if key not in self.outcome.peers:
            self.outcome.peers[key] = PeerFacts(title or PEERS[key].title)
        facts = self.outcome.peers[key]
        facts.version = version or facts.version
        return facts

    def begin(self, peer: Peer, stack: ExitStack, *, filled: bool) -> str:
        """Serve one peer and have its device written. Raises one of `TOLD_FAILURES`."""
        missing = self.bench.packages.missing(peer.packages)
        if missing:
            raise FileNotFoundError(missing)
        device = peer.serve(stack)
        if filled:
            fill(self.bench, device)
        peer.settle()
        self.bench.flush_everything()
        return device

    def _begin(self, peer: Peer, filled: bool) -> None:
        self.bench.say(f"starting {peer.title}")
        facts = self.facts(peer.key)
        stack = self._stacks[peer.key] = ExitStack()
        with self.or_gone(peer.key):
            self.served[peer.key] = peer, self.begin(peer, stack, filled=filled)
        facts.version = peer.version()

    @contextmanager
    def or_gone(self, key: str) -> Iterator[None]:
        """A peer that fails in the block is out of the run, with the reason; one of ours ends the run."""
        try:
            yield
        except TOLD_FAILURES as error:
            if key.startswith("asrfs"):
                raise
            self.facts(key).unavailable = reason = " ".join(str(error).split())[-300:]
            self.bench.say(f"{self.facts(key).title} is not available: {reason}")
            self.served.pop(key, None)
            if key in self._stacks:
                self._stacks.pop(key).close()

    # ---- turns ------------------------------------------------------------------------------------------------

    def take_turns(self, steps: Sequence[tuple[Workload, Callable[[Peer, str], Load]]]) -> None:
        """Every workload on every peer, peer after peer, again and again (A B C A B C …)."""
        for turn in range(self.bench.options.turns):
            for workload, step in steps:
                for key, (peer, device) in list(self.served.items()):
                    with self.or_gone(key):
                        workload.add(key, self.measure(peer, lambda: step(peer, device), workload.unit))  # noqa: B023
            self.bench.say(f"{self.outcome.benchmark}: turn {turn + 1} of {self.bench.options.turns} done")

    def measure(self, peer: Peer, step: Callable[[], Load], unit: str) -> Turn:
        """One turn of a peer. Returns when everything it caused has settled, whose processor time counts too."""
        before = {role: (pid, processor_seconds(pid)) for role, pid in peer.processes().items()}
        load = step()
        peer.settle()
        self.bench.flush_everything()
        facts = self.facts(peer.key)
        spent = {False: 0.0, True: 0.0}
        for role, (pid, seconds) in before.items():
            spent[role == STORE] += max(0.0, processor_seconds(pid) - seconds)
            facts.resident_bytes_max[role] = max(resident_peak(pid), facts.resident_bytes_max.get(role, 0))
        is_bulk = unit == BULK
        also = {} if is_bulk else {"mib_per_s": load.bytes_per_s / MIB}
        also |= {"p50_us": load.p50_us, "p99_us": load.p99_us}
        thousands = load.operations / 1000
        if before and thousands:
            also["cpu_ms"] = spent[False] * 1000 / thousands
            if STORE in before:
                also["store_cpu_ms"] = spent[True] * 1000 / thousands
        return Turn(load.bytes_per_s / MIB if is_bulk else load.iops, also)

    def use_fio(self) -> None:
        """Have fio, without which nothing can be measured, and say which. Raises FileNotFoundError."""
        missing = self.bench.packages.missing(FIO)
        if missing:
            raise FileNotFoundError(missing)
        self.outcome.machine["fio"] = version_of("fio") or "unknown"
