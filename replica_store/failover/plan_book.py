"""The recovery plans that a vault keeps: one sealed object that has all of them, read as it is.

No catalog has them, so a rebuild loses none. Whoever changes them holds the vault's `lock_descriptions`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from asrfs.errors import AsrfsError, BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.model.names import check_name
from replica_store.failover.plan import Plan, check_plan
from replica_store.vault.books import Shelf
from replica_store.vault.vault import Vault

PLANS_MAX = 1000


class PlanBook(msgspec.Struct, frozen=True, kw_only=True):
    """Plans by name. `generation` counts changes."""

    generation: int = 0
    plans: dict[str, Plan] = {}

    def plan(self, name: str) -> Plan:
        """Raises NotFoundError."""
        if (found := self.plans.get(check_name(name, "plan"))) is None:
            raise NotFoundError(f"there is no plan {name!r}: see `replica-store plan list`")
        return found


def _is_sound(book: PlanBook) -> bool:
    try:
        for plan in book.plans.values():
            check_plan(plan)
    except AsrfsError:
        return False
    return (
        0 <= book.generation < 1 << 62
        and len(book.plans) <= PLANS_MAX
        and all(name == plan.name for name, plan in book.plans.items())
    )


PLAN_BOOKS = Shelf("plans/book-", b"asrfs plans 1", "plans", PlanBook, _is_sound)


def read_plans(vault: Vault) -> PlanBook:
    """Raises IntegrityError if there are plans and none of their objects can be read."""
    book, damages = PLAN_BOOKS.newest(vault.objects, vault.sealer)
    if book is None and damages:
        raise IntegrityError(damages[0])
    return book or PlanBook()


def keep_plan(vault: Vault, plan: Plan, *, replace: bool) -> PlanBook:
    """Raises RefusedError if there is one of that name and it is not to be replaced."""

    def change(plans: dict[str, Plan]) -> dict[str, Plan]:
        if plan.name in plans and plans[plan.name] != plan and not replace:
            raise RefusedError(
                f"there is a plan {plan.name} already: replace it with --force, or name this one otherwise"
            )
        if len(plans) >= PLANS_MAX:
            raise BadInputError(f"a vault keeps at most {PLANS_MAX} plans")
        return plans | {plan.name: plan}

    return _change(vault, change)


def forget_plan(vault: Vault, name: str) -> PlanBook:
    """Raises NotFoundError."""
    read_plans(vault).plan(name)
    return _change(vault, lambda plans: {each: plan for each, plan in plans.items() if each != name})


def _change(vault: Vault, change: Callable[[dict[str, Plan]], dict[str, Plan]]) -> PlanBook:
    before = read_plans(vault)
    plans = change(before.plans)
    if plans == before.plans:
        return before
    after = PlanBook(generation=before.generation + 1, plans=plans)
    PLAN_BOOKS.put(vault.objects, vault.sealer, after)
    PLAN_BOOKS.remove_old(vault.objects, vault.sealer)
    return after
