"""Bugs around points for which something is quieted: what stays frozen, claims that are not so, hooks of anybody."""

from __future__ import annotations

import errno

import pytest

from asrfs.consistency import hooks
from asrfs.consistency.freezing import FrozenTogether
from asrfs.consistency.hook_sequence import HookSequence
from asrfs.consistency.procedure import Procedure
from asrfs.consistency.watchdog import Watchdog
from asrfs.model import marker
from replica_store.vault import catalog
from tests.planted import Plant

_PROCEDURE = "tests/t1_unit/test_point_procedure.py"
_WATCHDOG = "tests/t1_unit/test_frozen_filesystems.py"


def missing_thaw(patch: pytest.MonkeyPatch) -> None:
    """What was frozen before the one that could not be stays frozen."""
    sound = FrozenTogether.freeze

    def freeze(self: FrozenTogether, deadline: float) -> None:
        patch.setattr(FrozenTogether, "thaw", lambda self: None)
        sound(self, deadline)

    patch.setattr(FrozenTogether, "freeze", freeze)


def thaw_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """Whether it was frozen until we thawed it is nobody's question."""
    sound = FrozenTogether.thaw

    def thaw(self: FrozenTogether) -> None:
        sound(self)

    patch.setattr(FrozenTogether, "thaw", thaw)


def marker_after_the_deadline(patch: pytest.MonkeyPatch) -> None:
    """A marker may be appended at any time."""
    sound = Procedure._mark_quiesced

    def mark(self: Procedure) -> tuple[int | None, int | None]:
        deadline, self._deadline = self._deadline, None
        try:
            return sound(self)
        finally:
            self._deadline = deadline

    patch.setattr(Procedure, "_mark_quiesced", mark)


def frozen_in_any_order(patch: pytest.MonkeyPatch) -> None:
    """What others lie on is frozen first, and their freeze never ends."""
    sound = FrozenTogether.freeze

    def freeze(self: FrozenTogether, deadline: float) -> None:
        for each in self._filesystems:
            each.level = -each.level
        sound(self, deadline)

    patch.setattr(FrozenTogether, "freeze", freeze)


def watchdog_ends_with_its_master(patch: pytest.MonkeyPatch) -> None:
    """It thaws once when who freezes has died, not what was under way."""

    def once(self: Watchdog) -> None:
        self._thaw()
        self._wait_for_threads()

    patch.setattr(Watchdog, "_thaw_after_a_death", once)


def watchdog_without_a_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Watchdog, "_is_time", lambda self: False)
    patch.setattr(Watchdog, "_patience", lambda self: None)


def no_post_hooks_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    sound = HookSequence.end

    def end(self: HookSequence, failed: str | None) -> list[str]:
        return [] if failed else sound(self, failed)

    patch.setattr(HookSequence, "end", end)


def hooks_of_anybody(patch: pytest.MonkeyPatch) -> None:
    """A hook may be written by others."""
    patch.setattr(hooks, "check_nobody_else_writes", lambda path: None)


def last_word_for_any_point(patch: pytest.MonkeyPatch) -> None:
    """Whoever breaks into a host later can change what its points say."""

    def completed(said: marker.MarkerRecord, word: marker.MarkerRecord) -> marker.MarkerRecord:
        return word

    patch.setattr(catalog, "completed", completed)


def frozen_by_somebody_else_is_ours(patch: pytest.MonkeyPatch) -> None:
    sound = FrozenTogether._tried_freeze

    def tried(self: FrozenTogether, each: object) -> OSError | None:
        error = sound(self, each)  # type: ignore[arg-type]
        return None if error is not None and error.errno == errno.EBUSY else error

    patch.setattr(FrozenTogether, "_tried_freeze", tried)


PLANTS: tuple[Plant, ...] = (
    Plant(
        "missing-thaw",
        "what was frozen before a failure stays frozen",
        f"{_PROCEDURE}::test_a_freeze_that_fails_on_the_second_of_three_thaws_the_first",
        1,
        missing_thaw,
        "is let go while something is frozen|missing thaw|thaw fs0",
    ),
    Plant(
        "thaw-not-looked-at",
        "nobody notices that it was thawed too early",
        f"{_PROCEDURE}::test_i5_a_claim_is_taken_back_where_it_was_thawed_before_we_did",
        1,
        thaw_not_looked_at,
        "AssertionError",
    ),
    Plant(
        "marker-after-the-deadline",
        "a marker claims more than a crash after the deadline",
        f"{_PROCEDURE}::test_i5_a_marker_after_the_deadline_claims_nothing",
        1,
        marker_after_the_deadline,
        "AssertionError",
    ),
    Plant(
        "frozen-in-any-order",
        "a filesystem is frozen before what lies in its files",
        f"{_PROCEDURE}::test_what_lies_deeper_is_frozen_first_and_thawed_last",
        1,
        frozen_in_any_order,
        "freeze fs",
    ),
    Plant(
        "watchdog-ends-with-its-master",
        "a freeze under way at a death is never thawed",
        f"{_WATCHDOG}::test_the_watchdog_thaws_at_once_when_who_freezes_dies_and_until_its_last_freeze_is_over",
        1,
        watchdog_ends_with_its_master,
        "the second thaw|is_alive|not gone yet",
    ),
    Plant(
        "watchdog-without-a-deadline",
        "the watchdog waits for ever",
        f"{_WATCHDOG}::test_the_watchdog_thaws_at_the_deadline_and_never_before",
        1,
        watchdog_without_a_deadline,
        "the thaw",
    ),
    Plant(
        "no-post-hooks",
        "post hooks do not run after a failure",
        f"{_PROCEDURE}::test_after_a_pre_hook_that_fails_nothing_is_frozen_and_every_post_hook_runs",
        1,
        no_post_hooks_after_a_failure,
        "post-40",
    ),
    Plant(
        "hooks-of-anybody",
        "a hook that others can write runs",
        "tests/t1_unit/test_hooks.py::test_a_hook_that_others_can_write_is_refused_when_added_and_when_run",
        1,
        hooks_of_anybody,
        "DID NOT RAISE",
    ),
    Plant(
        "last-word-for-any-point",
        "a later record renames a point",
        "tests/t1_unit/test_catalog.py::test_i5_a_last_word_completes_its_point_once_and_makes_none",
        1,
        last_word_for_any_point,
        "AssertionError",
    ),
    Plant(
        "frozen-by-somebody-else",
        "what somebody else froze is taken for ours",
        f"{_PROCEDURE}::test_a_freeze_that_fails_on_the_second_of_three_thaws_the_first",
        1,
        frozen_by_somebody_else_is_ours,
        "AssertionError",
    ),
)
