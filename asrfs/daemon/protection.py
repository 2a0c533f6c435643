"""How well a machine is protected, as status says it. PURE."""

from __future__ import annotations

from typing import Any, NamedTuple

from asrfs.model.calendar import ALWAYS, Window
from asrfs.model.dirty_map import TO_COMPARE, DirtyMap, GivenUp, Reason
from asrfs.model.machine import MachineConfig
from asrfs.model.quantities import format_size
from asrfs.replication.alarms import Alarm
from asrfs.replication.resyncer import Phase


class Healing(NamedTuple):
    """For status: bytes that are dirty and why, by slot; what was given up; what is done about it."""

    dirty_bytes: dict[int, int]
    reasons: dict[int, Reason]
    given_up: GivenUp
    phase: Phase = "idle"
    failure: str = ""
    bytes_per_second: float = 0.0

    @property
    def bytes_left(self) -> int:
        return sum(self.dirty_bytes.values())


def standing_of(
    map: DirtyMap,
    given_up: GivenUp,
    machine: MachineConfig,
    phase: Phase = "idle",
    failure: str = "",
    pace: float = 0.0,
) -> Healing:
    """What the map says of a machine. What is not known and an adopted image that was not looked at yet count whole."""
    dirty_bytes: dict[int, int] = {}
    reasons: dict[int, Reason] = {}
    for disk in machine.live_disks():
        slot = disk.slot
        is_unread = Reason.UNREAD in map.reasons(slot) or (disk.gap and slot not in map)
        if slot in map or is_unread:
            is_whole = is_unread or bool(map.reasons(slot) & TO_COMPARE)
            dirty_bytes[slot] = disk.size_bytes if is_whole else map.dirty_bytes(slot, disk.size_bytes)
            reasons[slot] = map.reasons(slot) | (Reason.INITIAL if is_unread else Reason(0))
    return Healing(dirty_bytes, reasons, given_up, phase, failure, pace)


def protection(machine: MachineConfig, acknowledged_lsn: int, healing: Healing, window: Window) -> tuple[str, str]:
    """`(state, reason)` of an enrolled machine."""
    reasons = healing.reasons
    names = {disk.slot: disk.name for disk in machine.live_disks()}
    if any(Reason.REJOINED in reason for reason in reasons.values()):
        why = "host and store went on in a new epoch, and disks are to be compared"
        return "resyncing" if healing.phase == "comparing" else "resync-required", f"{why}{_when(healing, window)}"
    if is_initial := [slot for slot, reason in reasons.items() if Reason.INITIAL in reason]:
        reason = f"the content disk {names[is_initial[0]]} was adopted with is being sent"
        return "initial-replication", f"{reason}: {healing.failure}" if healing.phase == "failed" else reason
    if reasons or healing.given_up.covers(acknowledged_lsn):
        since_lsn = healing.given_up.gaps[-1].after_lsn if healing.given_up.gaps else 0
        state = "resyncing" if healing.phase in ("comparing", "running") else "resync-required"
        if any(Reason.UNKNOWN in reason for reason in reasons.values()):
            why = "the record of what the replica lacks was lost, and all disks are compared with it"
            return state, f"{why}{_when(healing, window)}"
        why = f"the journal came to its quota, and what was written behind LSN {since_lsn} was given up"
        if not any(Reason.GIVEN_UP in reason for reason in reasons.values()) and reasons:
            why = "comparing has found that the replica differs"
        return state, f"{why}: {format_size(healing.bytes_left)} are to be sent{_when(healing, window)}"
    if acknowledged_lsn == 0:
        return "initial-replication", "the store has nothing of this machine yet"
    return "protected", ""


def _when(healing: Healing, window: Window) -> str:
    if healing.phase == "store":
        return " once the store is there"
    if healing.phase == "window":
        return f" {_window_text(window)}, or at once by `asrfs resync --now`"
    if healing.phase == "failed":
        return f"; the last try failed: {healing.failure}"
    return ""


def _window_text(window: Window) -> str:
    if window == ALWAYS:
        return "at any time"
    start, end = (f"{minute // 60:02}:{minute % 60:02}" for minute in window)
    return f"between {start} and {end}"


def resync_document(healing: Healing) -> dict[str, Any]:
    """The `resync` of a status document. Seconds are None while nothing is known of how long it takes."""
    pace = healing.bytes_per_second
    seconds_left = 0.0 if not healing.bytes_left else round(healing.bytes_left / pace, 1) if pace else None
    return {"bytes_left": healing.bytes_left, "bytes_per_second": round(pace), "seconds_left": seconds_left}


def protection_alarms(state: str, reason: str) -> list[Alarm]:
    """The alarm of a replica that is not whole, and to which nothing is being sent."""
    return (
        [Alarm("resync-required", "warning", f"the replica is not whole: {reason}")]
        if state == "resync-required"
        else []
    )
