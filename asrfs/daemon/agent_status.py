"""The status document of a machine: a pure function of facts, so that it says the same with and without an agent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asrfs.daemon.control import call
from asrfs.daemon.disk_server_client import host_positions
from asrfs.daemon.enrolment import is_enrolled
from asrfs.daemon.health import process_alarms, quota_alarms, rpo_alarms, space_alarms
from asrfs.daemon.promoting import ALARM as PROMOTING_ALARM
from asrfs.daemon.promoting import load_promoting
from asrfs.daemon.protection import Healing, protection, protection_alarms, resync_document, standing_of
from asrfs.daemon.state import DIRTY_MAP_FILE, HYDRATION_FILE, StateDirectory
from asrfs.errors import AsrfsError
from asrfs.fuse.mount import FILESYSTEM_TYPE, mount_at
from asrfs.journal.reader import JournalReader
from asrfs.model.hydration import NO_TURN
from asrfs.model.machine import MachineConfig
from asrfs.model.names import id_bytes
from asrfs.model.policy import Policy
from asrfs.model.positions import Cursor, Positions
from asrfs.model.promoting import Promoting, promoting_text
from asrfs.model.recovered import RecoveredMachine
from asrfs.model.rejoining import Fence
from asrfs.replication.alarms import Alarm, in_order
from asrfs.replication.hydration_file import load_turn
from asrfs.replication.lost_map import find_dirty_map
from asrfs.replication.progress import bytes_between
from asrfs.replication.rejoiner import ALARM as FENCE_ALARM
from asrfs.replication.rejoiner import HANDOVER_ALARM, WHAT_TO_DO, handover_text, load_fence
from asrfs.replication.trimmer import Trimmer
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock

_ANSWER_S_MAX = 5.0
_RECORDS_AT_ONCE, _BYTES_AT_ONCE = 4096, 8 << 20
NS_PER_S = 1_000_000_000
AGENT_NOT_RUNNING = "agent not running"
AGENT_SILENT = "agent does not answer"
FENCED = "this host was superseded: another side of the machine goes on, and its disks take no more writes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What status is made of. `cut_bytes`: of the journal's segments that are shorter than its places count, and
    `lag_cut_bytes` of those from the acknowledged place on.
    `first_unacknowledged_ns`: time of the first durable record the store does not have. `hydration`: by slot, of disks
    that have a base.
    """

    machine: MachineConfig
    images: Mapping[int, str]
    is_enrolled: bool
    positions: Positions
    appended_lsn: int
    durable: Cursor
    epoch: int
    now_ns: int
    first_unacknowledged_ns: int | None
    oldest_segment: int
    cut_bytes: int = 0
    lag_cut_bytes: int = 0
    quota_bytes: int
    healing: Healing
    fence: Fence | None
    promoting: Promoting | None = None
    link: str
    link_reason: str = ""
    policy: Policy = field(default_factory=Policy)
    processes: Mapping[str, int | None] = field(default_factory=dict)
    alarms: Sequence[Alarm] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    recovered: RecoveredMachine | None = None
    hydration: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def status(facts: Facts) -> dict[str, Any]:
    """The document of `asrfs status --json`. The achieved RPO is None when it cannot be known."""
    applied, acknowledged = facts.positions.applied, facts.positions.acknowledged
    durable = facts.durable
    state, reason = "unprotected", "not enrolled with a store"
    if facts.recovered is not None:
        state, reason = "recovered", f"goes on from {facts.recovered.described()}; not enrolled with a store"
    if facts.is_enrolled:
        state, reason = protection(facts.machine, acknowledged.lsn, facts.healing, facts.policy.resync_window)
    if facts.fence is not None and facts.fence.handover:
        reason = handover_text(facts.fence)
    elif facts.fence is not None:
        state, reason = "unprotected", FENCED
    if facts.promoting is not None:
        state, reason = "promoting", promoting_text(facts.promoting)
    is_behind = durable.lsn > acknowledged.lsn
    since_ns = facts.first_unacknowledged_ns or acknowledged.time_ns
    rpo_s: float | None = 0.0
    if is_behind:
        rpo_s = max(0, facts.now_ns - since_ns) / NS_PER_S if since_ns else None
    alarms = [*facts.alarms, *protection_alarms(state, reason)]
    if facts.is_enrolled:
        alarms += rpo_alarms(rpo_s, facts.policy)
    return {
        "machine": facts.machine.name,
        "state": state,
        "reason": reason,
        "epoch": facts.epoch,
        "lsn": {
            "appended": facts.appended_lsn,
            "durable": durable.lsn,
            "applied": applied.lsn,
            "acknowledged": acknowledged.lsn,
        },
        "lag": {
            "records": durable.lsn - acknowledged.lsn,
            "bytes": max(0, bytes_between(acknowledged, durable) - facts.lag_cut_bytes),
            "seconds": max(0, durable.time_ns - since_ns) / NS_PER_S if is_behind and since_ns else 0.0,
        },
        "achieved_rpo_seconds": rpo_s,
        "journal": {
            "bytes": max(0, journal_bytes(facts.oldest_segment, durable) - facts.cut_bytes),
            "quota_bytes": facts.quota_bytes,
        },
        "link": facts.link,
        "link_reason": facts.link_reason,
        "processes": dict(facts.processes),
        "disks": [
            {
                "name": disk.name,
                "size_bytes": disk.size_bytes,
                "image": facts.images[disk.slot],
                "dirty_bytes": facts.healing.dirty_bytes.get(disk.slot, 0),
                "hydration": facts.hydration.get(disk.slot),
            }
            for disk in facts.machine.live_disks()
        ],
        "resync": resync_document(facts.healing),
        "groups": [dict(group) for group in facts.groups],
        "alarms": [alarm._asdict() for alarm in in_order(alarms)],
    }


def journal_bytes(oldest_segment: int, tail: Cursor) -> int:
    """Bytes of the journal from its oldest segment to its tail."""
    return bytes_between(Cursor(lsn=-1, segment=oldest_segment), tail) if oldest_segment and tail.segment else 0


def offline_status(state: StateDirectory) -> dict[str, Any]:
    """Status when no agent answers: from the files, and from the disk server if it runs. Blocks; raises AsrfsError."""
    return status(_facts_without_agent(state))


def _facts_without_agent(state: StateDirectory) -> Facts:
    machine = state.load_machine()
    positions = state.load_positions()
    journal = DirectoryStorage(state.journal)
    reader = JournalReader(journal, id_bytes(machine.id))
    durable = max(positions.applied, positions.acknowledged, key=lambda cursor: cursor.lsn)
    is_served = state.lock_holder("disk_server") is not None
    if not is_served:
        durable = end_of_journal(reader, durable)
    appended_lsn, epoch = durable.lsn, positions.epoch
    if is_served:
        try:
            host = host_positions(call(state.socket_path("disk_server"), "positions", seconds_max=_ANSWER_S_MAX))
            durable, appended_lsn, epoch = host.durable, host.appended_lsn, host.epoch
        except AsrfsError:
            pass  # it is just starting or ending
    trimmer = Trimmer(journal, id_bytes(machine.id))
    oldest_segment = trimmer.look()
    first_unacknowledged_ns = oldest_unacknowledged_ns(reader, positions.acknowledged, durable)
    reader.close()
    processes = state.processes()
    settings = state.load_settings()
    used = journal_bytes(oldest_segment, durable) - trimmer.cut_bytes(0)
    total_bytes, free_bytes = space_of(state.journal)
    quota_bytes = settings.quota_bytes(provisioned_bytes(machine), used + free_bytes)
    found = find_dirty_map(DirectoryStorage(state.root), DIRTY_MAP_FILE, journal, machine, positions)
    fence, promoting = load_fence(DirectoryStorage(state.root)), load_promoting(DirectoryStorage(state.root))
    alarms = [
        *process_alarms(processes, has_mount=has_mount(state), agent_answers=False),
        *_fence_alarms(fence),
        *_promoting_alarms(promoting),
        *quota_alarms(used, quota_bytes),
        *space_alarms(state.root, total_bytes, free_bytes),
    ]
    return Facts(
        machine=machine,
        images=images_of(state, machine),
        is_enrolled=is_enrolled(state),
        positions=positions,
        appended_lsn=appended_lsn,
        durable=durable,
        epoch=epoch,
        now_ns=SystemClock().time_ns(),
        first_unacknowledged_ns=first_unacknowledged_ns,
        oldest_segment=oldest_segment,
        cut_bytes=trimmer.cut_bytes(0),
        lag_cut_bytes=trimmer.cut_bytes(positions.acknowledged.segment),
        quota_bytes=quota_bytes,
        healing=standing_of(found.map, found.given_up, machine),
        fence=fence,
        promoting=promoting,
        policy=settings.policy,
        link=AGENT_NOT_RUNNING if processes["agent"] is None else AGENT_SILENT,
        processes=processes,
        alarms=in_order(alarms),
        recovered=state.load_recovered(),
        hydration=_resting_hydration(state, machine),
    )


def _fence_alarms(fence: Fence | None) -> list[Alarm]:
    if fence is None:
        return []
    if fence.handover:
        return [Alarm(HANDOVER_ALARM, "critical", handover_text(fence))]
    return [Alarm(FENCE_ALARM, "critical", f"{FENCED}; {WHAT_TO_DO}")]


def _promoting_alarms(promoting: Promoting | None) -> list[Alarm]:
    return [] if promoting is None else [Alarm(PROMOTING_ALARM, "critical", promoting_text(promoting))]


def _resting_hydration(state: StateDirectory, machine: MachineConfig) -> dict[int, dict[str, Any]]:
    """How far it is at least while no agent runs, in bytes of the disk."""
    based = [disk for disk in machine.live_disks() if disk.base is not None]
    turn = load_turn(DirectoryStorage(state.root), HYDRATION_FILE) if based else NO_TURN
    return {
        disk.slot: {
            "bytes_total": disk.size_bytes,
            "bytes_done": turn.through if turn.disk_id == disk.id else 0,
            "state": "waiting",
        }
        for disk in based
    }


def end_of_journal(reader: JournalReader, cursor: Cursor) -> Cursor:
    """The place behind the last record from `cursor` on: what the next disk server will find, where none runs."""
    count = _RECORDS_AT_ONCE
    while count:
        try:
            cursor = reader.read(cursor, cursor.lsn + count, _BYTES_AT_ONCE).cursor
        except (AsrfsError, OSError):
            count //= 2  # there are fewer, or none
    return cursor


def oldest_unacknowledged_ns(reader: JournalReader, acknowledged: Cursor, durable: Cursor) -> int | None:
    """Time of the first durable record the store does not have; None when there is none or it cannot be read."""
    if durable.lsn <= acknowledged.lsn:
        return None
    try:
        batch = reader.read(acknowledged, acknowledged.lsn + 1, 1)
    except (AsrfsError, OSError):
        return None
    return batch.records[0][0].time_ns if batch.parts else None


class OldestUnacknowledged:
    """As `oldest_unacknowledged_ns`, without reading the same record again and again."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._known: tuple[int, int | None] = (-1, None)

    def time_ns(self, acknowledged: Cursor, durable: Cursor) -> int | None:
        lsn, time_ns = self._known
        if lsn != acknowledged.lsn or time_ns is None:
            time_ns = oldest_unacknowledged_ns(self._reader, acknowledged, durable)
            self._known = (acknowledged.lsn, time_ns)
        return time_ns


def images_of(state: StateDirectory, machine: MachineConfig) -> dict[int, str]:
    return {disk.slot: state.image_path(disk) for disk in machine.live_disks()}


def provisioned_bytes(machine: MachineConfig) -> int:
    return sum(disk.size_bytes for disk in machine.live_disks())


def has_mount(state: StateDirectory) -> bool:
    """Whether the mount of this machine is there, alive or dead; it is not accessed."""
    served = state.load_served()
    mounted = None if served is None else mount_at(served.mount)
    return mounted is not None and mounted.type == FILESYSTEM_TYPE


def space_of(path: str) -> tuple[int, int]:
    """Bytes of a filesystem that we can use or do use, and those left of them."""
    status = os.statvfs(path)
    total = (status.f_blocks - status.f_bfree + status.f_bavail) * status.f_frsize
    return total, status.f_bavail * status.f_frsize
