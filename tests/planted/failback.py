"""Bugs of coming home: whose home it is, whose policy holds, and what is not handed over after all."""

from __future__ import annotations

import msgspec
import pytest

from asrfs.model.arrival import Arrival
from asrfs.model.configuration import POLICY_DEFAULT
from replica_store.cli import failing_over
from replica_store.failover import actions, choice, plan_runs
from replica_store.vault import arrivals
from replica_store.vault.books import Shelf
from replica_store.vault.policies import Assignment, PolicyBook
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault
from tests.planted import Plant

_ARRIVALS = "tests/t1_unit/test_arrivals.py::"
_FAILBACK = "tests/t4_sim/test_failback.py::"


def anybody_comes_home(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choice, "check_away", lambda vault, machine: None)


def always_away(patch: pytest.MonkeyPatch) -> None:
    """Who comes home is said to be away still."""
    sound = arrivals.departure_of

    def departure_of(vault: Vault, machine: MachineRow) -> Arrival:
        return msgspec.structs.replace(sound(vault, machine), away=True)

    patch.setattr("tests.t1_unit.test_arrivals.departure_of", departure_of)


def policy_stays_behind(patch: pytest.MonkeyPatch) -> None:
    """The other direction has whatever holds there."""
    patch.setattr(arrivals, "_may_follow", lambda present, before: False)


def persons_are_overruled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(arrivals, "_may_follow", lambda present, before: True)


def owner_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Whoever sends a machine on says that its policy is its own."""
    sound = arrivals.departure_of

    def departure_of(vault: Vault, machine: MachineRow) -> Arrival:
        return msgspec.structs.replace(sound(vault, machine), owner=vault.id)

    patch.setattr("tests.t1_unit.test_arrivals.departure_of", departure_of)


def policy_of_others_is_written_over(patch: pytest.MonkeyPatch) -> None:
    def followed(
        book: PolicyBook, machine: MachineRow, kept: arrivals.KeptArrival, before: arrivals.KeptArrival | None
    ) -> tuple[PolicyBook, arrivals.KeptArrival]:
        name = kept.arrival.policy
        assert name != POLICY_DEFAULT
        others = [each for each in book.assignments if each.target_id != machine.id]
        policies = book.policies | {name: dict(kept.arrival.keys)}
        made = (*others, Assignment("machine", machine.id, name))
        after = msgspec.structs.replace(book, policies=policies, assignments=made)
        return after, msgspec.structs.replace(kept, assigned=name, is_made=True)

    patch.setattr(arrivals, "followed", followed)


def arrival_in_memory(patch: pytest.MonkeyPatch) -> None:
    """Nothing of it is kept."""
    sound = Shelf.put

    def put(self: Shelf[arrivals.KeptArrival], objects: object, sealer: object, book: arrivals.KeptArrival) -> None:
        if not isinstance(book, arrivals.KeptArrival):
            sound(self, objects, sealer, book)  # type: ignore[arg-type]

    patch.setattr(Shelf, "put", put)


def unchecked_arrival(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(arrivals, "check_arrival", lambda arrival: arrival)


def failback_without_a_handover(patch: pytest.MonkeyPatch) -> None:
    """It goes on from what is here, while the machine there goes on, too."""
    patch.setattr(actions, "HANDED_OVER", ("planned",))


def plans_take_their_own_points(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan_runs, "selector_for", lambda plan, machine, kind: machine.point or plan.point)


def committed_whatever_it_is(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(failing_over, "verdict", lambda found: None)


PLANTS = tuple(
    Plant(name, text, level, 1, apply, shows)
    for name, text, level, apply, shows in (
        (
            "failback-from-home",
            "a machine that is at home is failed back",
            f"{_FAILBACK}test_only_a_machine_that_is_away_comes_home",
            anybody_comes_home,
            "DID NOT RAISE",
        ),
        (
            "failback-always-away",
            "a machine that came home counts as away",
            f"{_ARRIVALS}test_the_policy_holds_in_the_other_direction_and_again_when_it_is_back",
            always_away,
            "assert",
        ),
        (
            "failback-policy-stays",
            "the policy does not go with the machine",
            f"{_ARRIVALS}test_the_policy_holds_in_the_other_direction_and_again_when_it_is_back",
            policy_stays_behind,
            "assert",
        ),
        (
            "failback-person-overruled",
            "a policy that a person assigned is replaced by the one that comes along",
            f"{_ARRIVALS}test_what_a_person_decided_is_kept",
            persons_are_overruled,
            "assert",
        ),
        (
            "failback-owner-forgotten",
            "the first store follows the copy of its own policy",
            f"{_ARRIVALS}test_the_policy_holds_in_the_other_direction_and_again_when_it_is_back",
            owner_is_forgotten,
            "assert",
        ),
        (
            "failback-policy-written-over",
            "another policy of that name is changed",
            f"{_ARRIVALS}test_a_policy_of_the_same_name_is_not_changed",
            policy_of_others_is_written_over,
            "assert",
        ),
        (
            "failback-arrival-in-memory",
            "where a machine came from is not kept",
            f"{_ARRIVALS}test_it_is_all_there_after_the_catalog_was_lost",
            arrival_in_memory,
            "assert|runs at home",
        ),
        (
            "failback-arrival-unchecked",
            "whatever is said of a machine is taken for true",
            f"{_ARRIVALS}test_what_no_store_says_is_refused_and_the_token_is_good_still",
            unchecked_arrival,
            "DID NOT RAISE|AssertionError|Error",
        ),
        (
            "failback-without-handover",
            "a failback does not ask the host",
            f"{_FAILBACK}test_it_comes_home_and_nothing_is_lost",
            failback_without_a_handover,
            "assert",
        ),
        (
            "failback-plan-points",
            "a plan that is handed over takes older points",
            f"{_FAILBACK}test_a_plan_is_handed_over",
            plans_take_their_own_points,
            "assert|BadInputError",
        ),
        (
            "failback-commits-anything",
            "--commit commits a machine whose check failed",
            f"{_FAILBACK}test_what_is_not_good_is_not_committed_at_once",
            committed_whatever_it_is,
            "assert",
        ),
    )
)
