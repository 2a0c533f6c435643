"""Brings a replica that lacks something up to date: when, again after what failed, and what people are told of it.

    map empty ─▶ idle        store does not have what was given up yet ─▶ wait for it        not the time ─▶ wait
    not known what is missing, new epoch ─▶ compare        else ─▶ fill disk after disk ─▶ close ─▶ idle

A lost connection, a disk server that is being replaced and a full filesystem here, of which there is an alarm already,
are no failures: it waits, and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import structlog
import trio

from asrfs.errors import AsrfsError, NoSpaceError, TemporaryError
from asrfs.model.calendar import Window
from asrfs.model.dirty_map import TO_COMPARE, Reason
from asrfs.model.healing import FAILURES_MAX, Sick, is_due, lag_bytes_max, retry_delay_s
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.positions import Cursor
from asrfs.replication.alarms import Alarms
from asrfs.replication.filler import Filler
from asrfs.replication.lost_map import ALARM as LOST_MAP_ALARM
from asrfs.replication.lost_map import unknown_slots
from asrfs.replication.pace import Pace
from asrfs.replication.progress import Progress, bytes_between

ALARM = "resync"
RETRY_S = 1.0
LOOK_INTERVAL_S = 2.0
PATIENCE_S = 60.0
"""For so long a disk server may be away before that counts as a failure."""
_NOTES = {True: "the first copy is complete", False: "the resync is complete"}

Phase = Literal["idle", "store", "window", "comparing", "running", "failed"]


class HealingRules(NamedTuple):
    """What is in force now: the window of the day, the RPO that is to be kept, the journal's quota."""

    window: Window
    rpo_s: float
    quota_bytes: int


@dataclass(slots=True)
class Resyncer:
    """`minute`: of the host's local day; `find` compares disks with the store. `phase`: what is done or waited for;
    `failure`: why the last try failed."""

    filler: Filler
    progress: Progress
    alarms: Alarms
    is_enrolled: Callable[[], bool]
    rules: Callable[[], HealingRules]
    minute: Callable[[], int]
    phase: Phase = "idle"
    failure: str = ""
    failures: int = 0
    looked: bool = False
    """Whether it has looked at what there is to do since the last order."""
    _poked: trio.Event = field(default_factory=trio.Event)
    _link: Pace = field(default_factory=Pace)
    _acknowledged: Cursor = field(default_factory=Cursor)

    def __post_init__(self) -> None:
        self._acknowledged = self.progress.acknowledged
        self.filler.lag_bytes_max = self._lag_bytes_max

    async def run(self) -> None:
        """For ever. Waits while not enrolled."""
        away_since: float | None = None
        while True:
            await self.progress.wait_until(lambda: self.progress.is_known and self.is_enrolled())
            self._poked = trio.Event()
            before = self.filler.filled_bytes
            try:
                await self.heal_once()
            except (AsrfsError, OSError) as error:
                now = trio.current_time()
                if away_since is None or self.filler.filled_bytes > before:
                    away_since = now
                is_away = type(error) is TemporaryError and now - away_since < PATIENCE_S
                if is_away or isinstance(error, NoSpaceError):
                    await trio.sleep(RETRY_S)
                    continue
                await self._wait_after(error)
            else:
                self.failures, self.failure = 0, ""
                self.alarms.clear(ALARM)
                self._note_look()
                with trio.move_on_after(LOOK_INTERVAL_S):
                    await self.progress.wait_until(lambda: self._poked.is_set() or self._has_more())
            away_since = None

    def retry_now(self) -> None:
        """Cut short any waiting after a failure."""
        self.failures = 0
        self.looked = False
        self._poked.set()
        self.progress.wake()

    def _has_more(self) -> bool:
        """Whether there is something to do now that was not there to be done when it last looked."""
        return self.phase in ("idle", "store") and bool(self.filler.dirty.map.slots()) and self._has_store()

    def _note_look(self) -> None:
        self.looked = not self._poked.is_set()
        self.progress.wake()

    async def order(self, *, now: bool) -> None:
        """Try at once what failed; with `now`, whatever the time of the day. Raises OSError when that is not saved."""
        dirty = self.filler.dirty
        if now:
            async with dirty.turn:
                for slot in dirty.map.slots():
                    dirty.map.enter(slot, Reason.NOW)
                await trio.to_thread.run_sync(dirty.save, limiter=self.filler.threads)
        self.retry_now()

    async def heal_once(self) -> bool:
        """Do what can be done now; whether all disks are whole. Raises AsrfsError, OSError."""
        machine = await self.filler.prepare()
        map = self.filler.dirty.map
        if not unknown_slots(map):
            self.alarms.clear(LOST_MAP_ALARM)
        if not map.slots():
            self.phase = "idle"
            return True
        if not self._has_store():
            self.phase = "store"
            return False
        await self._find_out(machine)
        waiting = False
        for disk in machine.live_disks():
            if disk.slot in map:
                await self._fill(disk, machine)
                waiting = waiting or bool(map.dirty_chunks(disk.slot))
        if not self._has_store():
            self.phase = "store"
            return False
        whole = [slot for slot in map.slots() if self.filler.is_whole(slot)]
        if not whole or (waiting and not self._has_initial(whole)):
            self.phase = "window"
            return False
        self.phase = "running"
        is_closed = await self.filler.close(whole, _NOTES[self._has_initial(whole)])
        if is_closed and not map.slots():
            self.phase = "idle"
        return is_closed and not waiting

    async def _find_out(self, machine: MachineConfig) -> None:
        map = self.filler.dirty.map
        if disks := [disk for disk in machine.live_disks() if map.reasons(disk.slot) & TO_COMPARE]:
            self.phase = "comparing"
            await self.filler.find_out(disks)

    async def _fill(self, disk: DiskConfig, machine: MachineConfig) -> None:
        def may_go_on() -> bool:
            return self._has_store() and self._is_due(disk, machine)

        if self.filler.dirty.map.dirty_chunks(disk.slot) and may_go_on():
            self.phase = "running"
            await self.filler.fill(disk, may_go_on)

    def _is_due(self, disk: DiskConfig, machine: MachineConfig) -> bool:
        map = self.filler.dirty.map
        dirty_bytes = sum(map.dirty_bytes(each.slot, each.size_bytes) for each in machine.live_disks())
        return is_due(Sick(map.reasons(disk.slot), dirty_bytes), self.rules().window, self.minute())

    def _has_initial(self, slots: list[int]) -> bool:
        return any(Reason.INITIAL in self.filler.dirty.map.reasons(slot) for slot in slots)

    def _has_store(self) -> bool:
        """Whether the store knows what was given up: before that, more would only be given up with it."""
        return not self.filler.dirty.given_up.covers(self.progress.acknowledged.lsn)

    def _lag_bytes_max(self) -> int:
        """As `healing.lag_bytes_max`, by how fast the store has acknowledged lately."""
        now, acknowledged = trio.current_time(), self.progress.acknowledged
        self._link.note(bytes_between(self._acknowledged, acknowledged), now)
        self._acknowledged = acknowledged
        rules = self.rules()
        return lag_bytes_max(self._link.bytes_per_s(now), rules.rpo_s, rules.quota_bytes)

    async def _wait_after(self, error: Exception) -> None:
        self.failures += 1
        self.phase, self.failure = "failed", str(error) or type(error).__name__
        delay_s = retry_delay_s(self.failures)
        structlog.get_logger("asrfs.resync").warning("resync failed", reason=self.failure, retry_in_s=delay_s)
        if self.failures >= FAILURES_MAX:
            text = f"what the store lacks could not be sent, {self.failures} times in a row: {self.failure}"
            self.alarms.set(ALARM, "critical", f"{text}: it is tried again every {delay_s / 60:g} minutes")
        self._note_look()
        with trio.move_on_after(delay_s):
            await self._poked.wait()
