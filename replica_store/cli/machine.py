"""`replica-store machine list`, `show`, `revoke`: who is protected here, how well, and who no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from asrfs.errors import BadInputError
from asrfs.model.quantities import format_size, format_time
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.standing import Standing, standing_of
from replica_store.vault.vault import lock_descriptions

if TYPE_CHECKING:
    from rich.console import Console


@click.group()
def machine() -> None:
    """Machines that have enrolled with this store."""


@machine.command("list")
@pass_invocation
def list_machines(invocation: Invocation) -> None:
    """All machines."""
    clock = SystemClock()
    with invocation.open_vault() as vault:
        standings = [standing_of(vault, row, clock.time_ns()) for row in vault.machines()]
    documents = [_document(standing) for standing in standings]
    rows = [
        (
            standing.name,
            standing.state,
            "up" if standing.connected else "down",
            standing.epoch,
            standing.acknowledged_lsn,
            _seconds(standing.achieved_rpo_s),
            len(standing.disks),
            format_size(standing.bytes),
            standing.policy.policy,
            "; ".join(alarm.text for alarm in standing.alarms),
        )
        for standing in standings
    ]
    columns = (
        "MACHINE",
        "STATE",
        "LINK",
        "EPOCH",
        "ACKNOWLEDGED",
        "ACHIEVED RPO",
        "DISKS",
        "SPACE",
        "POLICY",
        "ALARMS",
    )
    invocation.answer(documents, lambda out: out.print(table(columns, rows)))


@machine.command("show")
@click.argument("name", metavar="MACHINE")
@pass_invocation
def show_machine(invocation: Invocation, name: str) -> None:
    """One machine."""
    with invocation.open_vault() as vault:
        standing = standing_of(vault, vault.machine(name), SystemClock().time_ns())
    invocation.answer(_document(standing), lambda out: _render(out, standing))


@machine.command()
@click.argument("name", metavar="MACHINE")
@click.option("--yes", is_flag=True, help="Do it; without this only the plan is printed.")
@pass_invocation
def revoke(invocation: Invocation, name: str, yes: bool) -> None:
    """Let MACHINE in no more: neither its certificate nor an unused token is good. Its history stays.

    A connection it has is cut within seconds. A new token lets the machine enrol again and go on where it was.
    """
    from replica_store.vault import enrolment  # loads TLS, which listing machines has no use for

    with invocation.open_vault() as vault:
        found = vault.machine(name)
    if not yes:
        raise BadInputError(
            f"this would revoke the certificate and unused tokens of machine {found.name}, so that nothing more of it "
            "is received until it enrols again: repeat with --yes"
        )
    with lock_descriptions(str(invocation.vault)), invocation.open_vault(writable=True) as vault:
        revoked = enrolment.revoke(vault, name, SystemClock())
    document = {"machine": revoked.name, "id": revoked.id, "revoked": True}
    invocation.answer(
        document,
        lambda out: out.print(
            f"machine {revoked.name} is revoked; `replica-store token {revoked.name}` lets it enrol again"
        ),
    )


def _document(standing: Standing) -> dict[str, Any]:
    return {
        "machine": standing.name,
        "id": standing.id,
        "state": standing.state,
        "reason": standing.reason,
        "link": "up" if standing.connected else "down",
        "heard": None if standing.heard_ns is None else format_time(standing.heard_ns),
        "epoch": standing.epoch,
        "acknowledged_lsn": standing.acknowledged_lsn,
        "acknowledged_time": None if standing.time_ns is None else format_time(standing.time_ns),
        "achieved_rpo_seconds": standing.achieved_rpo_s,
        "points": standing.points,
        "objects": standing.objects,
        "bytes": standing.bytes,
        "enrolled": format_time(standing.enrolled_ns),
        "policy": standing.policy.policy,
        "policy_by": standing.policy.by,
        "alarms": [alarm._asdict() for alarm in standing.alarms],
        "disks": [
            {"slot": disk.slot, "id": disk.id, "name": disk.name, "size_bytes": disk.size_bytes, "gap": disk.gap}
            for disk in standing.disks
        ],
    }


def _render(out: Console, standing: Standing) -> None:
    shown = _document(standing) | {
        "achieved_rpo_seconds": _seconds(standing.achieved_rpo_s),
        "bytes": format_size(standing.bytes),
    }
    del shown["disks"], shown["alarms"]
    out.print(pairs(shown))
    out.print()
    rows = [(disk.name, format_size(disk.size_bytes), disk.slot, disk.id) for disk in standing.disks]
    out.print(table(("DISK", "SIZE", "SLOT", "ID"), rows))
    for alarm in standing.alarms:
        out.print(f"{alarm.severity}: {alarm.text}")


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} s"
