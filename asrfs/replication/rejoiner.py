"""Goes on in a new epoch where host and store share no history any more; and what becomes of who was superseded.

    order written (rejoin.json) ─▶ disks in the map, gaps open ─▶ HELLO rejoin ─▶ WELCOME: epoch, LSN M of the store
        ─▶ journal: new segment of that epoch, LSNs above ours and M, DISK records ─▶ map saved: all of it is given up
        ─▶ positions: M acknowledged ─▶ fenced.json and rejoin.json gone ─▶ gap object, comparing, filling, gap closed

A kill between any two steps finds the order, and begins again: the store gives another epoch, and each step is done
anew or has been. What the store had stays as it is (I7): our records come behind it, with LSNs of their own (I9), and
no point is listed from there until all disks were compared and healed (I5). The side that did not ask is of an older
epoch from then on: the store refuses it, it writes that down, and its disks take no more writes (I6).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import structlog
import trio

from asrfs.errors import AsrfsError, FormatError, RefusedError, TemporaryError
from asrfs.journal.reader import JournalReader
from asrfs.model.dirty_map import Reason
from asrfs.model.machine import DiskRecord, MachineConfig
from asrfs.model.positions import Cursor
from asrfs.model.rejoining import (
    FENCE_FILE,
    REJOIN_FILE,
    By,
    Fence,
    FencedTail,
    Handed,
    RejoinOrder,
    decode_fence,
    decode_order,
    rejoining,
)
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import Welcome
from asrfs.replication.alarms import Alarms
from asrfs.replication.dirty_map_file import DirtyMapFile
from asrfs.replication.disk_server import DiskServer, HostPositions
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.quota import mark_records, with_gap
from asrfs.replication.rewind import epoch_start
from asrfs.storage.interface import Storage, read_whole, write_atomically

ALARM = "fenced"
"""As of the link: whoever was superseded is told so by the store, or by its own file."""
HANDOVER_ALARM = "handed-over"
WHAT_TO_DO = (
    "if this host is the one to go on, `asrfs resync --full-scan` has it go on in a new epoch, and every other host of "
    "this machine is fenced: its disks take no more writes"
)
RETRY_S = 1.0
_HANDED = "the store was handed all that it wrote"

T = TypeVar("T")
EditMachine = Callable[[Callable[[MachineConfig], MachineConfig]], MachineConfig]


@dataclass(slots=True)
class Rejoiner:
    """`storage`: the state directory's, `journal`: the journal's; `reader` is this one's own. `machine` reads
    `machine.json`, `edit_machine` replaces it; both block.

    `refusal`: why the last order came to nothing.
    """

    storage: Storage
    journal: Storage
    machine_id: bytes
    reader: JournalReader
    server: DiskServer
    progress: Progress
    positions: PositionsFile
    dirty: DirtyMapFile
    alarms: Alarms
    threads: trio.CapacityLimiter
    machine: Callable[[], MachineConfig]
    edit_machine: EditMachine
    now_ns: Callable[[], int]
    refusal: AsrfsError | None = None
    order: RejoinOrder | None = field(init=False)
    fence: Fence | None = field(init=False)

    def __post_init__(self) -> None:
        self.order = _load(self.storage, REJOIN_FILE, decode_order, None)
        self.fence = load_fence(self.storage)
        self._raise_alarm()

    async def run(self) -> None:
        """Have the disk server know of a fence that was written down, or removed, before somebody died. Ends then."""
        while True:
            try:
                return await self.server.reread_fence()
            except TemporaryError:
                await trio.sleep(RETRY_S)

    # ---- orders ----

    async def ask(self, by: By, why: str) -> None:
        """Order it, durably, unless it is ordered already. Raises OSError."""
        self.refusal = None
        if self.order is None:
            order = RejoinOrder(id=secrets.token_hex(16), by=by, why=why[:1000], time_ns=self.now_ns())
            await self._in_thread(write_atomically, self.storage, REJOIN_FILE, msgspec.json.encode(order))
            self.order = order
            structlog.get_logger("asrfs.rejoin").warning("rejoining is ordered", by=by, why=why)
        self.progress.wake()

    async def reread(self) -> None:
        """An order that somebody else has written is there now."""
        order = await self._in_thread(_load, self.storage, REJOIN_FILE, decode_order, None)
        if order is not None and order != self.order:
            self.refusal, self.order = None, order
            structlog.get_logger("asrfs.rejoin").warning("rejoining is ordered", by=order.by, why=order.why)
            self.progress.wake()

    async def refused(self, error: AsrfsError) -> None:
        """The store will never let this side rejoin. Raises OSError."""
        await self._in_thread(self._remove, REJOIN_FILE)
        self.order, self.refusal = None, error
        self.progress.wake()

    # ---- being superseded ----

    async def superseded(self, why: str) -> bool:
        """Take no more writes, also after any death; whether that is new. Raises AsrfsError, OSError."""
        before = self.fence
        if is_new := before is None or bool(before.handover):
            has_handed = before is not None and before.handed is not None
            tail = FencedTail(outcome="none", text=_HANDED) if has_handed else None
            await self._write_fence(Fence(epoch=self.progress.epoch, why=why[:1000], time_ns=self.now_ns(), tail=tail))
        self._raise_alarm()
        await self.server.reread_fence()
        return is_new

    @property
    def offers_tail(self) -> bool:
        """Whether this host was superseded, and it is open what becomes of what the store did not have."""
        fence = self.fence
        return fence is not None and not fence.handover and fence.tail is None and self.order is None

    async def tail_settled(self, tail: FencedTail) -> None:
        """What became of it is known. Raises OSError."""
        if self.fence is not None and self.offers_tail:
            await self._write_fence(msgspec.structs.replace(self.fence, tail=tail))
            structlog.get_logger("asrfs.rejoin").warning("the tail is settled", outcome=tail.outcome, text=tail.text)

    async def _write_fence(self, fence: Fence) -> None:
        await self._in_thread(write_atomically, self.storage, FENCE_FILE, msgspec.json.encode(fence))
        self.fence = fence
        self._raise_alarm()

    def _raise_alarm(self) -> None:
        fence = self.fence
        if fence is None or fence.handover:
            self.alarms.clear(ALARM)
        if fence is None or not fence.handover:
            self.alarms.clear(HANDOVER_ALARM)
        if fence is not None and fence.handover:
            self.alarms.set(HANDOVER_ALARM, "critical", handover_text(fence))
        elif fence is not None:
            tail = f"; {fence.tail.text}" if fence.tail is not None else ""
            text = f"this host was superseded, and its disks take no more writes: {fence.why}{tail}"
            self.alarms.set(ALARM, "critical", f"{text}; {WHAT_TO_DO}")

    # ---- making way for a planned failover ----

    async def hand_over(self, failover: str, why: str) -> None:
        """Take no more writes until the store says otherwise, also after any death. Raises AsrfsError, OSError."""
        if self.fence is None:
            fence = Fence(epoch=self.progress.epoch, why=why[:1000], time_ns=self.now_ns(), handover=failover)
            await self._write_fence(fence)
        if self.fence is None or self.fence.handover != failover:
            raise RefusedError("this host makes way for somebody else already")
        await self.server.reread_fence()

    async def handed(self, failover: str, handed: Handed) -> None:
        """What the store is about to be told; from now on it alone may take the fence back. Raises as `hand_over`."""
        if self.fence is None or self.fence.handover != failover or self.order is not None:
            raise RefusedError("this host goes on by itself meanwhile")
        await self._write_fence(msgspec.structs.replace(self.fence, handed=handed))

    async def take_back(self, failover: str) -> None:
        """Take writes again, unless the fence is not of this failover. Raises AsrfsError, OSError."""
        if self.fence is None or self.fence.handover == failover:
            await self._in_thread(self._remove, FENCE_FILE)
            self.fence = None
            self._raise_alarm()
            await self.server.reread_fence()
            self.progress.wake()

    # ---- the new epoch ----

    async def prepare(self) -> None:
        """What can be done, or can fail, before the store is asked. Raises AsrfsError, OSError."""
        async with self.dirty.turn:
            await self._open_gaps(())
            await self.server.sync()

    async def go_on(self, welcome: Welcome) -> Cursor:
        """Go on in the epoch that the store gave; where it stands, for ours. Raises AsrfsError, OSError.

        The caller makes that the acknowledged position, saved, and then calls `finish`.
        """
        if welcome.epoch <= self.progress.epoch:
            raise ProtocolError("the store is of before rejoining and gives no new epoch: upgrade it")
        store_lsn, dirty = welcome.acknowledged_lsn, self.dirty
        async with dirty.turn:
            host, machine = await self._begin_epoch(welcome, has_nothing=not store_lsn)
            self.progress.note_host(appended_lsn=host.appended_lsn, durable=host.durable, epoch=host.epoch)
            start = await self._in_thread(epoch_start, self.journal, self.machine_id)
            through, last = await self._in_thread(mark_records, self.reader, start, host.durable.lsn, dirty.map)
            boot = machine.boot_document()
            records = {disk.slot: DiskRecord.of(disk, boot) for disk in machine.disks} | last
            disks = tuple(with_gap(records[slot]) for slot in sorted(records))
            common_lsn = min(self.positions.saved.acknowledged.lsn, store_lsn)
            given_up = dirty.given_up.rejoined(store_lsn, common_lsn, through, disks)
            await self._in_thread(dirty.save, given_up)
        structlog.get_logger("asrfs.rejoin").warning(
            "a new epoch", epoch=host.epoch, store_lsn=store_lsn, first_lsn=start.lsn + 1, through_lsn=through.lsn
        )
        return msgspec.structs.replace(start, lsn=store_lsn, time_ns=welcome.acknowledged_time_ns)

    async def finish(self) -> None:
        """All of it is saved: the order is carried out. Raises AsrfsError, OSError."""
        await self._in_thread(self._remove, FENCE_FILE)
        if self.fence is not None:
            await self.server.reread_fence()
            self.fence = None
            self._raise_alarm()
        await self._in_thread(self._remove, REJOIN_FILE)
        self.order = None
        self.progress.wake()

    async def _begin_epoch(self, welcome: Welcome, *, has_nothing: bool) -> tuple[HostPositions, MachineConfig]:
        """Until no disk was added on the way: the history then says of each that content is missing."""
        while True:
            machine = await self._open_gaps(welcome.disks, has_nothing=has_nothing)
            host = await self.server.new_epoch(welcome.epoch, welcome.acknowledged_lsn)
            if all(self._is_open(disk.slot, disk.gap) for disk in (await self._in_thread(self.machine)).live_disks()):
                return host, machine

    def _is_open(self, slot: int, gap: bool) -> bool:
        return gap and Reason.REJOINED in self.dirty.map.reasons(slot)

    async def _open_gaps(self, at_store: tuple[DiskRecord, ...], *, has_nothing: bool = False) -> MachineConfig:
        """Every disk is in the map, and in `machine.json` with a gap."""
        map = self.dirty.map
        machine = await self._in_thread(self.machine)
        if not machine.live_disks():
            raise RefusedError("a machine without disks cannot go on in a new epoch: add a disk first")
        for disk in machine.live_disks():
            map.enter(disk.slot, Reason.REJOINED | (Reason.INITIAL if has_nothing else Reason(0)))
            map.settle(disk.slot, Reason.UNREAD)  # comparing finds that, too
        await self._in_thread(self.dirty.save)
        return await self._in_thread(self.edit_machine, lambda machine: rejoining(machine, at_store))

    def _remove(self, name: str) -> None:
        if self.storage.exists(name):
            self.storage.unlink(name)
            self.storage.sync_directory("")

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)


def load_fence(storage: Storage) -> Fence | None:
    """What was written down. A fence that cannot be read holds, and only rejoining ends it."""
    unreadable = Fence(epoch=0, why=f"{FENCE_FILE} is there and cannot be read", time_ns=0)
    return _load(storage, FENCE_FILE, decode_fence, unreadable)


def handover_text(fence: Fence) -> str:
    """What people are told of a host that makes way for a planned failover."""
    if fence.handed is None:
        return f"{fence.why}: the disks take no writes while host and store are being compared"
    return (
        f"{fence.why}: the disks take no writes, and the store has all of LSN {fence.handed.lsn}. `replica-store "
        f"failover cancel {fence.handover[:12]}` gives them back, `commit` makes it final"
    )


def _load(storage: Storage, name: str, decode: Callable[[bytes, str], T], unreadable: T | None) -> T | None:
    """What a file says; None where there is none."""
    if not storage.exists(name):
        return None
    try:
        return decode(read_whole(storage, name), name)
    except FormatError:
        return unreadable
