"""`asrfs pause` and `asrfs resume`: shipping only; writes go on."""

from __future__ import annotations

import click

from asrfs.cli.agent import call_agent
from asrfs.cli.invocation import Invocation, pass_invocation


@click.command()
@pass_invocation
def pause(invocation: Invocation) -> None:
    """Stop shipping to the store. Writes go on; the journal grows."""
    call_agent(invocation.open_state(), "pause")
    invocation.answer({"paused": True}, lambda out: out.print("shipping is paused: go on with `asrfs resume`"))


@click.command()
@pass_invocation
def resume(invocation: Invocation) -> None:
    """Go on shipping."""
    call_agent(invocation.open_state(), "resume")
    invocation.answer({"paused": False}, lambda out: out.print("shipping goes on"))
