"""What holds for the agent now: settings of this host over the policy the store told, and who must know of a change.

`asrfs set` ─▶ reload ─┐
store ─▶ keeper ─▶ told┴▶ current ─▶ shipping (the limit of this time of the day), schedule, alarms
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from asrfs.daemon.settings import Settings, parse_overrides
from asrfs.daemon.state import SETTINGS_FILE, StateDirectory
from asrfs.errors import BadInputError, IntegrityError
from asrfs.model.configuration import HostConfiguration
from asrfs.replication.alarms import Alarms
from asrfs.replication.source import ShippingSettings, Source

ALARM = "policy"
CALENDAR_INTERVAL_S = 5.0
"""Between looks at the time of the day, on which the limit of bandwidth may depend."""


def minute_of_day() -> int:
    """Of the host's local day."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


class SettingsInForce:
    """Belongs to the event loop."""

    def __init__(self, state: StateDirectory, alarms: Alarms, minute: Callable[[], int] = minute_of_day) -> None:
        self._state = state
        self._alarms = alarms
        self._minute = minute
        self._told = HostConfiguration()
        self._changed: Callable[[], None] = lambda: None
        self._source: Source | None = None
        self.current: Settings = state.load_settings()
        self._overrides = state.load_overrides()

    def shipping(self) -> ShippingSettings:
        """What shipping goes by at this time of the day."""
        settings = self.current
        limit = settings.policy.bandwidth.limit_at(self._minute())
        return ShippingSettings(settings.object_size, settings.object_age, settings.compression, limit)

    def follow(self, source: Source, changed: Callable[[], None]) -> None:
        """Keep the source's settings those in force, and tell when what is in force has changed."""
        self._source, self._changed = source, changed

    def told(self, configuration: HostConfiguration) -> None:
        """The store's word."""
        self._told = configuration
        self._settle(self._overrides)

    async def reload(self, threads: trio.CapacityLimiter) -> None:
        """`settings.json` has changed. Raises IntegrityError; then all stays as it was."""
        overrides = await trio.to_thread.run_sync(self._state.load_overrides, limiter=threads)
        try:
            self._settle(overrides)
        except BadInputError as error:
            raise IntegrityError(f"{self._state.path(SETTINGS_FILE)}: {error}") from None

    async def watch_calendar(self) -> None:
        """For ever: the limit of bandwidth may be another at another time of the day."""
        while True:
            self._tell_source()
            await trio.sleep(CALENDAR_INTERVAL_S)

    def _settle(self, overrides: dict[str, str]) -> None:
        settings = parse_overrides(overrides, self._told)
        self._overrides, self.current = overrides, settings
        if settings.unfollowed:
            said = "; ".join(settings.unfollowed)
            self._alarms.set(ALARM, "warning", f"policy {self._told.policy} cannot be followed in all: {said}"[:500])
        else:
            self._alarms.clear(ALARM)
        self._tell_source()
        self._changed()

    def _tell_source(self) -> None:
        if self._source is not None:
            self._source.settings = self.shipping()
