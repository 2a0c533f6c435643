"""`replica-store policy`: what machines are told to do, and which machine is told what.

    set NAME key=value …      assign NAME MACHINE|GROUP      unassign MACHINE|GROUP      show [NAME]      delete NAME

Works while the store serves, too: connected hosts are told within a second, the others when they connect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from asrfs.errors import NotFoundError
from asrfs.model.policy import texts_in_force
from asrfs.terminal.output import table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.configuration import policy_of
from replica_store.vault.groups import read_groups
from replica_store.vault.policies import PolicyBook, TargetKind, read_book
from replica_store.vault.policy_changes import assign, check_exists, delete_policy, set_policy
from replica_store.vault.vault import Vault, lock_descriptions

if TYPE_CHECKING:
    from rich.console import Console

LOCK_S_MAX = 10.0


@click.group()
def policy() -> None:
    """What machines are told to do: intervals of points, retention, limits, alarms."""


@policy.command("set")
@click.argument("name", metavar="NAME")
@click.argument("assignments", metavar="KEY=VALUE...", nargs=-1, required=True)
@pass_invocation
def set_keys(invocation: Invocation, name: str, assignments: tuple[str, ...]) -> None:
    """Set keys of policy NAME, which is made if there is none. KEY=default takes one back.

    \b
    crash_interval        1s to 24h                      crash-consistent points (300s)
    filesystem_interval   1s up to retention, 0 for none filesystem-consistent points (0)
    application_interval  1s up to retention, 0 for none application-consistent points (4h)
    retention             up to 365d, or a grid such as  how long points are kept (24h)
                          24h,7d/1h,30d/1d
    rpo_warning, rpo_critical                            alarms of the achieved RPO (15m, 60m)
    resync_window         18:30-06:00 or always          when resync may run (18:30-06:00)
    bandwidth_limit       none, 20M, or                  bytes per second of shipping (none)
                          "08:00-18:00 20M; else 200M"
    on_failure            crash or none                  instead of a point that failed (crash)
    point_alarm           1s to 30d                      alarm when no point has appeared (60m)
    partial_points        yes or no                      group points without all members (no)
    """
    given, wrong = _given(assignments)
    book = _change(invocation, lambda vault: set_policy(vault, name, given, wrong))
    _show_one(invocation, book, name)


@policy.command("assign")
@click.argument("name", metavar="NAME")
@click.argument("target", metavar="MACHINE|GROUP")
@pass_invocation
def assign_policy(invocation: Invocation, name: str, target: str) -> None:
    """Give a machine, or all machines of a group, policy NAME. A machine's own wins over its groups'."""
    book = _change(invocation, lambda vault: assign(vault, name, *_target(vault, target)))
    _show_one(invocation, book, name)


@policy.command()
@click.argument("target", metavar="MACHINE|GROUP")
@pass_invocation
def unassign(invocation: Invocation, target: str) -> None:
    """Take a machine's or group's own policy away: it has its groups', or `default`, again."""
    book = _change(invocation, lambda vault: assign(vault, None, *_target(vault, target)))
    _show_all(invocation, book)


@policy.command()
@click.argument("name", metavar="NAME")
@pass_invocation
def delete(invocation: Invocation, name: str) -> None:
    """Forget policy NAME, if nobody has it. `default` goes back to its defaults."""
    _show_all(invocation, _change(invocation, lambda vault: delete_policy(vault, name)))


@policy.command()
@click.argument("name", metavar="[NAME]", required=False)
@pass_invocation
def show(invocation: Invocation, name: str | None) -> None:
    """Every key of policy NAME and which machines have it; without NAME all policies."""
    with invocation.open_vault() as vault:
        book = read_book(vault.catalog)
    if name is None:
        _show_all(invocation, book)
    else:
        check_exists(book, name)
        _show_one(invocation, book, name)


def _given(words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Keys and values of the command line, and what of it is neither."""
    given: dict[str, str] = {}
    errors = []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            errors.append(f"{word[:60]!r} is not KEY=VALUE, such as crash_interval=60s")
            continue
        if key in given:
            errors.append(f"{key} is given twice: say it once")
        given[key] = text
    return given, errors


def _change(invocation: Invocation, change: Callable[[Vault], PolicyBook]) -> PolicyBook:
    invocation.open_vault().close()  # there is one, and it can be read
    with lock_descriptions(str(invocation.vault), LOCK_S_MAX), invocation.open_vault(writable=True) as vault:
        return change(vault)


def _target(vault: Vault, name: str) -> tuple[TargetKind, str]:
    """What a policy is given to."""
    try:
        return "machine", vault.machine(name).id
    except NotFoundError:
        for group in read_groups(vault.catalog).groups:
            if group.name == name:
                return "group", group.id
        raise NotFoundError(
            f"the store knows no machine and no group {name!r}: see `replica-store machine list`"
        ) from None


def _documents(vault: Vault, book: PolicyBook) -> list[dict[str, Any]]:
    """Each policy as commands print it."""
    names = {row.id: row.name for row in vault.machines()}
    names |= {group.id: group.name for group in read_groups(vault.catalog).groups}
    holds = {row.name: policy_of(vault.catalog, book, row.id) for row in vault.machines()}
    return [
        {
            "name": name,
            "keys": texts_in_force(book.texts(name) or {}),
            "set": book.texts(name) or {},
            "assigned": [
                {"kind": each.kind, "id": each.target_id, "name": names.get(each.target_id)}
                for each in book.assignments
                if each.policy == name
            ],
            "machines": [
                {"machine": machine, "by": held.by} for machine, held in sorted(holds.items()) if held.policy == name
            ],
        }
        for name in book.names()
    ]


def _show_one(invocation: Invocation, book: PolicyBook, name: str) -> None:
    with invocation.open_vault() as vault:
        document = next(each for each in _documents(vault, book) if each["name"] == name)
    rows = [(key, text, "set" if key in document["set"] else "default") for key, text in document["keys"].items()]

    def render(out: Console) -> None:
        out.print(table(("KEY", "VALUE", "FROM"), rows))
        out.print()
        given = [(each["kind"], each["name"] or each["id"]) for each in document["assigned"]]
        out.print(table(("GIVEN TO", "NAME"), given))
        out.print()
        out.print(table(("MACHINE", "HAS IT BY"), [(each["machine"], each["by"]) for each in document["machines"]]))

    invocation.answer(document, render)


def _show_all(invocation: Invocation, book: PolicyBook) -> None:
    with invocation.open_vault() as vault:
        documents = _documents(vault, book)
    rows = [
        (
            each["name"],
            ", ".join(f"{key}={text}" for key, text in each["set"].items()) or "all at their defaults",
            ", ".join(f"{held['machine']} ({held['by']})" for held in each["machines"]),
        )
        for each in documents
    ]
    invocation.answer(documents, lambda out: out.print(table(("POLICY", "SETS", "MACHINES"), rows)))
