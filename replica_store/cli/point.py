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
    records that came as one stretch. Last come tails, as tail-of-epoch-N: what a host that was superseded had written
    and could not send any more."""
    wanted = filter_of(options, SystemClock())
    with invocation.open_vault() as vault:
        machine_id = vault.machine(machine).id
        points = wanted.choose(vault.points(machine_id))
        tails = wanted.choose(vault.tail_points(machine_id))
    documents = [_document(each) | {"tail": False} for each in points]
    documents += [_document(each) | {"tail": True} for each in tails]
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
