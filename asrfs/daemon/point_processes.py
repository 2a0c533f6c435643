"""The agent's end of the processes that quiesce (`point_process.py`): `consistency.maker.Quiescer` for tasks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from asrfs.consistency.procedure import Held, Outcome, PointOrder
from asrfs.daemon.point_process import MARKED, ORDER_FILE
from asrfs.daemon.processes import child_environment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, TemporaryError, error_class

_READ_BYTES = 1 << 16

log = logging.getLogger(__name__)


class PointProcesses:
    """Starts one for each order. None of them dies with us."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state

    async def make(self, order: PointOrder) -> Outcome:
        """Raises what it failed with; TemporaryError if it was killed, and then its post hooks have run."""
        async with self.quiesce(order) as quiet:
            pass
        assert quiet.outcome is not None
        return quiet.outcome

    @asynccontextmanager
    async def quiesce(self, order: PointOrder) -> AsyncIterator[QuietMachine]:
        """Until the block ends everything is quiet, if `held` is there. Raises as `make`."""
        process = await self._spawn()
        assert process.stdin is not None and process.stdout is not None
        quiet = QuietMachine(process)
        try:
            try:
                await process.stdin.send_all(msgspec.json.encode(order) + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # it has died: the end of what it says will tell
            await quiet.listen(until_held=order.is_external)
            yield quiet
            await quiet.finish()
        finally:
            with trio.CancelScope(shield=True):
                await process.stdin.aclose()
        if quiet.outcome is None:
            await process.wait()
            await self.settle()
            raise TemporaryError(f"the process that made the point ended with {process.returncode} before it had")
        await process.wait()

    async def settle(self) -> None:
        """Have post hooks run that a process which was killed has left."""
        process = await self._spawn("--settle")
        assert process.stdin is not None and process.stdout is not None
        await process.wait()
        await process.stdin.aclose()
        await process.stdout.aclose()

    async def settle_interrupted(self) -> None:
        """Have post hooks run that a point has left which was interrupted by the death of all."""
        if not await trio.to_thread.run_sync(os.path.exists, self._state.path(ORDER_FILE)):
            return
        try:
            await self.settle()
        except AsrfsError as error:
            log.error("post hooks of a point that was interrupted: %s", error)

    async def _spawn(self, *arguments: str) -> trio.Process:
        command = [sys.executable, "-m", "asrfs.daemon.point_process", "--state", self._state.root, *arguments]
        try:
            return await trio.lowlevel.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
                env=child_environment(),
            )
        except OSError as error:
            raise TemporaryError(f"no process for the point can be started: {error.strerror}") from None


class QuietMachine:
    """`consistency.maker.Quiescing` of one process."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._text = b""
        self._was_marked = False
        self.held: Held | None = None
        self.outcome: Outcome | None = None

    def marked(self) -> None:
        self._was_marked = True

    async def listen(self, *, until_held: bool) -> None:
        """Until it says `held`, if that is wanted, or the outcome, or nothing any more. Raises what it failed with."""
        assert self._process.stdout is not None
        while self.outcome is None and not (until_held and self.held is not None):
            while b"\n" not in self._text:
                piece = await self._process.stdout.receive_some(_READ_BYTES)
                if not piece:
                    return
                self._text += piece
            line, _, self._text = self._text.partition(b"\n")
            self._take(msgspec.json.decode(line))

    async def finish(self) -> None:
        """Say whether the marker was appended, if that is waited for, and hear the outcome."""
        assert self._process.stdin is not None
        if self.held is not None and self._was_marked:
            try:
                await self._process.stdin.send_all(MARKED)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        await self._process.stdin.aclose()
        await self.listen(until_held=False)

    def _take(self, said: dict[str, Any]) -> None:
        if "failed" in said:
            raise error_class(said["exit_code"])(said["failed"])
        if "held" in said:
            self.held = msgspec.convert(said["held"], Held)
        else:
            self.outcome = msgspec.convert(said["outcome"], Outcome)
