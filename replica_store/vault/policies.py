"""Policies and who has which, as rows of the catalog. What the keys mean is `asrfs.model.policy`'s.

A machine's own assignment wins over one of a group it is in, of several groups' the first by name; without any it has
the policy `default`, which is there even if nobody ever set it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from asrfs.errors import IntegrityError
from asrfs.model.configuration import POLICY_DEFAULT
from asrfs.model.names import is_id, is_name
from replica_store.vault.catalog import Catalog

TargetKind = Literal["machine", "group"]


class Assignment(msgspec.Struct, frozen=True):
    """A machine or group, by its id, that has a policy of its own."""

    kind: TargetKind
    target_id: str
    policy: str


class PolicyBook(msgspec.Struct, frozen=True, kw_only=True):
    """All policies by name, each as the texts that were written, and all assignments."""

    generation: int = 0
    policies: dict[str, dict[str, str]] = {}
    assignments: tuple[Assignment, ...] = ()

    def texts(self, name: str) -> dict[str, str] | None:
        """What a policy sets; None if there is none of that name."""
        return self.policies.get(name, {} if name == POLICY_DEFAULT else None)

    def names(self) -> list[str]:
        """Of all there are, `default` first."""
        return [POLICY_DEFAULT, *sorted(self.policies.keys() - {POLICY_DEFAULT})]

    def own(self, kind: TargetKind, target_id: str) -> str | None:
        """The policy this very machine or group was assigned."""
        for each in self.assignments:
            if (each.kind, each.target_id) == (kind, target_id):
                return each.policy
        return None


@dataclass(frozen=True, slots=True)
class Assigned:
    """The policy of a machine, and by what it has it: `machine`, `group NAME` or `default`."""

    policy: str
    by: str


def assigned(book: PolicyBook, machine_id: str, groups: Mapping[str, str]) -> Assigned:
    """The policy that holds for a machine. `groups`: those it is in, ids by name. Pure."""
    own = book.own("machine", machine_id)
    if own is not None:
        return Assigned(own, "machine")
    for name in sorted(groups):
        policy = book.own("group", groups[name])
        if policy is not None:
            return Assigned(policy, f"group {name}")
    return Assigned(POLICY_DEFAULT, "default")


def read_book(catalog: Catalog) -> PolicyBook:
    """What the catalog says. Raises IntegrityError."""
    generation = catalog.configuration_generation()
    rows = catalog.select("SELECT name, keys FROM policies ORDER BY name")
    targets = catalog.select("SELECT kind, target_id, policy FROM assignments ORDER BY kind, target_id")
    try:
        book = PolicyBook(
            generation=generation,
            policies={name: msgspec.json.decode(text, type=dict[str, str]) for name, text in rows},
            assignments=tuple(msgspec.convert(row, type=Assignment) for row in map(_assignment, targets)),
        )
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        book = None
    if book is None or not is_sound(book):
        raise IntegrityError(
            f"{catalog.path}: the rows of policies cannot be: make the catalog again with `replica-store rebuild`"
        )
    return book


def is_sound(book: PolicyBook) -> bool:
    """Whether it is such as this program writes, wherever it was found."""
    return (
        book.generation >= 0
        and all(map(is_name, book.policies))
        and all(is_id(each.target_id) and book.texts(each.policy) is not None for each in book.assignments)
    )


def write_book(catalog: Catalog, book: PolicyBook) -> None:
    """Put it in the place of what the catalog says. Inside a transaction."""
    catalog.change("DELETE FROM policies")
    catalog.change("DELETE FROM assignments")
    for name, texts in sorted(book.policies.items()):
        catalog.change("INSERT INTO policies (name, keys) VALUES (?, ?)", (name, msgspec.json.encode(texts).decode()))
    for each in book.assignments:
        catalog.change(
            "INSERT INTO assignments (kind, target_id, policy) VALUES (?, ?, ?)",
            (each.kind, each.target_id, each.policy),
        )


def _assignment(row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("kind", "target_id", "policy"), row, strict=True))
