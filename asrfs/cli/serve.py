"""`asrfs serve`: the supervisor, in the foreground."""

from __future__ import annotations

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import supervisor


@click.command()
@click.option("--mount", metavar="DIR", required=True, help="Empty directory where the disks appear as DISK.img.")
@pass_invocation
def serve(invocation: Invocation, mount: str) -> int:
    """Serve the machine's disks until SIGTERM; prints `ready` when they are there."""
    return supervisor.run(invocation.open_state(), mount)
