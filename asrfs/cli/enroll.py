"""`asrfs enroll`: become a machine of a store, with a one-time token."""

from __future__ import annotations

import sys

import click

from asrfs.cli.agent import tell_agent_to_reload
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.enroll import enroll as enroll_with
from asrfs.terminal.output import pairs


@click.command()
@click.option("--store", metavar="HOST:PORT", required=True, help="Management address of the store.")
@click.option("--token", metavar="TOKEN", required=True, help="From `replica-store token MACHINE`; '-' reads stdin.")
@click.option("--instead", is_flag=True, help="Leave the store it is enrolled with: this one takes its place.")
@click.option(
    "--above-epoch",
    type=click.IntRange(0, (1 << 32) - 2),
    metavar="N",
    help="Go on there in a new epoch, higher than N: done by `replica-store reprotect`.",
)
@pass_invocation
def enroll(invocation: Invocation, store: str, token: str, instead: bool, above_epoch: int | None) -> None:
    """Register this machine with a store: keys and a certificate for a one-time token.

    A store that takes another one's place is sent everything, in a new epoch if need be.
    """
    if token == "-":
        asked = sys.stdin.isatty()
        token = click.prompt("token", hide_input=True, err=True) if asked else sys.stdin.readline().strip()
    state = invocation.open_state()
    document = enroll_with(state, store, token, instead=instead, above_epoch=above_epoch)
    tell_agent_to_reload(state)
    invocation.answer(document, lambda out: out.print(pairs(document)))
