"""`replica-store plan`: recovery plans: kept, shown, tried without doing anything.

create FILE.toml      list      show NAME      delete NAME --yes      check NAME
    runs           resume ID              (`failover test|unplanned NAME` begins one)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.terminal.output import table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.cli.plan_runs import answer_run, plan_runs
from replica_store.failover.plan import KINDS, PLAN_BYTES_MAX, Kind, Plan, read_plan
from replica_store.failover.plan_book import forget_plan, keep_plan, read_plans
from replica_store.failover.plan_dry_run import findings
from replica_store.failover.plan_facts import site_facts
from replica_store.failover.report import plan_document
from replica_store.vault.vault import lock_descriptions

if TYPE_CHECKING:
    from rich.console import Console

LOCK_S_MAX = 10.0
STATE_DIRECTORY = "/var/lib/asrfs"


@click.group()
def plan() -> None:
    """Recovery plans: groups of machines in an order, scripts and pauses around them."""


@plan.command()
@click.argument("file", metavar="FILE.toml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a plan of the same name.")
@pass_invocation
def create(invocation: Invocation, file: Path, force: bool) -> None:
    """Check the plan in FILE.toml and keep it."""
    given = read_plan(_read(file), str(file))
    with invocation.open_vault(writable=True) as vault, lock_descriptions(vault.root, seconds_max=LOCK_S_MAX):
        if any(machine.name == given.name for machine in vault.machines()):
            raise RefusedError(f"there is a machine {given.name}: name the plan otherwise, so that both can be meant")
        keep_plan(vault, given, replace=force)
    _answer(invocation, given)


@plan.command("list")
@pass_invocation
def list_plans(invocation: Invocation) -> None:
    """All plans."""
    with invocation.open_vault() as vault:
        kept = read_plans(vault).plans
    documents = [
        {
            "name": each.name,
            "description": each.description,
            "groups": len(each.groups),
            "machines": [machine.name for machine in each.machines()],
        }
        for _, each in sorted(kept.items())
    ]
    rows = [[d["name"], d["groups"], ", ".join(d["machines"]), d["description"]] for d in documents]  # type: ignore[arg-type]
    head = ("PLAN", "GROUPS", "MACHINES", "DESCRIPTION")
    invocation.answer(documents, lambda out: out.print(table(head, rows)))


@plan.command()
@click.argument("name")
@pass_invocation
def show(invocation: Invocation, name: str) -> None:
    """Plan NAME, group by group."""
    with invocation.open_vault() as vault:
        found = read_plans(vault).plan(name)
    _answer(invocation, found)


@plan.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do it; without this only what would be done is said.")
@pass_invocation
def delete(invocation: Invocation, name: str, yes: bool) -> None:
    """Forget plan NAME. What is being carried out by it goes on."""
    with invocation.open_vault(writable=True) as vault, lock_descriptions(vault.root, seconds_max=LOCK_S_MAX):
        found = read_plans(vault).plan(name)
        if not yes:
            raise BadInputError(f"this would forget plan {name} of {len(found.machines())} machines: repeat with --yes")
        forget_plan(vault, name)
    invocation.answer({"name": name, "deleted": True}, lambda out: out.print(f"plan {name} is forgotten"))


@plan.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="test", show_default=True, help="Of the failover to try.")
@click.option(
    "--state", "directory", metavar="DIR", default=STATE_DIRECTORY, help="Where recovered disks would be kept."
)
@pass_invocation
def check(invocation: Invocation, name: str, kind: Kind, directory: str) -> None:
    """Say what would stand in the way of plan NAME, without doing anything. Exit code 4 if it would fail."""
    with invocation.open_vault() as vault:
        found = read_plans(vault).plan(name)
        said = findings(found, kind, site_facts(vault, found, kind, directory))
    document = {"plan": name, "kind": kind, "findings": [each._asdict() for each in said]}

    def render(out: Console) -> None:
        if said:
            out.print(table(("", "WHERE", "WHAT"), [list(each) for each in said]))
        else:
            out.print(f"nothing stands in the way of plan {name}")

    invocation.answer(document, render)
    errors = [each for each in said if each.severity == "error"]
    if errors:
        raise RefusedError(f"plan {name} would fail: {errors[0].where}: {errors[0].text}")


@plan.command()
@click.argument("id")
@pass_invocation
def resume(invocation: Invocation, id: str) -> None:
    """Go on with run ID of a plan: its pause is over, what stopped it is tried again, or it was interrupted."""
    invocation.open_vault().close()
    answer_run(invocation, plan_runs(invocation).resume(id))


@plan.command()
@click.argument("id", required=False)
@pass_invocation
def runs(invocation: Invocation, id: str | None) -> None:
    """Runs of plans, oldest first, or run ID step by step."""
    invocation.open_vault().close()
    found = plan_runs(invocation)
    if id is not None:
        return answer_run(invocation, found.journal(id), judged=False)
    documents = [plan_document(each, found.operations(each.head.id)) for each in found.journals()]
    rows = [[d["id"][:12], d["plan"], d["kind"], d["state"], d["begun"]] for d in documents]
    invocation.answer(documents, lambda out: out.print(table(("ID", "PLAN", "KIND", "STATE", "BEGUN"), rows)))


def _answer(invocation: Invocation, found: Plan) -> None:
    document: dict[str, Any] = msgspec.to_builtins(found)
    before = found.predecessors()
    rows = [
        [
            group.name,
            ", ".join(before[group.name]),
            ", ".join(script.name for script in group.pre),
            ", ".join(machine.name for machine in group.machines),
            ", ".join(script.name for script in group.post),
        ]
        for group in found.groups
    ]
    invocation.answer(document, lambda out: out.print(table(("GROUP", "AFTER", "BEFORE", "MACHINES", "THEN"), rows)))


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(PLAN_BYTES_MAX + 1).decode()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInputError(f"{file} is not a text") from None
