"""Changing groups: in one transaction the book's object, the catalog's rows, the number that hosts are told by.

A group's generation rises with each change of its members or coordinator, above every generation that was ever given
out.

The caller of what changes holds `lock_descriptions`, which `rebuild` holds, too.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence

import msgspec

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.configuration import GROUPS_MAX as GROUPS_OF_A_MACHINE_MAX
from asrfs.model.configuration import MEMBERS_MAX
from asrfs.model.names import check_name
from replica_store.vault.books import Shelf
from replica_store.vault.groups import (
    GROUPS_MAX,
    Group,
    GroupBook,
    choose_coordinator,
    is_sound,
    read_groups,
    write_groups,
)
from replica_store.vault.policies import read_book
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault

GROUP_BOOKS = Shelf("groups/book-", b"asrfs groups 1", "groups", GroupBook, is_sound)


def create_group(vault: Vault, name: str, machines: Sequence[str]) -> Group:
    """A new group of these machines, by name. Raises BadInputError, NotFoundError, RefusedError; then there is none."""
    check_name(name, "group")
    if not machines:
        raise BadInputError(f"group {name} would have no member: name them with --member")
    if len(set(machines)) < len(machines):
        raise BadInputError(f"a machine is named twice as a member of group {name}")
    if len(machines) > MEMBERS_MAX:
        raise BadInputError(f"a group has at most {MEMBERS_MAX} members")
    rows = [_member(vault, machine) for machine in machines]

    def change(book: GroupBook, generation: int) -> GroupBook:
        if any(group.name == name for group in book.groups):
            raise RefusedError(f"there is a group {name} already")
        if any(row.name == name for row in vault.machines()):
            raise RefusedError(f"there is a machine {name}: a group needs another name")
        if len(book.groups) >= GROUPS_MAX:
            raise RefusedError(f"a vault has at most {GROUPS_MAX} groups")
        for row in rows:
            _check_room(book, row)
        members = tuple(row.id for row in rows)
        return book.with_group(
            Group(
                id=secrets.token_hex(16),
                name=name,
                members=members,
                coordinator=_connected_first(vault, members),
                generation=generation,
            )
        )

    return _change(vault, change).group(name)


def add_member(vault: Vault, name: str, machine: str) -> Group:
    """Raises NotFoundError, RefusedError."""
    row = _member(vault, machine)

    def change(book: GroupBook, generation: int) -> GroupBook:
        group = book.group(name)
        if row.id in group.members:
            raise RefusedError(f"machine {machine} is a member of group {name} already")
        if len(group.members) >= MEMBERS_MAX:
            raise RefusedError(f"a group has at most {MEMBERS_MAX} members")
        _check_room(book, row)
        return book.with_group(msgspec.structs.replace(group, members=(*group.members, row.id), generation=generation))

    return _change(vault, change).group(name)


def remove_member(vault: Vault, name: str, machine: str) -> Group:
    """Raises NotFoundError; RefusedError for the last member."""
    row = vault.machine(machine)

    def change(book: GroupBook, generation: int) -> GroupBook:
        group = book.group(name)
        if row.id not in group.members:
            raise NotFoundError(f"machine {machine} is not a member of group {name}")
        members = tuple(member for member in group.members if member != row.id)
        if not members:
            raise RefusedError(f"machine {machine} is the last member: `replica-store group delete {name} --yes`")
        coordinator = group.coordinator if group.coordinator in members else _connected_first(vault, members)
        return book.with_group(
            msgspec.structs.replace(group, members=members, coordinator=coordinator, generation=generation)
        )

    return _change(vault, change).group(name)


def delete_group(vault: Vault, name: str) -> None:
    """Its points stay. Raises NotFoundError, RefusedError while it has a policy of its own."""

    def change(book: GroupBook, _generation: int) -> GroupBook:
        group = book.group(name)
        if read_book(vault.catalog).own("group", group.id) is not None:
            raise RefusedError(f"group {name} has a policy: `replica-store policy unassign {name}` first")
        return book.without(group.id)

    _change(vault, change)


def lacks_coordinator(vault: Vault, connected: Collection[str]) -> bool:
    """Whether `choose_coordinators` would change anything. Blocks."""
    groups = read_groups(vault.catalog).groups
    return any(choose_coordinator(group, connected) != group.coordinator for group in groups)


def choose_coordinators(vault: Vault, connected: Collection[str]) -> list[Group]:
    """Have every group coordinated by a member that is connected, where one is. The groups that were changed."""
    if not lacks_coordinator(vault, connected):
        return []
    changed: list[Group] = []

    def change(book: GroupBook, generation: int) -> GroupBook:
        for group in book.groups:
            coordinator = choose_coordinator(group, connected)
            if coordinator != group.coordinator:
                changed.append(msgspec.structs.replace(group, coordinator=coordinator, generation=generation))
                book = book.with_group(changed[-1])
        return book

    _change(vault, change)
    return changed


def _change(vault: Vault, change: Callable[[GroupBook, int], GroupBook]) -> GroupBook:
    with vault.catalog.transaction():
        before = read_groups(vault.catalog)
        newest, _ = GROUP_BOOKS.newest(vault.objects, vault.sealer)
        generation = max(
            vault.catalog.configuration_generation(), before.generation, newest.generation if newest else 0
        )
        after = change(before, generation + 1)
        if after == before:
            return before
        vault.catalog.raise_configuration_generation(least=generation)
        after = msgspec.structs.replace(after, generation=generation + 1)
        GROUP_BOOKS.put(vault.objects, vault.sealer, after)
        write_groups(vault.catalog, after)
    GROUP_BOOKS.remove_old(vault.objects, vault.sealer)
    return after


def _member(vault: Vault, machine: str) -> MachineRow:
    """A machine of this vault that may be a member."""
    row = vault.machine(machine)
    if row.revoked:
        raise RefusedError(f"the certificate of machine {machine} is revoked: enrol it again first")
    return row


def _check_room(book: GroupBook, row: MachineRow) -> None:
    if len(book.of(row.id)) >= GROUPS_OF_A_MACHINE_MAX:
        raise RefusedError(f"machine {row.name} belongs to {GROUPS_OF_A_MACHINE_MAX} groups, which is the most")


def _connected_first(vault: Vault, members: Sequence[str]) -> str:
    """The first that was connected when the store last wrote that down, else the first."""
    for member in members:
        link = vault.catalog.link(member)
        if link is not None and link.connected:
            return member
    return members[0]
