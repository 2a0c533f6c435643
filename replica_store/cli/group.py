"""`replica-store group`: machines whose points are cut together.

    create G --member M …      add G M      remove G M      delete G --yes      list      show G

Works while the store serves, too: connected members are told within a second, the others when they connect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from asrfs.errors import BadInputError
from asrfs.terminal.output import pairs, table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.group_changes import add_member, create_group, delete_group, remove_member
from replica_store.vault.groups import Group, places_of, policy_of_group, read_groups
from replica_store.vault.policies import read_book
from replica_store.vault.vault import Vault, lock_descriptions

if TYPE_CHECKING:
    from rich.console import Console

LOCK_S_MAX = 10.0
T = TypeVar("T")


@click.group()
def group() -> None:
    """Consistency groups: machines whose points are cut together."""


@group.command()
@click.argument("name", metavar="G")
@click.option("--member", "members", metavar="M", multiple=True, help="A machine of this vault; once for each.")
@pass_invocation
def create(invocation: Invocation, name: str, members: tuple[str, ...]) -> None:
    """Make group G of machines of this vault. The store chooses which of them coordinates."""
    _answer(invocation, _change(invocation, lambda vault: create_group(vault, name, members)).name)


@group.command()
@click.argument("name", metavar="G")
@click.argument("machine", metavar="M")
@pass_invocation
def add(invocation: Invocation, name: str, machine: str) -> None:
    """Have machine M in group G from now on."""
    _answer(invocation, _change(invocation, lambda vault: add_member(vault, name, machine)).name)


@group.command()
@click.argument("name", metavar="G")
@click.argument("machine", metavar="M")
@pass_invocation
def remove(invocation: Invocation, name: str, machine: str) -> None:
    """Have machine M in group G no more. Points that were cut stay as they are."""
    _answer(invocation, _change(invocation, lambda vault: remove_member(vault, name, machine)).name)


@group.command()
@click.argument("name", metavar="G")
@click.option("--yes", is_flag=True, help="Do it.")
@pass_invocation
def delete(invocation: Invocation, name: str, yes: bool) -> None:
    """Forget group G. Points that were cut stay as they are."""
    if not yes:
        with invocation.open_vault() as vault:
            count = len(read_groups(vault.catalog).group(name).members)
        raise BadInputError(f"group {name} of {count} machines would be forgotten: say --yes to do it")
    _change(invocation, lambda vault: delete_group(vault, name))
    invocation.answer({"deleted": name}, lambda out: out.print(f"group {name} is forgotten"))


@group.command("list")
@pass_invocation
def list_groups(invocation: Invocation) -> None:
    """All groups, with their members."""
    with invocation.open_vault() as vault:
        documents = [_document(vault, each) for each in read_groups(vault.catalog).groups]
    rows = [
        (each["name"], ", ".join(member["name"] for member in each["members"]), each["coordinator"], each["generation"])
        for each in documents
    ]
    invocation.answer(documents, lambda out: out.print(table(("GROUP", "MEMBERS", "COORDINATOR", "GENERATION"), rows)))


@group.command()
@click.argument("name", metavar="G")
@pass_invocation
def show(invocation: Invocation, name: str) -> None:
    """Group G: its members and where they are reached, its coordinator and policy."""
    _answer(invocation, name)


def _change(invocation: Invocation, change: Callable[[Vault], T]) -> T:
    invocation.open_vault().close()  # there is one, and it can be read
    with lock_descriptions(str(invocation.vault), LOCK_S_MAX), invocation.open_vault(writable=True) as vault:
        return change(vault)


def _answer(invocation: Invocation, name: str) -> None:
    with invocation.open_vault() as vault:
        document = _document(vault, read_groups(vault.catalog).group(name))

    def render(out: Console) -> None:
        out.print(pairs({key: value for key, value in document.items() if key != "members"}))
        out.print()
        rows = [(each["name"], each["address"], each["connected"]) for each in document["members"]]
        out.print(table(("MEMBER", "REACHED AT", "CONNECTED"), rows))

    invocation.answer(document, render)


def _document(vault: Vault, group: Group) -> dict[str, Any]:
    """A group as commands print it."""
    names = {row.id: row.name for row in vault.machines()}
    places = places_of(vault.catalog)
    policies = read_book(vault.catalog)
    policy = policy_of_group(policies, group.id)
    members = []
    for member in group.members:
        address, port = places.get(member, ("", 0))
        link = vault.catalog.link(member)
        members.append(
            {
                "id": member,
                "name": names.get(member),
                "address": f"{address}:{port}" if port else None,
                "connected": link is not None and link.connected,
            }
        )
    return {
        "id": group.id,
        "name": group.name,
        "coordinator": names.get(group.coordinator),
        "generation": group.generation,
        "policy": policies.own("group", group.id),
        "interval_seconds": policy.crash_interval_s,
        "filesystem_interval_seconds": policy.filesystem_interval_s,
        "application_interval_seconds": policy.application_interval_s,
        "partial": policy.partial_points,
        "members": members,
    }
