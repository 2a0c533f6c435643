"""`asrfs set` and `asrfs settings`: what may be changed at any time, also while serving."""

from __future__ import annotations

import click

from asrfs.cli.agent import tell_agent_to_reload
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.settings import DEFAULT_TEXTS
from asrfs.daemon.state import StateDirectory
from asrfs.errors import BadInputError
from asrfs.terminal.output import table


@click.command("set")
@click.argument("assignments", metavar="KEY=VALUE...", nargs=-1, required=True)
@pass_invocation
def set_settings(invocation: Invocation, assignments: tuple[str, ...]) -> None:
    """Change settings, also while serving."""
    given = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise BadInputError(f"{word!r} is not KEY=VALUE, such as object_age=1s")
        if key in given:
            raise BadInputError(f"{key} is given twice: say it once")
        given[key] = text.strip()
    state = invocation.open_state()
    state.change_settings(given)
    tell_agent_to_reload(state)
    show(invocation, state)


@click.command("settings")
@pass_invocation
def show_settings(invocation: Invocation) -> None:
    """Show every setting in force and where it comes from."""
    show(invocation, invocation.open_state())


def show(invocation: Invocation, state: StateDirectory) -> None:
    overrides = state.load_overrides()
    document = {
        key: {"value": overrides.get(key, default), "default": default, "set": key in overrides}
        for key, default in DEFAULT_TEXTS.items()
    }
    rows = [[key, each["value"], "set here" if each["set"] else "default"] for key, each in document.items()]
    invocation.answer(document, lambda out: out.print(table(("SETTING", "VALUE", "FROM"), rows)))
