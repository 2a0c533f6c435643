"""`replica-store verify`: read everything back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from asrfs.errors import AsrfsError, IntegrityError
from asrfs.model.quantities import format_size
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, progress_bar
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.flaws import any_flaw, note_flaws
from replica_store.vault.rows import MachineRow
from replica_store.vault.scrub import Damage, Scrubbed, scrub
from replica_store.vault.vault import Vault

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("machine", required=False)
@pass_invocation
def verify(invocation: Invocation, machine: str | None) -> None:
    """Check every byte of every log object, of MACHINE or of all. Exit code 5 if anything is damaged.

    What is found is remembered until the next time: a failover to a point that may need it is refused.
    """
    with invocation.open_vault() as vault:
        machines = vault.machines() if machine is None else [vault.machine(machine)]
        with progress_bar("verifying") as step:
            scrubbed = scrub(vault, machines, step)
        forgotten = _remember(vault, machines, scrubbed)
    invocation.answer(_document(scrubbed), lambda out: _render(out, scrubbed))
    if scrubbed.damages:
        more = f" (and {len(scrubbed.damages) - 1} more)" if len(scrubbed.damages) > 1 else ""
        raise IntegrityError(f"{_line(scrubbed.damages[0])}{more}{forgotten}")


def _remember(vault: Vault, machines: Sequence[MachineRow], scrubbed: Scrubbed) -> str:
    """Have failovers know of it; why that could not be, if so: what was found must be said all the same."""
    try:
        for each in machines:
            found = [damage for damage in scrubbed.damages if damage.machine == each.name]
            if found:
                _forget_digests(vault, each.id)
            if found or any_flaw(vault.catalog, each.id):
                note_flaws(vault.root, each.id, found, SystemClock().time_ns())
    except AsrfsError as error:
        return f"; failovers do not know of it: {error}"
    return ""


def _forget_digests(vault: Vault, machine_id: str) -> None:
    """What comparing kept is of objects as they were: the next comparison reads them as they are."""
    with suppress(OSError):
        for name in vault.leaves.names(machine_id):
            vault.leaves.remove(machine_id, name)


def _document(scrubbed: Scrubbed) -> dict[str, Any]:
    return {
        "machines": scrubbed.machines,
        "objects": scrubbed.objects,
        "frames": scrubbed.frames,
        "bytes": scrubbed.bytes,
        "uncatalogued": scrubbed.uncatalogued,
        "damages": [
            {
                "machine": damage.machine,
                "file": damage.where,
                "offset": damage.offset,
                "first_lsn": damage.first_lsn,
                "last_lsn": damage.last_lsn,
                "text": damage.text,
                "points": list(damage.points),
            }
            for damage in scrubbed.damages
        ],
    }


def _render(out: Console, scrubbed: Scrubbed) -> None:
    out.print(
        pairs(
            {
                "machines": scrubbed.machines,
                "log objects": scrubbed.objects,
                "frames": scrubbed.frames,
                "read": format_size(scrubbed.bytes),
                "uncatalogued": len(scrubbed.uncatalogued),
                "damages": len(scrubbed.damages),
            }
        )
    )
    for damage in scrubbed.damages:
        out.print(f"damaged: {_line(damage)}", markup=False)
        if damage.points:
            out.print(f"  points that may need it: {', '.join(damage.points)}", markup=False)


def _line(damage: Damage) -> str:
    """File, offset where it is known, LSNs, and what is wrong."""
    offset = "" if damage.offset is None else f" at byte {damage.offset}"
    text = damage.text.removeprefix(f"{damage.where}: ")
    return f"{damage.where}{offset}, LSN {damage.first_lsn}..{damage.last_lsn}: {text}"
