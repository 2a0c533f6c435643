"""`asrfs init`: the state directory of a machine."""

from __future__ import annotations

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.state import StateDirectory
from asrfs.terminal.output import pairs


@click.command()
@click.argument("machine")
@pass_invocation
def init(invocation: Invocation, machine: str) -> None:
    """Make the state directory of a new MACHINE."""
    state = StateDirectory.create(str(invocation.state), machine)
    config = state.load_machine()
    document = {"machine": config.name, "id": config.id, "state": state.root}
    invocation.answer(document, lambda out: out.print(pairs(document)))
