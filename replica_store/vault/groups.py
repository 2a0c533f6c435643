"""Consistency groups as rows of the catalog, and what their members are told of them.

Who is revoked is in no order. The coordinator is a member that the store chose because it was connected
(`choose_coordinator`), written down with the group's generation, so that members know whether they were told the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from asrfs.errors import IntegrityError, NotFoundError
from asrfs.model.configuration import GroupOrder, Member
from asrfs.model.names import is_id, is_name
from asrfs.model.policy import Policy, follow_policy
from replica_store.vault.catalog import Catalog
from replica_store.vault.policies import PolicyBook
from replica_store.vault.rows import MachineRow

GROUPS_MAX = 256


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """`members`: ids of machines in the order they joined; `coordinator`: one of them."""

    id: str
    name: str
    members: tuple[str, ...]
    coordinator: str
    generation: int


class GroupBook(msgspec.Struct, frozen=True, kw_only=True):
    """All groups of a vault, by name."""

    generation: int = 0
    groups: tuple[Group, ...] = ()

    def group(self, name: str) -> Group:
        """Raises NotFoundError."""
        for group in self.groups:
            if group.name == name:
                return group
        raise NotFoundError(f"there is no group {name!r}: see `replica-store group list`")

    def of(self, machine_id: str) -> list[Group]:
        """The groups that a machine belongs to."""
        return [group for group in self.groups if machine_id in group.members]

    def with_group(self, changed: Group) -> GroupBook:
        """This one in the place of its older state, or beside the others."""
        rest = [group for group in self.groups if group.id != changed.id]
        return msgspec.structs.replace(self, groups=tuple(sorted([*rest, changed], key=lambda group: group.name)))

    def without(self, group_id: str) -> GroupBook:
        return msgspec.structs.replace(self, groups=tuple(group for group in self.groups if group.id != group_id))


def read_groups(catalog: Catalog) -> GroupBook:
    """What the catalog says. Raises IntegrityError."""
    rows = catalog.select("SELECT id, name, members, coordinator, generation FROM groups ORDER BY name")
    try:
        groups = tuple(msgspec.convert(fields, Group) for fields in map(_fields, rows))
        book = GroupBook(generation=max((group.generation for group in groups), default=0), groups=groups)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        book = None
    if book is None or not is_sound(book):
        raise IntegrityError(
            f"{catalog.path}: the rows of groups cannot be: make the catalog again with `replica-store rebuild`"
        )
    return book


def write_groups(catalog: Catalog, book: GroupBook) -> None:
    """Put it in the place of what the catalog says. Inside a transaction."""
    catalog.change("DELETE FROM groups")
    for group in book.groups:
        catalog.change(
            "INSERT INTO groups (id, name, members, coordinator, generation) VALUES (?, ?, ?, ?, ?)",
            (group.id, group.name, msgspec.json.encode(group.members).decode(), group.coordinator, group.generation),
        )


def is_sound(book: GroupBook) -> bool:
    """Whether it is such as this program writes, wherever it was found."""
    groups = book.groups
    return (
        len(groups) <= GROUPS_MAX
        and len({group.id for group in groups}) == len({group.name for group in groups}) == len(groups)
        and all(
            is_id(group.id)
            and is_name(group.name)
            and 0 < len(group.members) == len(set(group.members))
            and all(map(is_id, group.members))
            and group.coordinator in group.members
            and 0 <= group.generation < 1 << 62
            for group in groups
        )
    )


def choose_coordinator(group: Group, connected: Collection[str]) -> str:
    """Who shall coordinate: who does, as long as it is connected or nobody is, else the first member that is. Pure."""
    if group.coordinator in connected:
        return group.coordinator
    return next((member for member in group.members if member in connected), group.coordinator)


def orders_of(catalog: Catalog, policies: PolicyBook, machine_id: str) -> tuple[GroupOrder, ...]:
    """The groups of a machine, as it is told of them. Blocks."""
    groups = read_groups(catalog).of(machine_id)
    if not groups:
        return ()
    machines = {machine.id: machine for machine in catalog.machines()}
    places = places_of(catalog)
    orders = (_order(group, policies, machines, places) for group in groups)
    return tuple(order for order in orders if order is not None and machine_id in _ids(order))


def policy_of_group(policies: PolicyBook, group_id: str) -> Policy:
    """Of a group that was assigned none: the default."""
    own = policies.own("group", group_id)
    texts = policies.texts(own) if own is not None else policies.texts("default")
    return follow_policy(texts or {})[0]


def places_of(catalog: Catalog) -> dict[str, tuple[str, int]]:
    """Address and port at which machines can be reached by others of their groups, by id."""
    rows = catalog.select("SELECT machine_id, address, port FROM places")
    return {str(machine_id): (str(address), int(port)) for machine_id, address, port in rows}


def put_place(catalog: Catalog, machine_id: str, address: str, port: int) -> None:
    """Where a machine can be reached; tells the others if that is new. Blocks."""
    if not address.isprintable() or places_of(catalog).get(machine_id) == (address, port):
        return
    with catalog.transaction():
        catalog.change("INSERT OR REPLACE INTO places VALUES (?, ?, ?)", (machine_id, address, port))
        catalog.raise_configuration_generation()


def _order(
    group: Group, policies: PolicyBook, machines: Mapping[str, MachineRow], places: Mapping[str, tuple[str, int]]
) -> GroupOrder | None:
    """None if nobody of the group, or not its coordinator, may connect."""
    members = []
    for machine_id in group.members:
        machine = machines.get(machine_id)
        if machine is not None and not machine.revoked:
            address, port = places.get(machine_id, ("", 0))
            members.append(
                Member(machine_id=machine_id, name=machine.name, address=address, port=port, serial=machine.serial)
            )
    policy = policy_of_group(policies, group.id)
    if group.coordinator not in {member.machine_id for member in members}:
        return None
    return GroupOrder(
        id=group.id,
        name=group.name,
        coordinator=group.coordinator,
        members=tuple(members),
        consistency="crash",
        interval_s=policy.crash_interval_s,
        filesystem_interval_s=policy.filesystem_interval_s,
        application_interval_s=policy.application_interval_s,
        partial=policy.partial_points,
        generation=group.generation,
    )


def _ids(order: GroupOrder) -> set[str]:
    return {member.machine_id for member in order.members}


def _fields(row: tuple[Any, ...]) -> dict[str, Any]:
    group_id, name, members, coordinator, generation = row
    return {
        "id": group_id,
        "name": name,
        "members": msgspec.json.decode(members),
        "coordinator": coordinator,
        "generation": generation,
    }
