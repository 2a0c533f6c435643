"""`replica-store token`: a one-time enrolment token."""

from __future__ import annotations

import click

from asrfs.model.quantities import parse_duration
from asrfs.storage.system_clock import SystemClock
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.enrolment import make_token


@click.command()
@click.argument("machine")
@click.option("--expires", metavar="DURATION", default="24h", show_default=True, help="How long it may be used.")
@pass_invocation
def token(invocation: Invocation, machine: str, expires: str) -> None:
    """Print a token with which MACHINE may enrol once, and nothing else. Works whether the store serves or not."""
    lifetime_s = parse_duration(expires)
    with invocation.open_vault(writable=True) as vault:
        text = make_token(vault, machine, SystemClock(), lifetime_s)
    if invocation.json:
        invocation.answer({"machine": machine, "token": text}, lambda out: None)
    else:
        click.echo(text)
