"""`replica-store serve`: take in histories, in the foreground."""

from __future__ import annotations

import sys

import click

from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.daemon.serve import DATA_PORT, MANAGE_PORT, Addresses, run

_PORT = click.IntRange(0, 65535)


@click.command()
@click.option("--host", metavar="HOST", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--data-port", type=_PORT, default=DATA_PORT, show_default=True, help="For hosts; 0 picks one.")
@click.option("--manage-port", type=_PORT, default=MANAGE_PORT, show_default=True, help="For enrolling; 0 picks one.")
@pass_invocation
def serve(invocation: Invocation, host: str, data_port: int, manage_port: int) -> None:
    """Serve the vault until SIGTERM. Prints `ready data=HOST:PORT manage=HOST:PORT` once it listens."""

    def announce(addresses: Addresses) -> None:
        sys.stdout.write(f"ready data={addresses.data} manage={addresses.manage}\n")
        sys.stdout.flush()

    run(str(invocation.vault), host, data_port, manage_port, announce)
