"""`asrfs verify`: one comparison of all disks at a time, asked about again and again by who waits for it.

Whoever asks first begins it, whoever asks meanwhile waits for the same. It changes nothing, so when nobody has asked
for a while it is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.digest_tree import extents_of, leaf_count
from asrfs.model.machine import DiskConfig
from asrfs.replication.comparer import Comparer, Comparison

ANSWER_S_MAX = 1.0
"""An answer without the outcome comes after so long at the latest."""
NOBODY_S_MAX = 30.0
EXTENTS_MAX = 100
"""Of each disk, that are named."""


@dataclass(slots=True)
class _Job:
    number: int
    disks: Sequence[DiskConfig]
    started: float
    asked: float
    step: tuple[str, int, int] = ("compare", 0, 0)
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    outcome: dict[str, Any] | AsrfsError | None = None


class Verification:
    """`comparing` gives a comparer for as long as it is needed."""

    def __init__(
        self,
        state: StateDirectory,
        comparing: Callable[[], AbstractAsyncContextManager[Comparer]],
        threads: trio.CapacityLimiter,
    ) -> None:
        self._state = state
        self._comparing = comparing
        self._threads = threads
        self._job: _Job | None = None
        self._begun = trio.Event()
        self._log = structlog.get_logger("asrfs.verification")

    async def run(self) -> None:
        """For ever: do what was begun."""
        while True:
            await self._begun.wait()
            self._begun = trio.Event()
            job = self._job
            assert job is not None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_up_alone, job)
                with job.scope:
                    await self._do(job)
                if job.outcome is None:
                    job.outcome = TemporaryError("nobody waited for the comparison: it was given up")
                job.done.set()
                nursery.cancel_scope.cancel()

    async def ask(self, number: object) -> dict[str, Any]:
        """How far the comparison `number` is, or its outcome; without a number, of the one that is begun or joined.

        Raises what it failed with.
        """
        job = self._job
        if number is None and (job is None or job.done.is_set()):
            machine = await trio.to_thread.run_sync(self._state.load_machine, limiter=self._threads)
            now = trio.current_time()
            job = self._job = _Job(job.number + 1 if job else 1, machine.live_disks(), now, now)
            self._begun.set()
        if job is None or number not in (None, job.number):
            raise TemporaryError("this comparison is not known any more, the agent was started again: verify again")
        job.asked = trio.current_time()
        with trio.move_on_after(ANSWER_S_MAX):
            await job.done.wait()
        if isinstance(job.outcome, AsrfsError):
            raise job.outcome
        what, done, total = job.step
        return {"job": job.number, "outcome": job.outcome, "doing": what, "done": done, "total": total}

    async def _do(self, job: _Job) -> None:
        def step(what: str) -> Callable[[int, int], None]:
            def note(done: int, total: int) -> None:
                job.step = (what, done, total)

            return note

        try:
            async with self._comparing() as comparer:
                found = await comparer.compare(job.disks, step("compare"))
                settled = await comparer.settle(job.disks, found, step("look again"))
        except AsrfsError as error:
            job.outcome = error
            return
        seconds = trio.current_time() - job.started
        job.outcome = described(job.disks, settled, seconds)
        self._log.info("compared", different=settled.chunks_different, lagging=found.chunks_different, seconds=seconds)

    async def _give_up_alone(self, job: _Job) -> None:
        while True:
            await trio.sleep_until(job.asked + NOBODY_S_MAX)
            if trio.current_time() >= job.asked + NOBODY_S_MAX:
                job.scope.cancel()
                return


def described(disks: Sequence[DiskConfig], found: Comparison, seconds: float) -> dict[str, Any]:
    """The document of `asrfs verify`. `extents` in bytes; of many the first."""
    rows = []
    for disk in disks:
        chunks = found.different.get(disk.slot, ())
        rows.append(
            {
                "name": disk.name,
                "chunks_compared": leaf_count(disk.size_bytes),
                "chunks_different": len(chunks),
                "extents": [list(extent) for extent in extents_of(chunks, disk.size_bytes)[:EXTENTS_MAX]],
            }
        )
    return {
        "chunks_compared": found.chunks_compared,
        "chunks_different": found.chunks_different,
        "bytes_sent": found.bytes_sent,
        "seconds": round(seconds, 3),
        "disks": rows,
    }
