"""`asrfs drain`: wait until the store has everything written so far."""

from __future__ import annotations

import click

from asrfs.cli.agent import FOREVER_S, call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.model.quantities import parse_duration
from asrfs.terminal.output import pairs


@click.command()
@click.option("--timeout", metavar="DURATION", help="Give up after this long; exit code 1.")
@pass_invocation
def drain(invocation: Invocation, timeout: str | None) -> None:
    """Wait until everything appended at the call is acknowledged by the store."""
    seconds = None if timeout is None else parse_duration(timeout)
    state = invocation.open_state()
    document = call_agent(state, "drain", timeout=seconds, seconds_max=FOREVER_S if seconds is None else seconds)
    invocation.answer(document, lambda out: out.print(pairs(document)))
