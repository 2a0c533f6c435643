"""What `failover` and `failback` share: options, a start that does what is due, and telling how a failover stands."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from asrfs.errors import BadInputError
from asrfs.model.quantities import format_duration, parse_duration
from asrfs.storage.kernel_text import kernel_text
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, table
from replica_store.cli.invocation import Invocation
from replica_store.cli.plan_runs import carry_out, only_machine, plan_named, selector_of
from replica_store.failover.actions import Failovers
from replica_store.failover.report import document, verdict
from replica_store.failover.wanted import HANDOVER_S, Wanted
from replica_store.vault.operations import Operation

if TYPE_CHECKING:
    from rich.console import Console

POINT = click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    required=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
POINT_OR_PLANS = click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    help="As of `export`; of a plan for machines of which it says nothing else, instead of its own.",
)
ACCEPT = click.option("--accept-damage", is_flag=True, help="Take a point that verification has flagged all the same.")
STATE = click.option("--state", metavar="DIR", help="State directory of the recovered machine; new or empty.")
MOUNT = click.option("--mount", metavar="DIR", help="Where its disks appear as DISK.img; new or empty.")
NO_BOOT = click.option("--no-boot", is_flag=True, help="Bring the disks back and start nothing on them.")
CHECK = click.option("--check", "check_command", metavar="CMD", help="Run by sh when the disks are there; 0 is good.")
TIMEOUT = click.option(
    "--timeout",
    metavar="D",
    help=f"Cancelled after so long; {format_duration(HANDOVER_S)} unless given. Plans have their own.",
)
COMMIT = click.option(
    "--commit", "commits", is_flag=True, help="Commit at once, if all of it is good: the old side is fenced then."
)


@dataclass(frozen=True, slots=True)
class HandoverWords:
    """The words of `failover planned` and `failback`, as they were given."""

    name: str
    selector: str | None
    state: str | None
    mount: str | None
    check_command: str | None
    no_boot: bool
    timeout: str | None
    commits: bool


def hand_over(invocation: Invocation, kind: Literal["planned", "failback"], asked: HandoverWords) -> None:
    """Carry it out, of a machine or of a plan, and say how far it came."""
    failovers = failovers_of(invocation)
    if asked.selector not in (None, "latest"):
        raise BadInputError("a planned failover goes to `--point latest`: it loses nothing")
    if (plan := plan_named(invocation, asked.name, asked.selector)) is not None:
        only_machine(
            state=asked.state,
            mount=asked.mount,
            check=asked.check_command,
            timeout=asked.timeout,
            commit=asked.commits or None,
        )
        return carry_out(invocation, plan, kind, accept_damage=False, boots=not asked.no_boot)
    wanted = Wanted(
        machine=asked.name,
        selector=selector_of(asked.selector),
        state=asked.state,
        mount=asked.mount,
        check_command=asked.check_command,
        boots=not asked.no_boot,
        handover_s=HANDOVER_S if asked.timeout is None else math.ceil(parse_duration(asked.timeout)),
    )
    found = failovers.planned(wanted) if kind == "planned" else failovers.failback(wanted)
    if asked.commits and verdict(found) is None:
        found = failovers.commit(found.id)
    answer(invocation, found)


def failovers_of(invocation: Invocation) -> Failovers:
    """Ready for a command; what is due is done first."""
    invocation.open_vault().close()  # there is one, and it can be read

    def told(step: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"{step} …\n")
            sys.stderr.flush()

    failovers = Failovers(str(invocation.vault), SystemClock(), told, _seconds_since_start())
    failovers.sweep()
    return failovers


def _seconds_since_start() -> float:
    """Of this process: who waits for a machine waits for that, too."""
    fields = kernel_text("/proc/self/stat").rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return round(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s), 4)


def answer(invocation: Invocation, found: Operation, *, judged: bool = True) -> None:
    """Print it; fail after that if the machine is not good."""
    whole = document(found)

    def render(out: Console) -> None:
        shown = {
            key: value
            for key, value in whole.items()
            if value is not None and key != "next" and not isinstance(value, list | dict)
        }
        out.print(pairs(shown))
        out.print()
        out.print(table(("STEP", "SECONDS"), [(step["name"], step["seconds"]) for step in whole["steps"]]))
        out.print()
        rows = [(disk["name"], disk["path"], disk["filesystem"], disk["fsck"]) for disk in whole["disks"]]
        out.print(table(("DISK", "FILE", "FILESYSTEM", "FSCK"), rows))
        if (proof := whole["proof"]) is not None:
            out.print(
                f"nothing was lost: up to LSN {proof['lsn']} {proof['chunks_compared']} chunks were compared, 0 differ"
            )
        for warning in whole["warnings"]:
            out.print(f"warning: {warning}")
        if whole["next"] is not None:
            out.print(f"next: {whole['next']}", soft_wrap=True)

    invocation.answer(whole, render)
    if judged and (wrong := verdict(found)) is not None:
        raise wrong


def seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} s"
