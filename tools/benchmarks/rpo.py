"""The achieved RPO, sampled while something writes: from the store's catalog, and by the agent's own word.

The store's side is what counts, and looking at it disturbs nothing: the age of the newest record it has. The agent is
asked seldom, because asking makes it look at the journal sooner than it would. Samples before the first write under
test and after the last one are left out; when that was, the history itself says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from asrfs.daemon.control import ControlClient
from asrfs.errors import AsrfsError
from replica_store.vault.vault import Vault

from .own_peers import ShippingPeer
from .results import percentile

STORE_INTERVAL_S = 0.05
AGENT_INTERVAL_S = 0.5
_WARM_UP_NS = 500_000_000
_NS_PER_S = 1e9


class Sample(NamedTuple):
    """At `at_ns` the newest record at the store was of `newest_ns`. Nanoseconds since 1970."""

    at_ns: int
    newest_ns: int

    @property
    def rpo_s(self) -> float:
        return max(0, self.at_ns - self.newest_ns) / _NS_PER_S


class AchievedRpo(NamedTuple):
    """Over the samples while writes went on; `final_s` when the last one was made. `agent_s`: its worst own word."""

    median_s: float
    p99_s: float
    final_s: float
    agent_s: float
    samples: int


class RpoSampler:
    """Samples in a thread while the `with` block runs; `result` afterwards, when the store has everything."""

    def __init__(self, peer: ShippingPeer) -> None:
        self._peer = peer
        self._stop = threading.Event()
        self._samples: list[Sample] = []
        self._agent: list[tuple[int, float]] = []
        self._vault = Vault.open(str(peer.lab.vault))
        self._machine_id = self._vault.machine(peer.lab.machine).id
        self._first_lsn = self._newest()[0] + 1
        self._threads = [
            threading.Thread(target=self._repeat, args=each, daemon=True)
            for each in ((STORE_INTERVAL_S, self._look_at_store), (AGENT_INTERVAL_S, self._ask_agent))
        ]

    def __enter__(self) -> RpoSampler:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        self._vault.close()

    def result(self) -> AchievedRpo:
        """Call it when the history is drained."""
        last = self._vault.catalog.last_object(self._machine_id)
        first = self._vault.catalog.object_with(self._machine_id, self._first_lsn)
        if last is None or first is None:
            raise AsrfsError("nothing that was written came to the store")
        begin_ns, end_ns = first.first_time_ns + _WARM_UP_NS, last.last_time_ns
        during = [each for each in self._samples if begin_ns <= each.at_ns <= end_ns]
        if not during:
            raise AsrfsError("the writing was too short to be sampled")
        values = [each.rpo_s for each in during]
        final_s = max(0, end_ns - during[-1].newest_ns) / _NS_PER_S
        said = [rpo_s for at_ns, rpo_s in self._agent if begin_ns <= at_ns <= end_ns]
        return AchievedRpo(percentile(values, 50), percentile(values, 99), final_s, max(said, default=0.0), len(during))

    # ---- in the threads ---------------------------------------------------------------------------------------

    def _repeat(self, interval_s: float, look: Callable[[], None]) -> None:
        while not self._stop.wait(interval_s):
            look()

    def _look_at_store(self) -> None:
        _, newest_ns = self._newest()
        self._samples.append(Sample(time.time_ns(), newest_ns))

    def _ask_agent(self) -> None:
        try:
            with ControlClient(self._peer.state.socket_path("agent"), seconds_max=10) as agent:
                said = agent.call("status")["achieved_rpo_seconds"]
        except AsrfsError:
            return  # it is being started again: then the store's word is all there is
        if said is not None:
            self._agent.append((time.time_ns(), said))

    def _newest(self) -> tuple[int, int]:
        """LSN and time of the newest record that the store has."""
        row = self._vault.catalog.last_object(self._machine_id)
        return (row.last_lsn, row.last_time_ns) if row is not None else (0, time.time_ns())
