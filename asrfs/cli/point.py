"""`asrfs point`: make recovery points and list those this host has made."""

from __future__ import annotations

import click

from asrfs.cli.agent import FOREVER_S, call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.errors import RefusedError
from asrfs.model.names import check_point_name
from asrfs.model.quantities import parse_duration
from asrfs.terminal.output import pairs, table


@click.group()
def point() -> None:
    """Recovery points."""


@point.command()
@click.option("--consistency", type=click.Choice(["crash", "filesystem", "application"]), default="crash")
@click.option("--group", metavar="G", help="Cut the point together with the other members of group G.")
@click.option("--name", metavar="N", help="A name to find it by; the newest point of a name is meant.")
@click.option("--wait", is_flag=True, help="Return when it is recoverable at the store.")
@click.option("--timeout", metavar="DURATION", help="With --wait: give up after this long; exit code 1.")
@pass_invocation
def create(
    invocation: Invocation, consistency: str, group: str | None, name: str | None, wait: bool, timeout: str | None
) -> None:
    """Mark this instant in the history."""
    if name is not None:
        check_point_name(name)
    if consistency != "crash":
        raise RefusedError(f"{consistency}-consistent points are not built yet: use --consistency crash")
    if group is not None:
        raise RefusedError(f"there is no group {group!r}: consistency groups are not built yet")
    seconds = None if timeout is None else parse_duration(timeout)
    patience = FOREVER_S if wait and seconds is None else seconds or 30.0
    document = call_agent(
        invocation.open_state(),
        "point_create",
        consistency=consistency,
        name=name,
        wait=wait,
        timeout=seconds,
        seconds_max=patience,
    )
    invocation.answer(document, lambda out: out.print(pairs(document)))


@point.command("list")
@pass_invocation
def list_points(invocation: Invocation) -> None:
    """Points this host has made, oldest first, and whether the store has them."""
    points = call_agent(invocation.open_state(), "point_list")["points"]
    rows = [[each[key] for key in ("time", "lsn", "consistency", "name", "acknowledged", "id")] for each in points]
    head = ("TIME", "LSN", "CONSISTENCY", "NAME", "AT STORE", "ID")
    invocation.answer(points, lambda out: out.print(table(head, rows)))
