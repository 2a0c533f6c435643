"""What stops a machine before it is handed over and starts it again, with what was stopped written down before.

    run/handover.json ─▶ hooks, phase handover ─▶ … commit, or: hooks, phase take-back ─▶ gone

A kill in between leaves the file: hooks run again, so they must bear that, as stopping what is stopped does.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog
import trio

from asrfs.consistency.hooks import HookFiles, of_handover
from asrfs.daemon.processes import child_environment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError, foreign_line
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically

STOPPED_FILE = "run/handover.json"
_MODULE = "asrfs.daemon.handover_process"


class HandoverHooks:
    """Of a machine's state directory."""

    def __init__(self, state: StateDirectory, threads: trio.CapacityLimiter) -> None:
        self._state = state
        self._files = DirectoryStorage(state.root)
        self._threads = threads

    @property
    def is_stopped(self) -> bool:
        """Whether hooks of this phase ran, and nothing was started again since."""
        return self._files.exists(STOPPED_FILE)

    async def stop(self, failover: str) -> None:
        """Raises TemporaryError when a hook failed; AsrfsError, OSError."""
        if await self._in_thread(self._note_stopping):
            failure = await self._run(failover, "handover")
            if failure:
                raise TemporaryError(failure)

    async def start_again(self, failover: str) -> None:
        """If it was stopped. What fails is logged: there is nothing that could be done about it here."""
        if not self.is_stopped:
            return
        failure = await self._run(failover, "take-back")
        if failure:
            structlog.get_logger("asrfs.handover").error("not all was started again", failed=failure)
        await self._in_thread(self._forget)

    def _note_stopping(self) -> bool:
        """Whether there is something to run."""
        hooks = of_handover(HookFiles(DirectoryStorage(self._state.hooks), self._state.hooks).load())
        if hooks:
            write_atomically(self._files, STOPPED_FILE, b"{}")
        return bool(hooks)

    def _forget(self) -> None:
        if self.is_stopped:
            self._files.unlink(STOPPED_FILE)

    async def _run(self, failover: str, phase: str) -> str:
        """Why it failed; empty if it did not."""
        words = [sys.executable, "-m", _MODULE, "--state", self._state.root, "--failover", failover, "--phase", phase]
        done = await trio.run_process(
            words, capture_stdout=True, check=False, cwd="/", env=child_environment(), start_new_session=True
        )
        if done.returncode == 0:
            return ""
        said = foreign_line(done.stdout.decode(errors="replace"))
        return said or f"the process that runs handover hooks ended with {done.returncode}"

    async def _in_thread(self, function: Any) -> Any:
        return await trio.to_thread.run_sync(function, limiter=self._threads)
