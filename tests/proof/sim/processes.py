"""Processes that can be killed between any two operations of a storage, although all of them are one.

Whatever runs for a process runs with it as `CURRENT`. A process that was killed changes nothing any more: the next
operation it asks of a storage or of the catalog raises `Killed`, which no handler of the product catches, and ends all
of its tasks. A fuse kills at the n-th operation from now that changes something.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Literal

import trio

from tests.fakes.crash_storage import Fault

Part = Literal["disk server", "agent", "store"]


class Killed(BaseException):
    """This process is dead: it gets no further."""


class Acting:
    """Context manager of `Process.acting`."""

    __slots__ = ("_process", "_token")

    def __init__(self, process: Process) -> None:
        self._process = process

    def __enter__(self) -> None:
        self._token = CURRENT.set(self._process)

    def __exit__(self, *_: object) -> None:
        CURRENT.reset(self._token)


class Process:
    """One life of a program."""

    def __init__(self, part: Part, name: str) -> None:
        self.part = part
        self.name = name
        self.is_dead = False
        self.died = trio.Event()
        self.scope = trio.CancelScope()
        self.stops = False
        """It was told to end, not killed."""
        self._fuse: tuple[int, Callable[[], None]] | None = None

    def kill(self) -> None:
        self.is_dead = True
        self.died.set()
        self.scope.cancel()

    def stop(self) -> None:
        """Told to end, as by a signal it handles."""
        self.stops = True
        self.scope.cancel()

    def light_fuse(self, operations: int, action: Callable[[], None]) -> None:
        """Do `action`, which kills, after so many operations more that change something."""
        self._fuse = (operations, action)

    def put_out_fuse(self) -> None:
        self._fuse = None

    def check(self) -> None:
        if self.is_dead:
            raise Killed(self.name)

    def step(self) -> None:
        """An operation that changed something is done."""
        if self._fuse is not None:
            left, action = self._fuse
            self._fuse = (left - 1, action) if left > 1 else None
            if left <= 1:
                action()
        self.check()

    def acting(self) -> Acting:
        """What runs inside runs for this process."""
        return Acting(self)

    async def live(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run until it is killed or told to end. What the product raises meanwhile is its own fault and comes out."""
        with self.acting():
            try:
                with self.scope:
                    await main()
            except* Killed:
                pass
            except* Exception:
                if not self.is_dead:
                    raise
            finally:
                self.is_dead = True
                self.died.set()


CURRENT: ContextVar[Process | None] = ContextVar("process", default=None)


class Guard(Fault):
    """Injected into a storage, it keeps dead processes away from it."""

    def __init__(self) -> None:
        super().__init__(at=-1)

    def strikes(self, kind: str) -> bool:
        process = CURRENT.get()
        if process is not None:
            process.check()
        return False
