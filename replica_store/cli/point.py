"""`replica-store point list`: what a machine can go back to."""

from __future__ import annotations

from typing import Any

import click

from asrfs.model.quantities import format_time
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import table
from asrfs.terminal.point_options import filter_of, group_text, point_options
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.rows import PointRow


@click.group()
def point() -> None:
    """Recovery points."""


@point.command("list")
@click.argument("machine")
@point_options
@pass_invocation
def list_points(invocation: Invocation, /, machine: str, **options: Any) -> None:
    """Listed points of MACHINE, oldest first. What lies between can be recovered by lsn:N or time:T, too, but for
    records that came as one stretch."""
    wanted = filter_of(options, SystemClock())
    with invocation.open_vault() as vault:
        points = wanted.choose(vault.points(vault.machine(machine).id))
    documents = [_document(each) for each in points]
    keys = ("time", "lsn", "epoch", "consistency", "group", "name", "hold_ms", "failed", "protected", "id")
    rows = [
        ["yes" if cell is True else cell or None for cell in map((each | {"group": group_text(each)}).get, keys)]
        for each in documents
    ]
    head = [key.upper().replace("_MS", " MS") for key in keys]
    invocation.answer(documents, lambda out: out.print(table(head, rows)))


def _document(point: PointRow) -> dict[str, Any]:
    place = {"lsn": point.lsn, "epoch": point.epoch, "time": format_time(point.time_ns), "protected": point.protected}
    return point.marker.document() | place
