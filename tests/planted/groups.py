"""Bugs of points of groups: a cut that is none, a hold that does not hold, a list that shows what is not a point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest

from asrfs.consistency import cut as cut_room
from asrfs.consistency.cut import Cut, Phase
from asrfs.consistency.group_coordinator import GroupCoordinator
from asrfs.consistency.group_share import _HOLD_SLACK_S, GroupShare
from asrfs.consistency.group_stream import GroupStream
from asrfs.consistency.scheduled_points import ScheduledPoints
from asrfs.daemon.group_instants import GroupInstants
from asrfs.format.record import Kind
from asrfs.journal.hold import Held, WriteHold
from asrfs.journal.writer import Journal
from asrfs.model.machine import NO_SLOT
from asrfs.model.marker import MarkerRecord
from asrfs.protocol.group_messages import Word
from asrfs.storage.interface import Bytes
from replica_store.vault import cuts as cuts_room
from replica_store.vault import listing as listing_room
from replica_store.vault.cuts import ConfirmationRow, HasShare
from tests.planted import Plant

HOLD = "tests/t1_unit/test_write_hold.py::"
CUT = "tests/t1_unit/test_group_cut.py::"
LIST = "tests/t1_unit/test_groups_of_a_vault.py::"
SIM = "tests/t4_sim/test_groups.py::"
ATTENTION = "tests/t4_sim/test_group_attention.py::"


def barrier_without_drain(patch: pytest.MonkeyPatch) -> None:
    """The marker is appended, and new changes are stopped afterwards: what is in flight comes behind the marker."""
    sound = WriteHold.begin

    def begin(self: WriteHold, hold_id: str, marker: Bytes, seconds_max: float, not_after: float | None = None) -> Held:
        with self._journal.lock:
            self._journal.append_locked(int(Kind.MARKER), NO_SLOT, 0, 0, marker)
            lsn = self._journal.appended_lsn
        time.sleep(0.01)  # sleep: in which requests come
        held = sound(self, hold_id, marker, seconds_max, not_after)
        return held._replace(lsn=lsn)

    patch.setattr(WriteHold, "begin", begin)


def turns_are_not_held(patch: pytest.MonkeyPatch) -> None:
    """The bar is looked at for each record by itself, and not for those of a turn."""
    sound = Journal.append_framed_locked

    def append(self: Journal, writes: object) -> int | None:
        barred, self.barred = self.barred, None
        try:
            return sound(self, writes)  # type: ignore[arg-type]
        finally:
            self.barred = barred

    patch.setattr(Journal, "append_framed_locked", append)


def discards_are_not_held(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("asrfs.journal.hold.CHANGES", frozenset((Kind.WRITE, Kind.ZERO)))


def late_release_counts(patch: pytest.MonkeyPatch) -> None:
    """Whoever is still holding when RELEASE comes was holding, whatever the clock says."""
    sound = WriteHold._release_locked
    patch.setattr(WriteHold, "_release_locked", lambda self, *, in_time: sound(self, in_time=True))


def nobody_looks_at_an_armed_hold(patch: pytest.MonkeyPatch) -> None:
    """The thread of the deadline is believed to look soon, and sleeps on."""
    sound = WriteHold.arm

    def arm(self: WriteHold, hold_id: str, marker: Bytes, seconds_max: float, not_after: float | None = None) -> None:
        sound(self, hold_id, marker, seconds_max, not_after)
        time.sleep(0.01)  # sleep: in which the thread goes to its rest
        self._looks_at = 0.0

    patch.setattr(WriteHold, "_round_s", lambda self: 60.0)
    patch.setattr(WriteHold, "arm", arm)


def unknown_hold_counts(patch: pytest.MonkeyPatch) -> None:
    """A disk server that knows nothing of a hold takes it for one that was kept."""
    sound = WriteHold.release
    patch.setattr(WriteHold, "release", lambda self, hold_id: sound(self, hold_id)._replace(holding=True))


def kept_out_of_order(patch: pytest.MonkeyPatch) -> None:
    sound = WriteHold.keep

    def keep(self: WriteHold, request: Callable[[], None], size: int) -> bool:
        kept = sound(self, request, size)
        if kept:
            with self._journal.lock:
                self._kept.rotate(1)
        return kept

    patch.setattr(WriteHold, "keep", keep)


def release_before_all_are_ready(patch: pytest.MonkeyPatch) -> None:
    """The first that is ready is enough."""
    sound = Cut._go_on

    def go_on(self: Cut, now: float) -> cut_room.Said:
        if self.phase is Phase.PREPARING and self._lsns:
            self._parts = {
                member: cut_room._Part.READY if part is not cut_room._Part.OUT else part
                for member, part in self._parts.items()
            }
        return sound(self, now)

    patch.setattr(Cut, "_go_on", go_on)


def write_after_release_counts(patch: pytest.MonkeyPatch) -> None:
    """Who says that it had let go is in the point all the same."""
    sound = Cut.hear

    def hear(self: Cut, member: str, word: cut_room.Word, now: float) -> cut_room.Said:
        if isinstance(word, cut_room.Released):
            word = cut_room.Released(point=word.point, holding=True, hold_ms=word.hold_ms)
        return sound(self, member, word, now)

    patch.setattr(Cut, "hear", hear)


def late_members_hold_up_the_others(patch: pytest.MonkeyPatch) -> None:
    """A partial point waits for the last one until the others have let go."""
    sound = Cut._prepare

    def prepare(self: Cut, now: float) -> cut_room.Said:
        said = sound(self, now)
        self.wake_at = now + self.order.hold_s
        return said

    patch.setattr(Cut, "_prepare", prepare)


def share_says_it_held(patch: pytest.MonkeyPatch) -> None:
    """A member answers that it was holding without asking the disk server's word."""
    sound = GroupShare._let_go

    async def let_go(self: GroupShare, point: str) -> tuple[bool, float]:
        _, hold_ms = await sound(self, point)
        return True, hold_ms

    patch.setattr(GroupShare, "_let_go", let_go)


def lets_go_when_ready(patch: pytest.MonkeyPatch) -> None:
    """A member holds until it is ready itself, not until all are."""
    share_says_it_held(patch)
    sound = GroupShare._hear

    async def hear(self: GroupShare, seconds_max: float) -> Word | None:
        if seconds_max == self._first.hold_s + _HOLD_SLACK_S:
            await self._server.release(self._first.point, 0.0)
        return await sound(self, seconds_max)

    patch.setattr(GroupShare, "_hear", hear)


def shares_are_points(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listing_room, "listed", lambda points, _confirmations, _has_share: list(points))


def confirmed_is_enough(patch: pytest.MonkeyPatch) -> None:
    """A confirmed share is listed although those of others are not here yet."""
    sound = cuts_room.real_points
    patch.setattr(cuts_room, "real_points", lambda rows, _has_share: sound(rows, lambda *_: True))


def anybody_confirms(patch: pytest.MonkeyPatch) -> None:
    def real(confirmations: list[ConfirmationRow], has_share: HasShare) -> dict[str, ConfirmationRow]:
        return {
            row.marker.group_point or "": row
            for row in confirmations
            if all(has_share(each.machine, each.lsn, row.marker.group_point or "") for each in row.marker.confirms)
        }

    patch.setattr(cuts_room, "real_points", real)


_RED = "AssertionError|Failed|TimeoutError|assert "


def shares_keep_their_claim(patch: pytest.MonkeyPatch) -> None:
    """What comes out after the marker, that a hook had let go or who froze had died, is told nobody."""

    async def say_last(self: GroupInstants, word: MarkerRecord) -> None:
        return

    patch.setattr(GroupInstants, "_say_last", say_last)


def groups_begin_their_schedule_anew(patch: pytest.MonkeyPatch) -> None:
    """At each start of the coordinator's agent, however long the last point is ago."""
    sound = ScheduledPoints.run

    async def run(self: ScheduledPoints, ages_s: object) -> None:
        await sound(self, {})

    patch.setattr(ScheduledPoints, "run", run)


def attends_to_the_late(patch: pytest.MonkeyPatch) -> None:
    """Whatever the moment at which they are given up, which no task can do meanwhile."""
    sound = GroupCoordinator._attend

    def attend(self: GroupCoordinator, seconds_max: float) -> None:
        if (cut := self._cut) is None:
            return
        wake_at, cut.wake_at = cut.wake_at, math.inf
        try:
            sound(self, seconds_max)
        finally:
            cut.wake_at = min(cut.wake_at, wake_at)

    patch.setattr(GroupCoordinator, "_attend", attend)


def attends_to_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A connection at its end is looked at again and again."""
    sound = GroupStream.attend_at_hand

    def attend_at_hand(self: GroupStream) -> bool:
        sound(self)
        return True

    patch.setattr(GroupStream, "attend_at_hand", attend_at_hand)


def _plant(name: str, text: str, level: str, apply: Callable[[pytest.MonkeyPatch], None], shows: str = _RED) -> Plant:
    return Plant(name, text, level, 1, apply, shows)


PLANTS = (
    _plant(
        "barrier-without-drain",
        "writes in flight come behind the marker",
        HOLD + "test_nothing_is_acknowledged_behind_a_marker_while_it_is_held",
        barrier_without_drain,
    ),
    _plant(
        "hold-not-of-turns",
        "writes of a turn are not held",
        HOLD + "test_writes_of_a_turn_are_held_together",
        turns_are_not_held,
    ),
    _plant(
        "hold-not-of-discards",
        "discards are not held",
        HOLD + "test_what_changes_behind_the_marker_is_refused_until_the_release",
        discards_are_not_held,
        "DID NOT RAISE",
    ),
    _plant(
        "late-release-counts",
        "a release behind the deadline counts as held",
        HOLD + "test_a_release_behind_the_deadline_does_not_count_even_when_nothing_let_go_before",
        late_release_counts,
    ),
    _plant(
        "armed-hold-unwatched",
        "an armed hold outlasts its deadline",
        HOLD + "test_an_armed_hold_ends_at_its_deadline_too_though_nobody_is_woken_when_it_begins",
        nobody_looks_at_an_armed_hold,
    ),
    _plant(
        "unknown-hold-counts",
        "a disk server that died counts as holding",
        HOLD + "test_a_hold_that_is_not_known_is_not_held",
        unknown_hold_counts,
    ),
    _plant(
        "kept-out-of-order",
        "held writes are done out of order",
        HOLD + "test_held_writes_are_answered_after_the_release_and_in_order",
        kept_out_of_order,
    ),
    _plant(
        "release-before-all-ready",
        "RELEASE is said when one is ready",
        CUT + "test_release_is_said_to_all_when_the_last_is_ready_and_to_none_before",
        release_before_all_are_ready,
    ),
    _plant(
        "write-after-release-counts",
        "a member that had let go is in the point",
        CUT + "test_who_had_let_go_is_not_in_the_point",
        write_after_release_counts,
    ),
    _plant(
        "late-member-holds-up",
        "partial points wait until the others have let go",
        CUT + "test_partial_points_give_up_the_late_while_the_others_still_hold",
        late_members_hold_up_the_others,
    ),
    _plant(
        "share-says-it-held",
        "a member does not ask whether it was holding",
        SIM + "test_a_member_that_lets_go_early_is_never_in_a_point",
        share_says_it_held,
    ),
    _plant(
        "sim-lets-go-when-ready",
        "a member lets go when it is ready itself",
        SIM + "test_no_effect_without_its_cause_in_two_hundred_points[4]",
        lets_go_when_ready,
        "its cause",
    ),
    _plant(
        "shares-keep-their-claim",
        "a share claims a quiet that did not last",
        "tests/t4_sim/test_group_instants.py::test_a_share_whose_quiet_did_not_last_claims_nothing",
        shares_keep_their_claim,
        "ValueError",
    ),
    _plant(
        "group-schedule-begins-anew",
        "an agent that lives for less than the interval cuts no point of its group on schedule",
        SIM + "test_a_schedule_goes_on_where_it_was_when_the_coordinator_starts_again",
        groups_begin_their_schedule_anew,
    ),
    _plant(
        "shares-are-points",
        "shares that nobody confirmed are listed",
        LIST + "test_i5_shares_that_nobody_confirmed_are_points_nowhere",
        shares_are_points,
    ),
    _plant(
        "confirmed-is-enough",
        "a group's point is listed for some before it is for all",
        LIST + "test_i5_shares_are_listed_for_all_at_once_whatever_comes_last",
        confirmed_is_enough,
    ),
    _plant(
        "anybody-confirms",
        "a machine that is no member makes a point",
        LIST + "test_i5_who_is_no_member_confirms_nothing",
        anybody_confirms,
    ),
    _plant(
        "attends-to-the-late",
        "a coordinator attends to members that should have been given up",
        ATTENTION + "test_nobody_is_waited_for_beyond_the_moment_at_which_the_late_are_given_up",
        attends_to_the_late,
        "beyond the moment at which they are given up",
    ),
    _plant(
        "attends-to-the-dead",
        "a coordinator turns in a circle over a connection that has ended",
        ATTENTION + "test_a_connection_that_ends_is_looked_at_once",
        attends_to_the_dead,
        "it was looked at",
    ),
)
