"""Keeps one session to the store alive: when to connect, when to wait, and what people are told.

    wait until enrolled, not paused, host known ─▶ connect ─▶ session ─▶ why did it end? ─▶ wait ─▶ …

A lost connection is tried again at once, then with full jitter up to 5 s; an answer that more tries cannot change
(authentication, fence, diverged histories) raises an alarm and is tried every five minutes. Where the store was set
back, or is another one, this host rejoins it by itself; where it has been superseded, its disks take no more writes.
Nothing else of the link ever reaches the write path (I8).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog
import trio

from asrfs.errors import AsrfsError, AuthenticationError, FencedError, NoSpaceError
from asrfs.protocol.frames import ProtocolError
from asrfs.replication.alarms import Alarms
from asrfs.replication.link import Link
from asrfs.replication.object_builder import MachineKeys
from asrfs.replication.reconciliation import DivergedError, StoreLostError
from asrfs.replication.rejoiner import WHAT_TO_DO
from asrfs.replication.shipping_session import CorruptJournalError, ShippingSession
from asrfs.replication.source import Source
from asrfs.replication.tail_offer import offer_tail
from asrfs.transport.backoff import Backoff
from asrfs.transport.stream import ByteStream

HOPELESS_RETRY_S = 300.0
"""Between tries when the store's answer can only change by somebody's hand."""
USEFUL_SESSION_S = 5.0
"""A session that lasted so long, or moved something, is followed by a try at once."""
DISCONNECTED_ALARM_S = 60.0
TOLD_EVERY_S = 600.0
"""The same reason again comes to the log no oftener: a store may be away for weeks, with a try every few seconds."""
SAVE_INTERVAL_S = 0.5
"""At least so long between two saves of the acknowledged position; a lost one is made good at the next handshake."""


class StoreAccess(NamedTuple):
    """The way to the store, as enrolment gave it. `connect` raises AsrfsError or OSError when it cannot."""

    connect: Callable[[], Awaitable[ByteStream]]
    keys: MachineKeys


_ALARM_OF: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "authentication"),
    (FencedError, "fenced"),
    (DivergedError, "diverged"),
    (StoreLostError, "store-lost"),
    (CorruptJournalError, "corrupt"),
)
_ADVICE: dict[str, str] = {
    "diverged": f"; {WHAT_TO_DO}",
    "fenced": f"; {WHAT_TO_DO}",
    "store-lost": "; this host goes on in a new epoch by itself, and sends what differs",
}
_LINK_ALARMS = ("authentication", "fenced", "diverged", "store-lost", "protocol", "store-space", "link")


class Shipper:
    """`store` is None while the machine is not enrolled."""

    def __init__(
        self,
        source: Source,
        store: StoreAccess | None,
        alarms: Alarms,
        link: Link,
        backoff: Backoff,
        *,
        paused: bool = False,
    ) -> None:
        self.source = source
        self._store = store
        self._alarms = alarms
        self._link = link
        self._backoff = backoff
        self._paused = paused
        self._poked = trio.Event()
        self._scope = trio.CancelScope()
        self._connected_at = 0.0
        self._told: tuple[str, float] = ("", 0.0)
        self._log = structlog.get_logger("asrfs.shipper")

    @property
    def is_enrolled(self) -> bool:
        return self._store is not None

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """End the session; nothing is sent until `resume`."""
        self._paused = True
        self._scope.cancel()

    def resume(self) -> None:
        self._paused = False
        self.retry_now()

    def enrolled(self, store: StoreAccess) -> None:
        """Use another way to the store from now on."""
        self._store = store
        self.begin_again()

    def begin_again(self) -> None:
        """End the session, if there is one, and begin another at once: this side has something else to greet with."""
        self._scope.cancel()
        self.retry_now()

    def retry_now(self) -> None:
        """Cut short any waiting between tries."""
        self._backoff.reset()
        self._poked.set()

    def hurry(self, lsn: int) -> None:
        """Somebody waits for this LSN: ship it as soon as it is durable, whatever the object's age, and connect now."""
        self.source.hurry_lsn = max(self.source.hurry_lsn, lsn)
        if lsn > self.source.progress.acknowledged.lsn:
            self.retry_now()
        self.source.progress.wake()

    async def run(self) -> None:
        """Ship for ever. What is acknowledged is saved when this is cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._save_acknowledged)
                await self._keep_connected()
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _keep_connected(self) -> None:
        self._connected_at = trio.current_time()
        while True:
            store = await self._wait_until_allowed()
            self._poked = trio.Event()
            with trio.CancelScope() as self._scope:
                delay = await self._connect_once(store)
                with trio.move_on_after(delay):
                    await self._poked.wait()

    async def _wait_until_allowed(self) -> StoreAccess:
        """Until this machine is enrolled, shipping is not paused, and the host's position is known."""
        while True:
            if self._store is None:
                self._link.set("not enrolled")
            elif self._paused:
                self._link.set("paused")
            elif not self.source.progress.is_known:
                self._link.set("disconnected", "the disk server has not said yet what is durable")
                with trio.move_on_after(1):
                    await self.source.progress.change()
                continue
            else:
                return self._store
            self._poked = trio.Event()
            await self._poked.wait()

    async def _connect_once(self, store: StoreAccess) -> float:
        """One connection from beginning to end; seconds to wait before the next."""
        self._link.set("connecting")
        started = trio.current_time()
        session = None
        try:
            await self._check_may_connect()
            stream = await store.connect()
            try:
                if self.source.rejoiner is not None and self.source.rejoiner.offers_tail:
                    await offer_tail(stream, self.source, store.keys)
                session = ShippingSession(stream, self.source, store.keys, self._welcomed)
                await session.run()
            finally:
                await stream.aclose()
        except (AsrfsError, OSError) as error:
            if session is not None and session.welcomed:
                self._connected_at = trio.current_time()
                if session.objects_acknowledged or self._connected_at - started >= USEFUL_SESSION_S:
                    self._backoff.reset()
            delay = self._delay_after(error)
            return 0.0 if await self._takes_consequences(error) else delay
        raise AssertionError("a session ends by an error")

    async def _check_may_connect(self) -> None:
        """Whoever is fenced has nothing to say but that it wants to rejoin, or its tail. Raises AsrfsError, OSError."""
        rejoiner = self.source.rejoiner
        if rejoiner is None:
            return
        if rejoiner.order is not None:
            await rejoiner.prepare()
        elif rejoiner.fence is not None and not rejoiner.fence.handover and not rejoiner.offers_tail:
            raise FencedError(rejoiner.fence.why)

    async def _takes_consequences(self, error: Exception) -> bool:
        """What the end of a session means for this side of the machine. Whether another session begins at once."""
        rejoiner = self.source.rejoiner
        if rejoiner is None:
            return False
        try:
            if isinstance(error, FencedError) and rejoiner.order is not None:
                await rejoiner.refused(error)
            if isinstance(error, FencedError):
                return await rejoiner.superseded(str(error)) and rejoiner.offers_tail
            elif isinstance(error, StoreLostError):
                await rejoiner.ask("host", str(error))
                return True
        except (AsrfsError, OSError) as failure:
            self._log.warning("not written down", reason=str(failure))
        return False

    def _welcomed(self) -> None:
        self._alarms.clear(*_LINK_ALARMS)
        self._link.set("connected")
        self._told = ("", 0.0)
        self._log.info("connected", acknowledged_lsn=self.source.progress.acknowledged.lsn)

    def _delay_after(self, error: Exception) -> float:
        text = str(error) or type(error).__name__
        for kind, alarm in _ALARM_OF:
            if isinstance(error, kind):
                self._alarms.set(alarm, "critical", text + _ADVICE.get(alarm, ""))
                self._link.set("refused", text)
                return HOPELESS_RETRY_S
        if isinstance(error, ProtocolError):
            self._alarms.set("protocol", "warning", text)
        elif isinstance(error, NoSpaceError):
            self._alarms.set("store-space", "critical", text)
        elif trio.current_time() - self._connected_at >= DISCONNECTED_ALARM_S:
            self._alarms.set("link", "warning", f"no connection to the store: {text}")
        self._link.set("disconnected", text)
        delay = self._backoff.next_delay()
        now, (reason, told_at) = trio.current_time(), self._told
        if text != reason or now - told_at >= TOLD_EVERY_S:
            self._told = (text, now)
            self._log.info("not connected", reason=text, retry_in_s=round(delay, 3))
        return delay

    async def _save_acknowledged(self) -> None:
        progress, positions = self.source.progress, self.source.positions
        while True:
            await progress.wait_until(lambda: positions.current.acknowledged != positions.saved.acknowledged)
            await self._save()
            await trio.sleep(SAVE_INTERVAL_S)

    async def _save(self) -> None:
        try:
            await self.source.in_thread(self.source.positions.save)
            self._alarms.clear("positions")
        except (AsrfsError, OSError) as error:
            self._alarms.set("positions", "warning", f"positions cannot be saved: {error}")
