"""A point copied back over the disks of machines that go on running at their hosts: what it would do, and doing it.

    plan ─▶ a person says yes ─▶ begun, durably ─▶ hosts ready ─▶ written ─▶ released        (`vault/promotions.py`)

The command begins it and waits; `serve` tells the hosts and writes their answers down. So either may die: what has
begun goes on, and who asks for the same again waits for that. What nobody could prepare in time is cancelled.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from asrfs.errors import BadInputError, FormatError, NotFoundError, RefusedError, TemporaryError, error_class
from asrfs.model.boot import encode_boot
from asrfs.model.clock import Clock
from asrfs.model.machine import DiskRecord
from asrfs.model.quantities import NS_PER_SECOND, format_size
from replica_store.failover.choice import Chosen, check_in_history, choose
from replica_store.failover.handing_over import AWAY_S_MAX, check_present, is_present
from replica_store.points.changed_since import changed_since
from replica_store.points.group_cuts import group_cuts
from replica_store.vault.groups import read_groups
from replica_store.vault.operations import holder, operations
from replica_store.vault.promotions import (
    PromotedMachine,
    Promotion,
    live_promotion,
    promotion,
    save,
    sealed_promotion,
)
from replica_store.vault.vault import Vault

PREPARE_S = 600
PREPARE_S_MAX = 24 * 3600
FAILING_S_MAX = 60.0
"""For so long a host may say that it cannot before who waits is told: it tries again, or is told to, some times."""
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """`bytes_changed`: what was written since the point, all of which is brought back. `note`: for people."""

    machine: str
    name: str
    size_bytes: int
    bytes_changed: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a promotion would do, as things stand."""

    target: str
    selector: str
    group: str | None
    machines: tuple[PromotedMachine, ...]
    disks: tuple[PlannedDisk, ...]
    warnings: tuple[str, ...]


def plan(vault: Vault, target: str, selector: str, *, leave: Collection[str] = (), accept_damage: bool = False) -> Plan:
    """`target`: a machine, or a group with all its members. `leave`: names of disks that are not at the point or not at
    the machine any more, and stay as they are. Reads the history and changes nothing. Raises AsrfsError."""
    group = next((each for each in read_groups(vault.catalog).groups if each.name == target), None)
    cuts = {target: selector} if group is None else group_cuts(vault, group, selector)
    machines, disks, warnings = [], [], []
    unknown = set(leave)
    for name, where in cuts.items():
        chosen = choose(
            vault, name, where, accept_damage=accept_damage, with_group=group.name if group is not None else None
        )
        check_in_history(chosen)
        member, planned, notes = _plan_machine(vault, chosen, leave, unknown)
        machines.append(member)
        disks += planned
        warnings += [*chosen.warnings, *notes]
    if unknown:
        raise BadInputError(f"--leave {sorted(unknown)[0]}: no disk of that name was added or removed since the point")
    return Plan(
        target, selector, group.name if group is not None else None, tuple(machines), tuple(disks), tuple(warnings)
    )


def _plan_machine(
    vault: Vault, chosen: Chosen, leave: Collection[str], unknown: set[str]
) -> tuple[PromotedMachine, list[PlannedDisk], list[str]]:
    row, lsn = chosen.machine, chosen.point.lsn
    received = vault.received_lsn(row.id)
    then = {disk.slot: disk for disk in chosen.disks if not disk.removed}
    now = {disk.slot: disk for disk in vault.disks_at(row.id, received) if not disk.removed}
    both = [slot for slot in sorted(now) if slot in then and then[slot].id == now[slot].id]
    notes = _left(row.name, then, now, both, leave, unknown)
    if not both:
        raise RefusedError(f"machine {row.name} has none of the disks that it had at this point: use export")
    planned = []
    for slot in both:
        changed = changed_since(vault, row.id, slot, lsn, now[slot].size_bytes).total_bytes
        planned.append(_planned_disk(row.name, then[slot], now[slot], changed))
    notes += _boot_note(vault, chosen, received)
    member = PromotedMachine(
        machine_id=row.id,
        machine=row.name,
        point=chosen.point,
        records=tuple(msgspec.structs.replace(then[slot], boot=b"") for slot in both),
        left=tuple(slot for slot in sorted(now) if slot not in both),
        boot=_boot_of(vault, chosen),
        bytes_changed=sum(disk.bytes_changed for disk in planned),
    )
    return member, planned, notes


def _left(
    machine: str,
    then: dict[int, DiskRecord],
    now: dict[int, DiskRecord],
    both: list[int],
    leave: Collection[str],
    unknown: set[str],
) -> list[str]:
    """What is said of disks that are only on one side. Raises RefusedError for those that nobody named."""
    notes = []
    gone = [then[slot] for slot in then if slot not in both]
    new = [now[slot] for slot in now if slot not in both]
    for disk, text in (*((disk, "added since, stays as it is") for disk in new), *((d, "removed since") for d in gone)):
        if disk.name not in leave:
            raise RefusedError(
                f"disk {disk.name} of machine {machine} was {'added' if disk in new else 'removed'} since the point, "
                f"and all disks of a machine go back together: `--leave {disk.name}` has the others go without it"
            )
        unknown.discard(disk.name)
        notes.append(f"disk {disk.name} of machine {machine} was {text}")
    return notes


def _planned_disk(machine: str, then: DiskRecord, now: DiskRecord, changed: int) -> PlannedDisk:
    if now.size_bytes < then.size_bytes:
        raise RefusedError(f"disk {now.name} of machine {machine} is shorter than it was at this point: use export")
    note = ""
    if now.size_bytes > then.size_bytes:
        note = f"it had {format_size(then.size_bytes)}: it keeps its size, and the rest becomes zeros"
    return PlannedDisk(machine, now.name, now.size_bytes, changed, note)


def _boot_of(vault: Vault, chosen: Chosen) -> bytes | None:
    try:
        vault.boot_at(chosen.machine.id, chosen.point.lsn)
    except FormatError:  # of a newer host: `choose` has warned, and the disks go back all the same
        return None
    return b"" if chosen.boot is None else encode_boot(chosen.boot)


def _boot_note(vault: Vault, chosen: Chosen, received: int) -> list[str]:
    machine = chosen.machine
    try:
        is_same = vault.boot_at(machine.id, chosen.point.lsn) == vault.boot_at(machine.id, received)
    except FormatError:
        return [f"how machine {machine.name} is started stays as it is"]
    return [] if is_same else [f"how machine {machine.name} is started (`asrfs boot`) goes back, too"]


# ---- doing it -------------------------------------------------------------------------------------------------------


def begin_promotion(root: str, wanted: Plan, clock: Clock, prepare_s: int = PREPARE_S) -> Promotion:
    """Begin what was planned, or find it begun. One of the same machines that has written already, and not to the end,
    makes way. Raises RefusedError where something else has the machines."""
    if not 0 < prepare_s <= PREPARE_S_MAX:
        raise BadInputError("--timeout is more than nothing and at most one day")
    for member in wanted.machines:
        check_present(root, member.machine, clock, "use `failover` or `export`")
    now_ns = clock.time_ns()
    ids = {member.machine_id for member in wanted.machines}

    def make(vault: Vault) -> tuple[Promotion, ...]:
        for member in wanted.machines:
            held = holder(operations(vault.catalog, member.machine_id))
            if held is not None:
                what = f"failover {held.id[:12]}, {held.state}"
                raise RefusedError(f"machine {member.machine} is failed over ({what}): promote is refused")
        replaced = []
        for before in _live(vault, ids):
            if before.state == "cancelled":
                continue
            if _is_same(before, wanted) and not _has_moved_on(vault, before):
                return (before,)
            if before.state != "writing" or {each.machine_id for each in _remaining(before)} != ids:
                raise RefusedError(
                    f"promotion {before.id[:12]} of {before.target} is {before.state}: wait until that is over"
                )
            back = tuple(msgspec.structs.replace(each, is_back=True) for each in before.machines)
            has_moved_on = _has_moved_on(vault, before)
            why = "its host is in a new epoch" if has_moved_on else "another point was asked for, which takes its place"
            after = before.to("cancelled", now_ns, why)
            replaced.append(msgspec.structs.replace(after, machines=back))
        made = Promotion(
            id=secrets.token_hex(16),
            target=wanted.target,
            selector=wanted.selector,
            group=wanted.group,
            state="preparing",
            machines=wanted.machines,
            begun_ns=now_ns,
            until_ns=now_ns + prepare_s * NS_PER_SECOND,
        ).to("preparing", now_ns, "it was asked for")
        return (*replaced, made)

    return save(root, make)


def cancel_promotion(root: str, target: str, clock: Clock) -> Promotion:
    """Take one back of which nothing was written yet: hosts are not ready, or say that they cannot begin.

    Raises RefusedError, NotFoundError.
    """
    with Vault.open(root) as vault:
        live = [each for each in _live_all(vault) if each.target == target]
    if not live:
        raise NotFoundError(f"no point is being copied back over {target}")

    def cancel(vault: Vault) -> tuple[Promotion, ...]:
        before = sealed_promotion(vault, live[-1].id)
        if before.state == "cancelled":
            return (before,)
        is_untouched = before.state == "writing" and all(each.is_back or each.is_untouched for each in before.machines)
        if before.state != "preparing" and not is_untouched:
            raise RefusedError(
                f"promotion {before.id[:12]} is {before.state}: it goes on to its end. What was there before is point "
                f"before-promote-{before.id[:12]}, which can be promoted"
            )
        return (before.to("cancelled", clock.time_ns(), "it was cancelled"),)

    return save(root, cancel)


def wait_promotion(root: str, promotion_id: str, clock: Clock, step: Callable[[Promotion], None]) -> Promotion:
    """The promotion when it is done. `step` is told of it as it is, again and again.

    Raises what a host failed with, also if that is tried again and again, or TemporaryError when one is away: what has
    begun goes on without this.
    """
    seen = sound = clock.monotonic()
    while True:
        with Vault.open(root) as vault:
            found = promotion(vault.catalog, promotion_id)
        step(found)
        if found.state == "done":
            if left := [f"machine {each.machine}: {each.error}" for each in found.machines if each.has_left]:
                raise RefusedError(f"{'; '.join(left)}; the others are at their points")
            return found
        if found.state == "cancelled":
            raise _failure(found)
        now = clock.monotonic()
        here = [each for each in found.machines if not each.is_back]
        away = [each.machine for each in here if not is_present(root, each.machine, clock)]
        seen = seen if away else now
        if away and now >= seen + AWAY_S_MAX:
            raise TemporaryError(
                f"the host of machine {away[0]} is away; promotion {found.id[:12]} is {found.state} and goes on when "
                "it is back: the same command waits for that"
            )
        failing = [each for each in here if each.error is not None]
        sound = sound if failing else now
        if failing and now >= sound + FAILING_S_MAX:
            raise error_class(failing[0].exit_code)(
                f"machine {failing[0].machine}: {failing[0].error}; promotion {found.id[:12]} is {found.state}, and "
                "its host tries that again: the same command waits for it"
                + (", --cancel takes it back" if all(each.is_untouched for each in here) else "")
            )
        time.sleep(_LOOK_EVERY_S)  # sleep: another process writes it down


def _failure(found: Promotion) -> Exception:
    # All were ready: it was being written, unless no host could begin.
    are_ready = all(member.before_lsn is not None for member in found.machines)
    was_writing = are_ready and not all(member.is_untouched for member in found.machines)
    wrote = "was being written" if was_writing else "has written nothing"
    for member in found.machines:
        if member.error is not None:
            said = f"machine {member.machine}: {member.error}; promotion {found.id[:12]} {wrote}"
            return error_class(member.exit_code)(said)
    text = found.causes[-1].text if found.causes else "nobody said why"
    return TemporaryError(f"promotion {found.id[:12]} was cancelled and {wrote}: {text}")


def _is_same(found: Promotion, wanted: Plan) -> bool:
    def cuts(machines: tuple[PromotedMachine, ...]) -> set[tuple[str, int]]:
        return {(each.machine_id, each.point.lsn) for each in machines}

    # What a word means moves on while disks are written: of the same words only the first time counts.
    is_same_wish = (found.target, found.selector) == (wanted.target, wanted.selector)
    return is_same_wish or cuts(_remaining(found)) == cuts(wanted.machines)


def _remaining(found: Promotion) -> tuple[PromotedMachine, ...]:
    return tuple(each for each in found.machines if not each.has_left)


def _has_moved_on(vault: Vault, found: Promotion) -> bool:
    """Whether a host that is to write has gone on in another epoch: it does not go on with this one."""
    return found.state == "writing" and any(
        each.epoch and each.end_lsn is None and not each.is_back and vault.machine(each.machine).epoch != each.epoch
        for each in found.machines
    )


def _live_all(vault: Vault) -> list[Promotion]:
    found = {each.id: each for row in vault.machines() if (each := live_promotion(vault.catalog, row.id)) is not None}
    return list(found.values())


def _live(vault: Vault, machine_ids: Collection[str]) -> list[Promotion]:
    found = {}
    for machine_id in machine_ids:
        each = live_promotion(vault.catalog, machine_id)
        if each is not None:
            found[each.id] = sealed_promotion(vault, each.id)
    return list(found.values())
