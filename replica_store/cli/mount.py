"""`replica-store mount`: all points of all machines as a read-only tree, in the foreground."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from asrfs.storage.priority import be_usual
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.points.mount import mount_points


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@pass_invocation
def mount(invocation: Invocation, directory: Path) -> None:
    """Mount DIR/MACHINE/POINT/DISK.img until SIGTERM. Prints `ready` once it is there.

    POINT is a point's id or name; names ending in lsn:N or time:T, latest, latest-processed and latest-application
    are not listed but can be entered.
    """
    be_usual()
    with invocation.open_vault() as vault:
        mount_points(vault, directory, source=f"replica-store:{vault.name}", ready=_announce, report=_report)


def _announce() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _report(line: str) -> None:
    sys.stderr.write(f"replica-store: {' '.join(line.split())}\n")
    sys.stderr.flush()
