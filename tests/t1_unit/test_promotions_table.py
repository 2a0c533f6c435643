"""What hosts answer makes of a promotion: nobody writes before all are ready, nobody is let go before all have
written."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asrfs.model.machine import DiskRecord
from asrfs.protocol.messages import Promoted
from replica_store.vault.operations import ChosenPoint
from replica_store.vault.promoting import answered, expired, wanted_of, without
from replica_store.vault.promotions import PromotedMachine, Promotion, is_sound

ID, A, B = "f" * 32, "a" * 32, "b" * 32
DISK = DiskRecord(slot=0, id="d" * 32, name="data", size_bytes=4096)


def of(machine_id: str, name: str) -> PromotedMachine:
    point = ChosenPoint(selector="good", lsn=5, epoch=1, time_ns=1)
    return PromotedMachine(machine_id=machine_id, machine=name, point=point, records=(DISK,), boot=b"")


BEGUN = Promotion(
    id=ID,
    target="shop",
    selector="good",
    group="shop",
    state="preparing",
    machines=(of(A, "a"), of(B, "b")),
    begun_ns=1,
    until_ns=100,
    generation=1,
)


def told(promotion: Promotion, machine_id: str, outcome: Any, lsn: int = 0, **fields: Any) -> Promotion:
    word = Promoted(id=ID, outcome=outcome, lsn=lsn, **fields)
    after = answered(promotion, machine_id, word, 50, 9)
    assert is_sound(after)
    return after


def wants(promotion: Promotion) -> list[str | None]:
    words = [wanted_of(promotion, member) for member in promotion.machines]
    return [None if word is None else word.wanted for word in words]


def ready() -> Promotion:
    return told(told(BEGUN, A, "ready", 10), B, "ready", 20)


def written() -> Promotion:
    return told(told(ready(), A, "written", 30, bytes_written=7), B, "written", 40)


def test_members_go_together_step_by_step() -> None:
    assert wants(BEGUN) == ["prepare", "prepare"]
    one = told(BEGUN, A, "ready", 10)
    assert (one.state, wants(one)) == ("preparing", ["prepare", "prepare"]), "nobody writes before all are ready"
    both = told(one, B, "ready", 20)
    assert (both.state, wants(both)) == ("writing", ["write", "write"])
    assert [each.before_lsn for each in both.machines] == [10, 20]
    half = told(both, A, "written", 30, bytes_written=7)
    assert (half.state, wants(half)) == ("writing", ["write", "write"]), "nobody is let go before all have written"
    done = told(half, B, "written", 40)
    assert (done.state, wants(done)) == ("releasing", ["release", "release"])
    assert [(each.end_lsn, each.bytes_written) for each in done.machines] == [(30, 7), (40, 0)]
    freed = told(done, B, "released")
    assert (freed.state, wants(freed), freed.is_over) == ("releasing", ["release", None], False)
    over = told(freed, A, "released")
    assert (over.state, wants(over), over.is_over) == ("done", [None, None], True)
    assert [each.state for each in over.causes] == ["writing", "releasing", "done"]


def test_what_one_cannot_none_does() -> None:
    failed = told(told(BEGUN, A, "ready", 10), B, "failed", exit_code=4, error="disk data is attached")
    assert (failed.state, wants(failed), failed.is_over) == ("cancelled", ["take-back", None], False)
    assert (failed.machines[1].error, failed.machines[1].exit_code) == ("disk data is attached", 4)
    assert told(failed, A, "ready", 12) == failed, "it is too late"
    back = told(failed, A, "taken-back")
    assert back.is_over and wants(back) == [None, None]
    alone = told(BEGUN, A, "taken-back")
    assert alone.state == "cancelled" and wants(alone) == [None, "take-back"]


def test_time_is_up_for_what_nobody_was_told_to_write() -> None:
    assert expired(BEGUN, 99) == BEGUN
    late = expired(BEGUN, 100)
    assert (late.state, wants(late)) == ("cancelled", ["take-back", "take-back"])
    assert expired(ready(), 100) == ready() and expired(written(), 100) == written()


def test_what_fails_while_disks_are_written_is_noted_and_goes_on() -> None:
    failed = told(ready(), A, "failed", exit_code=5, error="a frame is damaged")
    assert (failed.state, wants(failed)) == ("writing", ["write", "write"])
    assert failed.machines[0].error == "a frame is damaged" and not failed.machines[0].is_back
    assert told(failed, A, "written", 30).machines[0].error is None
    assert told(ready(), A, "taken-back") == ready(), "it hears `write` when it is there, and prepares again"


@pytest.mark.parametrize("lsn", [0, 51])
def test_i5_a_claim_that_cannot_be_is_not_believed(lsn: int) -> None:
    assert told(BEGUN, A, "ready", lsn).state == "cancelled"
    after = told(ready(), A, "written", lsn)
    assert after.machines[0].end_lsn is None and "LSN 50 is here" in str(after.machines[0].error)


@pytest.mark.parametrize("outcome", ["ready", "written", "released", "taken-back", "failed"])
def test_what_is_said_again_changes_nothing(outcome: Any) -> None:
    over = told(told(written(), A, "released"), B, "released")
    assert told(over, A, outcome, 45) == over
    for state in (ready(), written()):
        once = told(state, A, outcome, 45)
        assert told(once, A, outcome, 45) == once


def left(promotion: Promotion, machine_id: str) -> Promotion:
    after = without(promotion, machine_id, 9, "it was failed over for good")
    assert is_sound(after) and without(after, machine_id, 10, "once more") == after
    return after


def test_who_is_failed_over_is_asked_nothing_more_and_kept_waiting_for_by_nobody() -> None:
    early = left(told(BEGUN, A, "ready", 10), B)
    assert (early.state, wants(early)) == ("cancelled", ["take-back", None]), "not all can go back any more"
    half = left(told(ready(), A, "written", 30), B)
    assert (half.state, wants(half)) == ("releasing", ["release", None])
    done = told(half, A, "released")
    assert (done.state, done.is_over) == ("done", True)
    assert done.machines[1].error == "it was failed over for good" and done.machines[1].end_lsn is None
    writing = left(ready(), B)
    assert (writing.state, wants(writing)) == ("writing", ["write", None])
    assert told(writing, B, "written", 40) == writing, "what its host says is of a side that ended"
    assert wants(told(writing, A, "written", 30)) == ["release", None]
    both = left(writing, A)
    assert (both.state, wants(both), both.is_over) == ("cancelled", [None, None], True)
    freed = left(told(written(), A, "released"), B)
    assert (freed.state, freed.is_over) == ("done", True)
    assert wants(left(written(), B)) == ["release", None]
    over = left(left(early, A), A)
    assert over.is_over and without(over, A, 11, "") == over and without(BEGUN, "c" * 32, 9, "") == BEGUN


def begun(promotion: Promotion) -> Promotion:
    """Each host is told to write, as `begin_attempt` notes it."""
    for member in promotion.machines:
        changed = msgspec.structs.replace(member, attempt=member.attempt + member.is_untouched)
        promotion = promotion.with_member(changed)
    return promotion


def attempts(promotion: Promotion) -> list[int]:
    return [each.attempt for each in promotion.machines]


def test_who_is_told_to_write_may_have_begun_until_he_says_of_that_very_attempt_that_he_has_not() -> None:
    assert not any(each.is_untouched for each in BEGUN.machines), "that is for who writes"
    assert all(each.is_untouched for each in ready().machines), "nobody was told"
    writing = begun(ready())
    assert attempts(writing) == [1, 1] and not any(each.is_untouched for each in writing.machines)
    failed = told(writing, A, "failed", exit_code=4, error="in use", attempt=1)
    assert [each.is_untouched for each in failed.machines] == [True, False]
    again = begun(failed)
    assert attempts(again) == [2, 1]
    assert [each.is_untouched for each in again.machines] == [False, False] and again.machines[0].error == "in use"
    assert not told(again, A, "failed", exit_code=4, error="in use", attempt=1).machines[0].is_untouched, "of before"
    assert not told(again, A, "failed", exit_code=5, error="a frame is damaged").machines[0].is_untouched
    on = told(again, A, "failed")
    assert (on.machines[0].error, on.machines[0].exit_code, on.machines[0].is_untouched) == (None, 0, False)
    assert not told(again, A, "written", 30).machines[0].is_untouched
    of_before = ready().with_member(of(A, "a")).with_member(of(B, "b"))
    assert not any(each.is_untouched for each in told(of_before, A, "failed", error="in use").machines), "uncounted"
