"""`replica-store promote`: a point copied back over the disks of a machine, or of a group, that goes on at its host.

promote M --point P          what it would do
promote M --point P --yes    do it, and wait; the same again waits for what has begun
promote M --cancel           take it back, as long as nothing was written
promotions                   all there were
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from asrfs.errors import BadInputError
from asrfs.model.quantities import format_duration, format_size, format_time, parse_duration
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, progress_bar, table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.failover.promoting import (
    PREPARE_S,
    Plan,
    begin_promotion,
    cancel_promotion,
    plan,
    wait_promotion,
)
from replica_store.vault.promotions import Promotion, promotions

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("target", metavar="MACHINE|GROUP")
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
@click.option("--yes", is_flag=True, help="Do it; else it is said what it would do.")
@click.option("--leave", metavar="DISK", multiple=True, help="A disk that was added or removed since stays as it is.")
@click.option("--accept-damage", is_flag=True, help="Take a point that verification has flagged all the same.")
@click.option(
    "--timeout", metavar="D", default=format_duration(PREPARE_S), show_default=True, help="For hosts to be ready."
)
@click.option("--cancel", is_flag=True, help="Take it back, as long as nothing was written.")
@pass_invocation
def promote(
    invocation: Invocation,
    target: str,
    selector: str | None,
    yes: bool,
    leave: tuple[str, ...],
    accept_damage: bool,
    timeout: str,
    cancel: bool,
) -> None:
    """Copy a point back over the live disks of MACHINE, or of all members of GROUP, at their hosts.

    All disks go back together, and how the machine is started with them. What the disks are now is kept as a point
    before, named before-promote-ID, and nothing of the history is lost: promoting that undoes this. Only what was
    written since the point travels. Nobody may use the disks meanwhile: stop what does, unmount and detach them first.
    """
    clock, root = SystemClock(), str(invocation.vault)
    if cancel:
        invocation.open_vault().close()
        return _answer(invocation, cancel_promotion(root, target, clock))
    if selector is None:
        raise BadInputError("--point says to what the disks go back: see `replica-store point list`")
    with invocation.open_vault() as vault:
        planned = plan(vault, target, selector, leave=leave, accept_damage=accept_damage)
    if not yes:
        _show_plan(invocation, planned)
        raise BadInputError("nothing was changed: say --yes to do it")
    begun = begin_promotion(root, planned, clock, int(parse_duration(timeout)))
    with progress_bar(f"bringing {target} back", in_bytes=False) as step:

        def told(found: Promotion) -> None:
            steps = {"preparing": 0, "writing": 1, "releasing": 2, "done": 3, "cancelled": 3}
            step(steps[found.state], 3)

        done = wait_promotion(root, begun.id, clock, told)
    _answer(invocation, done)


@click.command("promotions")
@pass_invocation
def list_promotions(invocation: Invocation) -> None:
    """Points that were copied back over live disks, oldest first."""
    with invocation.open_vault() as vault:
        documents = [document(each) for each in promotions(vault.catalog)]
    columns = ("ID", "TARGET", "MACHINE", "LSN", "STATE", "BEFORE", "END", "WRITTEN", "BEGUN", "ERROR")

    def render(out: Console) -> None:
        rows = [
            (
                each["id"][:12],
                each["target"],
                machine["machine"],
                machine["lsn"],
                each["state"],
                machine["before_lsn"],
                machine["end_lsn"],
                format_size(machine["bytes_written"]),
                each["begun"],
                machine["error"],
            )
            for each in documents
            for machine in each["machines"]
        ]
        out.print(table(columns, rows))

    invocation.answer(documents, render)


def document(found: Promotion) -> dict[str, Any]:
    """A promotion as commands print it."""
    return {
        "id": found.id,
        "target": found.target,
        "selector": found.selector,
        "group": found.group,
        "state": found.state,
        "begun": format_time(found.begun_ns),
        "machines": [
            {
                "machine": each.machine,
                "point": each.point.id,
                "lsn": each.point.lsn,
                "time": format_time(each.point.time_ns),
                "disks": [record.name for record in each.records],
                "before": f"before-promote-{found.id[:12]}",
                "before_lsn": each.before_lsn,
                "end": None if each.has_left else f"promoted-{found.id[:12]}",
                "end_lsn": each.end_lsn,
                "bytes_changed": each.bytes_changed,
                "bytes_written": each.bytes_written,
                "usable": each.is_back and not each.has_left,
                "error": each.error,
            }
            for each in found.machines
        ],
        "causes": [
            {"time": format_time(each.time_ns), "state": each.state, "text": each.text} for each in found.causes
        ],
    }


def _answer(invocation: Invocation, found: Promotion) -> None:
    shown = document(found)

    def render(out: Console) -> None:
        out.print(pairs({key: shown[key] for key in ("id", "target", "state", "begun")}))
        columns = ("MACHINE", "LSN", "TIME", "DISKS", "WRITTEN", "BEFORE", "NOW")
        rows = [
            (
                each["machine"],
                each["lsn"],
                each["time"],
                ", ".join(each["disks"]),
                format_size(each["bytes_written"]),
                each["before"],
                each["end"],
            )
            for each in shown["machines"]
        ]
        out.print(table(columns, rows))

    invocation.answer(shown, render)


def _show_plan(invocation: Invocation, planned: Plan) -> None:
    shown = {
        "state": "planned",
        "target": planned.target,
        "group": planned.group,
        "machines": [
            {"machine": each.machine, "lsn": each.point.lsn, "time": format_time(each.point.time_ns)}
            for each in planned.machines
        ],
        "disks": [
            {
                "machine": each.machine,
                "disk": each.name,
                "size_bytes": each.size_bytes,
                "bytes_changed": each.bytes_changed,
                "note": each.note or None,
            }
            for each in planned.disks
        ],
        "warnings": list(planned.warnings),
    }

    def render(out: Console) -> None:
        times = {each.machine: format_time(each.point.time_ns) for each in planned.machines}
        lsns = {each.machine: each.point.lsn for each in planned.machines}
        columns = ("MACHINE", "DISK", "SIZE", "BACK TO", "LSN", "TO BE WRITTEN", "NOTE")
        rows = [
            (
                each.machine,
                each.name,
                format_size(each.size_bytes),
                times[each.machine],
                lsns[each.machine],
                format_size(each.bytes_changed),
                each.note,
            )
            for each in planned.disks
        ]
        out.print(table(columns, rows))
        for warning in planned.warnings:
            out.print(f"warning: {warning}", highlight=False)

    invocation.answer(shown, render)
