"""The states of a machine's protection and every step between them, as one table. PURE, shared by host, store and page.

    unprotected ─▶ initial-replication ─▶ protected ⇄ resync-required ─▶ resyncing ─▶ protected
                                              │
                 failed-over (commit pending) ◀── failover, from whatever has recovery points
                    │ cancel ─▶ protected           change-point stays
                    ▼ commit
                 committed ─▶ reprotecting ─▶ protected, in the other direction

An event that the table does not have is refused and changes nothing. Health (lag, achieved RPO, alarms) is derived and
never a state; a test failover is an object beside the machine, which is possible in every state and changes none. A
cancelled failover goes back to `protected`; what a gap then makes of that is an event of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from asrfs.errors import RefusedError


class ProtectionState(StrEnum):
    """Of a machine's protection, as it is printed."""

    UNPROTECTED = "unprotected"
    INITIAL_REPLICATION = "initial-replication"
    PROTECTED = "protected"
    RESYNC_REQUIRED = "resync-required"
    RESYNCING = "resyncing"
    FAILED_OVER = "failed-over"
    COMMITTED = "committed"
    REPROTECTING = "reprotecting"


class ProtectionEvent(StrEnum):
    """What happens to a machine or is asked for it."""

    REPLICATE = "replicate"
    """Its host has begun to send."""
    REPLICATED = "replicated"
    """All that the disks held before is at the store."""
    GIVE_UP = "give-up"
    """What was written and not acknowledged was given up, or the replica was found to differ."""
    RESYNC = "resync"
    """What differs is being sent."""
    HEALED = "healed"
    """The gap is closed."""
    UNPLANNED_FAILOVER = "unplanned-failover"
    PLANNED_FAILOVER = "planned-failover"
    """Nothing may be lost, so all must be at the store. Failback is one, too, in the other direction."""
    CHANGE_POINT = "change-point"
    CANCEL = "cancel"
    COMMIT = "commit"
    REPROTECT = "reprotect"
    REPROTECTED = "reprotected"
    """The other direction is whole."""
    UNPROTECT = "unprotect"
    """Nothing more is received of it, and its history no longer counts."""


_S, _E = ProtectionState, ProtectionEvent

TRANSITIONS: Mapping[ProtectionState, Mapping[ProtectionEvent, ProtectionState]] = {
    _S.UNPROTECTED: {
        _E.REPLICATE: _S.INITIAL_REPLICATION,
    },
    _S.INITIAL_REPLICATION: {
        _E.REPLICATED: _S.PROTECTED,
        _E.GIVE_UP: _S.INITIAL_REPLICATION,
        _E.UNPLANNED_FAILOVER: _S.FAILED_OVER,  # a disk that was added later is being sent: there are points before it
        _E.UNPROTECT: _S.UNPROTECTED,
    },
    _S.PROTECTED: {
        _E.REPLICATE: _S.INITIAL_REPLICATION,  # of a disk that was added with content
        _E.GIVE_UP: _S.RESYNC_REQUIRED,
        _E.UNPLANNED_FAILOVER: _S.FAILED_OVER,
        _E.PLANNED_FAILOVER: _S.FAILED_OVER,
        _E.UNPROTECT: _S.UNPROTECTED,
    },
    _S.RESYNC_REQUIRED: {
        _E.GIVE_UP: _S.RESYNC_REQUIRED,
        _E.RESYNC: _S.RESYNCING,
        _E.UNPLANNED_FAILOVER: _S.FAILED_OVER,
        _E.UNPROTECT: _S.UNPROTECTED,
    },
    _S.RESYNCING: {
        _E.GIVE_UP: _S.RESYNC_REQUIRED,
        _E.HEALED: _S.PROTECTED,
        _E.UNPLANNED_FAILOVER: _S.FAILED_OVER,
        _E.UNPROTECT: _S.UNPROTECTED,
    },
    _S.FAILED_OVER: {
        _E.CHANGE_POINT: _S.FAILED_OVER,
        _E.CANCEL: _S.PROTECTED,
        _E.COMMIT: _S.COMMITTED,
    },
    _S.COMMITTED: {
        _E.REPROTECT: _S.REPROTECTING,
        _E.UNPROTECT: _S.UNPROTECTED,
    },
    _S.REPROTECTING: {
        _E.REPROTECTED: _S.PROTECTED,
        _E.REPROTECT: _S.REPROTECTING,  # once more, to another place
        _E.UNPROTECT: _S.UNPROTECTED,
    },
}


def allowed(state: ProtectionState) -> tuple[ProtectionEvent, ...]:
    """The events that the state takes, in the order of the table."""
    return tuple(TRANSITIONS[state])


def next_state(state: ProtectionState, event: ProtectionEvent, machine: str) -> ProtectionState:
    """Where the event leads. Raises RefusedError naming machine, state, event, and what is allowed."""
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise RefusedError(f"machine {machine} is {state}: {event} is refused; allowed: {', '.join(allowed(state))}")
    return following
