"""`asrfs set` and `asrfs settings`: what may be changed at any time, also while serving."""

from __future__ import annotations

from typing import Any

import click

from asrfs.cli.agent import tell_agent_to_reload
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import settings
from asrfs.daemon.state import StateDirectory
from asrfs.terminal.output import table


@click.command("set")
@click.argument("assignments", metavar="KEY=VALUE...", nargs=-1, required=True)
@pass_invocation
def set_settings(invocation: Invocation, assignments: tuple[str, ...]) -> None:
    """Change settings, also while serving. What the store's policy says is overridden; KEY=default takes that back."""
    given: dict[str, str] = {}
    errors = []
    for word in assignments:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            errors.append(f"{word[:60]!r} is not KEY=VALUE, such as object_age=1s")
            continue
        if key in given:
            errors.append(f"{key} is given twice: say it once")
        given[key] = text.strip()
    state = invocation.open_state()
    state.change_settings(given, errors)
    tell_agent_to_reload(state)
    show(invocation, state)


@click.command("settings")
@pass_invocation
def show_settings(invocation: Invocation) -> None:
    """Show every setting in force and where it comes from."""
    show(invocation, invocation.open_state())


def show(invocation: Invocation, state: StateDirectory) -> None:
    document = settings.shown(state.load_overrides(), state.load_configuration())
    rows = [[key, each["value"], _from(each)] for key, each in document.items()]
    invocation.answer(document, lambda out: out.print(table(("SETTING", "VALUE", "FROM"), rows)))


def _from(shown: dict[str, Any]) -> str:
    is_overridden = shown["set"] and shown["policy"] is not None
    return f"{shown['from']}, the policy says {shown['policy']}" if is_overridden else str(shown["from"])
