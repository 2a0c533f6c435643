"""Threads that wait for bases, so that the thread of the FUSE session never does.

A request that needs what is not here comes to them as a whole: they fetch that and do the request again, until it needs
nothing more. What they cannot finish before the end stays unanswered, so the next disk server gets it again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from asrfs.disk.interface import AbsentError, Fetching

READERS_MAX = 8

log = logging.getLogger(__name__)


class BaseReaders:
    """Starts its threads when they are first needed. Methods may be called from any thread."""

    def __init__(self, readers_max: int = READERS_MAX) -> None:
        self._readers_max = readers_max
        self._change = threading.Condition()
        self._requests: deque[Callable[[], None]] = deque()
        self._readers = self._idle = 0
        self._gate = threading.Lock()
        self._closed = False

    def submit(self, request: Callable[[], None]) -> None:
        """Have `request` done and answered, which may raise AbsentError any number of times and then nothing."""
        with self._change:
            self._requests.append(request)
            if self._idle >= len(self._requests) or self._readers == self._readers_max:
                self._change.notify()
                return
            self._readers += 1
        try:
            threading.Thread(target=self._run, name="base-reader", daemon=True).start()
        except RuntimeError:
            with self._change:
                self._readers -= 1
                if not self._readers:
                    raise

    def close(self) -> None:
        """When this returns nothing more is done or answered. Who still waits for a base is left to do so."""
        with self._gate:
            self._closed = True
        with self._change:
            self._requests.clear()
            self._change.notify_all()

    def _run(self) -> None:
        while not self._closed:
            with self._change:
                self._idle += 1
                while not self._requests and not self._closed:
                    self._change.wait()
                self._idle -= 1
                if self._closed:
                    return
                request = self._requests.popleft()
            try:
                self._do(request)
            except BaseException:
                log.exception("a request that waited for a base failed: the next disk server tries it again")
                os._exit(1)

    def _do(self, request: Callable[[], None]) -> None:
        sources: list[Fetching] = []
        try:
            while True:
                try:
                    with self._gate:
                        if not self._closed:
                            request()
                    return
                except AbsentError as absent:
                    sources.append(absent.source)
                    missing = absent
                missing.source.fetch(missing.extents)
        finally:
            for source in sources:
                source.forget()
