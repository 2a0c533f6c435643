"""Makes a history a function of its seed: time, randomness, scheduling and threads are the simulation's own.

Threads become tasks: what the product runs in a thread runs in one piece at a moment of virtual time, after and before
waits that the seed decides, and cannot be cancelled, as a thread cannot. The journal's helper threads do their work
in the caller's place. Random bytes come from the seed. Trio's scheduler shuffles by the seed.
"""

from __future__ import annotations

import gc
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import structlog
import trio
from trio._core import _run as trio_run

from asrfs.journal import next_segment as next_segment_room
from asrfs.journal import writer as writer_room
from asrfs.replication import applier_task as applier_task_room
from asrfs.replication import trimmer as trimmer_room
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest import listener as listener_room
from tests.proof.sim.processes import CURRENT

OnWork = Callable[[Callable[..., Any], bool], None]
LogEntry = dict[str, Any]


class _NoThread:
    """Stands for a helper thread whose work is done elsewhere."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self) -> None:
        pass


class _Threading:
    Lock = staticmethod(threading.Lock)
    Condition = staticmethod(threading.Condition)
    Event = staticmethod(threading.Event)
    Thread = _NoThread


class _VirtualTime:
    @staticmethod
    def monotonic() -> float:
        return trio.current_time()


class LeapingClock(trio.abc.Clock):
    """Virtual time: when every task waits, it is the next deadline at once."""

    def __init__(self) -> None:
        self._now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Trio asks only when nothing can run. Without a deadline it waits to be woken by itself, while it ends."""
        if deadline == math.inf:
            return 1.0
        self._now = max(self._now, deadline)
        return 0.0


class Threads:
    """`trio.to_thread.run_sync` without threads. `on_work(function, begins)` sees every piece of work."""

    def __init__(self, rng: random.Random, slow: float, on_work: OnWork) -> None:
        self._rng = rng
        self._slow = slow
        self._on_work = on_work

    async def run_sync(
        self, function: Callable[..., Any], *arguments: Any, limiter: trio.CapacityLimiter, **_: object
    ) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        process = CURRENT.get()
        try:
            limiter.acquire_nowait()
        except trio.WouldBlock:
            await limiter.acquire()
        self._on_work(function, True)
        try:
            works_first = self._rng.random() < 0.5
            if not works_first:
                await self._pass()
            if process is not None:
                process.check()
            result = function(*arguments)
            if works_first:
                await self._pass()
            return result
        finally:
            self._on_work(function, False)
            limiter.release()

    async def _pass(self) -> None:
        """As a thread that works: other tasks run meanwhile, and nobody can cancel it."""
        if self._slow and self._rng.random() < self._slow:
            with trio.CancelScope(shield=True):
                await trio.sleep(self._rng.expovariate(20))  # sleep: virtual, a thread that is slow
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()


def identity_of(certificate: bytes) -> MachineIdentity:
    """What stands for a certificate here: `name id serial`."""
    name, machine_id, serial = certificate.decode().split()
    return MachineIdentity(machine_id, name, serial)


def certificate_of(identity: MachineIdentity) -> bytes:
    return f"{identity.name} {identity.machine_id} {identity.serial}".encode()


@contextmanager
def seeded_bytes(rng: random.Random) -> Iterator[None]:
    """Every draw of secret bytes comes from `rng`."""
    with mock.patch.object(os, "urandom", rng.randbytes), mock.patch.object(random, "_urandom", rng.randbytes):
        yield


@contextmanager
def deterministic(rng: random.Random, *, segment_bytes: int, slow: float, on_work: OnWork) -> Iterator[list[LogEntry]]:
    """For one history. Yields what the product logs."""
    threads = Threads(random.Random(rng.getrandbits(64)), slow, on_work)
    log: list[LogEntry] = []

    def keep(_: Any, method: str, entry: Any) -> Any:
        log.append({**entry, "level": method})
        raise structlog.DropEvent

    with ExitStack() as stack:
        if gc.isenabled():
            gc.disable()  # nothing is to be finalised at a moment that the seed does not decide
            stack.callback(gc.enable)
        change = partial(_change, stack)
        stack.enter_context(seeded_bytes(random.Random(rng.getrandbits(64))))
        change(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        change(trio_run, "_r", random.Random(rng.getrandbits(64)))
        change(trio.to_thread, "run_sync", threads.run_sync)
        for room in (writer_room, next_segment_room):
            change(room, "threading", _Threading)
        change(applier_task_room, "time", _VirtualTime)
        change(trimmer_room, "trim", partial(trimmer_room.trim, segment_bytes=segment_bytes))
        change(trimmer_room, "prepare_spare", partial(trimmer_room.prepare_spare, segment_bytes=segment_bytes))
        change(listener_room, "machine_identity", identity_of)
        configuration = structlog.get_config()
        structlog.configure(
            processors=[structlog.processors.ExceptionRenderer(), keep], cache_logger_on_first_use=False
        )
        stack.callback(lambda: structlog.configure(**configuration))
        yield log


def _change(stack: ExitStack, owner: object, name: str, value: object) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))
