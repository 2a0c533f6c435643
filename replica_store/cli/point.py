"""`replica-store point list`: what a machine can go back to."""

from __future__ import annotations

from typing import Any

import click

from asrfs.model.quantities import format_time
from asrfs.terminal.output import table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.rows import PointRow


@click.group()
def point() -> None:
    """Recovery points."""


@point.command("list")
@click.argument("machine")
@pass_invocation
def list_points(invocation: Invocation, machine: str) -> None:
    """Listed points of MACHINE, oldest first. Any LSN or time between them can be recovered too."""
    with invocation.open_vault() as vault:
        points = vault.points(vault.machine(machine).id)
    documents = [_document(each) for each in points]
    keys = ("time", "lsn", "epoch", "consistency", "group", "name", "protected", "id")
    rows = [["yes" if cell is True else cell or None for cell in map(each.get, keys)] for each in documents]
    invocation.answer(documents, lambda out: out.print(table([key.upper() for key in keys], rows)))


def _document(point: PointRow) -> dict[str, Any]:
    return {
        "id": point.id,
        "lsn": point.lsn,
        "epoch": point.epoch,
        "time": format_time(point.time_ns),
        "consistency": point.consistency,
        "group": point.group,
        "name": point.name,
        "protected": point.protected,
    }
