"""What the store wants of this host: taken from the session, checked, kept in a file, handed to who follows it.

    session ──offer──▶ run: check ─▶ followers, in the event loop ─▶ `configuration.json`, durable

The last good one goes on being followed while the store is away and after every restart. One that makes no sense is
passed over with an alarm: the store's word about policies never ends replication, and no state of it reaches the write
path (I8). One that cannot be saved is followed all the same and saved as soon as that works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import structlog
import trio

from asrfs.errors import AsrfsError, FormatError
from asrfs.model.configuration import (
    HostConfiguration,
    check_configuration,
    decode_configuration,
    encode_configuration,
)
from asrfs.replication.alarms import Alarms
from asrfs.storage.interface import Storage, read_whole, write_atomically

ALARM = "configuration"
SAVE_RETRY_S = 5.0

Follower = Callable[[HostConfiguration], None]


class ConfigurationKeeper:
    """Made with what the file says. Belongs to the event loop; only saving is a thread's."""

    def __init__(self, storage: Storage, name: str, alarms: Alarms, threads: trio.CapacityLimiter) -> None:
        self._storage = storage
        self._name = name
        self._alarms = alarms
        self._threads = threads
        self._followers: list[Follower] = []
        self._offered = trio.Event()
        self._waiting: HostConfiguration | None = None
        self._log = structlog.get_logger("asrfs.configuration")
        self._current = HostConfiguration()
        try:
            self._current = load_configuration(storage, name)
        except (FormatError, OSError) as error:
            self._alarms.set(ALARM, "warning", f"{name}: {error}: defaults hold until the store is heard")
        self._saved = self._current

    @property
    def current(self) -> HostConfiguration:
        """What is followed now."""
        return self._current

    def follow(self, follower: Follower) -> None:
        """Tell it what holds now and whatever comes; it returns at once."""
        self._followers.append(follower)
        follower(self._current)

    def offer(self, configuration: HostConfiguration) -> None:
        """The store's newest word. Only the newest that waits is looked at."""
        self._waiting = configuration
        self._offered.set()

    async def run(self) -> None:
        """Take over what is offered, for ever."""
        while True:
            is_saved = self._saved == self._current
            with trio.move_on_after(math.inf if is_saved else SAVE_RETRY_S):
                await self._offered.wait()
            self._offered = trio.Event()
            configuration, self._waiting = self._waiting, None
            if configuration is not None and not self._take(configuration):
                continue
            await self._save()

    def _take(self, configuration: HostConfiguration) -> bool:
        """Follow it, if it makes sense."""
        try:
            check_configuration(configuration)
        except FormatError as error:
            self._alarms.set(ALARM, "warning", f"what the store wants of this host is passed over: {error}")
            return False
        self._alarms.clear(ALARM)
        if configuration != self._current:
            self._log.info(
                "configured",
                generation=configuration.generation,
                policy=configuration.policy,
                groups=len(configuration.groups),
            )
            self._current = configuration
            for follower in self._followers:
                follower(configuration)
        return True

    async def in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    async def _save(self) -> None:
        configuration = self._current
        if configuration == self._saved:
            return
        content = encode_configuration(configuration)
        try:
            await self.in_thread(write_atomically, self._storage, self._name, content)
        except (AsrfsError, OSError) as error:
            self._alarms.set(ALARM, "warning", f"{self._name} cannot be saved, so a restart forgets it: {error}")
            return
        self._saved = configuration
        self._alarms.clear(ALARM)


def load_configuration(storage: Storage, name: str) -> HostConfiguration:
    """What was kept; that of a host that never heard a store if nothing was. Raises FormatError."""
    if not storage.exists(name):
        return HostConfiguration()
    return decode_configuration(read_whole(storage, name))
