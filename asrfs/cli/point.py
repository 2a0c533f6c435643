"""`asrfs point`: make recovery points and list those this host has made."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from asrfs.cli.agent import FOREVER_S, call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.consistency.point_request import PointRequest
from asrfs.daemon.state import StateDirectory
from asrfs.model.marker import Consistency
from asrfs.model.point_filter import PointFilter
from asrfs.model.quantities import parse_duration
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, table
from asrfs.terminal.point_options import filter_of, group_text, point_options


@click.group()
def point() -> None:
    """Recovery points."""


@point.command()
@click.option("--consistency", type=click.Choice(["crash", "filesystem", "application"]), default="crash")
@click.option("--group", metavar="G", help="Cut the point together with the other members of group G.")
@click.option("--name", metavar="N", help="A name to find it by; the newest point of a name is meant.")
@click.option("--note", metavar="TEXT", help="A line that goes with it.")
@click.option("--wait", is_flag=True, help="Return when it is recoverable at the store.")
@click.option("--timeout", metavar="DURATION", help="With --wait: give up after this long; exit code 1.")
@pass_invocation
def create(
    invocation: Invocation,
    consistency: Consistency,
    group: str | None,
    name: str | None,
    note: str | None,
    wait: bool,
    timeout: str | None,
) -> None:
    """Mark this instant in the history.

    filesystem: every mounted filesystem on the machine's disks is frozen for it. application: hooks run around that,
    see `asrfs hooks`. What cannot be quieted makes a crash point, which says why. With --group all members of the
    group are cut at one instant, or there is no point.
    """
    PointRequest(consistency=consistency, name=name, note=note).check()
    seconds = None if timeout is None else parse_duration(timeout)
    waits = wait or consistency != "crash" or group is not None
    patience = FOREVER_S if waits and seconds is None else seconds or 30.0
    document = call_agent(
        invocation.open_state(),
        "point_create",
        consistency=consistency,
        group=group,
        name=name,
        note=note,
        wait=wait,
        timeout=seconds,
        seconds_max=patience,
    )
    failures = document.pop("post_failures")
    for why in ([document["failed"]] if document["failed"] else []) + failures:
        click.echo(f"asrfs: warning: {why}", err=True)
    said = {key: value for key, value in document.items() if value not in (None, [], False)}
    invocation.answer(document, lambda out: out.print(pairs(said)))


@point.command("list")
@point_options
@pass_invocation
def list_points(invocation: Invocation, /, **options: Any) -> None:
    """Points this host has made, oldest first, and whether the store has them. Older ones may be at the store only."""
    wanted = filter_of(options, SystemClock())
    points = read_points(invocation.open_state(), wanted)
    keys = ("time", "lsn", "consistency", "group", "name", "hold_ms", "failed", "acknowledged", "id")
    rows = [[(each | {"group": group_text(each)})[key] for key in keys] for each in points]
    head = ("TIME", "LSN", "CONSISTENCY", "GROUP", "NAME", "HELD MS", "FAILED", "AT STORE", "ID")
    invocation.answer(points, lambda out: out.print(table(head, rows)))


def read_points(state: StateDirectory, wanted: PointFilter) -> list[dict[str, Any]]:
    """The points that are wanted, asked for in pieces: there may be more than one answer can hold."""
    fields = msgspec.to_builtins(wanted)
    points: list[dict[str, Any]] = []
    after_lsn = 0
    while True:
        answer = call_agent(state, "point_list", filter=fields, after_lsn=after_lsn)
        points += answer["points"]
        if not answer["more"]:
            return points if wanted.limit is None else points[-wanted.limit :]
        after_lsn = points[-1]["lsn"]
