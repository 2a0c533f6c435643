"""What `failover` and `plan` share: a name that may be a plan's, carrying a plan out, and telling how it stands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

from asrfs.errors import BadInputError, NotFoundError
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs, table
from replica_store.cli.invocation import Invocation
from replica_store.failover.plan import Kind, Plan, check_plan
from replica_store.failover.plan_book import read_plans
from replica_store.failover.plan_journal import PlanJournal
from replica_store.failover.plan_run import Event
from replica_store.failover.plan_runs import PlanRuns
from replica_store.failover.report import plan_document, plan_verdict
from replica_store.failover.wanted import TTL_S
from replica_store.vault.operations import ENDED, operations

if TYPE_CHECKING:
    from rich.console import Console


def plan_named(invocation: Invocation, name: str, selector: str | None) -> Plan | None:
    """The plan of that name, with the selector for those of whom it says nothing; None if it is a machine's name.

    Raises NotFoundError, BadInputError if it is both.
    """
    with invocation.open_vault() as vault:
        plan = read_plans(vault).plans.get(name)
        is_machine = any(machine.name == name for machine in vault.machines())
    if plan is None and not is_machine:
        raise NotFoundError(f"there is neither a machine nor a plan {name!r}: see `machine list` and `plan list`")
    if plan is not None and is_machine:
        raise BadInputError(f"there is a machine {name} and a plan {name}: keep the plan under another name")
    if plan is None or selector is None:
        return plan
    plan = msgspec.structs.replace(plan, point=selector)
    check_plan(plan)
    return plan


def selector_of(given: str | None) -> str:
    """Of a machine. Raises BadInputError."""
    if given is None:
        raise BadInputError("a machine needs a point: give --point latest, or see `replica-store point list MACHINE`")
    return given


def only_machine(**given: object) -> None:
    """Raise BadInputError if any of these was given with a plan."""
    for name, value in given.items():
        if value is not None:
            raise BadInputError(f"--{name.replace('_', '-')} is for one machine, not for a plan")


def plan_runs(invocation: Invocation) -> PlanRuns:
    """Those of the vault; at a terminal each event is told as it happens."""

    def report(event: Event) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"{event.step} {event.what} {event.text}".rstrip() + "\n")
            sys.stderr.flush()

    return PlanRuns(str(invocation.vault), SystemClock(), report)


def members_of(invocation: Invocation, id: str) -> list[str] | None:
    """Ids of the failovers of a plan's run that have not ended, None if this is no run's id."""
    runs = plan_runs(invocation)
    with invocation.open_vault() as vault:
        if any(each.id.startswith(id) for each in operations(vault.catalog)):
            return None  # whatever became of a run's file, a failover can be acted on
    try:
        run_id = runs.journal(id).head.id
    except NotFoundError:
        return None
    return [each.id for each in runs.operations(run_id) if each.state not in ENDED]


def carry_out(
    invocation: Invocation,
    plan: Plan,
    kind: Kind,
    *,
    accept_damage: bool,
    boots: bool,
    ttl_s: float = TTL_S,
) -> None:
    """As far as it goes, and say how far that is."""
    journal = plan_runs(invocation).begin(plan, kind, accept_damage=accept_damage, ttl_s=ttl_s, boots=boots)
    answer_run(invocation, journal)


def answer_run(invocation: Invocation, journal: PlanJournal, *, judged: bool = True) -> None:
    """Print it; fail after that if something has stopped it."""
    whole = plan_document(journal, plan_runs(invocation).operations(journal.head.id))

    def render(out: Console) -> None:
        shown = {key: value for key, value in whole.items() if value is not None and not isinstance(value, list)}
        out.print(pairs(shown))
        out.print()
        rows = [(step["name"], step["state"], step["seconds"], step["text"]) for step in whole["steps"]]
        out.print(table(("STEP", "STATE", "SECONDS", ""), rows))
        for text in whole["waits_for"]:
            out.print(f"it waits: {text} Then `replica-store plan resume {journal.head.id[:12]}`")

    invocation.answer(whole, render)
    if judged and (wrong := plan_verdict(journal)) is not None:
        raise wrong
