"""`asrfs init`: the state directory of a machine, a new one or one that goes on from a recovery point."""

from __future__ import annotations

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.state import StateDirectory
from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.recovered import RecoveredMachine, decode_recovered
from asrfs.terminal.output import pairs


@click.command()
@click.argument("machine")
@click.option(
    "--recovered", metavar="FILE.json", help="Go on from the recovery point that this file of a store describes."
)
@pass_invocation
def init(invocation: Invocation, machine: str, recovered: str | None) -> None:
    """Make the state directory of a new MACHINE."""
    if recovered is None:
        state = StateDirectory.create(str(invocation.state), machine)
    else:
        state = StateDirectory.create_recovered(str(invocation.state), _read(recovered, machine))
    config = state.load_machine()
    document = {"machine": config.name, "id": config.id, "state": state.root}
    invocation.answer(document, lambda out: out.print(pairs(document)))


def _read(path: str, machine: str) -> RecoveredMachine:
    try:
        with open(path, "rb") as file:
            found = decode_recovered(file.read())
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}") from None
    if found.name != machine:
        raise BadInputError(f"{path} describes machine {found.name}, not {machine}: say `asrfs init {found.name}`")
    return found
