"""What thaws when nobody else does: decides nothing but when it is time, and does nothing but thaw.

    told `freeze DEADLINE`  ─▶ waits ─┬─ told `thawed`                    ─▶ ends
                                      ├─ the deadline is there            ─▶ thaws until told `thawed`
                                      └─ who tells has died (end of file) ─▶ thaws until that process is wholly gone,
                                      once more, ends

A freeze that is under way cannot be interrupted, not even by the death of its process; so thawing goes on until none
can be. Each filesystem is thawed in a thread of its own: a thaw may have to wait for a disk server that is just being
replaced.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Sequence

from asrfs.consistency.freezing import Freezer
from asrfs.model.clock import Clock

FREEZE, THAWED = b"freeze ", b"thawed"
AGAIN_S = 0.02
_MESSAGE_BYTES_MAX = 64


class Watchdog:
    """`told`: a pipe from who freezes; `freezing_process`: a pidfd of it; `fds`: what it may freeze."""

    def __init__(self, told: int, freezing_process: int, fds: Sequence[int], freezer: Freezer, clock: Clock) -> None:
        self._told = told
        self._process = freezing_process
        self._freezer = freezer
        self._clock = clock
        self._thawing: dict[int, threading.Thread | None] = dict.fromkeys(fds)
        self._deadline: float | None = None
        self._rest = b""
        self._ended = False
        self._is_over = False
        self.thawed: set[int] = set()
        """Descriptors of what was frozen when we thawed it."""

    def run(self) -> None:
        """Until there is nothing left to watch."""
        while not (self._is_over or self._ended):
            self._listen(self._patience())
            if self._is_time() and not self._is_over:
                self._thaw()
        if self._ended and self._deadline is not None and not self._is_over:
            self._thaw_after_a_death()

    def _patience(self) -> float | None:
        if self._deadline is None:
            return None
        return AGAIN_S if self._is_time() else max(0.0, self._deadline - self._clock.monotonic())

    def _is_time(self) -> bool:
        return self._deadline is not None and self._clock.monotonic() >= self._deadline

    def _listen(self, seconds_max: float | None) -> None:
        readable, _, _ = select.select([self._told], [], [], seconds_max)
        if not readable:
            return
        piece = os.read(self._told, _MESSAGE_BYTES_MAX)
        self._ended = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(FREEZE):
                self._deadline = float(line.removeprefix(FREEZE))
            self._is_over = self._is_over or line == THAWED

    def _thaw_after_a_death(self) -> None:
        while not select.select([self._process], [], [], AGAIN_S)[0]:
            self._thaw()
        self._wait_for_threads()  # one may have come just before a freeze
        self._thaw()
        self._wait_for_threads()

    def _wait_for_threads(self) -> None:
        for thread in self._thawing.values():
            if thread is not None:
                thread.join()

    def _thaw(self) -> None:
        for fd, thread in self._thawing.items():
            if thread is None or not thread.is_alive():
                started = self._thawing[fd] = threading.Thread(target=self._thaw_one, args=(fd,), daemon=True)
                started.start()

    def _thaw_one(self, fd: int) -> None:
        try:
            self._freezer.thaw(fd)
            self.thawed.add(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
