"""`replica-store boot`: how a machine is started in its state at a point."""

from __future__ import annotations

import click

from asrfs.terminal.boot_table import boot_document, boot_rows
from asrfs.terminal.output import pairs
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.points.builder import resolve


@click.group()
def boot() -> None:
    """How machines are started where they are recovered, as their hosts said."""


@boot.command("show")
@click.argument("machine")
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    default="latest",
    show_default=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
@pass_invocation
def show_boot(invocation: Invocation, machine: str, selector: str) -> None:
    """Show what MACHINE's history says at a point."""
    with invocation.open_vault() as vault:
        cut = resolve(vault, machine, selector)
        settings = vault.boot_at(cut.machine.id, cut.lsn)
    document = boot_document(settings)
    invocation.answer(document, lambda out: out.print(pairs(boot_rows(document))))
