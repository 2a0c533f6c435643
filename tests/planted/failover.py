"""Bugs of failover: said before it is so, known to the catalog alone, believed unsealed, a test taken for earnest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest

from replica_store.failover import actions, places, processes
from replica_store.ingest import session
from replica_store.vault import operations as operations_room
from replica_store.vault import protection, returning
from replica_store.vault.books import Shelf
from replica_store.vault.catalog import Catalog
from replica_store.vault.operations import ENDED, Operation
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault
from tests.planted import Plant

_OPERATIONS = "tests/t1_unit/test_operations.py::"
_RETURN = "tests/t4_sim/test_return.py::"
_ACTIONS = "tests/t4_sim/test_failover_actions.py::"


def commit_without_a_new_epoch(patch: pytest.MonkeyPatch) -> None:
    def keep(vault: Vault, machine_id: str) -> int:
        row = vault.catalog.machine_by_id(machine_id)
        return row.epoch if row else 0

    patch.setattr(actions, "raise_epoch", keep)


def no_object_of_a_failover(patch: pytest.MonkeyPatch) -> None:
    sound = Shelf.put

    def put(self: Shelf[Operation], objects: object, sealer: object, book: Operation) -> None:
        if not isinstance(book, Operation):
            sound(self, objects, sealer, book)  # type: ignore[arg-type]

    patch.setattr(Shelf, "put", put)
    patch.setattr(Shelf, "of_generation", lambda self, objects, sealer, generation: None)
    patch.setattr(
        operations_room, "sealed_operation", lambda vault, text: operations_room.operation(vault.catalog, text)
    )


def the_row_is_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        operations_room, "sealed_operation", lambda vault, text: operations_room.operation(vault.catalog, text)
    )


def a_test_holds_its_machine(patch: pytest.MonkeyPatch) -> None:
    def holder(found: Iterable[Operation]) -> Operation | None:
        return next((each for each in reversed(list(found)) if each.state not in ENDED), None)

    patch.setattr(protection, "holder", holder)


def cancel_after_a_commit_began(patch: pytest.MonkeyPatch) -> None:
    """What the commit has begun is not written down."""
    sound = actions.change

    def change(root: str, operation_id: str, make: object) -> Operation:
        def without(vault: Vault, before: Operation) -> Operation:
            after: Operation = make(vault, before)  # type: ignore[operator]
            return before if after.epoch is not None and after.state == "commit-pending" else after

        return sound(root, operation_id, without)

    patch.setattr(actions, "change", change)


def any_side_may_come_back(patch: pytest.MonkeyPatch) -> None:
    """A new certificate is enough, whatever epoch it comes with."""
    sound = returning.check_side

    def check_side(catalog: Catalog, machine: MachineRow, epoch: int) -> Operation | None:
        return sound(catalog, machine, 1 << 30)

    patch.setattr(session, "check_side", check_side)


def the_old_certificate_may_come_back(patch: pytest.MonkeyPatch) -> None:
    """An epoch above the commit's is enough, which anybody can say."""
    sound = returning.check_side

    def check_side(catalog: Catalog, machine: MachineRow, epoch: int) -> Operation | None:
        return sound(catalog, replace(machine, serial="new"), epoch)

    patch.setattr(session, "check_side", check_side)


def tokens_of_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def close_side(vault: Vault, found: Operation) -> Operation:
        return msgspec.structs.replace(found, closed_serial=vault.machine(found.machine).serial)

    patch.setattr(actions, "close_side", close_side)


def what_came_back_is_swept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(actions, "ENDED", (*ENDED, "returned"))


def the_lock_goes_first(patch: pytest.MonkeyPatch) -> None:
    sound = places.empty

    def empty(directory: str, spared: str | None = None) -> None:
        if spared is not None:
            os.unlink(os.path.join(directory, spared))
        sound(directory)

    patch.setattr(places, "empty", empty)


def scripts_side_by_side(patch: pytest.MonkeyPatch) -> None:
    nobody = SimpleNamespace(end=lambda mark, part: None, MARK=processes.MARK)
    patch.setattr("replica_store.failover.plan_script.processes", nobody)  # who tidies up behind the test ends them


PLANTS = tuple(
    Plant(name, text, level, 1, apply, shows)
    for name, text, level, apply, shows in (
        (
            "commit-without-epoch",
            "commit leaves the epoch as it is",
            f"{_ACTIONS}test_i6_a_commit_has_raised_the_epoch_before_it_is_one",
            commit_without_a_new_epoch,
            "assert",
        ),
        (
            "failover-in-the-catalog-alone",
            "failovers have no object, so a rebuilt catalog has forgotten them",
            f"{_OPERATIONS}test_an_operation_is_there_after_its_catalog_was_lost",
            no_object_of_a_failover,
            "assert",
        ),
        (
            "failover-row-believed",
            "what is unmounted and removed is taken from a row that nobody sealed",
            f"{_OPERATIONS}test_nobody_acts_on_a_row_that_was_never_sealed",
            the_row_is_believed,
            "srv/two|DID NOT RAISE",
        ),
        (
            "test-holds-its-machine",
            "a test failover makes its machine failed-over",
            f"{_OPERATIONS}test_a_failover_holds_its_machine_and_a_test_does_not",
            a_test_holds_its_machine,
            "FAILED_OVER|failed-over",
        ),
        (
            "lock-goes-first",
            "two take one failover away at a time",
            "tests/t4_sim/test_failover_places.py::test_nobody_else_works_on_it_before_all_of_it_is_gone",
            the_lock_goes_first,
            "DID NOT RAISE",
        ),
        (
            "scripts-side-by-side",
            "a script of a plan runs beside the one that a killed command had begun",
            "tests/t4_sim/test_plan_scripts.py::test_what_a_killed_command_left_is_ended_before_it_is_begun_again",
            scripts_side_by_side,
            "gone",
        ),
        (
            "stale-side-returns",
            "a token of after the commit lets in the side that was left behind",
            f"{_RETURN}test_i6_and_i7_the_side_that_went_on_comes_back_and_the_other_never_does",
            any_side_may_come_back,
            "assert",
        ),
        (
            "old-certificate-returns",
            "whoever says a high epoch comes back",
            f"{_RETURN}test_i6_and_i7_the_side_that_went_on_comes_back_and_the_other_never_does",
            the_old_certificate_may_come_back,
            "assert",
        ),
        (
            "tokens-outlive-commit",
            "a token of before the commit is good after it",
            f"{_RETURN}test_a_token_of_before_the_commit_is_no_proof_of_intent",
            tokens_of_before_the_commit,
            "certificate request cannot be read",
        ),
        (
            "returned-is-swept",
            "what a machine that came back left where it ran is taken away by whoever comes next",
            "tests/t4_sim/test_reprotect.py::test_i7_what_it_left_is_removed_by_a_person_and_only_if_nothing_is_lost",
            what_came_back_is_swept,
            "assert",
        ),
        (
            "commit-begun-unknown",
            "that a commit has begun is not written down, so it can be cancelled half done",
            f"{_ACTIONS}test_i6_a_commit_has_raised_the_epoch_before_it_is_one",
            cancel_after_a_commit_began,
            "assert|DID NOT RAISE",
        ),
    )
)
