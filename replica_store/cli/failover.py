"""`replica-store failover`: a machine brought back from a point, for trial or in earnest.

    test MACHINE|PLAN --point P          cleanup ID                    beside the machine, which goes on
    planned MACHINE --point latest       its host hands it over, nothing is lost; then as unplanned
    unplanned MACHINE|PLAN --point P     change-point ID --point P · cancel ID · commit ID
    list · show ID · report · resume ID

Works on the vault itself, whether it is served or not. What is started outlives the command.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from asrfs.errors import AsrfsError
from asrfs.model.quantities import format_duration, parse_duration, parse_size
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.cli.plan_runs import carry_out, members_of, only_machine, plan_named, selector_of
from replica_store.failover.actions import Failovers
from replica_store.failover.report import document, drills, verdict
from replica_store.failover.wanted import HANDOVER_S, TTL_S, Wanted
from replica_store.vault.operations import ENDED, Operation, operation, operations

Command = TypeVar("Command", bound=Callable[..., Any])

_POINT = click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    required=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
_POINT_OR_PLANS = click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    help="As of `export`; of a plan for machines of which it says nothing else, instead of its own.",
)
_ACCEPT = click.option("--accept-damage", is_flag=True, help="Take a point that verification has flagged all the same.")
_STATE = click.option("--state", metavar="DIR", help="State directory of the recovered machine; new or empty.")
_MOUNT = click.option("--mount", metavar="DIR", help="Where its disks appear as DISK.img; new or empty.")
_NO_BOOT = click.option("--no-boot", is_flag=True, help="Bring the disks back and start nothing on them.")
_CHECK = click.option("--check", "check_command", metavar="CMD", help="Run by sh when the disks are there; 0 is good.")


@click.group()
def failover() -> None:
    """Bring machines back from their points."""


@failover.command()
@click.argument("name", metavar="MACHINE|PLAN")
@_POINT_OR_PLANS
@_STATE
@_MOUNT
@click.option("--ttl", metavar="D", default=format_duration(TTL_S), show_default=True, help="Cleaned up after so long.")
@_CHECK
@_NO_BOOT
@click.option("--space-limit", metavar="SIZE", help="Cleaned up when it takes more than this.")
@_ACCEPT
@pass_invocation
def test(
    invocation: Invocation,
    name: str,
    selector: str | None,
    state: str | None,
    mount: str | None,
    ttl: str,
    check_command: str | None,
    no_boot: bool,
    space_limit: str | None,
    accept_damage: bool,
) -> None:
    """Try it: MACHINE at a point, or all of PLAN, beside the protected ones, with disks and a network of its own.

    Replication, points and epochs are not touched. fsck and CMD say whether it is good; CMD has ASRFS_MOUNT and
    ASRFS_STATE, and runs in the machine's network. Exit code 5 if a filesystem is damaged, 1 if CMD fails.
    """
    failovers = _failovers(invocation)
    if (plan := plan_named(invocation, name, selector)) is not None:
        only_machine(state=state, mount=mount, check=check_command, space_limit=space_limit)
        return carry_out(
            invocation, plan, "test", accept_damage=accept_damage, boots=not no_boot, ttl_s=parse_duration(ttl)
        )
    wanted = Wanted(
        machine=name,
        selector=selector_of(selector),
        state=state,
        mount=mount,
        check_command=check_command,
        accept_damage=accept_damage,
        boots=not no_boot,
        ttl_s=parse_duration(ttl),
        space_limit_bytes=None if space_limit is None else parse_size(space_limit),
    )
    _answer(invocation, failovers.test(wanted))


@failover.command()
@click.argument("name", metavar="MACHINE|PLAN")
@_POINT_OR_PLANS
@_STATE
@_MOUNT
@_CHECK
@_NO_BOOT
@_ACCEPT
@pass_invocation
def unplanned(
    invocation: Invocation,
    name: str,
    selector: str | None,
    state: str | None,
    mount: str | None,
    check_command: str | None,
    no_boot: bool,
    accept_damage: bool,
) -> None:
    """In earnest, its host being lost: MACHINE, or each of PLAN, goes on here from a point, commit pending.

    Until `commit` the point can be changed and all can be cancelled; then what was written here is given up.
    """
    failovers = _failovers(invocation)
    if (plan := plan_named(invocation, name, selector)) is not None:
        only_machine(state=state, mount=mount, check=check_command)
        return carry_out(invocation, plan, "unplanned", accept_damage=accept_damage, boots=not no_boot)
    wanted = Wanted(
        machine=name,
        selector=selector_of(selector),
        state=state,
        mount=mount,
        check_command=check_command,
        accept_damage=accept_damage,
        boots=not no_boot,
    )
    _answer(invocation, failovers.unplanned(wanted))


@failover.command()
@click.argument("machine")
@click.option("--point", "selector", metavar="latest", required=True, help="`latest`, for nothing is to be lost.")
@_STATE
@_MOUNT
@_CHECK
@_NO_BOOT
@click.option(
    "--timeout", metavar="D", default=format_duration(HANDOVER_S), show_default=True, help="Cancelled after so long."
)
@pass_invocation
def planned(
    invocation: Invocation,
    machine: str,
    selector: str,
    state: str | None,
    mount: str | None,
    check_command: str | None,
    no_boot: bool,
    timeout: str,
) -> None:
    """In earnest, its host being there: MACHINE goes on here with all that it wrote, commit pending.

    The host stops writing, sends what is left and compares all disks; only if none differs it is gone on from here.
    Until `commit` it can be cancelled: the host writes again, and what was written here is given up. Stop what uses the
    disks there first: who has a filesystem mounted finds it read-only.
    """
    wanted = Wanted(
        machine=machine,
        selector=selector,
        state=state,
        mount=mount,
        check_command=check_command,
        boots=not no_boot,
        handover_s=math.ceil(parse_duration(timeout)),
    )
    _answer(invocation, _failovers(invocation).planned(wanted))


@failover.command("change-point")
@click.argument("id")
@_POINT
@_ACCEPT
@pass_invocation
def change_point(invocation: Invocation, id: str, selector: str, accept_damage: bool) -> None:
    """Another point for failover ID, which is not committed. What was written since it began is given up."""
    _answer(invocation, _failovers(invocation).change_point(id, selector, accept_damage=accept_damage))


@failover.command()
@click.argument("id")
@pass_invocation
def cancel(invocation: Invocation, id: str) -> None:
    """Take failover ID back, which is not committed. What was written since it began is given up.

    ID may be the run of a plan: that is all its machines.
    """
    _act(invocation, id, Failovers.cancel)


@failover.command()
@click.argument("id")
@pass_invocation
def commit(invocation: Invocation, id: str) -> None:
    """Failover ID is for good: the machine's old side can add nothing to its history any more.

    ID may be the run of a plan: that is all its machines.
    """
    _act(invocation, id, Failovers.commit)


@failover.command()
@click.argument("id")
@click.option("--yes", is_flag=True, help="Also what no store has, of a machine that was left behind.")
@pass_invocation
def cleanup(invocation: Invocation, id: str, yes: bool) -> None:
    """End test failover ID, or what one whose machine came back has left here. Its report stays.

    ID may be the run of a plan: that is all its machines.
    """
    _act(invocation, id, lambda failovers, each: failovers.cleanup(each, gives_up=yes), judged=False)


@failover.command()
@click.argument("id")
@pass_invocation
def resume(invocation: Invocation, id: str) -> None:
    """Carry on with failover ID, which was interrupted, or start what is missing of it, as after a restart."""
    _answer(invocation, _failovers(invocation).resume(id))


@failover.command()
@click.argument("id")
@pass_invocation
def show(invocation: Invocation, id: str) -> None:
    """One failover, also one that has ended."""
    with invocation.open_vault() as vault:
        found = operation(vault.catalog, id)
    _answer(invocation, found, judged=False)


@failover.command("list")
@click.option("--all", "everything", is_flag=True, help="Those that have ended, too.")
@pass_invocation
def list_failovers(invocation: Invocation, everything: bool) -> None:
    """Failovers, oldest first."""
    _failovers(invocation)
    with invocation.open_vault() as vault:
        found = [each for each in operations(vault.catalog) if everything or each.remains or each.state not in ENDED]
    columns = ("ID", "KIND", "MACHINE", "LSN", "STATE", "RTO", "BEGUN", "ENDS", "MOUNT")

    def render(out: Console) -> None:
        rows = [
            (
                each.id[:12],
                each.kind,
                each.machine,
                each.point.lsn,
                each.state,
                _seconds(each.rto_s),
                document(each)["begun"],
                document(each)["expires"],
                each.places.mount,
            )
            for each in found
        ]
        out.print(table(columns, rows))

    invocation.answer([document(each) for each in found], render)


@failover.command()
@click.argument("machine", required=False)
@pass_invocation
def report(invocation: Invocation, machine: str | None) -> None:
    """The drills of all machines, or of MACHINE: how many were good, how long they took, and the trend."""
    with invocation.open_vault() as vault:
        machine_id = None if machine is None else vault.machine(machine).id
        documents = drills(operations(vault.catalog, machine_id))

    def render(out: Console) -> None:
        columns = ("MACHINE", "DRILLS", "GOOD", "LAST", "LAST RTO", "BEST", "MEDIAN", "WORST", "TREND")
        rows = [
            (
                each["machine"],
                each["drills"],
                each["passed"],
                each["last"],
                *(_seconds(each[f"{which}_rto_seconds"]) for which in ("last", "best", "median", "worst")),
                None if each["trend"] is None else f"{each['trend']:+.0%}",
            )
            for each in documents
        ]
        out.print(table(columns, rows))

    invocation.answer(documents, render)


def _failovers(invocation: Invocation) -> Failovers:
    """Ready for a command; what is due is done first."""
    invocation.open_vault().close()  # there is one, and it can be read

    def told(step: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"{step} …\n")
            sys.stderr.flush()

    failovers = Failovers(str(invocation.vault), SystemClock(), told, _seconds_since_start())
    failovers.sweep()
    return failovers


def _act(invocation: Invocation, id: str, verb: Callable[[Failovers, str], Operation], *, judged: bool = True) -> None:
    """What is asked for one failover, or for each of a plan's run: all are tried, and the first that fails is told."""
    failovers, members = _failovers(invocation), members_of(invocation, id)
    if members is None:
        return _answer(invocation, verb(failovers, id), judged=judged)
    done, failures = [], []
    for each in members:
        try:
            done.append(verb(failovers, each))
        except AsrfsError as error:
            failures.append(error)
    rows = [(each.id[:12], each.machine, each.state) for each in done]
    documents = [document(each) for each in done]
    invocation.answer(documents, lambda out: out.print(table(("ID", "MACHINE", "STATE"), rows)))
    if failures:
        raise failures[0]


def _seconds_since_start() -> float:
    """Of this process: who waits for a machine waits for that, too."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return round(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s), 4)


def _answer(invocation: Invocation, found: Operation, *, judged: bool = True) -> None:
    """Print it; fail after that if the machine is not good."""
    whole = document(found)

    def render(out: Console) -> None:
        shown = {key: value for key, value in whole.items() if value is not None and not isinstance(value, list | dict)}
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

    invocation.answer(whole, render)
    if judged and (wrong := verdict(found)) is not None:
        raise wrong


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} s"
