"""`asrfs resync`: send what the replica lacks."""

from __future__ import annotations

import click

from asrfs.cli.agent import FOREVER_S, call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.model.quantities import format_size, parse_duration
from asrfs.terminal.output import pairs


@click.command()
@click.option("--now", is_flag=True, help="Whatever the time of the day, else what is large waits for resync_window.")
@click.option(
    "--full-scan",
    is_flag=True,
    help="Compare all disks with the replica first, and send what differs. The store reads nothing again that it has "
    "read for an earlier comparison; with `asrfs verify` it does.",
)
@click.option("--timeout", metavar="DURATION", help="Give up waiting after this long; exit code 1. It goes on.")
@pass_invocation
def resync(invocation: Invocation, now: bool, full_scan: bool, timeout: str | None) -> None:
    """Send what the store lacks, and return when it lacks nothing any more.

    Where records were given up because the journal came to its quota, the chunks they changed are sent. `asrfs status`
    shows how far it is. On a host that was set back, cloned or superseded (alarms diverged and fenced) --full-scan has
    this host go on in a new epoch: every other host of this machine is fenced, its disks take no more writes.
    """
    seconds = None if timeout is None else parse_duration(timeout)
    state = invocation.open_state()
    patience = FOREVER_S if seconds is None else seconds
    document = call_agent(state, "resync", now=now, full_scan=full_scan, timeout=seconds, seconds_max=patience)
    said = {
        "sent": format_size(document["bytes_sent"]),
        "seconds": document["seconds"],
        "left": "all of what waits for its window" if document["waits_for_window"] else "nothing",
    }
    invocation.answer(document, lambda out: out.print(pairs(said)))
