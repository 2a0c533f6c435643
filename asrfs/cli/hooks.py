"""`asrfs hooks`: commands that quiet an application around a point, and wake it again."""

from __future__ import annotations

import os
import shutil
from typing import Any

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.consistency import shipped_hooks
from asrfs.consistency.hooks import PHASES, Hook, HookFiles, Phase, make_hook
from asrfs.daemon.state import StateDirectory
from asrfs.errors import BadInputError
from asrfs.model.quantities import parse_duration
from asrfs.storage.directory import DirectoryStorage
from asrfs.terminal.output import pairs, table


@click.group()
def hooks() -> None:
    """Hooks of application-consistent points, and of planned failover."""


@hooks.command()
@click.argument("phase", metavar="pre|post|hold|handover", type=click.Choice(PHASES))
@click.argument("command", metavar="CMD")
@click.option(
    "--order", metavar="N", type=int, default=50, show_default=True, help="Lower ones run earlier before, later after."
)
@click.option(
    "--timeout", metavar="DURATION", default="30s", show_default=True, help="Killed when it has not ended then."
)
@click.option("--name", metavar="NAME", help="What to call it; else PHASE-ORDER-PROGRAM.")
@pass_invocation
def add(invocation: Invocation, phase: Phase, command: str, order: int, timeout: str, name: str | None) -> None:
    """Run CMD around application-consistent points, or before this machine is handed over.

    CMD is a program and its arguments, as one word of this line; no shell reads it. A `pre` hook runs before the
    filesystems are frozen, a `post` hook after they are thawed, and always. A `hold` hook runs all the while: it prints
    a line when it holds, and lets go when its standard input ends.

    A `handover` hook stops what uses the disks, and unmounts them, before a planned failover: ASRFS_PHASE is handover,
    or take-back when all is to be started again, in reverse order. It may run twice.

    \b
    Shipped with asrfs, by name:
      postgresql   pre:  CHECKPOINT, so that recovery is short
      mysql        hold: FLUSH TABLES WITH READ LOCK until the point is made
      generic      pre, post, handover: stops and continues a systemd unit, `generic UNIT`
    """
    state = invocation.open_state()
    os.makedirs(state.hooks, mode=0o700, exist_ok=True)
    hook = make_hook(phase, _found(state, phase, command), order, parse_duration(timeout), name)
    _files(state).add(hook)
    document = describe(hook)
    invocation.answer(document, lambda out: out.print(pairs(document)))


@hooks.command("list")
@pass_invocation
def list_hooks(invocation: Invocation) -> None:
    """List the hooks by order; those of `post` run backwards."""
    described = [describe(hook) for hook in _files(invocation.open_state()).load()]
    keys = ("name", "phase", "order", "timeout_s", "command")
    head = ("HOOK", "PHASE", "ORDER", "TIMEOUT S", "COMMAND")
    invocation.answer(
        described, lambda out: out.print(table(head, [[each[key] for key in keys] for each in described]))
    )


@hooks.command()
@click.argument("name", metavar="HOOK")
@pass_invocation
def remove(invocation: Invocation, name: str) -> None:
    """Run HOOK no more."""
    _files(invocation.open_state()).remove(name)
    invocation.answer({"name": name, "removed": True}, lambda out: out.print(f"hook {name} is removed"))


def _files(state: StateDirectory) -> HookFiles:
    return HookFiles(DirectoryStorage(state.hooks), state.hooks)


def _found(state: StateDirectory, phase: Phase, command: str) -> str:
    """The command with the path of its program."""
    if os.path.isfile(command):  # its path may have blanks
        return _quoted(os.path.abspath(command))
    program, _, rest = command.strip().partition(" ")
    if "/" in program:
        path = os.path.abspath(program)
    elif program in shipped_hooks.PHASES_OF:
        allowed = shipped_hooks.PHASES_OF[program]
        if phase not in allowed:
            raise BadInputError(f"the shipped hook {program} is for {' or '.join(allowed)}, not for {phase}")
        path = shipped_hooks.install(program, state.hooks)
    else:
        found = shutil.which(program)
        if found is None:
            raise BadInputError(
                f"there is no program {program[:80]!r}: give its path, or one of {', '.join(shipped_hooks.PHASES_OF)}"
            )
        path = found
    return f"{_quoted(path)} {rest}"


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\"'\"'") + "'"


def describe(hook: Hook) -> dict[str, Any]:
    return {
        "name": hook.name,
        "phase": hook.phase,
        "order": hook.order,
        "timeout_s": hook.timeout_s,
        "command": " ".join(hook.argv),
        "argv": list(hook.argv),
    }
