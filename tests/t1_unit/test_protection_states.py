"""The table of protection states: every legal path, every pair of state and event that is none, and what is said."""

from __future__ import annotations

from itertools import product

import pytest

from asrfs.errors import RefusedError
from asrfs.model.protection_states import (
    TRANSITIONS,
    ProtectionEvent,
    ProtectionState,
    allowed,
    next_state,
)

LEGAL = """
unprotected          replicate           initial-replication
initial-replication  replicated          protected
initial-replication  give-up             initial-replication
initial-replication  unplanned-failover  failed-over
initial-replication  unprotect           unprotected
protected            replicate           initial-replication
protected            give-up             resync-required
protected            unplanned-failover  failed-over
protected            planned-failover    failed-over
protected            unprotect           unprotected
resync-required      give-up             resync-required
resync-required      resync              resyncing
resync-required      unplanned-failover  failed-over
resync-required      unprotect           unprotected
resyncing            give-up             resync-required
resyncing            healed              protected
resyncing            unplanned-failover  failed-over
resyncing            unprotect           unprotected
failed-over          change-point        failed-over
failed-over          cancel              protected
failed-over          commit              committed
committed            reprotect           reprotecting
committed            unprotect           unprotected
reprotecting         reprotected         protected
reprotecting         reprotect           reprotecting
reprotecting         unprotect           unprotected
"""
STEPS = {
    (ProtectionState(state), ProtectionEvent(event)): ProtectionState(following)
    for state, event, following in (line.split() for line in LEGAL.strip().splitlines())
}
ILLEGAL = [pair for pair in product(ProtectionState, ProtectionEvent) if pair not in STEPS]


@pytest.mark.parametrize(("pair", "following"), STEPS.items(), ids=lambda value: " ".join(map(str, value))[:60])
def test_a_legal_step_leads_where_the_page_says(
    pair: tuple[ProtectionState, ProtectionEvent], following: ProtectionState
) -> None:
    state, event = pair
    assert next_state(state, event, "db1") is following
    assert event in allowed(state)


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_everything_else_is_refused_with_state_event_and_what_is_allowed(
    state: ProtectionState, event: ProtectionEvent
) -> None:
    with pytest.raises(RefusedError) as refused:
        next_state(state, event, "db1")
    assert refused.value.exit_code == 4
    words = ", ".join(allowed(state))
    assert str(refused.value) == f"machine db1 is {state}: {event} is refused; allowed: {words}"


def test_each_state_is_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(ProtectionState)
    assert {event for events in TRANSITIONS.values() for event in events} == set(ProtectionEvent)
    reached = {following for events in TRANSITIONS.values() for following in events.values()}
    assert reached == set(ProtectionState)
    assert all(any(following is not state for following in events.values()) for state, events in TRANSITIONS.items())


def test_the_whole_circle_and_the_ways_out_of_commit_pending() -> None:
    def walk(*events: str) -> ProtectionState:
        state = ProtectionState.UNPROTECTED
        for event in events:
            state = next_state(state, ProtectionEvent(event), "db1")
        return state

    there = ("replicate", "replicated", "planned-failover", "commit", "reprotect", "reprotected")
    assert walk(*there) is ProtectionState.PROTECTED
    assert walk(*there, "planned-failover", "commit", "reprotect", "reprotected") is ProtectionState.PROTECTED
    assert walk(*there[:3], "change-point", "change-point", "cancel") is ProtectionState.PROTECTED
    with pytest.raises(RefusedError, match=r"^machine db1 is committed: cancel is refused"):
        walk(*there[:4], "cancel")
    with pytest.raises(RefusedError, match=r"^machine db1 is committed: commit is refused"):
        walk(*there[:4], "commit")
