"""`replica-store failover`: a machine brought back from a point, for trial or in earnest.

    test MACHINE|PLAN --point P          cleanup ID                    beside the machine, which goes on
    planned MACHINE|PLAN --point latest  its host hands it over, nothing is lost; then as unplanned
    unplanned MACHINE|PLAN --point P     change-point ID --point P · cancel ID · commit ID
    list · show ID · report · resume ID

Works on the vault itself, whether it is served or not. What is started outlives the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from asrfs.errors import AsrfsError
from asrfs.model.quantities import format_duration, parse_duration, parse_size
from asrfs.terminal.output import table
from replica_store.cli.failing_over import (
    ACCEPT,
    CHECK,
    COMMIT,
    MOUNT,
    NO_BOOT,
    POINT,
    POINT_OR_PLANS,
    STATE,
    TIMEOUT,
    HandoverWords,
    answer,
    failovers_of,
    hand_over,
    seconds,
)
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.cli.plan_runs import carry_out, members_of, only_machine, plan_named, selector_of
from replica_store.failover.actions import Failovers
from replica_store.failover.report import document, drills
from replica_store.failover.wanted import TTL_S, Wanted
from replica_store.vault.operations import ENDED, Operation, operation, operations

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group()
def failover() -> None:
    """Bring machines back from their points."""


@failover.command()
@click.argument("name", metavar="MACHINE|PLAN")
@POINT_OR_PLANS
@STATE
@MOUNT
@click.option("--ttl", metavar="D", default=format_duration(TTL_S), show_default=True, help="Cleaned up after so long.")
@CHECK
@NO_BOOT
@click.option("--space-limit", metavar="SIZE", help="Cleaned up when it takes more than this.")
@ACCEPT
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
    failovers = failovers_of(invocation)
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
    answer(invocation, failovers.test(wanted))


@failover.command()
@click.argument("name", metavar="MACHINE|PLAN")
@POINT_OR_PLANS
@STATE
@MOUNT
@CHECK
@NO_BOOT
@ACCEPT
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
    failovers = failovers_of(invocation)
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
    answer(invocation, failovers.unplanned(wanted))


@failover.command()
@click.argument("name", metavar="MACHINE|PLAN")
@click.option("--point", "selector", metavar="latest", help="`latest`, for nothing is to be lost; of a plan, too.")
@STATE
@MOUNT
@CHECK
@NO_BOOT
@TIMEOUT
@COMMIT
@pass_invocation
def planned(
    invocation: Invocation,
    name: str,
    selector: str | None,
    state: str | None,
    mount: str | None,
    check_command: str | None,
    no_boot: bool,
    timeout: str | None,
    commits: bool,
) -> None:
    """In earnest, its host being there: MACHINE goes on here with all that it wrote, commit pending; or all of PLAN.

    The host stops writing, sends what is left and compares all disks; only if none differs it is gone on from here.
    Until `commit` it can be cancelled: the host writes again, and what was written here is given up. Stop what uses the
    disks there first: who has a filesystem mounted finds it read-only.
    """
    asked = HandoverWords(name, selector, state, mount, check_command, no_boot, timeout, commits)
    hand_over(invocation, "planned", asked)


@failover.command("change-point")
@click.argument("id")
@POINT
@ACCEPT
@pass_invocation
def change_point(invocation: Invocation, id: str, selector: str, accept_damage: bool) -> None:
    """Another point for failover ID, which is not committed. What was written since it began is given up."""
    answer(invocation, failovers_of(invocation).change_point(id, selector, accept_damage=accept_damage))


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
    answer(invocation, failovers_of(invocation).resume(id))


@failover.command()
@click.argument("id")
@pass_invocation
def show(invocation: Invocation, id: str) -> None:
    """One failover, also one that has ended."""
    with invocation.open_vault() as vault:
        found = operation(vault.catalog, id)
    answer(invocation, found, judged=False)


@failover.command("list")
@click.option("--all", "everything", is_flag=True, help="Those that have ended, too.")
@pass_invocation
def list_failovers(invocation: Invocation, everything: bool) -> None:
    """Failovers, oldest first."""
    failovers_of(invocation)
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
                seconds(each.rto_s),
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
                *(seconds(each[f"{which}_rto_seconds"]) for which in ("last", "best", "median", "worst")),
                None if each["trend"] is None else f"{each['trend']:+.0%}",
            )
            for each in documents
        ]
        out.print(table(columns, rows))

    invocation.answer(documents, render)


def _act(invocation: Invocation, id: str, verb: Callable[[Failovers, str], Operation], *, judged: bool = True) -> None:
    """What is asked for one failover, or for each of a plan's run: all are tried, and the first that fails is told."""
    failovers, members = failovers_of(invocation), members_of(invocation, id)
    if members is None:
        return answer(invocation, verb(failovers, id), judged=judged)
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
