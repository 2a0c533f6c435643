"""Bugs of planned failover: a promise not written down, a machine that runs twice, a claim that is believed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asrfs.daemon.agent_handover import FencedInstant
from asrfs.daemon.handing_over import Fencing, HandingOver
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.rejoining import Fence, Handed
from asrfs.protocol.messages import HandedOver
from asrfs.replication.comparer import Comparison
from asrfs.replication.outlet import Outlet
from asrfs.replication.rejoiner import Rejoiner
from replica_store.failover import actions
from replica_store.vault import handovers
from replica_store.vault.operations import HandoverAsked, Operation
from tests.planted import Plant

_HOST = "tests/t4_sim/test_handing_over.py::"
_STORE = "tests/t4_sim/test_planned_failover.py::"


def answered_in_memory(patch: pytest.MonkeyPatch) -> None:
    """What the store is told is not written down."""

    async def handed(self: Rejoiner, failover: str, handed: Handed) -> None:
        assert self.fence is not None
        self.fence = msgspec.structs.replace(self.fence, handed=handed)

    patch.setattr(Rejoiner, "handed", handed)


def fence_in_memory(patch: pytest.MonkeyPatch) -> None:
    """Who makes way does not write that down."""

    async def write_fence(self: Rejoiner, fence: Any) -> None:
        self.fence = fence

    patch.setattr(Rejoiner, "_write_fence", write_fence)


def marker_before_fence(patch: pytest.MonkeyPatch) -> None:
    """Guests write between the marker and the fence."""

    async def call(self: FencedInstant, failover: str, fence: Fencing) -> int:
        marker = MarkerRecord(id="a" * 32, name="handover")
        lsn, _ = await self._maker.mark(encode_marker(marker))
        await fence()
        return lsn

    patch.setattr(FencedInstant, "__call__", call)


def given_up_after_it_was_said(patch: pytest.MonkeyPatch) -> None:
    """A host whose store is away takes its machine back, whatever it has promised."""
    sound = Rejoiner.handed

    async def handed(self: Rejoiner, failover: str, handed: Handed) -> None:
        await sound(self, failover, handed)
        assert self.fence is not None
        self.fence = msgspec.structs.replace(self.fence, handed=None)

    patch.setattr(Rejoiner, "handed", handed)


def differences_overlooked(patch: pytest.MonkeyPatch) -> None:
    """What differs is handed over all the same."""
    patch.setattr(Comparison, "chunks_different", property(lambda self: 0))


def compared_without_a_fence(patch: pytest.MonkeyPatch) -> None:
    """The disk server is not told."""

    async def hand_over(self: Rejoiner, failover: str, why: str) -> None:
        await self._write_fence(Fence(epoch=self.progress.epoch, why=why, time_ns=0, handover=failover))

    patch.setattr(Rejoiner, "hand_over", hand_over)


def taken_back_after_commit(patch: pytest.MonkeyPatch) -> None:
    """A host that made way stays revocable when it was superseded."""
    sound = Rejoiner.superseded

    async def superseded(self: Rejoiner, why: str) -> bool:
        return self.fence is None and await sound(self, why)

    patch.setattr(Rejoiner, "superseded", superseded)


def store_away_is_no_matter(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the store is still there."""
    patch.setattr(Outlet, "is_open", property(lambda self: True))


def time_does_not_end(patch: pytest.MonkeyPatch) -> None:
    """Who cannot hand over tries for ever."""
    sound = HandingOver._within
    patch.setattr(HandingOver, "_within", lambda self, seconds_max, failover: sound(self, 1e9, failover))


def two_run_at_once(patch: pytest.MonkeyPatch) -> None:
    """A host is told to take its machine back while the recovered one still runs."""
    sound = handovers.wanted_of

    def wanted_of(found: Operation, now_ns: int) -> Any:
        return sound(msgspec.structs.replace(found, remains=False), now_ns)

    patch.setattr(handovers, "wanted_of", wanted_of)


def claims_believed(patch: pytest.MonkeyPatch) -> None:
    """Whatever a host says that it handed over is taken for here and equal."""

    def handed_over(
        before: Operation, asked: HandoverAsked, word: HandedOver, received_lsn: int, now_ns: int
    ) -> Operation:
        return msgspec.structs.replace(before, handover=msgspec.structs.replace(asked, lsn=word.lsn))

    patch.setattr(handovers, "_handed_over", handed_over)


def rows_believed(patch: pytest.MonkeyPatch) -> None:
    """A row that nobody sealed has a host stop writing."""
    patch.setattr(handovers, "sealed_operation", lambda vault, text: handovers.operation(vault.catalog, text))


def commit_over_a_host_that_goes_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(actions, "_check_host_rests", lambda found, epoch: None)


def nobody_cancels(patch: pytest.MonkeyPatch) -> None:
    """A handover whose command died holds the machine for ever."""
    sound = actions.cause_to_end

    def cause_to_end(found: Operation, now_ns: int) -> str | None:
        return None if found.handover is not None else sound(found, now_ns)

    patch.setattr(actions, "cause_to_end", cause_to_end)


def proof_of_another_point(patch: pytest.MonkeyPatch) -> None:
    """The newest LSN that is here is gone on from, whatever was handed over."""
    sound = actions.choose
    patch.setattr(
        actions,
        "choose",
        lambda vault, machine, selector, **more: sound(
            vault, machine, "lsn:1" if selector.startswith("lsn:") else selector, **more
        ),
    )


PLANTS = tuple(
    Plant(name, text, level, 1, apply, shows)
    for name, text, level, apply, shows in (
        (
            "handover-answer-in-memory",
            "what a host promised the store is forgotten when it dies",
            f"{_HOST}test_i2_i6_and_i8_killed_or_without_power_at_any_step",
            answered_in_memory,
            "I6: the store may have gone on",
        ),
        (
            "handover-fence-in-memory",
            "a host that makes way writes again when it was started anew",
            f"{_HOST}test_i2_i6_and_i8_killed_or_without_power_at_any_step",
            fence_in_memory,
            "compared while guests could write",
        ),
        (
            "handover-marker-before-fence",
            "guests write behind what is handed over",
            f"{_HOST}test_i6_fenced_before_the_marker_and_equal_before_it_is_said",
            marker_before_fence,
            "a guest wrote behind it|assert",
        ),
        (
            "handover-given-up-after-it-was-said",
            "a host takes its machine back although the store may have gone on",
            f"{_HOST}test_i6_fenced_before_the_marker_and_equal_before_it_is_said",
            given_up_after_it_was_said,
            "I6|only the store's word counts",
        ),
        (
            "handover-differences-overlooked",
            "disks that differ are handed over",
            f"{_HOST}test_what_differs_is_not_handed_over_and_the_host_writes_again",
            differences_overlooked,
            "handed-over",
        ),
        (
            "handover-fence-not-told",
            "the disk server does not hear of the fence",
            f"{_HOST}test_i6_fenced_before_the_marker_and_equal_before_it_is_said",
            compared_without_a_fence,
            "compared while guests could write|a guest wrote",
        ),
        (
            "handover-back-after-commit",
            "a host that handed over takes its machine back after the commit",
            f"{_HOST}test_i6_a_superseded_host_takes_nothing_back",
            taken_back_after_commit,
            "assert",
        ),
        (
            "handover-store-away",
            "a host whose store is away does not write again",
            f"{_HOST}test_i8_a_host_whose_store_went_away_writes_again_unless_it_has_said_that_it_will_not",
            store_away_is_no_matter,
            "assert",
        ),
        (
            "handover-without-end",
            "a host that cannot hand over never writes again",
            f"{_HOST}test_i8_a_host_that_cannot_hand_over_in_time_writes_again",
            time_does_not_end,
            "IndexError|assert",
        ),
        (
            "handover-two-at-once",
            "a host is told to write again while the recovered machine runs",
            f"{_STORE}test_i6_a_host_gets_its_machine_back_when_nobody_else_runs_it",
            two_run_at_once,
            "the store said",
        ),
        (
            "handover-claims-believed",
            "records that are not here are taken for handed over",
            f"{_STORE}test_i5_a_claim_that_cannot_be_is_not_believed",
            claims_believed,
            "assert",
        ),
        (
            "handover-rows-believed",
            "a row that nobody sealed has a host stop writing",
            f"{_STORE}test_a_row_that_was_never_sealed_stops_no_host",
            rows_believed,
            "assert",
        ),
        (
            "handover-commit-over-a-host",
            "commit although the host goes on since it handed over",
            f"{_STORE}test_i7_a_host_that_goes_on_by_itself_is_not_committed_away",
            commit_over_a_host_that_goes_on,
            "DID NOT RAISE",
        ),
        (
            "handover-nobody-cancels",
            "a handover whose command died holds its machine for ever",
            f"{_STORE}test_i8_what_nobody_carries_on_with_is_cancelled_in_time",
            nobody_cancels,
            "assert",
        ),
        (
            "handover-another-point",
            "another point than what was handed over is gone on from",
            f"{_STORE}test_what_was_handed_over_is_gone_on_from_and_nothing_is_lost",
            proof_of_another_point,
            "assert",
        ),
    )
)
