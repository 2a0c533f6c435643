"""How a machine stands, derived from the catalog: what `machine list` shows. Nothing here is ever stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from asrfs.model.machine import DiskRecord
from asrfs.model.point_alarms import WATCHED, alarm_id, kinds_of, missing_text
from asrfs.model.policy import Policy, follow_policy
from asrfs.model.quantities import NS_PER_SECOND
from asrfs.model.rpo_alarm import rpo_text
from replica_store.vault.configuration import policy_of
from replica_store.vault.gaps import Gap
from replica_store.vault.operations import Operation, holder, operations
from replica_store.vault.policies import Assigned, read_book
from replica_store.vault.promotions import live_promotion
from replica_store.vault.rows import LinkRow, MachineRow, PointRow
from replica_store.vault.vault import Vault

State = Literal["unprotected", "initial-replication", "protected", "failed-over", "committed", "reprotecting"]

SILENT_S_MAX = 20.0
"""A link that has not been heard of for so long is down, whatever was last written of it: the store may be, too."""


class StandingAlarm(NamedTuple):
    """What people should know about a machine, as seen from the store."""

    id: str
    severity: Literal["warning", "critical"]
    text: str


@dataclass(frozen=True, slots=True)
class Standing:
    """`time_ns`: of the newest acknowledged record, host's clock. `achieved_rpo_s` is None before anything came."""

    id: str
    name: str
    state: State
    reason: str
    epoch: int
    connected: bool
    heard_ns: int | None
    acknowledged_lsn: int
    time_ns: int | None
    achieved_rpo_s: float | None
    points: int
    objects: int
    bytes: int
    enrolled_ns: int
    disks: tuple[DiskRecord, ...]
    policy: Assigned
    alarms: tuple[StandingAlarm, ...]


def standing_of(vault: Vault, machine: MachineRow, now_ns: int) -> Standing:
    """Blocks."""
    last = vault.catalog.last_object(machine.id)
    link = vault.catalog.link(machine.id)
    received = last.last_lsn if last else 0
    gap = vault.gap_at(machine.id, received)
    objects, size = vault.catalog.space(machine.id)
    heard_recently = link is not None and now_ns - link.heard_ns < SILENT_S_MAX * NS_PER_SECOND
    holding = holder(operations(vault.catalog, machine.id))
    state, reason = _failed_over(holding) if holding else _state(machine, is_empty=last is None, gap=gap)
    if (promotion := live_promotion(vault.catalog, machine.id)) is not None:
        reason = f"{promotion.point_of(machine.id)} is being copied back over its disks (promotion {promotion.id[:12]})"
    points = vault.points(machine.id)
    book = read_book(vault.catalog)
    policy = policy_of(vault.catalog, book, machine.id)
    rules, _ = follow_policy(book.texts(policy.policy) or {})
    rpo_s = achieved_rpo_s(received, last.last_time_ns, link, now_ns) if last else None
    said = None if machine.revoked else rpo_text(rpo_s, rules)
    alarms: tuple[StandingAlarm, ...] = () if said is None else (StandingAlarm("rpo", *said),)
    alarms += point_alarms(machine, points, vault.catalog.appeared(machine.id), rules, now_ns)
    if holding is not None and holding.state == "committed":
        alarms = ()  # nothing is to come: it runs elsewhere, and whoever protects it there has the alarms
    return Standing(
        id=machine.id,
        name=machine.name,
        state=state,
        reason=reason,
        epoch=machine.epoch,
        connected=link is not None and link.connected and heard_recently,
        heard_ns=link.heard_ns if link else None,
        acknowledged_lsn=received,
        time_ns=last.last_time_ns if last else None,
        achieved_rpo_s=rpo_s,
        points=len(points),
        objects=objects,
        bytes=size,
        enrolled_ns=machine.enrolled_ns,
        disks=tuple(disk for disk in vault.disks_at(machine.id, received) if not disk.removed),
        policy=policy,
        alarms=alarms,
    )


def point_alarms(
    machine: MachineRow, points: Sequence[PointRow], appeared: Mapping[int, int], policy: Policy, now_ns: int
) -> tuple[StandingAlarm, ...]:
    """Of listed points that do not appear. `appeared`: when points came, by LSN, store's clock.

    That is forgotten when the catalog is made again; then the point's own time, by the host's clock, has to do. A
    machine that nothing is received of has no such alarm: its state says so.
    """
    if machine.revoked:
        return ()
    alarms = []
    for kind in WATCHED:
        newest = max(
            (point for point in points if kind in kinds_of(point.consistency)),
            key=lambda point: point.lsn,
            default=None,
        )
        since_ns = machine.enrolled_ns if newest is None else appeared.get(newest.lsn, newest.time_ns)
        waited_s = max(0, now_ns - since_ns) / NS_PER_SECOND
        text = missing_text(kind, policy, waited_s, never=newest is None)
        if text is not None:
            alarms.append(StandingAlarm(alarm_id(kind), "warning", text))
    return tuple(alarms)


def _failed_over(holding: Operation) -> tuple[State, str]:
    """Of a machine that a failover holds."""
    at = f"{holding.kind} failover {holding.id[:12]} to LSN {holding.point.lsn}"
    if holding.state == "committed":
        text, other = f"it runs elsewhere since {at}: nothing of its old side is taken any more", holding.reprotection
        if other is None:
            return "committed", text
        if other.done_ns is None:
            return "reprotecting", f"{text}; it is being sent to the store at {other.store}"
        return "protected", f"in the other direction, by the store at {other.store}; {text}"
    return "failed-over", f"{at} is {holding.state}: change the point, cancel or commit"


def _state(machine: MachineRow, *, is_empty: bool, gap: Gap | None) -> tuple[State, str]:
    """The state, and why it is not the best one."""
    if machine.revoked:
        return "unprotected", "its certificate is revoked, so nothing more is received: enrol it again"
    if is_empty:
        return "unprotected", "nothing has been received yet"
    return ("initial-replication", str(gap)) if gap else ("protected", "")


def achieved_rpo_s(received_lsn: int, received_time_ns: int, link: LinkRow | None, now_ns: int) -> float:
    """Seconds of work that would be lost if the host burned down now, as far as the store can know.

    While the host is heard of and all it made durable is here, nothing: 0. If not all is here, the newest durable
    record is this much newer than the newest one here, and the time since we heard so comes on top. The two clocks are
    never compared with each other, except when the host was never heard of since the catalog was made.
    """
    if link is None:
        return max(0.0, (now_ns - received_time_ns) / NS_PER_SECOND)
    since_heard_ns = max(0, now_ns - link.heard_ns)
    if link.durable_lsn > received_lsn:
        return (max(0, link.durable_time_ns - received_time_ns) + since_heard_ns) / NS_PER_SECOND
    if link.connected and since_heard_ns < SILENT_S_MAX * NS_PER_SECOND:
        return 0.0
    return since_heard_ns / NS_PER_SECOND
