"""What is failed over to: the cut, its disks, and everything that speaks against it before anything is touched."""

from __future__ import annotations

import os
from dataclasses import dataclass

from asrfs.errors import FormatError, NotFoundError, RefusedError
from asrfs.model.boot import NO_BOOT, BootSettings
from asrfs.model.machine import DiskRecord
from asrfs.model.protection_states import ProtectionEvent
from asrfs.model.quantities import NS_PER_SECOND, format_size
from asrfs.model.recovered import RecoveredDisk, RecoveredMachine, encode_recovered
from replica_store.points.builder import Cut, build_states, disks_of, resolve
from replica_store.vault.arrivals import check_away
from replica_store.vault.flaws import flaw_before
from replica_store.vault.groups import read_groups
from replica_store.vault.operations import HANDED_OVER, ChosenPoint, Kind, Operation
from replica_store.vault.promotions import check_not_promoting
from replica_store.vault.protection import check_event
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault

RESERVE_BYTES = 512 << 20
"""Beside the disks, for the journal of the recovered machine."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A cut that may be failed over to. `disks`: all slots, removed ones too. `data_loss_s`: None if nobody knows.
    `past`: as which machine or tail its content is read."""

    machine: MachineRow
    point: ChosenPoint
    disks: tuple[DiskRecord, ...]
    data_loss_s: float
    warnings: tuple[str, ...]
    boot: BootSettings | None = None
    past: str = ""

    @property
    def disk_names(self) -> tuple[str, ...]:
        return tuple(disk.name for disk in self.disks if not disk.removed)


def choose(
    vault: Vault, machine: str, selector: str, *, accept_damage: bool = False, with_group: str | None = None
) -> Chosen:
    """`with_group`: all of its members are taken there, too.

    Raises NotFoundError where there is no such point, RefusedError for one that verification has flagged."""
    row = vault.machine(machine)
    cut = resolve(vault, machine, selector)
    past = cut.machine.id
    disks = vault.disks_at(past, cut.lsn)
    if not disks_of(vault, cut):
        raise NotFoundError(f"machine {machine} has no disk at LSN {cut.lsn}: choose a later point")
    warnings = _group_warnings(vault, row, cut, with_group)
    flaw = flaw_before(vault.catalog, past, cut.lsn)
    if flaw is not None and not accept_damage:
        raise RefusedError(
            f"LSN {cut.lsn} of machine {machine} may need what verification found damaged "
            f"(LSN {flaw.first_lsn}..{flaw.last_lsn}): choose a point before LSN {flaw.first_lsn}, or take this one "
            "all the same with --accept-damage"
        )
    if flaw is not None:
        warnings.append(f"verification found LSN {flaw.first_lsn}..{flaw.last_lsn} damaged: {flaw.what}")
    point = ChosenPoint(
        selector=selector,
        lsn=cut.lsn,
        epoch=cut.epoch,
        time_ns=cut.time_ns,
        id=cut.point.id if cut.point else None,
        name=cut.point.name if cut.point else None,
        consistency=cut.point.consistency if cut.point else None,
        is_tail=past != row.id,
    )
    try:
        boot = vault.boot_at(past, cut.lsn)
    except FormatError as error:  # the disks come back all the same
        boot = NO_BOOT
        warnings.append(str(error))
    loss_s = 0.0 if point.is_tail else _data_loss_s(vault, row, cut)
    return Chosen(row, point, tuple(disks), loss_s, tuple(warnings), None if boot == NO_BOOT else boot, past)


def _group_warnings(vault: Vault, row: MachineRow, cut: Cut, with_group: str | None) -> list[str]:
    groups = [group for group in read_groups(vault.catalog).of(row.id) if group.name != with_group]
    names = {machine.id: machine.name for machine in vault.machines()}
    warnings = []
    for group in groups:
        others = ", ".join(names.get(member, member) for member in group.members if member != row.id)
        if others:
            is_cut_together = cut.point is not None and cut.point.group == group.name
            advice = (
                "take them to the same point" if is_cut_together else f"choose a point of group {group.name} for all"
            )
            warnings.append(
                f"machine {row.name} belongs to group {group.name}, and {others} stay where they are: to have all "
                f"agree with each other, {advice}"
            )
    return warnings


def _data_loss_s(vault: Vault, row: MachineRow, cut: Cut) -> float:
    """Between the chosen state and the newest record that the store knows of: its own, or one that has not come and of
    which the host said so. Both times are the host's."""
    last = vault.catalog.last_object(row.id)
    link = vault.catalog.link(row.id)
    newest_ns = last.last_time_ns if last else 0
    if link is not None and last is not None and link.durable_lsn > last.last_lsn:
        newest_ns = max(newest_ns, link.durable_time_ns)
    return max(0, newest_ns - cut.time_ns) / NS_PER_SECOND


def check_in_history(chosen: Chosen) -> None:
    """Raise RefusedError for a cut from which the machine cannot go on: another side has gone on since."""
    if chosen.point.is_tail:
        raise RefusedError(
            f"{chosen.point.name} is what a superseded host wrote, beside the history: a machine cannot go on from "
            "there; allowed: failover test, export, mount"
        )


def check_may_begin(vault: Vault, kind: Kind, machine: str) -> None:
    """Raise RefusedError where the table does not let such a failover begin, or the machine has no home to come to."""
    if kind == "test":
        return
    row = vault.machine(machine)
    is_handed_over = kind in HANDED_OVER
    check_event(vault, row, ProtectionEvent.PLANNED_FAILOVER if is_handed_over else ProtectionEvent.UNPLANNED_FAILOVER)
    if is_handed_over:
        check_not_promoting(vault.catalog, row.id, machine)
    if kind == "failback":
        check_away(vault, row)


def check_space(vault: Vault, chosen: Chosen, directory: str, given_back: int = 0) -> None:
    """Raise RefusedError if hydration would fill the filesystem, which gets so many bytes back before. Reads the disks'
    maps and nothing of their content."""
    free = free_bytes(directory) + given_back
    live = [disk for disk in chosen.disks if not disk.removed]
    states = build_states(vault, chosen.past, chosen.point.lsn, live)
    needed = sum(state.layers.bytes_max for state in states.values())
    if needed + RESERVE_BYTES > free:  # that was an upper bound; the exact figure takes longer
        needed = sum(group.mapped_bytes for state in states.values() for group in state.layers.groups())
    if needed + RESERVE_BYTES > free:
        raise RefusedError(
            f"the disks of machine {chosen.machine.name} hold {format_size(needed)} at LSN {chosen.point.lsn}, and "
            f"{directory} has {format_size(free)} free, of which {format_size(RESERVE_BYTES)} are for the journal: "
            "make space, or choose another place with --state"
        )


def free_bytes(directory: str) -> int:
    """Of the filesystem on which the directory is or would be made."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def recovered_file(
    operation: Operation, disks: tuple[DiskRecord, ...], boot: BootSettings | None, tree: str, epoch: int
) -> bytes:
    """What `asrfs init --recovered` makes the machine of. `tree`: where the points are mounted."""
    point = operation.point
    directory = f"{tree}/{operation.machine}/{point.place}"
    return encode_recovered(
        RecoveredMachine(
            machine_id=operation.machine_id,
            name=operation.machine,
            epoch=epoch,
            lsn=point.lsn,
            time_ns=point.time_ns,
            point=point.name or point.id or "",
            disks=tuple(
                RecoveredDisk(
                    slot=disk.slot,
                    id=disk.id,
                    name=disk.name,
                    size_bytes=disk.size_bytes,
                    base="" if disk.removed else f"{directory}/{disk.name}.img",
                    removed=disk.removed,
                )
                for disk in disks
            ),
            boot=boot,
            is_trial=operation.kind == "test",
        )
    )
